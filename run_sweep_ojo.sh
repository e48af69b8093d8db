#!/usr/bin/env bash
# The sweep of sweep_config.json on ojo, in its container: ./run_sweep_ojo.sh help
set -euo pipefail
cd "$(dirname "$0")"
NODE=ojo
DEVICE=(--runtime nvidia) # a Jetson's runtime refuses --gpus
# Its GPU is only open to the groups of these files, video and render.
for file in /dev/nvmap /dev/dri/renderD*; do
  if [ -e "$file" ]; then DEVICE+=(--group-add "$(stat -c %g "$file")"); fi
done
# What a record says of the board and its power mode is read from these.
for file in /etc/nv_tegra_release /etc/nvpmodel.conf /var/lib/nvpmodel/status; do
  if [ -e "$file" ]; then DEVICE+=(-v "$file:$file:ro"); fi
done
# shellcheck source=harness/run_sweep.sh
. harness/run_sweep.sh
main "$@"
