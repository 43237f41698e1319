#!/usr/bin/env bash
# A run that was killed goes on; or its weights start another run: examples/resume.sh RUN [NEW_NAME] [FLAGS]
# RUN: a run folder. Without NEW_NAME it goes on from its newest intact checkpoint, on as many GPUs as this machine has.
# With NEW_NAME its weights start a run of that name. FLAGS go to `train`.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 RUN [NEW_NAME] [FLAGS]" >&2; exit 2; }
run=$1
shift
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
train=(torchrun --standalone --nproc_per_node "$gpus" -m vla_foundry.main --config_path "$run/config.yaml")

case "${1:---}" in
  --*) "${train[@]}" --resume auto "$@" ;;
  *) "${train[@]}" --name "$1" --model.resume_from_checkpoint "$run" --model.resume_weights_only true "${@:2}" ;;
esac
