"""The seam between the method and its backends: which kernels serve which memory."""

import importlib
from functools import cache

import torch

from addax_ds.core.noise import Distribution
from addax_ds.core.plain import Perturbation, Step

# Device type to the module with its kernels; every other device runs the plain torch operations.
BACKENDS = {"cpu": "addax_ds.core.cpu", "cuda": "addax_ds.core.gpu"}


@cache
def backend(device_type: str):
    """The module whose functions serve this memory."""
    return importlib.import_module(BACKENDS.get(device_type, "addax_ds.core.plain"))


def noise(
    seed: int,
    name: str,
    start: int,
    stop: int,
    *,
    query: int = 0,
    distribution: Distribution = "normal",
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Noise of elements [start, stop) of the flattened parameter `name`: float32 [stop - start].

    Exactly what a step with this seed uses (the seed stands in that step's metrics), whatever the
    sharding, engine or dtype of the weights. Source: MeZO, algorithm 1 (z ~ N(0, I) from a seed),
    with Philox4x32-10 indexed by element in place of a sequential generator.
    """
    device = torch.device(device)
    return backend(device.type).draw(seed, name, start, stop, query, distribution, device)


def perturb(
    weight: torch.Tensor,
    start: int,
    plus: torch.Tensor | None,
    minus: torch.Tensor | None,
    name: str,
    point: Perturbation,
) -> None:
    """plus <- W + scale z and minus <- W - scale z of a range; W is only read. See `plain.perturb`."""
    backend(weight.device.type).perturb(weight, start, plus, minus, name, point)


def perturb_rows(
    weight: torch.Tensor, rows: torch.Tensor, name: str, point: Perturbation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of W + scale z and of W - scale z. See `plain.perturb_rows`."""
    return backend(weight.device.type).perturb_rows(weight, rows, name, point)


def update(
    local: torch.Tensor,
    start: int,
    gradient: torch.Tensor | None,
    name: str,
    step: Step,
    left_out: torch.Tensor | None = None,
) -> None:
    """The fused update, in place on a flat shard. See `plain.update`."""
    if gradient is not None:
        gradient = gradient.to(local.device)
    backend(local.device.type).update(local, start, gradient, name, step, left_out)
