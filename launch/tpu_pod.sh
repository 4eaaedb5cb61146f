#!/usr/bin/env bash
# Train, evaluate and report one configuration on a TPU pod slice, one process per worker, the report on worker 0.
# CHECKOUT is this repository on a file system that all workers mount (Filestore, say); WORKDIR is inside it or
# absolute. DRY_RUN=1 prints the commands:
#   TPU=NAME ZONE=us-central2-b CHECKOUT=/mnt/genret launch/tpu_pod.sh CONFIG WORKDIR [--config.x=y ...]
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${CHECKOUT:-}" ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
config="--config=$1" workdir="--workdir=$2" for=$1
shift 2
# shellcheck source=launch/dry_run.sh
. "$(dirname "$0")/dry_run.sh"
on() { # WORKERS COMMAND...: in the checkout, with the environment that worker 0 has made
  local workers=$1 words
  shift
  printf -v words '%q ' "$@"
  run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$workers" \
    --command="cd ${CHECKOUT@Q} && GENRET_PREEMPTED=75 PATH=\$PWD/.venv/bin:\$PATH ${words% }"
}
on 0 bash -euc '. launch/environment.sh "$@"' install "$for" tpu
on all python -m experiments.run --multihost "$config" "$workdir" "$@"
on all python -m experiments.evaluate --multihost "$config" "$workdir" "$@"
on 0 python -m experiments.report "$workdir"
