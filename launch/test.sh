#!/usr/bin/env bash
# The whole test suite from nothing. Further arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" test
run python -m pytest -n 2 "$@"
