#!/usr/bin/env bash
# Train, evaluate and report one configuration on this machine:
#   launch/local.sh experiments/configs/modit.py:size=demo,seeds=0+1+2 runs/three [--config.x=y ...]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
config="--config=$1" workdir="--workdir=$2"
case "$1" in
*configs/r4t.py*) extra=fanout ;;
*data=fashion* | *data=streaming*) extra=text ;;
*) extra=moses ;;
esac
shift 2
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" "$extra"
python -m experiments.run "$config" "$workdir" "$@"
python -m experiments.evaluate "$config" "$workdir" "$@"
python -m experiments.report "$workdir"
