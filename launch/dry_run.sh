# shellcheck shell=bash
# Sourced by the other scripts: `run COMMAND` runs it, or prints it under DRY_RUN=1.
run() {
  if [ -z "${DRY_RUN:-}" ]; then
    "$@"
  else
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
  fi
}
