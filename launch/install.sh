#!/usr/bin/env bash
# Make .venv and install the project with everything the scripts here use; a second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
stamp=$venv/.addax-ds-$(cat pyproject.toml launch/constraints.txt | cksum | cut -d' ' -f1)
[ -f "$stamp" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed, $python is $("$python" -V): set PYTHON=/path/to/python3.11" >&2
  exit 2
}
echo "installing into $venv (a few minutes, once)"
"$python" -m venv "$venv"
# torch first and exactly: a bare range would pull the newest build with all its GPU libraries.
"$venv/bin/pip" install --quiet "$(grep '^torch==' launch/constraints.txt)"
"$venv/bin/pip" install --quiet --constraint launch/constraints.txt --editable '.[deepspeed,mpi,train,test]'
# DeepSpeed compiles an op at its first start on CPUs; with the ninja that later starts find, or they compile it again.
source "$venv/bin/activate"
python -c 'from addax_ds.engines.ops import COLLECTIVES, build_op; build_op(COLLECTIVES)'
touch "$stamp"
