#!/usr/bin/env bash
# Train, evaluate and report one configuration on this machine (DRY_RUN=1 prints the commands):
#   launch/local.sh experiments/configs/modit.py:size=demo,seeds=0+1+2 runs/three [--config.x=y ...]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
config="--config=$1" workdir="--workdir=$2" for=$1
shift 2
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" "$for"
run python -m experiments.run "$config" "$workdir" "$@"
run python -m experiments.evaluate "$config" "$workdir" "$@"
run python -m experiments.report "$workdir"
