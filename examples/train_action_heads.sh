#!/usr/bin/env bash
# Every action head on the data of a quickstart: examples/train_action_heads.sh QUICKSTART OUTPUT
# QUICKSTART: the folder of a finished `vla-foundry quickstart`. OUTPUT: a folder for everything made.
# HEADS (all), SEED (1), SAMPLES (30000) and EPISODES of each task (0:25) may be set.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 QUICKSTART OUTPUT" >&2; exit 2; }
quickstart=$1 output=$2 seed=${SEED:-1} jobs=config_presets/training_jobs
heads=${HEADS:-flow ddpm regression joint_attention insulated fast_tokens discrete_bins lora}
mkdir -p "$output"

for head in $heads; do
  job=$jobs/action_heads/$head.yaml flags=() tokenizer=$output/$head.json
  case $head in
    flow) job=$jobs/vla_quickstart.yaml ;;
    fast_tokens) flags=(--model.action_head.tokenizer "$tokenizer") ;;
    insulated) flags=(--model.action_tokens.tokenizer "$tokenizer") ;;
  esac
  flags+=(--data.dataset_manifest "$quickstart/vla/shards/train/manifest.jsonl"
    --model.vision_language_backbone.resume_from_checkpoint "$quickstart/vlm/runs/vlm")
  case $head in fast_tokens | insulated)
    vla-foundry data action-tokenizer --config_path "$job" "${flags[@]}" --output "$tokenizer" ;;
  esac
  vla-foundry train --config_path "$job" "${flags[@]}" --save_path "$output/runs" --name "${head}_$seed" --resume auto \
    --total_train_samples "${SAMPLES:-30000}" --hparams.seed "$seed" --data.seed "$seed"
  vla-foundry evaluate --checkpoint "$output/runs/${head}_$seed" --name "${head}_$seed" --output "$output/evaluation" \
    --tasks drawer-open-v3@half,drawer-close-v3@half,window-open-v3@half,window-close-v3@half \
    --episodes "${EPISODES:-0:25}" --max_steps 200
done
vla-foundry report "$output/evaluation"
