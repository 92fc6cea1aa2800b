"""Memory for perturbed copies, used again module after module.

Fresh memory costs more than the noise that is written to it: the system clears every page of it.
"""

import torch

_ALIGNMENT = 64  # bytes, as torch aligns its own tensors: matrix products may round otherwise


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its memory begins otherwise than torch's own: in a mapped file, within another."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


class Scratch:
    """One block of memory per device and dtype, as large as the largest module asked for."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def pairs(self, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Two uninitialised tensors like each weight; those of the call before may be overwritten."""
        places, sizes = [], dict.fromkeys(self._blocks, 0)
        for weight in weights:
            key = weight.device, weight.dtype
            step = _ALIGNMENT // weight.element_size()
            padded = -(-weight.numel() // step) * step
            begin = sizes.get(key, 0)
            places.append((begin, begin + padded))
            sizes[key] = begin + 2 * padded
        for key, size in sizes.items():
            if key not in self._blocks or self._blocks[key].numel() < size:
                self._blocks.pop(key, None)  # before the larger one is there
                self._blocks[key] = torch.empty(size, dtype=key[1], device=key[0])

        def part(weight: torch.Tensor, begin: int) -> torch.Tensor:
            block = self._blocks[weight.device, weight.dtype]
            return block[begin : begin + weight.numel()].view(weight.shape)

        return [(part(w, first), part(w, second)) for w, (first, second) in zip(weights, places, strict=True)]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in this memory."""
        storage = tensor.untyped_storage().data_ptr()
        return any(block.untyped_storage().data_ptr() == storage for block in self._blocks.values())

    def release(self) -> None:
        """Give the memory up; tensors that lie in it keep it."""
        self._blocks = {}
