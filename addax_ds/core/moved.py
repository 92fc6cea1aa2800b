"""Large weights at a guest's point that are never copied whole: they are made where they are read."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from addax_ds.core.kernels import perturb
from addax_ds.core.plain import Perturbation
from addax_ds.core.rows import Rows
from addax_ds.core.scratch import aligned

# Elements of a head's weight that are made at a time: few enough to be used again from the cache,
# enough for a product at full speed.
CHUNK = 1 << 22

LINEAR: Any = torch._C._nn.linear
"""torch's own, which libraries replace under `functional.linear`."""


def is_made_where_read(module: nn.Module, local: str, weight: torch.Tensor, in_block: bool) -> bool:
    """Whether a module's weight is worth a `Moved` in place of a copy.

    in_block: whether the module stands in a repeated block. Outside of them, a large linear layer is
    the head of a large vocabulary.
    """
    if local != "weight":
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None  # else the forward writes into its weight
    return isinstance(module, nn.Linear) and not in_block and weight.numel() > CHUNK


class Moved(torch.Tensor):
    """W + sign * scale * z: the rows that are looked up, or a product in chunks of rows.

    Whatever else is done with it gets the whole copy. Looked-up rows are those of the whole copy
    bit for bit, and drawn once for all guests of a direction, which share `rows` (None at theta
    itself, sign 0); a product in chunks is the same on every engine and at theta. Each guest draws
    the z of its product: both signs of a chunk together would keep two sets of logits.
    """

    _of: tuple[torch.Tensor, str, Perturbation, Rows | None]

    @staticmethod
    def __new__(cls, weight: torch.Tensor, name: str, point: Perturbation, rows: Rows | None):
        moved = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        moved._of = (weight, name, point, rows)
        return moved

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.embedding:
            ids, weight = _inputs(*args, **kwargs)[:2]
            if isinstance(weight, cls):
                return weight._look_up(ids)
        if function is LINEAR:
            input, weight, bias = _inputs(*args, **kwargs)
            if isinstance(weight, cls):
                return weight._multiply(input, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _memory(self, rows: int) -> torch.Tensor:
        """Memory for so many rows; none at theta itself."""
        weight, _, point, _ = self._of
        return weight.new_empty(rows if point.sign else 0, *weight.shape[1:])

    def _part(self, begin: int, end: int, memory: torch.Tensor) -> torch.Tensor:
        """Rows [begin, end), made at the beginning of `memory`; at theta itself those of W."""
        weight, name, point, _ = self._of
        if not point.sign:
            return aligned(weight[begin:end])
        out = memory[: end - begin]
        plus, minus = (out, None) if point.sign > 0 else (None, out)
        perturb(weight[begin:end], begin * (weight.numel() // weight.shape[0]), plus, minus, name, point)
        return out

    def whole(self) -> torch.Tensor:
        """The whole copy."""
        height = self._of[0].shape[0]
        return self._part(0, height, self._memory(height))

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        weight, _, point, rows = self._of
        return functional.embedding(ids, weight) if rows is None else rows.look_up(ids, point.sign)

    def _multiply(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        height, width = self._of[0].shape
        rows = min(max(CHUNK // width, 1), height)
        memory = self._memory(rows)  # for all chunks: the system clears every fresh page
        out: Any = None
        for begin in range(0, height, rows):
            end = min(begin + rows, height)
            part = LINEAR(input, self._part(begin, end, memory), None if bias is None else bias[begin:end])
            if out is None:  # only now is autocast's dtype known
                out = part.new_empty(*part.shape[:-1], height)
            out[..., begin:end] = part
        return out


def _inputs(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    """What a linear layer or a look-up was called with, by place or by name."""
    return input, weight, bias
