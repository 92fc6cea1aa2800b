"""Every rank holds every weight: one process, data parallel ranks, DeepSpeed ZeRO-0, 1 and 2.

ZeRO-1 and 2 shard optimizer states and gradients; Addax keeps neither, so nothing is left to shard.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from addax_ds.core.shard import Shard
from addax_ds.engines.base import Engine, OnGradient
from addax_ds.errors import UserError


class Replicated(Engine):
    """Whole weights on every rank; each gradient is all-reduced in its hook."""

    name = "replicated"

    def __init__(self, model: nn.Module, skeleton: nn.Module) -> None:
        super().__init__(model, skeleton)
        self._parameters = dict(model.named_parameters())
        for parameter in self._parameters.values():
            # A shard is a flat view, which only contiguous memory has.
            parameter.data = parameter.data.contiguous()
            if self.world_size > 1:
                # Ranks that start apart would average gradients of different models for ever.
                dist.broadcast(parameter.data, 0)
        self._handles: list = []

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def is_gathered(self, path: str) -> bool:
        return True

    def weight(self, path: str, local: str) -> torch.Tensor:
        return self._parameters[self.owners[path][local]]

    def gather(self, path: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def shard(self, name: str) -> Shard:
        flat = self._parameters[name].data.view(-1)
        return Shard(name, flat.numel(), 0, flat)

    def whole(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach().clone()

    def attach(self, parameters: dict[str, nn.Parameter], gathered: Callable[[], None], on_gradient: OnGradient):
        # All weights are always at hand, so guests need no word from the host.
        for name, parameter in parameters.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._reduce(name, on_gradient)))

    def _reduce(self, name: str, on_gradient: OnGradient) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None  # torch calls the hook with it set
            gradient, parameter.grad = parameter.grad.contiguous(), None
            if self.world_size > 1:
                dist.all_reduce(gradient)
            on_gradient(name, gradient.view(-1))

        return hook

    def before_step(self) -> None:
        for path, owned in self.owners.items():
            for local, name in owned.items():
                if self._modules[path]._parameters[local] is not self._parameters[name]:
                    raise UserError(
                        f"{name} was replaced after the optimizer was built (load_state_dict(assign=True) does that) "
                        "and would no longer be trained: build Addax again"
                    )

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
