"""What FSDP2 gathers beyond a model's weights: it splits dimension 0, and fills up what the ranks do not divide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Padding:
    """Of a model on so many shards."""

    share: float
    """Weights that are gathered, of the model's."""
    worst: str
    """Name of the parameter that is filled up most."""
    rows: int
    """Its length along dimension 0."""
    shards: int

    def __str__(self) -> str:
        return (
            f"padding: {self.worst} and its like have {self.rows} along dimension 0, which {self.shards} shards do not "
            f"divide: {self.share:.2f} times the model is gathered"
        )


def padding_of(sizes: Mapping[str, Sequence[int]], shards: int) -> Padding:
    """Of parameters by their names."""
    added = {
        name: (math.ceil(size[0] / shards) * shards - size[0]) * math.prod(size[1:]) for name, size in sizes.items()
    }
    worst = max(added, key=lambda name: added[name])
    whole = sum(map(math.prod, sizes.values()))
    return Padding(1 + sum(added.values()) / whole, worst, sizes[worst][0], shards)
