"""Worlds of real processes over gloo or NCCL, each started once and sent many cases.

    results = world.run(case, engine="zero3")     # case(**kwargs) on every rank; results by rank

A case is a module-level function with picklable arguments and result. A case that fails on any rank
fails here with that rank's traceback. A case that exceeds its time limit, or during which a rank
dies, fails with the stacks of every rank; its world is killed and the next case gets a fresh one.
"""

import faulthandler
import gc
import logging
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forkserver import DEVICE, ENVIRONMENT, context

CASE_SECONDS = 300.0
# What the other ranks get to finish once one has failed: they may wait for it in a collective.
GRACE_SECONDS = 3.0
# On this signal a rank writes the stacks of its threads to its log.
WRITE_STACKS = signal.SIGUSR1


class CaseError(AssertionError):
    """A case failed, hung or died on some rank; the message holds the remote evidence."""


class World:
    """`size` processes with a process group between them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: Path | None = None

    def run(self, case: Callable[..., Any], *, seconds: float = CASE_SECONDS, **kwargs: Any) -> list[Any]:
        """Run case(**kwargs) on every rank and return what each rank returned."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((case, kwargs))
        results, errors = self._collect(time.monotonic() + seconds)
        missing = [rank for rank in range(self.size) if rank not in results and rank not in errors]
        if not errors and not missing:
            return [results[rank] for rank in range(self.size)]
        dead = [rank for rank in missing if not self._processes[rank].is_alive()]
        report = [f"rank {rank} of {self.size} raised\n{text}" for rank, text in sorted(errors.items())]
        for rank in missing:
            what = "died" if rank in dead else "was still running"
            report.append(f"rank {rank} of {self.size} {what} in {case.__qualname__}\n{self._evidence(rank)}")
        self.kill()
        raise CaseError("\n".join(report))

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="world-"))
        for rank in range(self.size):
            ours, theirs = context().Pipe()
            process = context().Process(target=_serve, args=(rank, self.size, self._folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Answers by rank until all have come, one has failed and its grace is over, or the deadline."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        failed = False
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                rank = waiting.pop(connection)
                try:
                    good, answer = connection.recv()
                    (results if good else errors)[rank] = answer
                except EOFError:
                    good = False
                    self._processes[rank].join(GRACE_SECONDS)  # its pipe closes first
                if not good and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        return results, errors

    def _evidence(self, rank: int) -> str:
        """What a silent rank wrote; its stacks are asked for first."""
        process = self._processes[rank]
        if process.is_alive():
            os.kill(process.pid, WRITE_STACKS)
            time.sleep(0.2)
        written = (self._folder / f"rank{rank}.log").read_text(errors="replace")
        if len(written) <= 8000:
            return written
        # What killed it comes before the stacks of its threads.
        fatal = max(written.rfind("Fatal Python error") - 1000, 0)
        return f"{written[fatal : fatal + 5000]}\n...\n{written[-3000:]}"

    def kill(self) -> None:
        """End every process of this world at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    close = kill


def _serve(rank: int, size: int, folder: Path, connection: Connection) -> None:
    """A rank: runs the cases it is sent until its world is closed."""
    log = (folder / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(WRITE_STACKS, log, all_threads=True)
    import torch
    import torch.distributed as dist

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    local_rank, backend, device = rank, "gloo", None
    if DEVICE == "cuda":
        local_rank, backend = rank % torch.cuda.device_count(), "nccl"
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # NCCL takes no two ranks of one host on one GPU, so ranks that share one say they are on different hosts.
        os.environ.update(
            NCCL_HOSTID=str(rank // torch.cuda.device_count()), NCCL_SOCKET_IFNAME="lo", NCCL_NET="Socket"
        )
    os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(size))
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device)
    while True:
        try:
            case, kwargs = connection.recv()
        except EOFError:
            return
        try:
            answer = True, case(**kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        gc.collect()
        connection.send(answer)
