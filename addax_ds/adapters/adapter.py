"""Tensor-train adapters and the projections that they follow (AdaZeta, Yang et al., 2024, section 3.1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from addax_ds.adapters.tensor_train import TensorTrainLinear
from addax_ds.config import TensorTrainConfig
from addax_ds.errors import UserError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "none": lambda x: x,
}


class TensorTrainAdapter(nn.Module):
    """x + up(activation(down(x))) for x [..., hidden], in the dtype of x.

    Its parameters are float32 whatever the backbone is, and so is what it computes. The last core
    of `up` begins at zero: with new adapters a model is what it was, so that its scores before a run
    are the backbone's, and every core is reached by gradients as soon as that one has moved.
    """

    def __init__(self, hidden: int, config: TensorTrainConfig) -> None:
        super().__init__()
        narrow, modes, narrow_modes = config.bottleneck, config.hidden_modes, config.bottleneck_modes
        self.down = TensorTrainLinear(hidden, narrow, config.rank, modes, narrow_modes, config.bias, config.groups)
        self.up = TensorTrainLinear(narrow, hidden, config.rank, narrow_modes, modes, config.bias, config.groups)
        nn.init.zeros_(self.up.cores[-1])
        self.activation = config.activation

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a linear adapter adds to x: x A + a, as A [hidden, hidden] and a [hidden]."""
        down, up = self.down.matrix(), self.up.matrix()
        if self.down.bias is None or self.up.bias is None:
            return down @ up, up.new_zeros(up.shape[1])
        return down @ up, self.down.bias @ up + self.up.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = ACTIVATIONS[self.activation](self.down(x.float()))
        return x + self.up(hidden).to(x.dtype)


class Adapted(nn.Module):
    """A projection of the backbone and the adapter that follows it."""

    def __init__(self, base_layer: nn.Module, adapter: TensorTrainAdapter) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.adapter(self.base_layer(*args, **kwargs))

    @property
    def weight(self) -> Any:
        """The backbone's: some models look at its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The backbone's."""
        return self.base_layer.bias


def output_size(path: str, module: nn.Module) -> int:
    """Size of the last dimension of what a projection returns."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    raise UserError(f"adapters follow linear layers, and {path} is a {type(module).__name__}: name others in modules")
