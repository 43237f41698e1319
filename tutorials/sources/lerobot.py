# %% [markdown]
# # Your LeRobot dataset to a policy
#
# About two minutes on two CPU cores. The dataset is recorded here, by a scripted expert in a simulator; put the path of your
# own, or `hf://datasets/OWNER/NAME`, in place of `recordings`. Training is stopped long before the policy is any good: a real
# one takes hours on a GPU, by the same commands.

# %%
import os
import tempfile

os.chdir(tempfile.mkdtemp())

# %% magic_args="-e" language="bash"
# vla-foundry demos --tasks drawer-open-v3@half --episodes 12 --cameras workspace,gripperPOV \
#     --image_size 96 --num_workers 0 --output_dir recordings
# ls recordings recordings/meta

# %% [markdown]
# ## Two config files
# `new-policy` reads what the dataset holds and writes two commented files: how recordings become shards, and how the policy is
# trained. `--backbone hf:NAME` would start from a Hugging Face model.

# %% magic_args="-e" language="bash"
# vla-foundry new-policy --dataset recordings --output my_policy 2> /dev/null
# sed -n '/^data:/,/^hparams:/p' my_policy/train.yaml

# %% [markdown]
# ## Shards
# Each frame is stored once; windows, relative actions and normalization are chosen when training starts.

# %% magic_args="-e" language="bash"
# vla-foundry preprocess robotics --config_path my_policy/preprocess.yaml --num_workers 0 2>&1 | grep samples

# %% [markdown]
# ## Look at the data before training
# The doctor draws samples as training would. Its exit code is 3 after a warning, so `|| true` here.

# %% language="bash"
# vla-foundry doctor --config_path my_policy/train.yaml || true

# %% magic_args="-e" language="bash"
# vla-foundry data inspect my_policy/shards/train --sample 60 --output sample.png

# %%
from IPython.display import Image

Image("sample.png", width=700)

# %% [markdown]
# ## Train
# `--total_train_samples` cuts the run short, and so do the smaller batches.

# %% magic_args="-e" language="bash"
# vla-foundry train --config_path my_policy/train.yaml --data.num_workers 0 --total_train_samples 160 --total_val_samples 16 \
#     --hparams.global_batch_size 16 --hparams.per_gpu_batch_size 16 --hparams.precision fp32 --log_every_n_steps 2 \
#     --num_checkpoints 1

# %% [markdown]
# ## Act
# `Policy` takes what a robot sees and measures, and returns an action in the units of the dataset. `vla-foundry serve` does the
# same over the network.

# %%
import numpy as np

from vla_foundry.inference import Policy, RobotObservation

policy = Policy.from_run("my_policy/runs/policy", device="cpu")
policy.reset(seed=0)
fields = {name: np.zeros(field.width, np.float32) for name, field in policy.observed.items()}
images = {camera.name: np.zeros((96, 96, 3), np.uint8) for camera in policy.cameras}
policy.act(RobotObservation(images=images, fields=fields, instruction="open the drawer"))

# %% [markdown]
# ## Where to go
# - Train without the cuts: `vla-foundry train --config_path my_policy/train.yaml`, or `torchrun` on several GPUs.
# - What can be set, and what each value means: `my_policy/train.yaml`, and `vla-foundry train --help data`.
# - Serve it to a robot: tutorial `serve_policy`, and docs/serving.md.
