"""The Addax step on plain tensors (Li et al., ICLR 2025, algorithm 1), to be read beside the paper.

    theta <- theta - lr * (alpha * mean_q(g0_q z_q) + (1 - alpha) * g1 + weight_decay * theta)

- g0_q: mean over the long samples B^0 of (l(theta + eps z_q; x) - l(theta - eps z_q; x)) / (2 eps),
  a scalar per direction (n-SPSA, Malladi et al., NeurIPS 2023, definition 1)
- g1: mean over the short samples B^1 of grad l(theta; x)
- z_q: noise named by (step seed, q, parameter name, element), see core/noise.py

With `directions: per-micro-batch` the mean runs over micro-batches too, each weighted by its samples
and measured along directions of its own: micro-batch m along q = m * queries and those that follow.

One process, whole weights, every temporary written out. Each engine is tested against this file.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from addax_ds.config import AddaxConfig
from addax_ds.core.noise import noise, step_seed

Weights = dict[str, torch.Tensor]


def addax_step(
    model: nn.Module,
    zo_batches: list[Any],
    fo_batches: list[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    config: AddaxConfig,
    step: int,
    g0: list[float] | None = None,
) -> tuple[Weights, list[float]]:
    """Weights after step number `step` (from 0) and the projected gradients, one per direction.

    zo_batches, fo_batches: the micro-batches of the whole step; loss_fn(model, batch) -> [batch].
    g0: use these in place of evaluating them, to compare a step given its own scalars.
    """
    model = copy.deepcopy(model)
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    seed = step_seed(config.seed, step)
    if config.alpha == 0:
        measured = []
    elif config.directions == "shared":
        measured = [zo_batches] * config.queries
    else:
        measured = [[batch] for batch in zo_batches for _ in range(config.queries)]
    directions = [
        {name: _noise_like(p, name, seed, query, config) for name, p in theta.items()} for query in range(len(measured))
    ]

    if g0 is None:
        g0 = []
        for z, batches in zip(directions, measured, strict=True):
            plus = _mean_loss(model, _moved(theta, z, config.eps), batches, loss_fn)
            minus = _mean_loss(model, _moved(theta, z, -config.eps), batches, loss_fn)
            g0.append((plus - minus) / (2 * config.eps))
    samples = [sum(len(loss_fn(model, batch)) for batch in batches) for batches in measured]

    g1 = {} if config.alpha == 1 else _gradient(model, theta, fo_batches, loss_fn)

    updated = {}
    for name, weight in theta.items():
        if config.alpha == 0 and name not in g1:
            updated[name] = weight  # nothing moves a weight that neither half reaches
            continue
        direction = torch.zeros_like(weight, dtype=torch.float64)
        if name in g1:
            direction += (1 - config.alpha) * g1[name]
        for scalar, z, count in zip(g0, directions, samples, strict=True):
            direction += config.alpha * scalar * count / sum(samples) * z[name]
        direction += config.weight_decay * weight
        updated[name] = (weight - config.lr * direction).to(weight.dtype)
    return updated, g0


def _noise_like(weight: torch.Tensor, name: str, seed: int, query: int, config: AddaxConfig) -> torch.Tensor:
    drawn = noise(seed, name, 0, weight.numel(), query=query, distribution=config.distribution)
    return drawn.view_as(weight).to(weight.device)


def _moved(theta: Weights, z: Weights, scale: float) -> Weights:
    return {name: weight + scale * z[name] for name, weight in theta.items()}


def _load(model: nn.Module, weights: Weights) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def _mean_loss(model: nn.Module, weights: Weights, batches: list[Any], loss_fn: Callable) -> float:
    """Mean over samples; summed in float64, since 1 / (2 eps) multiplies every rounding."""
    _load(model, weights)
    model.eval()
    with torch.no_grad():
        return torch.cat([loss_fn(model, batch).double() for batch in batches]).mean().item()


def _gradient(model: nn.Module, theta: Weights, batches: list[Any], loss_fn: Callable) -> Weights:
    """Gradient of the mean loss; parameters that no loss reaches are left out."""
    _load(model, theta)
    model.eval()
    model.zero_grad()
    samples = sum(len(loss_fn(model, batch)) for batch in batches)
    for batch in batches:
        (loss_fn(model, batch).sum() / samples).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
