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
# Here, where it costs no test its time.
python -c 'from addax_ds.engines.ops import ADAM, build_op; build_op(ADAM)'
# Two processes that are given test after test: they wait for their ranks most of the time.
pytest --numprocesses 2 --dist load --maxschedchunk 1 --durations 25 "$@"
