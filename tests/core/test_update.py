"""What enters the fused update, each alone, and what rounding to bfloat16 keeps."""

import math
from dataclasses import replace

import torch

from addax_ds.core import kernels
from addax_ds.core.noise import noise
from addax_ds.core.plain import Step

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


def test_nearest_rounding_loses_small_updates():
    rounded = torch.ones(1000, dtype=torch.bfloat16)
    step = replace(STEP, lr=1.0, weight_decay=0.0, coefficients=(), gradient_weight=1.0, stochastic=False)
    for _ in range(100):
        kernels.update(rounded, 0, torch.full((1000,), 1e-4), "w", step)
    assert rounded.eq(1).all()
    for seed in range(100):
        kernels.update(rounded, 0, torch.full((1000,), 1e-4), "w", replace(step, stochastic=True, seed=seed))
    # 100 steps of 1e-4 move the mean by 0.01; an element's standard deviation is below sqrt(0.01 * 2**-8).
    assert abs(rounded.double().mean().item() - 0.99) < 5 * math.sqrt(0.01 * 2**-8 / 1000)


def test_perturbation_rounds_once_from_float32():
    weight = torch.randn(N).bfloat16()
    plus, minus = kernels.perturb(weight, 1e-3, 7, "w", 0, "normal")
    moved = noise(7, "w", 0, N) * torch.tensor(1e-3)
    assert torch.equal(plus, (weight.float() + moved).bfloat16())
    assert torch.equal(minus, (weight.float() - moved).bfloat16())
