#!/usr/bin/env bash
# Install, check style and types, run every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
source "${VENV:-.venv}/bin/activate"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

ruff check .
ruff format --check .
mypy
# Groups of tests on two processes: they wait for their ranks most of the time.
pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder --durations 25 "$@"
