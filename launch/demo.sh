#!/usr/bin/env bash
# MO-DiT on real molecules from nothing: installs, builds the catalogue, trains, evaluates, reports.
# A second run resumes or skips what is finished. Further arguments are config overrides.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" moses
config="--config=experiments/configs/modit.py:size=demo"
run python -m experiments.run "$config" --workdir=runs/demo "$@"
run python -m experiments.evaluate "$config" --workdir=runs/demo "$@"
run python -m experiments.report --workdir=runs/demo
