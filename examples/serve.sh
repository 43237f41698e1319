#!/usr/bin/env bash
# A policy behind a server, and a simulated robot that asks it for actions: examples/serve.sh RUN OUTPUT
# RUN: a policy's run folder. OUTPUT: results. PORT (50051), TASK, EPISODES and STEPS may be set. A real robot's loop: docs/serving.md
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 RUN OUTPUT" >&2; exit 2; }
run=$1 output=$2 port=${PORT:-50051}

if (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "error: port $port is in use, and another policy might answer. Set PORT." >&2
  exit 2
fi
vla-foundry serve --checkpoint "$run" --port "$port" --websocket_port null &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || exit 2
  sleep 1
done
vla-foundry evaluate --policy_server "127.0.0.1:$port" --name served --tasks "${TASK:-drawer-open-v3@half}" \
  --episodes "${EPISODES:-0:10}" --max_steps "${STEPS:-200}" --output "$output"
