#!/usr/bin/env bash
# Fine-tune on several nodes with torchrun: give the same command on each. Arguments go to the train command:
#   HEAD=node-0 bash launch/torchrun.sh [--dry-run] run.yaml engine=fsdp output=/shared/run
# The nodes meet at HEAD, the name or address of one of them, and PORT. RESTARTS is how often ranks are started again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/start.sh"

# After SIGTERM ranks have so many seconds to end the step under way and to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

start torchrun --nnodes "${NODES:-2}" --nproc_per_node "${GPUS_PER_NODE:-8}" --max_restarts "${RESTARTS:-0}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:?set it to the name or address of a node}:${PORT:-29500}" \
  --rdzv_id "${JOB:-addax}" "$here/train.py" "$@"
