# shellcheck shell=bash
# Sourced by the other scripts: `run COMMAND` runs it, or prints it under DRY_RUN=1.
# A command that SIGTERM ends has this status, for which no script goes on to the next.
export GENRET_PREEMPTED=75
run() {
  if [ -z "${DRY_RUN:-}" ]; then
    "$@"
  else
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
  fi
}
