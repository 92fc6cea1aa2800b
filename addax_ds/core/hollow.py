"""Hollow parameters: a shape and a type without memory, of weights that still lie in files.

They are on the CPU, where a model is before it is sharded; on the meta device, what looks at a
weight's device (adapters, skeletons) would follow it there.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn


def hollow(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One number, expanded to a shape."""
    return torch.empty((), dtype=dtype).expand(tuple(shape))


def give_memory(parameters: Iterable[nn.Parameter], device: torch.device | str) -> None:
    """Memory of the device, not yet written, for those that are hollow: to be split over the ranks at once."""
    for parameter in parameters:
        if parameter.numel() > 1 and not any(parameter.stride()):
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
