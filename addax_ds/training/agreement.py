"""Faults and facts of one rank, made known to all: no rank goes on alone, none waits in vain."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from addax_ds.engines.base import Engine
from addax_ds.errors import UserError


def agree(engine: Engine, error: str, kind: type[UserError] = UserError) -> None:
    """Raise an error of this kind on every rank where any rank has one (a collective)."""
    failed = torch.zeros(engine.world_size, dtype=torch.float64)
    failed[engine.rank] = float(bool(error))
    ranks = engine.sum(failed).nonzero().flatten().tolist()
    if error:
        raise kind(error)
    if ranks:
        raise kind(f"rank {ranks[0]} has met a fault, which it names: mend that")


def from_main(engine: Engine, work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank, or the error that it met there (a collective)."""
    outcome: list[Any] = [None, ""]
    unforeseen: Exception | None = None
    if engine.rank == 0:
        try:
            outcome[0] = work()
        except OSError as error:
            where = f"{error.filename}: " if error.filename else "the run folder cannot be written: "
            outcome[1] = f"{where}{error.strerror or error}: mend that or choose another output"
        except SafetensorError as error:  # its word for a full disk, too
            outcome[1] = f"the run folder cannot be written: {error}: mend that or choose another output"
        except UserError as error:
            outcome[1] = str(error)
        except Exception as error:  # a fault of ours: with its traceback here, and nobody left waiting
            unforeseen, outcome[1] = error, "rank 0 has failed, and says why"
    if engine.world_size > 1:
        dist.broadcast_object_list(outcome)
    if unforeseen is not None:
        raise unforeseen
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]
