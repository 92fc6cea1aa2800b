"""Global batches, cut into the micro-batches that are dealt to ranks.

A batch is what the model takes: a tensor, or a mapping or sequence of tensors with the samples
along dimension 0.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from addax_ds.errors import UserError

Batch = Any


def batch_size(batch: Batch) -> int:
    """Samples of a batch: the length of dimension 0 of its first tensor."""
    return len(_tensors(batch)[0])


def cut(batch: Batch | list[Batch] | None, size: int, what: str) -> list[Batch]:
    """Micro-batches of `size` samples, the last one smaller where it does not divide.

    A list is taken as micro-batches already. `what` names the batch in errors.
    """
    if batch is None:
        raise UserError(f"{what} is None: alpha strictly between 0 and 1 needs both batches")
    if isinstance(batch, list):
        pieces = [piece for piece in batch if batch_size(piece)]
    else:
        count = batch_size(batch)
        pieces = [_slice(batch, begin, size, count) for begin in range(0, count, size)]
    if not pieces:
        raise UserError(f"{what} is empty: give at least one sample")
    return pieces


def fingerprint(batches: list[Batch]) -> int:
    """Checksum of all tensors, to notice ranks that were given different batches."""
    checksum = 0
    for batch in batches:
        for tensor in _tensors(batch):
            # Through bytes, since numpy has no bfloat16; of a copy: an element cut from a wider tensor shows none.
            whole = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            content = whole.view(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(content.tobytes(), checksum)
    return checksum


def _tensors(batch: Batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        raise UserError("a batch holds no tensor: give a tensor, or a mapping or sequence of tensors")
    return tensors


def _slice(batch: Batch, begin: int, size: int, count: int) -> Batch:
    """Samples [begin, begin + size) of every tensor that has `count` of them; the rest as it is."""

    def piece(value: Any) -> Any:
        per_sample = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count
        return value[begin : begin + size] if per_sample else value

    if isinstance(batch, torch.Tensor):
        return piece(batch)
    if isinstance(batch, Mapping):
        return {key: piece(value) for key, value in batch.items()}
    return type(batch)(piece(value) for value in batch)
