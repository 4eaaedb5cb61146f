#!/usr/bin/env bash
# Train, evaluate and report one configuration on this machine:
#   launch/local.sh experiments/configs/modit.py:size=full,seeds=0+1+2 runs/full [--config.x=y ...]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
config="--config=$1" workdir="--workdir=$2"
shift 2
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" moses
python -m experiments.run "$config" "$workdir" "$@"
python -m experiments.evaluate "$config" "$workdir" "$@"
python -m experiments.report "$workdir"
