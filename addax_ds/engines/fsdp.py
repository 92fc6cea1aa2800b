"""FSDP2: `fully_shard` on a device mesh, one or two dimensions (HSDP)."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from addax_ds.core.hollow import give_memory
from addax_ds.core.shard import Shard
from addax_ds.core.skeleton import strip
from addax_ds.engines.base import OnGradient, ShardedEngine
from addax_ds.engines.host_forward import HostForward
from addax_ds.engines.units import units_of
from addax_ds.errors import UserError

_SKELETON = "_addax_skeleton"


def shard(model: nn.Module, mesh: DeviceMesh, **fully_shard_options) -> nn.Module:
    """Wrap `model` for Addax with FSDP2, in place, and return it.

    mesh: one dimension shards over all ranks; two are (replicate, shard), HSDP. Options such as
    `offload_policy` go to every `fully_shard` call. Embedding, every block, norm and head become
    units of their own, modules with tied weights one unit together. Raises `UserError` where the
    model is already wrapped, or the mesh or an option would give wrong numbers.
    """
    if "mp_policy" in fully_shard_options:
        raise UserError("mp_policy would not cast zeroth-order forwards: load the model in bfloat16 instead")
    return wrap(model, mesh, **fully_shard_options)


def wrap(model: nn.Module, mesh: DeviceMesh, **fully_shard_options) -> nn.Module:
    """See `shard`; with an `mp_policy` for first-order training alone, and hollow parameters, whose shards follow."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UserError("the model is already wrapped by fully_shard: give addax_ds.shard the plain model")
    if mesh.size() != dist.get_world_size() or mesh.ndim > 2:
        raise UserError("the mesh must hold every rank in one dimension, or two (replicate, shard)")
    if "shard_placement_fn" in fully_shard_options or any(isinstance(p, DTensor) for p in model.parameters()):
        raise UserError("only dimension 0 can be sharded, by fully_shard alone: leave out other placements")
    refuse_fsdp1(model)
    skeleton = strip(model)
    _refuse_mixed_dtypes(model)
    for paths in units_of(model):
        modules = [model.get_submodule(path) for path in paths]
        give_memory((parameter for module in modules for parameter in module.parameters()), mesh.device_type)
        fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, **fully_shard_options)
    give_memory(model.parameters(), mesh.device_type)
    fully_shard(model, mesh=mesh, **fully_shard_options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are weighted over the global batch already, so gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Beside the module's own attributes: a skeleton is no submodule of the model.
    model.__dict__[_SKELETON] = skeleton
    return model


def _refuse_mixed_dtypes(model: nn.Module) -> None:
    """FSDP2 gathers the trainable weights of a unit together, as one type."""
    unit_of = {path: number for number, paths in enumerate(units_of(model)) for path in paths}
    first_of: dict[int, tuple[str, torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # What lies in no unit is gathered with the root.
            unit = next((number for path, number in unit_of.items() if name.startswith(f"{path}.")), -1)
            first, dtype = first_of.setdefault(unit, (name, parameter.dtype))
            if parameter.dtype != dtype:
                raise UserError(
                    f"{first} is {dtype} and {name}, gathered with it, {parameter.dtype}: load the model in one type"
                )


def refuse_fsdp1(model: nn.Module) -> None:
    """FSDP1 flattens parameters together and never fires their hooks."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UserError("FSDP1 (FullyShardedDataParallel) is not supported: wrap the model with addax_ds.shard")


def skeleton_of(model: nn.Module) -> nn.Module:
    """The skeleton that `shard` took before wrapping."""
    if _SKELETON not in model.__dict__:
        raise UserError("the model was wrapped by fully_shard itself: wrap the plain model with addax_ds.shard")
    return model.__dict__[_SKELETON]


class FSDP(ShardedEngine):
    """A model wrapped by `addax_ds.shard`."""

    name = "fsdp"

    def __init__(self, model: nn.Module, skeleton: nn.Module) -> None:
        super().__init__(model, skeleton)
        self._root = cast(Any, model)  # FSDP2 gives modules further methods
        self._unit_of: dict[str, Any] = {}
        for unit in self.units:
            self._unit_of.update(dict.fromkeys(self.owners_in(unit), model.get_submodule(unit[0])))
        # What no unit holds stays with the root.
        for owner in self.owners:
            self._unit_of.setdefault(owner, model)
        self._first_owner: dict[str, tuple[nn.Module, str]] = {}
        for path, owned in self.owners.items():
            for local, name in owned.items():
                self._first_owner.setdefault(name, (self._modules[path], local))
        self._starts: dict[str, int] = {}  # of this rank's shard of each parameter
        self._hooked: dict[str, nn.Parameter] = {}
        self._handles: list = []
        self._prefetched: Any = None  # the unit whose gather is under way
        self._order: dict[str, None] = {}  # first module of each unit, as forwards of the host enter them
        self._overlapped = False
        parameter = self._registered(self.names[0])
        self._mesh = parameter.device_mesh
        self._device = torch.device(self._mesh.device_type)
        # The engine's units take the root's state at the first forward; guests may come before it.
        self._root._get_fsdp_state()._lazy_init()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self._device.type == "cuda" else self._device

    def is_primary_copy(self) -> bool:
        return self._mesh.ndim == 1 or self._mesh.get_local_rank(0) == 0

    def _registered(self, name: str) -> Any:
        """The parameter as its module holds it now: FSDP2 swaps it at every (un)shard."""
        module, local = self._first_owner[name]
        return module._parameters[local]

    def is_gathered(self, path: str) -> bool:
        parameters = self._modules[path]._parameters
        return not any(isinstance(parameters[local], DTensor) for local in self.owners[path])

    def weight(self, path: str, local: str) -> torch.Tensor:
        return self._modules[path]._parameters[local]

    @contextlib.contextmanager
    def gather(self, path: str):
        unit = self._unit_of[path]
        if unit is not self._prefetched:
            self.drop_prefetched()
        self._prefetched = None
        unit.unshard()  # waits for the prefetch, if there was one
        try:
            yield
        finally:
            unit.reshard()

    def prefetch(self, path: str) -> None:
        unit = self._unit_of[path]
        if not self.is_gathered(path):
            unit.unshard(async_op=True)
            self._prefetched = unit

    def drop_prefetched(self) -> None:
        unit, self._prefetched = self._prefetched, None
        if unit is not None:
            unit.unshard()
            unit.reshard()

    def shard(self, name: str) -> Shard:
        parameter = self._registered(name)
        if not isinstance(parameter, DTensor):
            raise RuntimeError(f"{name} is gathered: its shard cannot be taken now")
        if name not in self._starts:  # it takes longer than the launch of an update
            self._starts[name] = _start(parameter)
        return Shard(name, parameter.numel(), self._starts[name], parameter._local_tensor.detach().view(-1))

    def share(self, name: str) -> tuple[int, dist.ProcessGroup | None]:
        parameter = self._registered(name)
        group = self._mesh.get_group(self._mesh.ndim - 1)
        if not parameter.ndim:
            return parameter.numel(), group
        rows = -(-parameter.shape[0] // dist.get_world_size(group))
        return rows * (parameter.numel() // parameter.shape[0]), group

    def whole(self, name: str) -> torch.Tensor:
        # With CPU offload a shard lies where the group of ranks cannot gather it.
        return self._registered(name).detach().to(self.device).full_tensor().clone()

    def attach(self, parameters: dict[str, nn.Parameter], gathered: Callable[[], None], on_gradient: OnGradient):
        for unit in self.units:
            for path in unit:
                # Registered after wrapping, so that it runs with the unit gathered.
                self._handles.append(self._modules[path].register_forward_pre_hook(self._enter(unit[0], gathered)))
        for name, parameter in parameters.items():
            self._hooked[name] = parameter
            # FSDP2 itself calls these hooks of the sharded parameter right after the reduce-scatter.
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._take(name, on_gradient)))
        self._gathers = HostForward(self.model, self._own_hooks(), gathered, self.failed_on)

    def _own_hooks(self) -> list[Any]:
        """FSDP2's own around forwards."""
        states = [module._get_fsdp_state() for module in self.model.modules() if isinstance(module, FSDPModule)]
        both = [handle for s in states for handle in (s._pre_forward_hook_handle, s._post_forward_hook_handle)]
        # Modules that are gathered together have one handle for all their hooks.
        return [hook for handle in both for hook in getattr(handle, "handles", [handle])]

    def _enter(self, unit: str, gathered: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._order.setdefault(unit)
            gathered()

        return hook

    def _overlap_gathers(self) -> None:
        """Have each unit of the host begin the gather of the next; FSDP2 itself does so on GPUs only, by streams."""
        self._root._set_unshard_async_op(True)
        for unit, following in itertools.pairwise(self._order):
            module = cast(FSDPModule, self._modules[unit])
            module.set_modules_to_forward_prefetch([cast(FSDPModule, self._modules[following])])

    def _take(self, name: str, on_gradient: OnGradient) -> Callable[[Any], None]:
        def hook(parameter: Any) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient._local_tensor.device.type != self._device.type:
                # CPU offload: the copy to the CPU may still be under way.
                torch.cuda.current_stream().synchronize()
            on_gradient(name, gradient._local_tensor.view(-1))

        return hook

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._gathers.detach()
        self._handles, self._hooked = [], {}

    def before_step(self) -> None:
        for name, parameter in self._hooked.items():
            if self._registered(name) is not parameter and isinstance(self._registered(name), DTensor):
                raise UserError(
                    f"{name} was replaced after the optimizer was built (load_state_dict(assign=True) does that) "
                    "and would no longer be trained: build Addax again"
                )
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                for group in parameter_groups_of(module._get_fsdp_state()):
                    _check(group)
                    _end_gather(group)

    def after_step(self, backward_ran: bool) -> None:
        if backward_ran and self._order and self._device.type == "cpu" and not self._overlapped:
            self._overlap_gathers()
            self._overlapped = True
        # A forward without its backward leaves units gathered and listed for a prefetch.
        state = self._root._get_fsdp_state()
        if backward_ran or state._is_root is None:
            return
        if hasattr(self._root, "reset_iter_state"):
            self._root.reset_iter_state()
        else:
            _reset_iteration(state)
        for unit in state._state_ctx.all_states:
            for group in parameter_groups_of(unit):
                for parameter in group.fsdp_params:
                    _forget_gradients(parameter)


def shards_of(model: nn.Module) -> Iterator[Shard]:
    """This rank's range of every parameter of a model that `wrap` has sharded, before an engine holds it."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        yield Shard(name, parameter.numel(), _start(parameter), parameter._local_tensor.detach().view(-1))


def _start(parameter: DTensor) -> int:
    """The first element of this rank's shard of a parameter."""
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.numel() // parameter.shape[0] if parameter.ndim and parameter.shape[0] else 1
    return min(offset[0] * row, parameter.numel()) if parameter.ndim else 0


def _check(group: Any) -> None:
    """Raises `UserError` for settings of FSDP2 that would spoil a step."""
    if not group.reduce_grads:
        raise UserError(
            "set_requires_gradient_sync(False) (accelerate's no_sync) would drop gradients in silence: "
            "leave it on; train_step cuts batches into micro-batches itself"
        )
    if not group.all_reduce_grads:
        raise UserError("set_requires_all_reduce(False) would drop gradients in silence: leave it at True")
    if not group.reshard_after_backward:
        raise UserError("set_reshard_after_backward(False) would leave old weights gathered: leave it at True")


def _end_gather(group: Any) -> None:
    """Drop what a forward that went no further has begun to gather: the weights may have changed since."""
    if group._all_gather_result is not None:
        group.wait_for_unshard()
        group.reshard()


def _forget_gradients(parameter: Any) -> None:
    """Drop what a failed backward has left on a unit: the next one would add to it."""
    parameter.unsharded_accumulated_grad = None
    if hasattr(parameter, "_unsharded_param"):
        parameter._unsharded_param.grad = None


def _reset_iteration(root: Any) -> None:
    """What `reset_iter_state` of torch 2.13 does after a forward that no backward followed."""
    root._comm_ctx.all_gather_state = None
    root._comm_ctx.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        for group in parameter_groups_of(state):
            group.wait_for_unshard()
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group.reshard()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


def parameter_groups_of(state: Any) -> list:
    """FSDP2's parameter groups of a unit's state, for every supported torch."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
