"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, as peft names them."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from addax_ds.adapters.attach import adapted, new_adapters, put
from addax_ds.config import TensorTrainConfig, build
from addax_ds.core.shard import Shard
from addax_ds.digest import digest_of
from addax_ds.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KIND = "TENSOR_TRAIN"


def backbone(model: nn.Module, shards: Iterable[Shard]) -> Iterator[Shard]:
    """Those shards that are not of adapters, under the names they had before, in bfloat16.

    Rounded, they are the same whether the backbone was loaded in float32 or in bfloat16.
    """
    prefixes = {f"{path}." for path, _ in adapted(model)}
    for shard in shards:
        prefix = next((prefix for prefix in prefixes if shard.name.startswith(prefix)), "")
        rest = shard.name.removeprefix(prefix)
        if not (prefix and rest.startswith("adapter.")):
            name = prefix + rest.removeprefix("base_layer.")
            yield Shard(name, shard.numel, shard.start, shard.local.bfloat16())


def whole_backbone_digest(model: nn.Module) -> str:
    """Digest of the backbone of a model whose weights are whole here."""
    whole = (Shard(name, p.numel(), 0, p.detach().reshape(-1)) for name, p in model.named_parameters())
    return digest_of(list(backbone(model, whole)))


def write_adapters(
    folder: Path, config: TensorTrainConfig, weights: dict[str, torch.Tensor], base_model: str, digest: str
) -> None:
    """Write both files to a folder. weights: of the adapters, whole; digest: of the backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    facts = {"peft_type": KIND, "base_model_name_or_path": base_model, "backbone_digest": digest}
    settings = {**facts, **dataclasses.asdict(config)}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the adapters by name."""
    prefixes = tuple(f"{path}.adapter." for path, _ in adapted(model))
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}


def load_adapters(model: nn.Module, folder: Path) -> TensorTrainConfig:
    """Put the adapters of a folder into a model that is whole here, and return their settings.

    Raises `UserError` where the folder holds none, or another backbone's, or damaged ones.
    """
    settings = read_adapter_config(folder)
    if settings.pop("peft_type") != KIND:
        raise UserError(f"{folder}: these are no tensor-train adapters: load them with peft")
    base_model, digest = settings.pop("base_model_name_or_path", "another"), settings.pop("backbone_digest", "")
    if digest != whole_backbone_digest(model):
        raise UserError(another_backbone(folder, base_model))
    config: TensorTrainConfig = build(TensorTrainConfig, settings, str(folder / CONFIG))
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): restore it") from None
    adapters = new_adapters(model, config)
    own = {f"{path}.adapter.{name}": p for path, adapter in adapters.items() for name, p in adapter.named_parameters()}
    if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in weights.items()}:
        raise UserError(f"{folder / WEIGHTS} does not hold the weights that {CONFIG} describes: restore both")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    put(model, adapters)
    return config


def another_backbone(folder: Path, base_model: Any) -> str:
    """What is wrong with adapters of a folder, in a line whatever name their settings give."""
    name = shorten(str(base_model), 100, placeholder="...")
    return f"{folder}: they belong to the backbone {name}, and this model has other weights: set model to that"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings beside adapters, peft's or ours, told apart by "peft_type"."""
    try:
        settings = json.loads((folder / CONFIG).read_bytes())
    except OSError as error:
        raise UserError(f"{folder / CONFIG}: {error.strerror}: give a folder with adapters") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({error}): restore it") from None
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise UserError(f"{folder / CONFIG} does not describe adapters: restore it")
    return settings
