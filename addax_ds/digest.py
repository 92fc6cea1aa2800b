"""A digest of all weights that does not depend on how they are sharded."""

import hashlib

import torch
import torch.distributed as dist

from addax_ds.core import cpu
from addax_ds.engines.base import Engine


def weights_digest(engine: Engine) -> str:
    """SHA-256 (hex) over name, size, type and a sum modulo 2**64 of every parameter's mixed elements.

    The sums of a parameter's shards add up to that of the whole, so one all-reduce of a number per
    parameter suffices, and every engine and world size gives the same digest for the same weights.
    """
    sums, kinds = [], []
    for shard in engine.shards():
        counted = engine.is_primary_copy() and shard.local.numel()
        total = cpu.digest(shard.local.cpu(), shard.start) if counted else 0
        sums.append(total - 2**64 if total >= 2**63 else total)  # int64 wraps like modulo 2**64
        kinds.append(f"{shard.name} {shard.numel} {shard.local.dtype}")
    totals = torch.tensor(sums, dtype=torch.int64, device=engine.device)
    if engine.world_size > 1:
        dist.all_reduce(totals)
    lines = [f"{kind} {total % 2**64:016x}" for kind, total in zip(kinds, totals.tolist(), strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
