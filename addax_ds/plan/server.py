"""The server that processes for rehearsals are forked from: it has imported everything once."""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def start(with_deepspeed: bool) -> ForkServerContext:
    """Begin its imports, which take seconds, unless they have begun; the context that makes its processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["addax_ds.plan.rehearse", *(["addax_ds.plan.zero3"] if with_deepspeed else [])])
    forkserver.ensure_running()
    return context
