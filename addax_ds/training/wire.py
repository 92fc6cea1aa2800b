"""Bytes that a rank receives, counted from the collectives themselves."""

from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class WireCounter(TorchDispatchMode):
    """While active, counts what this rank receives, by collective, for the usual ring algorithms.

    Of N ranks, each receives (N-1)/N of an all-gather's output or a reduce-scatter's input, and
    twice that share of an all-reduce. Every torch operation passes through Python meanwhile: count
    single steps only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, args: tuple) -> None:
        """Count one call of the collective `name` of c10d."""
        if "allgather" in name:
            self.received["all_gather"] += _bytes(args[0]) - _bytes(args[1])
        elif "reduce_scatter" in name:
            self.received["reduce_scatter"] += _bytes(args[1]) - _bytes(args[0])
        elif "allreduce" in name:
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.received["all_reduce"] += 2 * _bytes(args[0]) * (ranks - 1) // ranks
        elif "broadcast" in name:
            self.received["broadcast"] += _bytes(args[0])


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0
