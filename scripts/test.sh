#!/bin/bash
# Install into .venv and run the tests; what people and CI run. Arguments go to pytest: ./scripts/test.sh -k broker
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
venv_install dev
export OMP_NUM_THREADS=2
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
