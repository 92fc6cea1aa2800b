"""Skeletons: a model's module tree without its parameters, which guests run through."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from addax_ds.errors import UserError


class Absent(torch.Tensor):
    """Stands for a weight outside its module's forward: answers shape, dtype and device only.

    A meta tensor in its place would not fail but silently give meta results.
    """

    weight_name: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        absent = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        absent.weight_name = name
        return absent

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        absent = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Absent)]
        name = absent[0].weight_name if absent else "a weight"
        reader = ".".join(name.split(".")[:-2]) or "*"
        raise UserError(
            f"{name} is read outside the forward of the module that owns it ({function}), and zeroth-order forwards "
            f"hold it only there: set atomic to the module that reads it, for example [{reader}], or have the loss "
            "function call the module that owns it"
        )


def strip(model: nn.Module) -> nn.Module:
    """A deep copy of `model` in evaluation mode, with placeholders for parameters and shared buffers.

    Take it before the model is sharded: FSDP2 modules cannot be copied, and what engines hang on
    modules is not for guests. Raises `UserError` for a forward that a copy would share.
    """
    for path in own_forwards(model):
        module = model.get_submodule(path)
        if hasattr(module, "_orig_mod"):
            raise UserError(
                f"{path or 'the model'} was wrapped by torch.compile, of which there is no copy for zeroth-order "
                "forwards: compile modules in place, with module.compile()"
            )
        if getattr(module.__dict__["forward"], "__self__", None) is not module:
            raise UserError(
                f"{path or 'the model'}.forward was replaced by a function that is no method of it, through which "
                "zeroth-order forwards would run the model itself: bind it with types.MethodType"
            )
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        # ZeRO-3's parameters keep their whole shape aside once they are partitioned.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        memo[id(parameter)] = Absent(name, shape, parameter.dtype, parameter.device)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo).eval()


def own_forwards(model: nn.Module) -> set[str]:
    """Paths of modules whose forward is not their class's, as accelerate makes it."""
    return {path for path, module in model.named_modules() if "forward" in module.__dict__}


def duplicate(skeleton: nn.Module) -> nn.Module:
    """Another skeleton like this one, for another guest: modules of its own, shared placeholders and buffers."""
    memo: dict[int, object] = {id(p): p for module in skeleton.modules() for p in module._parameters.values()}
    memo.update({id(buffer): buffer for buffer in skeleton.buffers()})
    return copy.deepcopy(skeleton, memo)


def owned_weights(skeleton: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """(module path, module, {local name: parameter name}) of every module that owns parameters itself.

    The parameter name is the first under which `named_parameters` lists it, so that tied weights
    have one name.
    """
    for path, module in skeleton.named_modules():
        owned = {local: p.weight_name for local, p in module._parameters.items() if p is not None}
        if owned:
            yield path, module, owned


def link_buffers(skeleton: nn.Module, model: nn.Module) -> None:
    """Point the skeleton at the model's present buffers, which `model.to()` may have replaced."""
    targets = dict(skeleton.named_modules())
    for path, module in model.named_modules():
        target = targets.get(path)
        if target is not None:
            target._buffers.update(module._buffers)
