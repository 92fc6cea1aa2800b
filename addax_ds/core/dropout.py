"""Dropout in the host's forward, on or off."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def dropout(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Training mode with dropout, or forwards and backwards without any; afterwards as it was.

    Hugging Face models checkpoint activations in training mode only, so layers that checkpoint stay
    in it; what they drop themselves is switched off by its probability. The context must hold the
    backward too, which recomputes those layers.
    """
    found: list[tuple[nn.Module, str, Any]] = []

    def put(module: nn.Module, attribute: str, value: Any) -> None:
        found.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    for module in model.modules():
        checkpoints = getattr(module, "gradient_checkpointing", False)
        put(module, "training", enabled or checkpoints)
        if checkpoints and not enabled:
            for attribute, value in list(vars(module).items()):
                if "drop" in attribute and isinstance(value, float):
                    put(module, attribute, 0.0)
    try:
        yield
    finally:
        for module, attribute, value in found:
            setattr(module, attribute, value)


@contextlib.contextmanager
def dropout_seed(seed: int, device: torch.device, enabled: bool) -> Iterator[None]:
    """Masks that depend on the seed alone, so that runs repeat and resume; torch's generators stay as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=enabled):
        if enabled:
            torch.manual_seed(seed)
        yield
