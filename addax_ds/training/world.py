"""The ranks of a run, whichever launcher started them."""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from addax_ds.errors import OutOfMemoryError, PreemptedError, RankLostError, UserError, of_another_rank

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")

_OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0


def discover() -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher has not.

    `torchrun` and `deepspeed` set them; under `mpirun` they are agreed on through mpi4py; `srun` tells
    ranks all but the address, which must be in the environment; a plain `python` process is a world of one.
    """
    if "RANK" in os.environ:
        return
    if under_mpi():
        _discover_mpi()
        return
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        _discover_slurm()
        return
    _set(rank=0, size=1, local_rank=0, address="127.0.0.1", port=0)


def under_mpi() -> bool:
    """Whether an MPI launcher has started more than this one process."""
    return any(int(os.environ.get(name, "1")) > 1 for name in _MPI_SIZES)


def _discover_mpi() -> None:
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("mpirun needs mpi4py: pip install 'addax-ds[mpi]'") from None
    everyone = MPI.COMM_WORLD
    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if node.Get_size() == everyone.Get_size() else socket.gethostname()
    with free_port() as port:
        address, port = everyone.bcast((address, port), root=0)
    _set(everyone.Get_rank(), everyone.Get_size(), node.Get_rank(), address, port)
    # Else it is done at exit, where a rank that fails would wait for the others for ever.
    MPI.Finalize()


def _discover_slurm() -> None:
    # Else each task would take itself for a world of one and write the same folder.
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"srun does not tell ranks their address: set {' and '.join(missing)}, or start torchrun on each node"
        )
    for name, told in (("RANK", "PROCID"), ("WORLD_SIZE", "STEP_NUM_TASKS"), ("LOCAL_RANK", "LOCALID")):
        os.environ[name] = os.environ[f"SLURM_{told}"]


def _set(rank: int, size: int, local_rank: int, address: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank), MASTER_ADDR=address, MASTER_PORT=str(port)
    )


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port at which a store can listen; in the context the system gives it to nobody who takes any."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


@contextlib.contextmanager
def joined(timeout_minutes: float = 10.0, offload: bool = False) -> Iterator[World]:
    """Join the process group for the length of the context (`discover` comes first).

    A collective that takes longer than `timeout_minutes` has lost a rank. offload: what lies on the CPUs is reduced
    there, such as the norm of gradients. Raises `RankLostError` then, and where another rank has ended, and
    `OutOfMemoryError` where this one has too little memory.
    """
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # torch 2.13 warns of the collectives' new names, which torch 2.11 does not have.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts ranks again, with the addresses of those that have died.
        attempt = dist.PrefixStore(f"addax_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # Else NCCL guesses at barriers which GPU is this rank's.
        own = device if device.type == "cuda" else None
        backends = "cpu:gloo,cuda:nccl" if offload and backend == "nccl" else backend
        dist.init_process_group(backends, store=attempt, rank=rank, world_size=size, timeout=timeout, device_id=own)
    except dist.DistError as error:
        told = " ".join(str(error).split())[:120]
        if backend == "nccl" and isinstance(error, dist.DistBackendError) and "timed out" not in str(error).lower():
            raise RankLostError(
                f"rank {rank}: NCCL cannot start ({' '.join(str(error).split())[-160:]}): look at the ranks' GPUs, of "
                "which each needs its own, and at their network"
            ) from error
        if "timed out" not in str(error).lower():
            raise RankLostError(f"rank {rank} cannot join the others ({told}): look at its address and port") from error
        raise RankLostError(
            f"rank {rank}: the {size} ranks did not all join within {timeout_minutes:g} minutes "
            f"({told}): look at the others and their nodes"
        ) from error
    together = size == 1 or backend != "nccl"
    try:
        yield World(rank, local_rank, size, device)
        # A rank that leaves early takes its sockets from collectives still under way.
        dist.barrier()
        together = True
    except (UserError, PreemptedError):
        _let_others_meet_it(rank, size)
        raise
    except RuntimeError as error:
        # NCCL's, too, and before what looks like the end of another rank.
        if any(words in f"{type(error).__name__}: {error}" for words in _OUT_OF_MEMORY):
            told = shorten(str(error), 160, placeholder="...")
            raise OutOfMemoryError(
                f"rank {rank} is out of memory ({told}): lower zo_micro_batch, fo_micro_batch, lt or eval_micro_batch, "
                "or take more ranks; addax-ds plan tells what fits"
            ) from error
        if lost := of_another_rank(error):
            reason = " ".join(str(lost).partition("This is typically caused")[0].split())[
                -120:
            ]  # gloo's advice is long
            raise RankLostError(
                f"rank {rank}: another rank has ended or did not answer for {timeout_minutes:g} minutes "
                f"({reason}): see what it or its node says; a run with output=FOLDER goes "
                "on when it is started again"
            ) from error
        raise
    finally:
        # NCCL's end waits for the other ranks of the node, which may be in a collective that this one never joins:
        # the command then leaves without it.
        if together:
            dist.destroy_process_group()


def limit_waiting(minutes: float) -> None:
    """Have collectives of every group wait no longer than this; most groups are made with torch's 30 minutes."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def _let_others_meet_it(rank: int, size: int) -> None:
    """Wait a moment for ranks that meet the same fault: they may still need this one's sockets."""
    store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + 5.0
    with contextlib.suppress(dist.DistError):  # the store is gone with rank 0, which waits as well
        count = store.add("addax_ds/fault", 1)
        while count < size and time.monotonic() < end:
            time.sleep(0.05)
            count = store.add("addax_ds/fault", 0)
        if rank:
            store.set(f"addax_ds/met/{rank}", "")  # which asks for no answer, so that the store may go
        while not rank and not store.check([f"addax_ds/met/{r}" for r in range(1, size)]) and time.monotonic() < end:
            time.sleep(0.05)
