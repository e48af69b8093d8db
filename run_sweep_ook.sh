#!/usr/bin/env bash
# The sweep of sweep_config.json on ook, in its container: ./run_sweep_ook.sh help
set -euo pipefail
cd "$(dirname "$0")"
NODE=ook
DEVICE=(--gpus all)
# shellcheck source=harness/run_sweep.sh
. harness/run_sweep.sh
main "$@"
