"""Memory for perturbed copies, used again stretch after stretch.

Fresh memory costs more than the noise that is written to it: the system clears every page of it.
"""

import torch

_ALIGNMENT = 64  # bytes, as torch aligns its own tensors: matrix products may round otherwise


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its memory begins otherwise than torch's own: in a mapped file, within another."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


_Kind = tuple[torch.device, torch.dtype]


class Scratch:
    """One block of memory per device and dtype, as large as what the largest stretch has taken of it."""

    def __init__(self) -> None:
        self._blocks: dict[_Kind, torch.Tensor] = {}
        self._used: dict[_Kind, int] = {}  # elements of the block
        self._taken: dict[_Kind, int] = {}  # elements in this stretch, of blocks before this one, too
        self._most: dict[_Kind, int] = {}  # elements in any stretch

    def begin(self, afresh: bool) -> None:
        """A stretch begins: what was taken before may be overwritten, unless it is to be `afresh`."""
        kept = {} if afresh else self._blocks
        # A block that was too small for a whole stretch makes way for one that is not.
        self._blocks = {kind: block for kind, block in kept.items() if block.numel() >= self._most[kind]}
        self._used, self._taken = {}, {}

    def pairs(self, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Two uninitialised tensors like each weight, apart from all that this stretch has taken."""
        needed: dict[_Kind, int] = {}
        for weight in weights:
            kind = weight.device, weight.dtype
            needed[kind] = needed.get(kind, 0) + 2 * _padded(weight)
        for kind, size in needed.items():
            self._reserve(kind, size)
        return [(self._take(weight), self._take(weight)) for weight in weights]

    def _reserve(self, kind: _Kind, size: int) -> None:
        taken = self._taken.get(kind, 0)
        self._taken[kind] = taken + size
        self._most[kind] = max(self._most.get(kind, 0), taken + size)
        if kind not in self._blocks or self._used.get(kind, 0) + size > self._blocks[kind].numel():
            self._blocks.pop(kind, None)  # before the next one is there; what lies in it keeps it
            # A stretch that is longer than all before it goes on in another block, and the next has one for all.
            size = size if taken else self._most[kind]
            self._blocks[kind], self._used[kind] = torch.empty(size, dtype=kind[1], device=kind[0]), 0

    def _take(self, weight: torch.Tensor) -> torch.Tensor:
        kind = weight.device, weight.dtype
        begin = self._used.get(kind, 0)
        self._used[kind] = begin + _padded(weight)
        return self._blocks[kind][begin : begin + weight.numel()].view(weight.shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in memory that is used again."""
        # Not by address of the memory, which fake tensors do not have.
        storage = tensor.untyped_storage()._cdata
        return any(block.untyped_storage()._cdata == storage for block in self._blocks.values())

    def release(self) -> None:
        """Give the memory up; tensors that lie in it keep it."""
        self._blocks, self._used = {}, {}


def _padded(weight: torch.Tensor) -> int:
    """Elements after which the next tensor begins."""
    step = _ALIGNMENT // weight.element_size()
    return -(-weight.numel() // step) * step
