"""Weights from safetensors files straight into shards: no rank holds the whole model.

A model is made with hollow parameters, each of which has a place in a file. Once an engine has
sharded it, every rank reads the ranges of its own shards.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from addax_ds.config import PrefixConfig, RunConfig
from addax_ds.core.hollow import hollow
from addax_ds.core.shard import Shard
from addax_ds.core.skeleton import link_buffers
from addax_ds.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a safetensors file, and its name in it."""

    file: str
    key: str

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in the file's type; whole rows are read."""
        with safe_open(self.file, framework="pt") as file:  # a file left open keeps in memory what was read of it
            tensor = file.get_slice(self.key)
            shape = tensor.get_shape()
            if not shape:
                return file.get_tensor(self.key).view(1)[start:stop]
            row = math.prod(shape[1:])
            first = start // row
            rows = tensor[first : -(-stop // row)]
            return rows.reshape(-1)[start - first * row : stop - first * row]


Unread: TypeAlias = Mapping[str, Place]
"""Hollow parameters of a model by name, and where their values lie.

It holds none of them: FSDP2 puts others in their place, and whole weights would stay on the GPU with what holds them.
"""
NOTHING: Unread = MappingProxyType({})
"""Of a model that is whole."""


def may_stay_in_files(config: RunConfig, ds_config: dict[str, Any]) -> bool:
    """Whether the run's engine shards weights, and nothing looks at them before."""
    zero = ds_config.get("zero_optimization", {})
    # Of quantized weights and those on NVMe a shard is no range of the weight's own memory.
    odd = any(key.startswith("zero_quantized") for key in zero) or "nvme" in str(zero.get("offload_param"))
    shards = config.engine == "fsdp" or (zero.get("stage") == 3 and not odd)
    # A prefix begins as keys and values of the backbone; adapters of a folder belong to one of a digest.
    return shards and not isinstance(config.adapter, PrefixConfig) and config.adapter_weights is None


def open_weights(location: str, make: Callable[..., Any]) -> tuple[Any, dict[nn.Parameter, Place]] | None:
    """A model with hollow parameters, its buffers as they are when it is loaded, and the places of its weights.

    make: loads it by `from_pretrained` with these options. None where its weights are not in safetensors
    files, one tensor there for one here.
    """
    files = _files(location)
    if not files:
        return None
    # Nothing is read: transformers sees that everything is there and fits, and says what does not.
    model = make(device_map="meta")
    places = _places(model, files)
    if places is None:
        return None
    saved = {name: places[id(buffer)] for name, buffer in model.named_buffers() if id(buffer) in places}
    with init_empty_weights(include_buffers=False):
        computed = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    link_buffers(model, computed)
    fill((Shard(name, b.numel(), 0, b.view(-1)) for name, b in model.named_buffers() if name in saved), saved)
    return model, _hollowed(model, places)


def _files(location: str) -> list[str]:
    """The safetensors files of a model, a folder or a hub id; none where it has others, or none at all."""
    try:
        return [str(cached_file(location, SAFE_WEIGHTS_NAME))]
    except OSError:
        pass
    try:
        index = json.loads(Path(str(cached_file(location, SAFE_WEIGHTS_INDEX_NAME))).read_bytes())
        return [str(cached_file(location, name)) for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _places(model: Any, files: list[str]) -> dict[int, Place] | None:
    """The place of each weight and saved buffer, by its id; None where they are not there one for one."""
    if getattr(model, "_weight_conversions", None) or getattr(model.config, "transformers_weights", None):
        return None
    found: dict[str, tuple[Place, list[int]]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found.update({key: (Place(path, key), file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118

    def place_of(name: str) -> tuple[Place, list[int]] | None:
        # A file may be that of the model without its head, or the other way round.
        prefix = f"{model.base_model_prefix}."
        keys = (name, name.removeprefix(prefix), prefix + name)
        return next((found[key] for key in keys if key in found), None)

    if any(place_of(one) and place_of(other) for one, other in model.all_tied_weights_keys.items()):
        return None  # tied if they are equal, for which they have to be read
    places: dict[int, Place] = {}
    named = model.state_dict(keep_vars=True)
    for name, tensor in named.items():
        there = place_of(name)
        if there is not None and there[1] == list(tensor.shape):
            places[id(tensor)] = there[0]
    return places if all(id(tensor) in places for tensor in named.values()) else None


def _hollowed(model: nn.Module, places: dict[int, Place]) -> dict[nn.Parameter, Place]:
    """Put hollow parameters in place of those on the meta device, tied ones once."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(parameter, nn.Parameter(hollow(parameter.shape, parameter.dtype)))
                module._parameters[local] = made[parameter]
    return {parameter: places[id(before)] for before, parameter in made.items()}


def by_name(model: nn.Module, places: Mapping[nn.Parameter, Place]) -> Unread:
    """The places of a model's hollow parameters by the names that they have now."""
    return {name: places[parameter] for name, parameter in model.named_parameters() if parameter in places}


@torch.no_grad()
def fill(shards: Iterable[Shard], unread: Unread) -> None:
    """Read the shards that have a place. Raises `UserError` where a file cannot be read."""
    left = dict(unread)
    for shard in shards:
        place = left.pop(shard.name, None)
        if place is None or not shard.local.numel():
            continue
        try:
            shard.local.copy_(place.read(shard.start, shard.start + shard.local.numel()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{place.file} cannot be read ({error}): restore it") from None
    assert not left, f"there are no shards of {min(left)} to read it into"
