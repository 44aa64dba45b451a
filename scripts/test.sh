#!/bin/bash
# Install into .venv, lint, check types and run the tests: what people and CI run; --help explains.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

usage() {
  cat <<END
Usage: scripts/test.sh [--all] [PYTEST ARGUMENT]...

Installs into .venv what is missing, lints, checks types and runs the tests, in two processes of pytest.

  --all    every test; CI does that. Without it those marked "slow" are left out, which take most of the time; some of
           each kind are always there. --all also installs Ray, for the tests that need it.
  --help   this text

Everything else goes to pytest:

  scripts/test.sh -k broker
  scripts/test.sh --all tests/faults -x
  scripts/test.sh -n 0 --pdb tests/daemon/test_broker.py   # in one process: with its output, and a debugger

What a test needs and this machine lacks (a Debian package, root, IPv6, ...) is a skip by its name in the summary.
END
}

extras=dev
tier=(-m "not slow")
arguments=()
for argument in "$@"; do
  case $argument in
    --all) extras=dev,ray tier=() ;;
    --help | -h) usage && exit ;;
    *) arguments+=("$argument") ;;
  esac
done

trap 'exit 143' TERM # after the step that runs, which would otherwise go on without us
venv_install "$extras"
export OMP_NUM_THREADS=1 # in each of two processes
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest -n 2 --no-loadscope-reorder "${tier[@]}" "${arguments[@]}"
