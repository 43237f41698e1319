# %% [markdown]
# # From text to a robot policy: LLM, VLM, VLA
#
# About four minutes on two CPU cores. One command, `vla-foundry train`, trains all three stages; each starts from the checkpoint of
# the one before. Sizes here show the path and no more: `vla-foundry quickstart` runs the same commands for a quarter of an hour, and
# its policy opens drawers.

# %%
import os
import tempfile

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## 1. A language model
# Text: docstrings of the packages on this machine. A tokenizer is trained on it; then it is packed into WebDataset shards.

# %%
from pathlib import Path

from vla_foundry.quickstart.docstrings import harvest_docstrings

harvest_docstrings(Path("text"), packages=("numpy", "json"))

# %% magic_args="-e" language="bash"
# vla-foundry preprocess tokenizer --source text/train --output tokenizer --vocab_size 4096
# vla-foundry preprocess text --source text/train --output text_shards --tokenizer tokenizer --seq_len 128 --num_workers 0

# %% magic_args="-e" language="bash"
# vla-foundry train --config_path config_presets/training_jobs/llm_quickstart.yaml --name llm \
#     --data.dataset_manifest text_shards/manifest.jsonl --total_val_samples null --data.seq_len 128 --data.num_workers 0 \
#     --total_train_samples 320 --hparams.global_batch_size 16 --hparams.per_gpu_batch_size 16 --num_checkpoints 1

# %% magic_args="-e" language="bash"
# vla-foundry generate --checkpoint experiments/llm --prompt "Return the" --max_new_tokens 20

# %% [markdown]
# ## 2. A vision-language model
# Pictures of a simulated table with captions from its true state. The language model's weights come from the run above.

# %% magic_args="-e" language="bash"
# vla-foundry scenes --output scenes --num_scenes 300 --num_validation_scenes 16 --num_processes 1 \
#     --tasks drawer-open-v3,window-open-v3
# vla-foundry preprocess image_caption --source scenes/train --output scene_shards --num_workers 0
# vla-foundry train --config_path config_presets/training_jobs/vlm_quickstart.yaml --name vlm \
#     --data.dataset_manifest scene_shards/manifest.jsonl --total_val_samples null --data.num_workers 0 \
#     --model.transformer.resume_from_checkpoint experiments/llm --total_train_samples 480 --num_checkpoints 1 \
#     --log_every_n_steps 10

# %% magic_args="-e" language="bash"
# vla-foundry caption --checkpoint experiments/vlm --image scenes/validation/00000000.png --max_new_tokens 40

# %%
from IPython.display import Image

Image("scenes/validation/00000000.png", width=200)

# %% [markdown]
# ## 3. A vision-language-action model
# Demonstrations by a scripted expert, in the LeRobot format. The policy's backbone is the vision-language model; its head denoises
# a chunk of actions (flow matching).

# %% magic_args="-e" language="bash"
# vla-foundry demos --tasks drawer-open-v3@half --episodes 6 --cameras workspace --image_size 64 --num_workers 0 --output_dir demos
# vla-foundry preprocess robotics --type lerobot --source_episodes demos --field_map field_maps/metaworld.yaml \
#     --output_dir robot_shards --past_lowdim_steps 0 --future_lowdim_steps 7 --image_indices "[0]" \
#     --max_padding_right 7 --num_workers 0
# vla-foundry train --config_path config_presets/training_jobs/vla_quickstart.yaml --name vla \
#     --data.dataset_manifest robot_shards/manifest.jsonl --data.num_workers 0 \
#     --model.vision_language_backbone.resume_from_checkpoint experiments/vlm --total_train_samples 960 --num_checkpoints 1 \
#     --hparams.global_batch_size 48 --hparams.per_gpu_batch_size 48 --log_every_n_steps 5

# %% [markdown]
# ## 4. In closed loop
# Trained for seconds, it does not open the drawer yet; `contact_sheet.png` shows what it does.

# %% magic_args="-e" language="bash"
# vla-foundry evaluate --checkpoint experiments/vla --tasks drawer-open-v3@half --episodes 0:2 --max_steps 60 --output rollouts

# %%
Image("rollouts/vla/contact_sheet.png", width=600)
