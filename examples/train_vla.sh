#!/usr/bin/env bash
# Demonstrations and a backbone to a policy: examples/train_vla.sh DATASET BACKBONE OUTPUT [FLAGS]
# DATASET: a LeRobot dataset (v2.0, v2.1, v3.0). BACKBONE: a run of train_vlm.sh, hf:Qwen/Qwen3-VL-2B-Instruct or another
# image-text model, or small. OUTPUT: a folder for everything made. FLAGS go to `train`.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 DATASET BACKBONE OUTPUT [FLAGS]" >&2; exit 2; }
dataset=$1 backbone=$2 output=$3
shift 3
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")

if [ -e "$output/train.yaml" ]; then
  echo "$output/train.yaml exists and is used; DATASET and BACKBONE are not. Give another OUTPUT for others." >&2
else
  vla-foundry new-policy --dataset "$dataset" --backbone "$backbone" --output "$output"
fi
vla-foundry preprocess robotics --config_path "$output/preprocess.yaml" --num_workers "${NUM_WORKERS:-null}"
torchrun --standalone --nproc_per_node "$gpus" -m vla_foundry.main --config_path "$output/train.yaml" --resume auto "$@"
# then: vla-foundry serve --checkpoint OUTPUT/runs/policy
