"""Losses per sample: over label tokens (the default), or over a task's label words."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from addax_ds.errors import UserError

IGNORED = -100

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""loss_fn(model, batch) -> [batch], a loss per sample; a batch is what the model takes."""


def per_sample(losses: torch.Tensor, samples: int | None = None) -> torch.Tensor:
    """What a loss function returned, as float32 [samples]; raises `UserError` where it is anything else."""
    is_tensor = isinstance(losses, torch.Tensor)
    if not is_tensor or losses.ndim != 1 or samples not in (None, len(losses)):
        expected = "n" if samples is None else samples
        given = list(losses.shape) if is_tensor else type(losses).__name__
        raise UserError(f"loss_fn must return one loss per sample, [{expected}]: it returned {given}")
    return losses.float()


def token_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy over each sample's label tokens: float32 [batch].

    batch: what a causal language model takes, with `labels` [batch, tokens] that are -100 wherever
    no token is to be predicted; labels are shifted here. A sample without label tokens has loss 0.
    Where the model allows it, logits are computed at the positions that predict a label only.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    columns = _target_columns(targets)
    targets = targets[:, columns]
    logits = _logits_at(model, inputs, columns)
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (targets != IGNORED).sum(dim=1).clamp(min=1)
    return losses.view_as(targets).sum(dim=1) / counted


def choice_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the right label word among all of them: float32 [batch].

    batch: see `choice_scores`, with `answer` [batch], the index of the right word. Source: MeZO
    (Malladi et al., NeurIPS 2023), classification by label words.
    """
    return cross_entropy(choice_scores(model, batch), batch["answer"], reduction="none")


def choice_scores(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Score of every label word of each sample, the likeliest highest: float32 [batch, words].

    batch: prompts [batch, tokens] with `choices` [batch, words], where each word is one token; or a
    row for every word, [batch, words, tokens], with `labels` on the word's tokens, whose mean log
    likelihood then counts, so that a longer word is at no disadvantage.
    """
    if "choices" not in batch:
        rows = {key: value.flatten(0, 1) for key, value in batch.items() if key != "answer"}
        return -token_loss(model, rows).unflatten(0, batch["input_ids"].shape[:2])
    inputs = {key: value for key, value in batch.items() if key not in ("choices", "answer")}
    columns, column_of = _last_columns(batch["attention_mask"])
    logits = _logits_at(model, inputs, columns)
    samples = torch.arange(len(column_of), device=column_of.device)
    return logits[samples, column_of].float().gather(1, batch["choices"])


def _target_columns(targets: torch.Tensor) -> torch.Tensor:
    """Where any sample's targets [batch, tokens] are to be predicted: [n]."""
    return (targets != IGNORED).any(dim=0).nonzero().view(-1)


def _last_columns(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where prompts end, whichever side the padding of `mask` [batch, tokens] is on: [n]; which of these each has."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * positions).argmax(dim=1).unique(return_inverse=True)


def _logits_at(model: nn.Module, inputs: Mapping[str, torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """Logits at some positions [n] of every sample: [batch, n, vocabulary]."""
    if takes_logits_to_keep(model):
        return model(**inputs, use_cache=False, logits_to_keep=columns).logits
    return model(**inputs).logits[:, columns]


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can compute logits at chosen positions (most Hugging Face decoders)."""
    inside: Any = getattr(model, "module", model)  # a DeepSpeed engine's forward takes anything, as peft's does
    inside = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
    return "logits_to_keep" in inspect.signature(inside.forward).parameters
