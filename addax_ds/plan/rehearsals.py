"""Rehearsals beside each other, in processes of their own, and none twice."""

import contextlib
import gc
import logging
import multiprocessing
import os
import textwrap
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any

import torch
from transformers import PretrainedConfig

from addax_ds.config import RunConfig
from addax_ds.cores import available_cores
from addax_ds.errors import UserError
from addax_ds.plan.rehearse import Rehearsal, blocks_are_alike, rehearse


class RehearsalLostError(UserError):
    """The process of a rehearsal has ended."""


class Rehearsals:
    """Steps of a model, rehearsed on as many processes as there are cores; a context, at whose end none goes on.

    A rehearsal changes what all of a process shares (its process group, patched functions): so none
    are in the command's own. Processes come from a server that has imported everything once, and take
    one rehearsal after another, but of DeepSpeed, which keeps more of that than it gives back, one.
    """

    def __init__(self, shape: PretrainedConfig, with_deepspeed: bool) -> None:
        self._shape = shape
        self._with_deepspeed = with_deepspeed
        self._context = multiprocessing.get_context("forkserver")
        model = type(shape).__module__.replace("configuration", "modeling")
        modules = [rehearse.__module__, "torch.testing._internal.distributed.fake_pg", "peft", model]
        self._context.set_forkserver_preload([*modules, *(["addax_ds.plan.zero3"] if with_deepspeed else [])])
        forkserver.ensure_running()  # it imports while data are read
        self._threads = ThreadPoolExecutor(available_cores())  # each waits for a process at a time
        self._processes: set[BaseProcess] = set()
        self._idle: SimpleQueue[tuple[BaseProcess, Connection]] = SimpleQueue()
        self._begun: dict[str, Future[Rehearsal]] = {}
        self._closing = False
        self.told: Callable[[str], object] = lambda _: None
        """Called, on any thread, with how many are done."""

    def __enter__(self) -> "Rehearsals":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True  # a process that is being started is not among them yet
        for future in self._begun.values():
            future.cancel()
        for process in [*self._processes]:
            process.terminate()
        self._threads.shutdown()

    @cached_property
    def _blocks_are_alike(self) -> bool:
        return blocks_are_alike(self._shape)

    def begin(self, config: RunConfig, ranks: int, long: int, short: int, **options: Any) -> "Future[Rehearsal]":
        """See `rehearse`; faults come with the result. Where blocks differ all layers are rehearsed."""
        options["all_layers"] = options.get("all_layers", False) or not self._blocks_are_alike
        key = repr((config, ranks, long, short, options))
        if key not in self._begun:
            self._begun[key] = self._threads.submit(self._in_a_process, config, ranks, long, short, **options)
            self._begun[key].add_done_callback(self._tell)
        return self._begun[key]

    def _tell(self, _: "Future[Rehearsal]") -> None:
        begun = [*self._begun.values()]
        self.told(f"rehearsed {sum(future.done() for future in begun)} steps of {len(begun)} so far")

    def _in_a_process(self, config: RunConfig, *layout: int, **options: Any) -> Rehearsal:
        process, connection = self._take()
        try:
            connection.send((config, layout, options))
            told = connection.recv()
        except (EOFError, OSError):
            told = RehearsalLostError("a rehearsal was killed, perhaps for want of memory: free some, and plan again")
        if isinstance(told, Rehearsal) and not self._with_deepspeed:
            self._idle.put((process, connection))
            return told
        connection.close()
        process.terminate()  # and not at its own end: a fault may have left threads that wait
        process.join()
        self._processes.discard(process)
        if isinstance(told, UserError):
            raise told
        assert isinstance(told, Rehearsal)
        return told

    def _take(self) -> tuple[BaseProcess, Connection]:
        """A process that waits for a rehearsal."""
        with contextlib.suppress(Empty):
            while True:
                process, connection = self._idle.get_nowait()
                if process.is_alive():
                    return process, connection
        return self._start()

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._shape), daemon=True)
        process.start()
        self._processes.add(process)
        if self._closing:
            process.terminate()
        theirs.close()
        return process, ours


def _serve(asked: Connection, shape: PretrainedConfig) -> None:
    """Answer with rehearsals, or with why there is none, until nobody asks any more."""
    _prepare()
    while True:
        try:
            config, layout, options = asked.recv()
        except EOFError:
            return
        try:
            asked.send(rehearse(shape, config, *layout, **options))
        except UserError as error:
            asked.send(error)
        except Exception as error:  # of a model's own code, which may not take tensors without memory
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
            told = f"{shape.model_type} with {config.method_name} cannot be rehearsed in {config.dtype}: {reason}"
            asked.send(UserError(f"{told}: plan another model{', or dtype=bfloat16' * (config.dtype == 'float32')}"))


def _prepare() -> None:
    """Once in each process, before its first rehearsal."""
    torch.set_num_threads(1)  # fake tensors compute nothing that threads could share
    gc.freeze()  # what the server has imported is not looked through again
    # Of tensors that are not what they seem, which is what a rehearsal takes, and of DeepSpeed with another optimizer.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the command is killed, nobody asks this process for anything any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is not the command's own process
    wait([parent.sentinel])
    os._exit(1)
