"""The reference itself, on a model whose step can be written down."""

import torch
from torch import nn

from addax_ds.config import AddaxConfig
from addax_ds.core.noise import noise, step_seed
from addax_ds.reference import addax_step

# l(w; x) = (w . x)^2 / 2, so grad = (w . x) x, and the two-sided difference along z is exact:
# (l(w + eps z) - l(w - eps z)) / (2 eps) = (w . x)(z . x).
W = torch.tensor([[0.5, -1.0, 2.0]])
ZO = [torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, -1.0]])]
FO = [torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])]


def model() -> nn.Module:
    linear = nn.Linear(3, 1, bias=False).double()
    linear.weight.data.copy_(W)
    return linear


def loss(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(x.double())[:, 0] ** 2 / 2


def by_hand(config: AddaxConfig, step: int):
    """The step, its scalars and their tolerance."""
    w = W[0].double()
    seed = step_seed(config.seed, step)
    zs = [noise(seed, "weight", 0, 3, query=q).double() for q in range(config.queries)]
    zo, fo = torch.cat(ZO).double(), torch.cat(FO).double()
    g0 = [((zo @ w) * (zo @ z)).mean().item() for z in zs]
    g1 = ((fo @ w)[:, None] * fo).mean(dim=0)
    direction = (1 - config.alpha) * g1 + config.weight_decay * w
    direction = direction + config.alpha * sum(g * z for g, z in zip(g0, zs, strict=True)) / config.queries
    # All is float64 but eps z, whose elements are rounded to float32 once.
    tolerance = max(2.0**-24 * ((zo @ w).abs() * (zo.abs() @ z.abs())).mean().item() for z in zs)
    return w - config.lr * direction, g0, tolerance


def check(**settings) -> None:
    config = AddaxConfig(lr=0.1, seed=5, **settings)
    for step in (0, 3):
        weights, g0 = addax_step(model(), ZO, FO, loss, config, step)
        expected, expected_g0, tolerance = by_hand(config, step)
        # No |z| drawn here is above 4.
        bound = 1e-12 + config.lr * config.alpha * tolerance * 4
        torch.testing.assert_close(weights["weight"][0], expected, rtol=0, atol=bound)
        if config.alpha > 0:
            assert max(abs(a - b) for a, b in zip(g0, expected_g0, strict=True)) <= tolerance


def test_the_step_is_algorithm_1():
    check(alpha=0.3)


def test_directions_are_averaged():
    check(alpha=0.3, queries=3)


def test_alpha_1_is_mezo_and_alpha_0_is_sgd():
    check(alpha=1.0)
    check(alpha=0.0)


def test_weight_decay_is_decoupled():
    check(alpha=0.3, weight_decay=0.2)


def test_given_scalars_are_used_and_the_model_is_left_alone():
    linear = model()
    config = AddaxConfig(lr=0.1, alpha=1.0)
    weights, g0 = addax_step(linear, ZO, FO, loss, config, 0, g0=[2.0])
    z = noise(step_seed(0, 0), "weight", 0, 3).double()
    torch.testing.assert_close(weights["weight"][0], W[0].double() - 0.1 * 2.0 * z, rtol=0, atol=1e-12)
    assert g0 == [2.0]
    assert torch.equal(linear.weight[0], W[0].double())
