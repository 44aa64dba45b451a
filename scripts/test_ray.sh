#!/bin/bash
# Add Ray to .venv and run the tests that need it (four minutes on two cores). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
venv_install dev,ray
export OMP_NUM_THREADS=2
.venv/bin/python -m pytest "${@:-tests/cluster}"
