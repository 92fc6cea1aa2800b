"""Dropout in the host's forward, on or off."""

from torch import nn


def set_dropout(model: nn.Module, enabled: bool) -> None:
    """Training mode with dropout, or a forward without any.

    Hugging Face models checkpoint activations in training mode only, so layers that checkpoint stay
    in it; what they drop themselves is switched off by its probability.
    """
    model.train(enabled)
    if enabled:
        return
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for attribute, value in vars(module).items():
                if "drop" in attribute and isinstance(value, float):
                    setattr(module, attribute, 0.0)
