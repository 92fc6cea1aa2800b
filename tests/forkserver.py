"""Processes forked from a server that has imported torch, transformers and DeepSpeed once."""

import multiprocessing
import multiprocessing.forkserver
import os
from functools import cache
from multiprocessing.context import BaseContext

from addax_ds.engines.ops import ADAM, COLLECTIVES, build_op

DEVICE = os.environ.get("ADDAX_TEST_DEVICE", "cpu")
"""What the tests of engines run on: `ADDAX_TEST_DEVICE=cuda pytest tests/engines` takes GPUs and NCCL."""

ENVIRONMENT = {
    # One thread a rank: ranks share few cores, and sums must not depend on the number of cores.
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
    **({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {}),
}
_PRELOADED = [
    "addax_ds.training.run",
    "addax_ds.training.report",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "deepspeed",
    "rich.console",
    "pytest",
    "tests.warm",
]


@cache
def context() -> BaseContext:
    """The multiprocessing context of all tests; the first call starts the server."""
    if DEVICE != "cpu":
        return multiprocessing.get_context("spawn")  # what has looked at a GPU cannot be forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server, and so DeepSpeed at its import, sees what the environment is now.
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    # Here, where it costs no case its time.
    for name in (COLLECTIVES, ADAM):
        build = context.Process(target=build_op, args=(name,))
        build.start()
        build.join()
        if build.exitcode:
            raise RuntimeError(f"DeepSpeed's {name} cannot be built: see above")
    return context
