#!/usr/bin/env bash
# A policy from a few demonstrations, with captions beside them and without: examples/train_cotrained.sh QUICKSTART OUTPUT
# QUICKSTART: the folder of a finished `vla-foundry quickstart`. OUTPUT: a folder for everything made.
# SEED (1), EPISODES (12 demonstrations a task) and SAMPLES (30000 windows of robot data) may be set.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 QUICKSTART OUTPUT" >&2; exit 2; }
quickstart=$1 output=$2 seed=${SEED:-1} samples=${SAMPLES:-30000}
vlm=$quickstart/vlm/runs/vlm shards=$output/shards
tasks=drawer-open-v3@half,drawer-close-v3@half,window-open-v3@half,window-close-v3@half

[ -e "$vlm/config_model.yaml" ] || { echo "error: $vlm is no run; $quickstart must be a finished quickstart" >&2; exit 2; }
vla-foundry demos --tasks "$tasks" --episodes "${EPISODES:-12}" --output_dir "$output/demos"
vla-foundry preprocess robotics --type lerobot --source_episodes "$output/demos" --output_dir "$shards" \
  --field_map config_presets/field_maps/metaworld.yaml --past_lowdim_steps 0 --future_lowdim_steps 7 \
  --image_indices "[0]" --max_padding_left 0 --max_padding_right 7 --validation_fraction 0.1 --num_workers 0

# both see the same windows of robot data; four fifths of the mixture are such windows
both=(--save_path "$output/runs" --resume auto --hparams.seed "$seed" --data.seed "$seed"
  --model.vision_language_backbone.resume_from_checkpoint "$vlm")
vla-foundry train --config_path config_presets/training_jobs/vla_quickstart_cotrained.yaml --name "cotrained_$seed" \
  --data.datasets.robots.dataset_manifest "$shards/train/manifest.jsonl" \
  --data.datasets.robots.processor "$vlm/processor" \
  --data.datasets.captions.dataset_manifest "$quickstart/vlm/shards/train/manifest.jsonl" \
  --data.datasets.captions.processor "$vlm/processor" \
  --total_train_samples $((samples * 5 / 4)) "${both[@]}"
vla-foundry train --config_path config_presets/training_jobs/vla_quickstart.yaml --name "robots_only_$seed" \
  --data.dataset_manifest "$shards/train/manifest.jsonl" --data.processor "$vlm/processor" \
  --total_train_samples "$samples" "${both[@]}"
for name in "cotrained_$seed" "robots_only_$seed"; do
  vla-foundry evaluate --checkpoint "$output/runs/$name" --tasks "$tasks" --episodes "${TRIALS:-100:125}" \
    --max_steps 200 --output "$output/evaluation" --name "$name"
done
vla-foundry report "$output/evaluation"
