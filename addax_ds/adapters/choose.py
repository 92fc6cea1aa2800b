"""The adapters that a run asks for: put into a model, written, and loaded again."""

from pathlib import Path

import torch
from torch import nn

from addax_ds.adapters import through_peft
from addax_ds.adapters.attach import add_adapters
from addax_ds.adapters.files import KIND, load_adapters, read_adapter_config
from addax_ds.config import AdapterConfig, TensorTrainConfig
from addax_ds.errors import UserError

_PEFT_TYPES = {"tensor-train": KIND, "lora": "LORA", "prefix": "PREFIX_TUNING"}


def adapt(model: nn.Module, config: AdapterConfig, weights: str | None, seed: int) -> nn.Module:
    """The model with adapters, which alone are trained: those of a folder, or new ones, alike on every rank.

    Raises `UserError` where they do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is not None:
            return _loaded(model, config, Path(weights))
        if isinstance(config, TensorTrainConfig):
            add_adapters(model, config)
            return model
        return through_peft.add(model, config)


def _loaded(model: nn.Module, config: AdapterConfig, folder: Path) -> nn.Module:
    if read_adapter_config(folder)["peft_type"] != _PEFT_TYPES[config.kind]:
        raise UserError(f"{folder} holds adapters of another kind than {config.kind}: set adapter.kind to theirs")
    if not isinstance(config, TensorTrainConfig):
        return through_peft.load(model, config, folder)
    settings = load_adapters(model, folder)
    if settings != config:
        raise UserError(f"{folder} holds adapters with other settings: set adapter to those in its adapter_config.json")
    return model
