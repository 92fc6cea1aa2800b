"""Activation checkpointing in the host's forward: what of it a step can live with."""

from torch import nn

from addax_ds.errors import UserError


def refuse_reentrant(model: nn.Module) -> None:
    """Raises `UserError` where Hugging Face layers checkpoint with use_reentrant=True.

    Each reentrant segment runs a backward of its own, so a weight that two segments share would get
    a second gradient, taken after the first one was applied.
    """
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(checkpoint, "keywords", {}).get(
            "use_reentrant"
        ):
            raise UserError(
                "reentrant activation checkpointing cannot be used with Addax: enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
