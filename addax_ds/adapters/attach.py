"""Adapters put into a model, told apart from its backbone, and merged into it."""

import fnmatch
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from addax_ds.adapters.adapter import Adapted, TensorTrainAdapter, output_size
from addax_ds.config import TensorTrainConfig, nearest
from addax_ds.errors import UserError

_LLAMA = ("*.self_attn.o_proj", "*.mlp.down_proj")
_BERT = ("*.attention.output.dense", "*.layer.*.output.dense")
PROJECTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3", "olmo2"), _LLAMA),
    **dict.fromkeys(("bert", "roberta", "electra"), _BERT),
    "opt": ("*.self_attn.out_proj", "*.fc2"),
    "gpt2": ("*.attn.c_proj", "*.mlp.c_proj"),
}
"""Last projections of attention and of the feed-forward part, by the model's type: before the residual is added."""


def add_adapters(model: nn.Module, config: TensorTrainConfig) -> None:
    """Put an adapter behind every projection that `config` names, and freeze everything else.

    Before the model is put on an engine. Raises `UserError` for a model type without known
    projections, for a pattern that matches nothing, for modes that do not fit, and for a model that
    has adapters already; the model is then as it was.
    """
    put(model, new_adapters(model, config))


def new_adapters(model: nn.Module, config: TensorTrainConfig) -> dict[str, TensorTrainAdapter]:
    """An adapter for each projection that `config` names, by the projection's path."""
    if any(adapted(model)):
        raise UserError("the model has adapters already: add them once")
    paths = matching(model, config)
    return {path: TensorTrainAdapter(output_size(path, model.get_submodule(path)), config) for path in paths}


def put(model: nn.Module, adapters: dict[str, TensorTrainAdapter]) -> None:
    """Put these adapters behind their projections, and freeze everything else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, adapter in adapters.items():
        projection = model.get_submodule(path)
        device = next(projection.parameters()).device
        model.set_submodule(path, Adapted(projection, adapter.to(device)))


def matching(model: nn.Module, config: TensorTrainConfig) -> list[str]:
    """Paths of the projections that adapters are to follow, in the model's order."""
    patterns = config.modules
    if patterns is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in PROJECTIONS:
            raise UserError(
                f"where adapters go in a {kind} is not known: name projections in modules, as '*.down_proj'"
            )
        patterns = PROJECTIONS[kind]
    linear = [path for path, module in model.named_modules() if path and module._parameters]
    for pattern in patterns:
        if not fnmatch.filter(linear, pattern):
            leaves = sorted({f"*.{path.rpartition('.')[2]}" for path in linear})
            raise UserError(f"modules: {pattern} matches no projection of the model{nearest(pattern, leaves)}")
    return [path for path in linear if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Path of each projection that an adapter follows, and both of them."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield path, module


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Multiply linear adapters into the projections that they follow, and take them out.

    y = x W + b becomes y (I + A) + a = x W (I + A) + b (I + A) + a. Raises `UserError`, with the model
    as it was, where no weight is equal to it: with an activation between the layers of an adapter,
    with biases behind a projection that has none, and where the projection's weights are another module's, too.
    """
    found = list(adapted(model))
    if not found:
        raise UserError("the model has no adapters: nothing is to be merged")
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in found:
        if any(holders[id(parameter)] > 1 for parameter in module.base_layer.parameters()):
            raise UserError(
                f"{path} shares its weights with another module, which a merge would change, too: keep the adapter "
                "beside the model, or untie them"
            )
        activation = module.adapter.activation
        if activation != "none":
            raise UserError(
                f"the adapter of {path} has {activation} between its layers, and no weight is equal to that: "
                "keep it beside the model, or train with activation none"
            )
        if module.adapter.up.bias is not None and module.base_layer.bias is None:
            raise UserError(f"{path} has no bias to take that of its adapter: train with bias false")
    for path, module in found:
        base: Any = module.base_layer
        factor, added = module.adapter.affine()
        # As [outputs, inputs]; transformers' Conv1D keeps [inputs, outputs].
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
        weight.copy_(weight.float() + factor.T @ weight.float())
        if base.bias is not None:
            base.bias.copy_(base.bias.float() + base.bias.float() @ factor + added)
        model.set_submodule(path, base)
