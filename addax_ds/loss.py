"""The default loss: per sample, the mean cross entropy over its label tokens."""

import inspect
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy

IGNORED = -100


def token_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy over each sample's label tokens: float32 [batch].

    batch: what a causal language model takes, with `labels` [batch, tokens] that are -100 wherever
    no token is to be predicted; labels are shifted here. A sample without label tokens has loss 0.
    Where the model allows it, logits are computed at the positions that predict a label only.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().view(-1)
    targets = targets[:, columns]
    if takes_logits_to_keep(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (targets != IGNORED).sum(dim=1).clamp(min=1)
    return losses.view_as(targets).sum(dim=1) / counted


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can compute logits at chosen positions (most Hugging Face decoders)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
