#!/usr/bin/env bash
# Recordings of a robot to shards, and a look at one sample: examples/preprocess_robotics.sh TYPE RECORDINGS OUTPUT [FLAGS]
# TYPE: lerobot, hdf5 or spartan. RECORDINGS, OUTPUT: folders, local or s3://. FLAGS go to `preprocess robotics`.
# NUM_WORKERS may be set: tasks of preprocessing; 0: in one process, without Ray. PICTURES (.): a folder for the pictures.
# Without recordings, make some: examples/preprocess_robotics.sh demos OUTPUT records two tasks in a simulator.
set -euo pipefail
usage() { echo "usage: $0 TYPE RECORDINGS OUTPUT [FLAGS] | $0 demos OUTPUT" >&2; exit 2; }

if [ "${1:-}" = demos ]; then
  [ $# -eq 2 ] || usage
  vla-foundry demos --tasks drawer-open-v3,button-press-topdown-v3 --episodes "${EPISODES:-20}" \
    --cameras workspace,gripperPOV --image_size 96 --output_dir "$2/demos"
  set -- lerobot "$2/demos" "$2/shards" --field_map field_maps/metaworld.yaml
fi
[ $# -ge 3 ] || usage
type=$1 recordings=$2 output=$3
shift 3

# a tenth of the episodes is held out; a killed run goes on where it was
vla-foundry preprocess robotics --type "$type" --source_episodes "$recordings" --output_dir "$output" \
  --validation_fraction 0.1 --num_workers "${NUM_WORKERS:-null}" "$@"
for part in train validation; do
  vla-foundry manifest verify "$output/$part"
  vla-foundry data inspect "$output/$part" --sample 0 --output "${PICTURES:-.}/$part.png"
done
