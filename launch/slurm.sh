#!/usr/bin/env bash
# Train, evaluate and report one configuration on a SLURM allocation, one task per GPU, as JAX expects it there.
# From a checkout on a file system that all nodes share; sbatch's options go first (DRY_RUN=1 prints the commands):
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh CONFIG WORKDIR [--config.x=y ...]
# ACCELERATOR (cuda) is the extra to install beside the configuration's own; with "" it runs on CPUs.
#SBATCH --job-name=genret
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
config="--config=$1" workdir="--workdir=$2" for=$1
shift 2
# sbatch runs a copy of this script from its spool, and starts in the folder it was called from.
# shellcheck source=launch/environment.sh
. "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch/environment.sh" "$for" "${ACCELERATOR-cuda}"
run srun --kill-on-bad-exit=1 python -m experiments.run --multihost "$config" "$workdir" "$@"
run srun --kill-on-bad-exit=1 python -m experiments.evaluate --multihost "$config" "$workdir" "$@"
run python -m experiments.report "$workdir"
