"""DeepSpeed ZeRO-3: every flattened parameter is split over the ranks.

The weights live in what DeepSpeed builds for stage 3 without an optimizer (no float32 master, no
gradient buffer). Names of DeepSpeed's internals in this file were checked against version 0.19.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from torch.nn import functional

from addax_ds.core.moved import LINEAR, Moved
from addax_ds.core.shard import Shard
from addax_ds.engines.base import OnGradient, ShardedEngine
from addax_ds.engines.host_forward import HostForward


class Zero3(ShardedEngine):
    """A model whose parameters DeepSpeed has partitioned."""

    name = "zero3"

    def __init__(
        self, model: nn.Module, skeleton: nn.Module, offload: DeepSpeedZeRoOffload, device: torch.device
    ) -> None:
        super().__init__(model, skeleton)
        if functional.linear is zero3_linear_wrap:  # put there for the whole process, as ours then is
            functional.linear = _linear
        self._offload = offload
        self._device = device
        # Captured once: reading module._parameters inside a forward makes DeepSpeed register the
        # parameter as external and keep it gathered for ever.
        named: dict[str, Any] = dict(model.named_parameters())
        self._parameters = {name: named[name] for name in self.names}
        self._owned = {
            path: [self._parameters[name] for name in dict.fromkeys(owned.values())]
            for path, owned in self.owners.items()
        }
        self._handles: list = []
        self._prefetched: str | None = None  # path of a module of the unit whose gather is under way
        self._pending: Any = None  # what to wait for until it is there
        # The reduce-scatter under way: what to wait for, the memory it reads, and what comes after it.
        self._reducing: tuple[Any, torch.Tensor, Callable[[], None]] | None = None
        self._backward = -1  # autograd's number of the backward that it belongs to

    @property
    def device(self) -> torch.device:
        return self._device

    def is_gathered(self, path: str) -> bool:
        return all(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in self._owned[path])

    def weight(self, path: str, local: str) -> torch.Tensor:
        return self._parameters[self.owners[path][local]].data

    @contextlib.contextmanager
    def gather(self, path: str):
        if self._prefetched is None or path not in self.gathered_with[self._prefetched]:
            self.drop_prefetched()
            self.prefetch(path)
        self._wait()
        try:
            yield
        finally:
            self._partition(path)

    def prefetch(self, path: str) -> None:
        absent = [p for p in self._unit(path) if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            _forget_secondary(absent)  # a unit is gathered from one kind of partition
            self._pending = absent[0].all_gather_coalesced(absent)
            self._prefetched = path

    def _unit(self, path: str) -> list:
        return list({id(p): p for owner in self.gathered_with[path] for p in self._owned[owner]}.values())

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
        self._prefetched, self._pending = None, None

    def drop_prefetched(self) -> None:
        path = self._prefetched
        if path is not None:
            self._wait()
            self._partition(path)

    def _partition(self, path: str) -> None:
        unit = self._unit(path)
        unit[0].partition(param_list=unit)
        _forget_secondary(unit)  # no backward follows that would read it

    def shard(self, name: str) -> Shard:
        return _shard_of(name, self._parameters[name])

    def share(self, name: str) -> tuple[int, dist.ProcessGroup | None]:
        parameter = self._parameters[name]
        return parameter.ds_tensor.ds_numel, parameter.ds_process_group

    def is_primary_copy(self) -> bool:
        return True

    def whole(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.detach().clone()

    def attach(self, parameters: dict[str, nn.Parameter], gathered: Callable[[], None], on_gradient: OnGradient):
        for path in self.owners:
            # Registered after DeepSpeed's own, so that it runs with the module's weights gathered.
            self._handles.append(self._modules[path].register_forward_pre_hook(lambda *_: gathered()))
        for name in parameters:
            parameter = self._parameters[name]
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._reduce(name, on_gradient)))

        hooks = [self._offload.fwd_pre_hook, *self._offload.forward_hooks]
        self._gathers = HostForward(self.model, hooks, gathered, self.failed_on)

    def _reduce(self, name: str, on_gradient: OnGradient) -> Callable[[Any], None]:
        def hook(parameter: Any) -> None:
            gradient, parameter.grad = parameter.grad, None
            part, whole, work = self._reduce_scatter(parameter, gradient)
            mine = part[: self.shard(name).local.numel()]
            if self._backward != (backward := torch._C._current_graph_task_id()):
                self._backward, self._reducing = backward, None  # not what a failed backward has left
                # Called by autograd at the end of this backward.
                torch.autograd.Variable._execution_engine.queue_callback(self._finish_reducing)
            self._finish_reducing()
            self._reducing = work, whole, lambda: on_gradient(name, mine)

        return hook

    def _reduce_scatter(
        self, parameter: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dist.Work | None]:
        """This rank's part of the sum, the memory that it is read from, and what to wait for."""
        group, size = parameter.ds_process_group, parameter.ds_tensor.ds_numel
        whole = gradient.reshape(-1)
        padding = size * dist.get_world_size(group) - whole.numel()
        if padding:
            whole = nn.functional.pad(whole, (0, padding))
        if dist.get_world_size(group) == 1:
            return whole, whole, None
        part = whole.new_empty(size)
        return part, whole, dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)

    def _finish_reducing(self) -> None:
        """Apply the gradient whose reduce-scatter ran while the next one was computed."""
        reducing, self._reducing = self._reducing, None
        if reducing is not None:
            work, _, apply = reducing
            if work is not None:
                work.wait()
            apply()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._gathers.detach()
        self._handles = []

    def before_step(self) -> None:
        self._drop_gathered()

    def after_step(self, backward_ran: bool) -> None:
        if self._device.type == "cuda":
            # DeepSpeed gathers on a stream of its own, which would not wait for the writes of this step.
            torch.cuda.current_stream().synchronize()
        self._drop_gathered()

    def _drop_gathered(self) -> None:
        self._reducing = None  # left by a backward that failed
        # What is still gathered is not gathered again: persistent parameters and everything within
        # the reuse distance would go on with the weights of before the update.
        self._offload.partition_all_parameters()
        _forget_secondary(self._parameters.values())  # they hold the same old weights


def shards_of(model: nn.Module) -> Iterator[Shard]:
    """This rank's range of every parameter of a model that DeepSpeed has partitioned, before an engine holds it."""
    return (_shard_of(name, parameter) for name, parameter in model.named_parameters())


def _shard_of(name: str, parameter: Any) -> Shard:
    size = parameter.ds_tensor.ds_numel
    start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    # The last ranks' parts end in padding, which is nobody's weight.
    length = min(size, parameter.ds_numel - start)
    return Shard(name, parameter.ds_numel, start, parameter.ds_tensor.data.narrow(0, 0, length))


def _forget_secondary(parameters: Iterable) -> None:
    """Drop the copies of hpZ, which DeepSpeed makes at every release and prefers to the shards."""
    for parameter in parameters:
        parameter.ds_secondary_tensor = None


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """DeepSpeed's linear function, which would ask for the whole copy of a head that guests make in pieces."""
    linear = LINEAR if isinstance(weight, Moved) else zero3_linear_wrap
    return linear(input, weight, bias)
