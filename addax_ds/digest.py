"""A digest of all weights that does not depend on how they are sharded."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from addax_ds.core import cpu
from addax_ds.core.shard import Shard
from addax_ds.engines.base import Engine


def weights_digest(engine: Engine) -> str:
    """SHA-256 (hex) over name, size, type and a sum modulo 2**64 of every parameter's mixed elements.

    The sums of a parameter's shards add up to that of the whole, so one all-reduce of a number per
    parameter suffices, and every engine and world size gives the same digest for the same weights.
    """
    return digest_over(engine, list(engine.shards()))


def digest_over(engine: Engine, shards: Sequence[Shard]) -> str:
    """The same of these shards, which every rank names alike."""
    mine = _sums(shards) if engine.is_primary_copy() else [0] * len(shards)
    totals = torch.tensor(mine, dtype=torch.int64, device=engine.device)
    if engine.world_size > 1:
        dist.all_reduce(totals)
    return _digest(shards, totals.tolist())


def digest_of(shards: Sequence[Shard]) -> str:
    """The same of weights that are whole here: a shard for each parameter."""
    return _digest(shards, _sums(shards))


def _sums(shards: Sequence[Shard]) -> list[int]:
    totals = [cpu.digest(shard.local.cpu(), shard.start) for shard in shards]
    return [total - 2**64 if total >= 2**63 else total for total in totals]  # int64 wraps like modulo 2**64


def _digest(shards: Sequence[Shard], totals: Sequence[int]) -> str:
    kinds = [f"{shard.name} {shard.numel} {shard.local.dtype}" for shard in shards]
    lines = [f"{kind} {total % 2**64:016x}" for kind, total in zip(kinds, totals, strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
