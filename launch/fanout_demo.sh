#!/usr/bin/env bash
# R4T from nothing: installs, embeds 16,000 words, tunes a fan-out language model by set-level rewards, compiles
# it into a set diffusion retriever, evaluates, times and reports. A second run resumes or skips what is
# finished. Further arguments are config overrides.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" fanout
config="--config=experiments/configs/r4t.py:size=demo"
run python -m experiments.run "$config" --workdir=runs/fanout "$@"
run python -m experiments.evaluate "$config" --workdir=runs/fanout "$@"
run python -m experiments.report --workdir=runs/fanout
