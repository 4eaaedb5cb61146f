#!/usr/bin/env bash
# The whole test suite from nothing. Further arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" test
# By file: what a file prepares and compiles is needed by one worker alone. In our order: long ones first.
run python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
