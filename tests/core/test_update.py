"""What enters the fused update, each alone, and what rounding to bfloat16 keeps."""

import math
from dataclasses import replace

import pytest
import torch

from addax_ds.core import kernels
from addax_ds.core.noise import noise
from addax_ds.core.plain import Perturbation, Step

N = 5000
STEP = Step(
    seed=21,
    lr=0.01,
    weight_decay=0.1,
    gradient_weight=0.75,
    coefficients=(0.4, -0.9, 2.0),
    distribution="normal",
    stochastic=True,
)


def test_each_direction_and_the_gradient_enter_alone():
    def moved(gradient=None, **changes):
        weight = torch.zeros(N)
        kernels.update(weight, 0, gradient, "w", replace(STEP, weight_decay=0.0, lr=1.0, **changes))
        return weight

    for query in range(3):
        coefficients = tuple(float(q == query) for q in range(3))
        assert torch.equal(moved(coefficients=coefficients), -noise(STEP.seed, "w", 0, N, query=query))
    gradient = torch.randn(N)
    assert torch.equal(moved(gradient, coefficients=(), gradient_weight=1.0), -gradient)
    assert torch.equal(moved(coefficients=()), torch.zeros(N))


def test_stochastic_rounding_is_unbiased_and_between_neighbours():
    weight = torch.full((1 << 16,), 1.0)
    target = 1.0 - 1e-4  # bfloat16 holds 1 and, below it, 1 - 2**-8
    rounded = weight.bfloat16()
    step = replace(STEP, lr=1.0, weight_decay=0.0, coefficients=(), gradient_weight=1.0)
    kernels.update(rounded, 0, torch.full_like(weight, 1e-4), "w", step)
    assert set(rounded.tolist()) == {1.0, 1.0 - 2**-8}
    down = 1e-4 * 2**8  # probability of the lower neighbour
    error = abs(rounded.double().mean().item() - target)
    assert error < 5 * 2**-8 * math.sqrt(down * (1 - down) / len(weight))


@pytest.mark.parametrize(
    ("size", "kept", "last_digit"), [(1e-4, 0.94, 0.01), (1e-5, 0.16, 0.01), (1e-6, 0.02, 0.01), (1e-7, 0.001, 0.001)]
)
def test_nearest_rounding_loses_small_updates_and_stochastic_rounding_does_not(size, kept, last_digit):
    """The table of README: of 100 steps of one size on normal weights of 0.02, how much is kept."""
    weight = (0.02 * torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))).bfloat16()
    step = replace(STEP, lr=1.0, weight_decay=0.0, coefficients=(), gradient_weight=1.0)
    gradient = torch.full(weight.shape, -size)
    moved = {}
    for stochastic in (False, True):
        rounded = weight.clone()
        for seed in range(100):
            kernels.update(rounded, 0, gradient, "w", replace(step, stochastic=stochastic, seed=seed))
        moved[stochastic] = (rounded.double() - weight.double()).mean().item() / (100 * size)
    assert abs(moved[False] - kept) <= last_digit / 2
    # A step moves a weight by one unit in its last place (2**-12 at most here) or not at all.
    deviation = math.sqrt(100 * size * 2**-12 / len(weight))
    assert abs(moved[True] - 1) <= 5 * deviation / (100 * size)


def test_perturbation_rounds_once_from_float32():
    weight = torch.randn(N).bfloat16()
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    kernels.perturb(weight, 0, plus, minus, "w", Perturbation(7, 0, 1, 1e-3))
    moved = noise(7, "w", 0, N) * torch.tensor(1e-3)
    assert torch.equal(plus, (weight.float() + moved).bfloat16())
    assert torch.equal(minus, (weight.float() - moved).bfloat16())
