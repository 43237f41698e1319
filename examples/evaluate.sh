#!/usr/bin/env bash
# A policy against none at all, in a simulator: examples/evaluate.sh RUN OUTPUT [FLAGS]
# RUN: a policy's run folder. OUTPUT: results and a report. FLAGS go to `evaluate`: --tasks, --simulator, --num_workers.
# EPISODES (0:50) of each task may be set. A killed evaluation goes on when started again.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 RUN OUTPUT [FLAGS]" >&2; exit 2; }
run=$1 output=$2
shift 2
flags=(--tasks "drawer-open-v3@half,drawer-close-v3@half" --episodes "${EPISODES:-0:50}" --max_steps 200 --output "$output")

vla-foundry evaluate --checkpoint "$run" --name policy "${flags[@]}" "$@"
for baseline in "null" random; do
  vla-foundry evaluate --policy "$baseline" --name "$baseline" "${flags[@]}" "$@"
done
vla-foundry report "$output"
