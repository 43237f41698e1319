#!/usr/bin/env bash
# Captioned pictures and a language model to a vision-language model: examples/train_vlm.sh PICTURES LLM OUTPUT [FLAGS]
# PICTURES: a folder of pictures with captions beside them (a.png, a.txt), or a table, local or s3://. LLM: a run of
# train_llm.sh, in OUTPUT/runs/llm. OUTPUT: a folder for everything made. FLAGS go to `train`.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 PICTURES LLM OUTPUT [FLAGS]" >&2; exit 2; }
pictures=$1 llm=$2 output=$3
shift 3
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")

vla-foundry preprocess image_caption --source "$pictures" --output "$output/captions" --num_workers "${NUM_WORKERS:-null}"
torchrun --standalone --nproc_per_node "$gpus" -m vla_foundry.main \
  --config_path config_presets/training_jobs/vlm_quickstart.yaml --total_val_samples null \
  --model.transformer "include $llm/config_model.yaml" --model.transformer.resume_from_checkpoint "$llm" \
  --model.transformer.resume_weights_only true --data.dataset_manifest "$output/captions/manifest.jsonl" \
  --save_path "$output/runs" --name vlm --resume auto "$@"
# then: vla-foundry caption --checkpoint OUTPUT/runs/vlm --image PICTURE
