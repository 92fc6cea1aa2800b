"""Cases of a benchmark on fresh processes with a process group between them."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from types import MappingProxyType
from typing import Any

import torch

from addax_ds.bench.link import Host
from addax_ds.cores import available_cores
from addax_ds.errors import UserError
from addax_ds.training.world import free_port, joined

_GRACE = 3.0  # seconds that the other ranks have to say what became of them


def on_ranks(
    case: Callable[..., Any],
    ranks: int,
    *,
    seconds: float = 900.0,
    hosts: Sequence[Host] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
    **arguments: Any,
) -> list[Any]:
    """case(world, **arguments) on every rank; what each returned, by rank.

    case: a function of a module, with picklable arguments and result. On GPUs there is one rank for
    each; CPU ranks share the threads. hosts: where each rank runs, if not on this machine's own
    network. variables: further environment of the ranks. Raises `UserError` where a rank fails or
    time runs out, once every process has ended.
    """
    gpus = torch.cuda.device_count()
    if gpus and gpus < ranks:
        raise UserError(
            f"{ranks} ranks need as many GPUs, here are {gpus}: hide them (CUDA_VISIBLE_DEVICES=) to use CPUs"
        )
    threads = max(available_cores() // ranks, 1)
    address = hosts[0].address if hosts else "127.0.0.1"
    environment = {**variables, "WORLD_SIZE": str(ranks), "MASTER_ADDR": address, "OMP_NUM_THREADS": str(threads)}
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    before = dict(os.environ)
    with free_port() as port:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                # Set here as well, since some libraries read it as soon as they are imported.
                os.environ.update(environment, MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
                host = hosts[rank] if hosts else None
                if host is not None:
                    os.environ["GLOO_SOCKET_IFNAME"] = host.interface
                process = context.Process(target=_serve, args=(theirs, threads, host, case, arguments), daemon=True)
                process.start()
                theirs.close()
                connections.append(ours)
                processes.append(process)
            return _collect(connections, time.monotonic() + seconds)
        finally:
            os.environ.clear()
            os.environ.update(before)
            for process in processes:
                process.kill()
                process.join()


def _collect(connections: list[Connection], deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    faults: list[str] = []
    waiting = list(range(len(connections)))
    while waiting and (ready := wait([connections[r] for r in waiting], max(deadline - time.monotonic(), 0.0))):
        for rank in [rank for rank in waiting if connections[rank] in ready]:
            waiting.remove(rank)
            try:
                good, answers[rank] = connections[rank].recv()
            except EOFError:
                good, answers[rank] = False, "the process died"
            if not good:
                faults.append(f"rank {rank}: {answers[rank]}")
                # The others fail with it, and theirs may be the message that comes first.
                deadline = min(deadline, time.monotonic() + _GRACE)
    if faults:
        raise UserError(f"the benchmark failed: {'; '.join(faults)}")
    if waiting:
        raise UserError(f"ranks {waiting} of the benchmark did not finish in time")
    return [answers[rank] for rank in range(len(connections))]


def _serve(
    connection: Connection, threads: int, host: Host | None, case: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    if host is not None:
        host.enter()
    torch.set_num_threads(threads)
    try:
        with joined() as world:
            answer = True, case(world, **arguments)
    except BaseException as error:
        answer = False, "".join(traceback.format_exception_only(error)).strip()
    connection.send(answer)
