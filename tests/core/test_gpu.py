"""Triton kernels against the plain operations: on a GPU where there is one, else under Triton's interpreter."""

import pytest
import torch

from addax_ds.core import plain
from addax_ds.core.noise import noise as defined_noise
from addax_ds.core.plain import Perturbation, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the extra `test` brings triton on Linux only")
from addax_ds.core import gpu  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
DISTRIBUTIONS = ["normal", "rademacher"]
# Within one tile, over the edge of one, and past what 32 bits hold.
RANGES = [(0, 1), (3, 2000), (1023, 1025), (2**33 + 5, 2**33 + 1200)]


def weights(n, dtype, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_noise_is_the_defined_one_bit_for_bit(distribution, start, stop):
    drawn = gpu.draw(7, "w", start, stop, 3, distribution, DEVICE).cpu()
    assert torch.equal(drawn, defined_noise(7, "w", start, stop, query=3, distribution=distribution))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_perturbation_is_the_plain_one_bit_for_bit(dtype, distribution, start, stop):
    weight, point = weights(stop - start, dtype), Perturbation(5, 2, 1, 1e-3, distribution)
    expected = [torch.empty_like(weight), torch.empty_like(weight)]
    plain.perturb(weight, start, *expected, "w", point)
    on_device = weight.to(DEVICE)
    for wanted in ((0, 1), (0,), (1,)):
        sides = [torch.zeros_like(on_device) if side in wanted else None for side in (0, 1)]
        gpu.perturb(on_device, start, *sides, "w", point)
        for side in wanted:
            assert torch.equal(sides[side].cpu(), expected[side])
    assert torch.equal(on_device.cpu(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(50, 7), (9, 3, 5), (6, 1500)])
def test_perturbed_rows_are_the_plain_ones(dtype, distribution, shape):
    weight, rows = weights(torch.Size(shape).numel(), dtype).view(shape), torch.tensor([5, 0, 3, 3])
    point = Perturbation(5, 2, 1, 1e-3, distribution)
    ours = gpu.perturb_rows(weight.to(DEVICE), rows.to(DEVICE), "w", point)
    none = gpu.perturb_rows(weight.to(DEVICE), rows[:0].to(DEVICE), "w", point)
    for side, expected in enumerate(plain.perturb_rows(weight, rows, "w", point)):
        assert torch.equal(ours[side].cpu(), expected)
        assert none[side].shape == (0, *shape[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize(("start", "n"), [(1234, 1500), (2**33 + 3, 1100)])
def test_update_is_the_plain_one_bit_for_bit(dtype, stochastic, distribution, gradient_dtype, start, n):
    gradient = None if gradient_dtype is None else weights(n, gradient_dtype, seed=1)
    step = Step(11, 1e-2, 0.1, 0.7, (0.3, -0.2), distribution, stochastic)
    ours, theirs = weights(n, dtype).to(DEVICE), weights(n, dtype)
    gpu.update(ours, start, None if gradient is None else gradient.to(DEVICE), "w", step)
    plain.update(theirs, start, gradient, "w", step)
    assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("stochastic", [True, False])
def test_an_update_without_directions_keeps_what_is_not_finite(stochastic):
    w = torch.tensor([torch.inf, -torch.inf, torch.nan, 4.0]).to(DEVICE, torch.bfloat16)
    gpu.update(w, 0, torch.zeros(4).to(DEVICE), "w", Step(1, 1.0, 0.0, 1.0, (), "normal", stochastic))
    assert w[0] == torch.inf and w[1] == -torch.inf and w[2].isnan() and w[3] == 4


def test_gradient_elements_that_are_not_finite_count_as_zero():
    step = Step(1, 0.5, 0.0, 1.0, (0.3,), "normal", True)
    gradient = torch.tensor([torch.inf, 1.0, -torch.inf, torch.nan, -2.0])
    ours, theirs = torch.ones(5).to(DEVICE), torch.ones(5)
    left_out = torch.zeros((), dtype=torch.int64, device=DEVICE)
    gpu.update(ours, 7, gradient.to(DEVICE), "w", step, left_out)
    plain.update(theirs, 7, torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0]), "w", step)
    assert int(left_out) == 3 and torch.equal(ours.cpu(), theirs)
