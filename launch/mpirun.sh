#!/usr/bin/env bash
# Fine-tune on the nodes of a hostfile with Open MPI, a rank for each slot. Arguments go to the train command:
#   bash launch/mpirun.sh [--dry-run] run.yaml engine=fsdp output=/shared/run
# MPI_OPTIONS go to mpirun, such as "-x NCCL_SOCKET_IFNAME=eth0 -x HF_HOME=/shared/hub".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/start.sh"

# The same on every node, where PATH may be another.
python=$(command -v python) || { echo "no python on PATH: activate the environment that has addax_ds" >&2; exit 2; }
# --bind-to none: else all threads of a rank share one core.
read -ra options <<< "${MPI_OPTIONS:-}"
start mpirun --hostfile "${HOSTFILE:-$here/hostfile}" --bind-to none ${options[@]+"${options[@]}"} "$python" "$here/train.py" "$@"
