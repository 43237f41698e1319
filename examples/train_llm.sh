#!/usr/bin/env bash
# Text to a trained language model on one machine with GPUs: examples/train_llm.sh CORPUS OUTPUT [FLAGS]
# CORPUS: a folder of .txt, .jsonl, .parquet files (also .gz), local or s3://. OUTPUT: a folder for everything made.
# FLAGS go to `train`: --resolve_configs true prints the run and does not start it.
# NUM_WORKERS may be set: tasks of preprocessing; 0: in one process, without Ray.
# For a first look on a laptop, use the quickstart: uv run vla-foundry quickstart --stages llm
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CORPUS OUTPUT [FLAGS]" >&2; exit 2; }
corpus=$1 output=$2
shift 2
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")

vla-foundry preprocess tokenizer --source "$corpus" --output "$output/tokenizer" --vocab_size 32000
vla-foundry preprocess text --source "$corpus" --output "$output/shards" --tokenizer "$output/tokenizer" --seq_len 2048 \
  --num_workers "${NUM_WORKERS:-null}"
vla-foundry manifest verify "$output/shards"
torchrun --standalone --nproc_per_node "$gpus" -m vla_foundry.main \
  --config_path config_presets/training_jobs/llm_11m.yaml --model.vocab_size 32000 \
  --data.dataset_manifest "$output/shards/manifest.jsonl" \
  --save_path "$output/runs" --name llm --resume auto "$@"
# then: vla-foundry generate --checkpoint OUTPUT/runs/llm --prompt "The"
