"""Rehearsals beside each other: each in a process of its own, and none twice."""

import gc
import logging
import multiprocessing
import os
import textwrap
import threading
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import torch
from transformers import PretrainedConfig

from addax_ds.config import RunConfig
from addax_ds.errors import UserError
from addax_ds.plan.rehearse import Rehearsal, rehearse


class Rehearsals:
    """Steps of a model, rehearsed on as many processes as there are cores; a context.

    A rehearsal changes what all of a process shares (its process group, patched functions), and
    DeepSpeed keeps more of that than it gives back: so one process for each, from a server that has
    imported everything once.
    """

    def __init__(self, shape: PretrainedConfig, with_deepspeed: bool) -> None:
        self._shape = shape
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([rehearse.__module__, *(["addax_ds.plan.zero3"] if with_deepspeed else [])])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ProcessPoolExecutor(cores, context, initializer=_prepare, max_tasks_per_child=1)
        self._begun: dict[str, Future[Rehearsal]] = {}

    def __enter__(self) -> "Rehearsals":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, config: RunConfig, ranks: int, long: int, short: int, **options: Any) -> "Future[Rehearsal]":
        """See `rehearse`; faults come with the result."""
        key = repr((config, ranks, long, short, options))
        if key not in self._begun:
            self._begun[key] = self._pool.submit(_rehearse, self._shape, config, ranks, long, short, **options)
        return self._begun[key]


def _rehearse(
    shape: PretrainedConfig, config: RunConfig, ranks: int, long: int, short: int, **options: Any
) -> Rehearsal:
    try:
        return rehearse(shape, config, ranks, long, short, **options)
    except UserError:
        raise
    except Exception as error:  # of a model's own code, which may not take tensors without memory
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
        raise UserError(f"{shape.model_type} with {config.method_name} cannot be rehearsed: {reason}") from None


def _prepare() -> None:
    """Once in each process, before its rehearsal."""
    torch.set_num_threads(1)  # fake tensors compute nothing that threads could share
    gc.freeze()  # what the server has imported is not looked through again
    # Of tensors that are not what they seem, which is what a rehearsal takes, and of DeepSpeed with another optimizer.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the command is killed, nobody asks this process for anything any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a process of the pool
    wait([parent.sentinel])
    os._exit(1)
