"""What FSDP2 gathers beyond a model's weights: it splits dimension 0, and fills up what the ranks do not divide."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from addax_ds.shapes import weightless


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


def padding_of(shape: PretrainedConfig, shards: int) -> Padding:
    """Counted from the parameters' shapes."""
    sizes = {name: parameter.shape for name, parameter in weightless(shape).named_parameters()}
    added = {
        name: (math.ceil(size[0] / shards) * shards - size[0]) * math.prod(size[1:]) for name, size in sizes.items()
    }
    worst = max(added, key=lambda name: added[name])
    whole = sum(map(math.prod, sizes.values()))
    return Padding(1 + sum(added.values()) / whole, worst, sizes[worst][0], shards)
