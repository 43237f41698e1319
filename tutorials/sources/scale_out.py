# %% [markdown]
# # Scale out: torchrun, Slurm, SageMaker, Ray
#
# About two minutes on two CPU cores. The same config trains on one process or on a cluster, and gives the same losses: the content
# of batch b is a function of b, whatever the number of ranks. What needs an account or a cluster is shown and not run.

# %%
import json
import os
import tempfile
from pathlib import Path

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## Data: a Ray job
# `preprocess` starts Ray on this machine, one worker per core, or joins a cluster: `--ray_address auto`. Its output is the same to
# the byte with any number of workers. `--num_workers 0` does without Ray, which is quicker for so little.

# %%
Path("text.jsonl").write_text(
    "".join(json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}. " * 8}) + "\n" for n in range(400))
)

# %% magic_args="-e" language="bash"
# vla-foundry preprocess tokenizer --source text.jsonl --output tokenizer --vocab_size 300
# vla-foundry preprocess text --source text.jsonl --output shards --tokenizer tokenizer --seq_len 64 --num_workers 0

# %% [markdown]
# ## One process, and two that share a batch
# `global_batch_size` is what counts; each of the two takes half of it. `--distributed.fsdp true` shards weights and optimizer
# (FSDP2); `--distributed.replicate_size N` does so within N groups (HSDP).

# %%
Path("train.yaml").write_text("""
model: {type: transformer, hidden_dim: 64, n_layers: 2, n_heads: 4, vocab_size: 300, max_seq_len: 64, norm_type: rms_norm}
data:
  type: text
  dataset_manifest: [shards/manifest.jsonl]
  seq_len: 64
  num_workers: 0
hparams: {global_batch_size: 8, per_gpu_batch_size: 4, precision: fp32, lr: 0.003, warmup: 2}
total_train_samples: 160
num_checkpoints: 2
log_every_n_steps: 5
wandb: false
""")

# %% magic_args="-e" language="bash"
# export OMP_NUM_THREADS=1
# vla-foundry train --config_path train.yaml --name alone
# torchrun --standalone --nproc_per_node 2 -m vla_foundry.main --config_path train.yaml --name sharded --distributed.fsdp true


# %%
def read_losses(run: str) -> list[float]:
    lines = map(json.loads, Path(f"experiments/{run}/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


for alone, sharded in zip(read_losses("alone"), read_losses("sharded"), strict=True):
    print(f"{alone:.6f} {sharded:.6f}")
    assert abs(alone - sharded) < 1e-4

# %% [markdown]
# ## Will it fit?
# `plan` predicts what each GPU holds, without one.

# %% magic_args="-e" language="bash"
# vla-foundry plan --config_path train.yaml --gpus 2 --gpu_memory 80

# %% [markdown]
# ## Interrupted
# A run that was stopped goes on from its newest whole checkpoint, on the same or on another number of processes, with
# `--resume auto`. SIGTERM, as a scheduler sends it, saves one first; `vla-foundry verify-resume` proves for a config that a killed
# run ends as one that was not.

# %% [markdown]
# ## Slurm
# `examples/slurm/` has scripts for one node, several nodes and arrays of evaluations; a preempted job is queued again and resumes:
# ```bash
# sbatch --nodes 4 examples/slurm/train.sbatch --config_path train.yaml --name my_run
# ```
#
# ## SageMaker
# The flags are those of training; `--dry_run true` prints the whole job and changes nothing (needs `uv sync --group sagemaker` and
# credentials):
# ```bash
# uv run --group sagemaker sagemaker/launch_training.py --config_path train.yaml --sagemaker.user me \
#     --sagemaker.instance_type p5.48xlarge --sagemaker.instance_count 4 --sagemaker.dry_run true
# ```
#
# ## Ray
# `examples/ray/` describes a cluster on AWS for preprocessing and rollouts: `vla-foundry preprocess ... --ray_address auto`,
# `vla-foundry evaluate ... --cluster auto`. docs/launching.md says the rest.
