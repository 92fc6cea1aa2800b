#!/usr/bin/env bash
# Fine-tune SmolLM2-135M on movie reviews with Addax under DeepSpeed ZeRO-3: on all GPUs, or on two
# CPU ranks where there is none. Arguments go to the train command: bash launch/quickstart.sh steps=20
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
source "${VENV:-.venv}/bin/activate"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
if [ "$gpus" -eq 0 ]; then
  export DS_ACCELERATOR=cpu
  cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
  # Ranks that share cores must not each start a thread per core.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

addax-ds prepare smollm2-135m movies
exec deepspeed --num_accelerators "$ranks" --no_local_rank launch/train.py launch/quickstart.yaml "$@"
