"""A shard is a flat range of a parameter: the one type that noise, update and digest speak."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """Elements [start, start + local.numel()) of the row-major flattened parameter `name`.

    local: [n], the engine's own memory, so that writing to it writes the weight. ZeRO-3 splits
    the flattened parameter, FSDP2 splits dimension 0: both are one contiguous range; a replicated
    parameter is the range [0, numel). n may be 0.
    """

    name: str
    numel: int
    start: int
    local: torch.Tensor
