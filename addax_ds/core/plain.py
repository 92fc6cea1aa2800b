"""Perturbation and fused update in plain torch operations: the backend for any device.

Every backend offers the functions of this file with the same signatures and, operation for
operation, the same rounding.
"""

from dataclasses import dataclass

import torch

from addax_ds.core.noise import Distribution, noise, noise_of_rows, rounding_bits


@dataclass(frozen=True)
class Perturbation:
    """One point theta + sign * scale * z of a step; sign 0 is theta itself."""

    seed: int = 0
    query: int = 0
    sign: int = 0
    scale: float = 0.0
    distribution: Distribution = "normal"


@dataclass(frozen=True)
class Step:
    """What one step's update needs beside weights and gradients.

    theta <- (1 - lr * weight_decay) * theta - lr * (gradient_weight * gradient + sum_q coefficients[q] * z_q)
    """

    seed: int
    lr: float
    weight_decay: float
    gradient_weight: float
    """(1 - alpha), times what turns the reduced gradient into the mean over the global batch."""
    coefficients: tuple[float, ...]
    """alpha * g0_q / Q, one per direction; empty without a zeroth-order part."""
    distribution: Distribution
    stochastic: bool
    """Stochastic rounding to bfloat16; else to nearest. Float32 weights need neither."""


CHUNK = 1 << 24  # elements drawn at a time: plain Philox needs some 100 bytes of temporaries for each


def draw(seed, name, start, stop, query, distribution, device) -> torch.Tensor:
    """Noise of elements [start, stop): float32 [stop - start] on `device`."""
    out = torch.empty(stop - start, device=device)
    for begin in range(start, stop, CHUNK):
        end = min(begin + CHUNK, stop)
        out[begin - start : end - start] = noise(
            seed, name, begin, end, query=query, distribution=distribution, device=device
        )
    return out


def perturb(
    weight: torch.Tensor,
    start: int,
    plus: torch.Tensor | None,
    minus: torch.Tensor | None,
    name: str,
    point: Perturbation,
) -> None:
    """plus <- W + scale z and minus <- W - scale z; W is only read, and a side that is None is not wanted.

    weight: elements [start, start + n) of the flattened parameter `name`, in any shape; plus and
    minus: contiguous, of its shape and dtype; a side that is wanted alone may be the weight itself.
    The sign of `point` does not enter.

    The sum is taken in float32 and rounded once. `torch.add(w, z, alpha=scale)` on bfloat16 rounds
    otherwise in its vector body than in its tail, so shards and wholes would differ.
    """
    z = draw(point.seed, name, start, start + weight.numel(), point.query, point.distribution, weight.device)
    step = (z * _float32(point.scale)).view(weight.shape)
    wide = weight.float()
    if plus is not None:
        plus.copy_(wide + step)
    if minus is not None:
        minus.copy_(wide - step)


def perturb_rows(
    weight: torch.Tensor, rows: torch.Tensor, name: str, point: Perturbation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of W + scale z and of W - scale z for a whole parameter W: [n, ...] of its dtype. rows: int64 [n]."""
    width = weight.numel() // weight.shape[0]
    plus, minus = (weight.new_empty(len(rows), *weight.shape[1:]) for _ in range(2))
    for begin in range(0, len(rows), CHUNK // width + 1):
        end = begin + CHUNK // width + 1
        z = noise_of_rows(point.seed, name, rows[begin:end], width, point.query, point.distribution)
        step = (z * _float32(point.scale)).view(-1, *weight.shape[1:])
        wide = weight[rows[begin:end]].float()
        plus[begin:end] = wide + step
        minus[begin:end] = wide - step
    return plus, minus


def update(
    local: torch.Tensor,
    start: int,
    gradient: torch.Tensor | None,
    name: str,
    step: Step,
    left_out: torch.Tensor | None = None,
) -> None:
    """The fused update, in place on a flat shard.

    local: [n], float32 or bfloat16, elements [start, start + n) of the flattened parameter.
    gradient: [n] of any float type, or None where the first-order part has none. Its elements that
    are not finite count as zero, and their number is added to left_out, an int64 tensor [].
    """
    stop = start + local.numel()
    device = local.device
    direction = torch.zeros(local.numel(), device=device)
    if gradient is not None:
        finite = gradient.isfinite()
        if left_out is not None:
            left_out += (~finite).sum()
        direction = torch.where(finite, gradient, 0.0).float() * _float32(step.gradient_weight)
    for query, coefficient in enumerate(step.coefficients):
        z = draw(step.seed, name, start, stop, query, step.distribution, device)
        direction = direction + z * _float32(coefficient)
    decay = _float32(1.0 - step.lr * step.weight_decay)
    updated = local.float() * decay - direction * _float32(step.lr)
    if local.dtype == torch.bfloat16 and step.stochastic:
        updated = _round_stochastically(updated, rounding_bits(step.seed, name, start, stop, device))
    local.copy_(updated)


def _float32(x: float) -> float:
    """Scalars take part as float32, as they do in compiled kernels."""
    return torch.tensor(x, dtype=torch.float32).item()


def _round_stochastically(x: torch.Tensor, bits16: torch.Tensor) -> torch.Tensor:
    """float32 to a value that bfloat16 holds: up with the probability of the part cut off."""
    rounded = ((x.view(torch.int32) + bits16) & ~0xFFFF).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)
