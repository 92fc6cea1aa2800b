"""What the noise is like beyond its moments, and how exact its polynomials are."""

import math
from itertools import pairwise

import pytest
import torch

from addax_ds.core import noise as definition
from addax_ds.core.noise import noise, rounding_bits

HALF_ULP = 2.0**-24  # relative rounding error of one float32 operation


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("first", [2**34 - 300, 2**39 - 300, 2**45 + 1], ids=["normal blocks", "sign blocks", "far"])
def test_ranges_join_where_the_block_index_passes_32_bits(distribution, first):
    whole = noise(5, "w", first, first + 700, query=1, distribution=distribution)
    ends = [0, 1, 130, 299, 300, 301, 512, 700]
    parts = [
        noise(5, "w", first + begin, first + end, query=1, distribution=distribution) for begin, end in pairwise(ends)
    ]
    assert torch.equal(torch.cat(parts), whole)
    before, after = whole[:300], whole[300:600]
    assert abs((before * after).mean().item()) < 5 / math.sqrt(300)


def test_rounding_bits_do_not_depend_on_where_a_range_begins():
    whole = rounding_bits(5, "w", 0, 4096)
    parts = [rounding_bits(5, "w", a, b) for a, b in ((0, 3), (3, 8), (8, 77), (77, 4096))]
    assert torch.equal(torch.cat(parts), whole)
    # Uniform on [0, 2**16): standard deviation 2**16 / sqrt(12).
    assert abs(whole.double().mean().item() - (2**16 - 1) / 2) < 5 * 2**16 / math.sqrt(12 * 4096)
    assert whole.min() >= 0 and whole.max() < 2**16


def test_neighbours_that_share_a_philox_call_are_independent():
    n = 1 << 20
    z = noise(11, "w", 0, n).double()
    for lag in (1, 2, 3, 4):
        for power in (1, 2):  # the radius is shared by two: squares would show it
            product = (z[:-lag] ** power - (power - 1)) * (z[lag:] ** power - (power - 1))
            assert abs(product.mean().item()) < 5 * power / math.sqrt(n), f"lag {lag}, power {power}"


def test_signs_are_balanced_and_independent_in_every_position_of_a_block():
    signs = noise(11, "w", 0, 128 * 4096, distribution="rademacher").view(4096, 128).double()
    assert signs.mean(dim=0).abs().max() < 6 / math.sqrt(4096)
    assert ((signs.T @ signs) / 4096 - torch.eye(128)).abs().max() < 6 / math.sqrt(4096)


def test_the_logarithm_is_exact_to_four_half_ulps():
    u = torch.cat([torch.linspace(0.25, 1, 200001)[:-1], 2.0 ** -torch.arange(1, 34), 1 - 2.0 ** -torch.arange(1, 25)])
    exact = torch.log(u.double())
    assert ((definition._logarithm(u).double() - exact) / exact).abs().max() <= 4 * HALF_ULP
    assert definition._logarithm(torch.tensor([1.0])).item() == 0.0


def test_sine_and_cosine_are_exact_to_four_half_ulps_on_the_whole_circle():
    angle = torch.arange(0, 2**32, 4099)
    lowest = torch.zeros_like(angle)  # the word of the greatest radius
    radius = definition._box_muller(lowest[:1], angle[:1])[0, 0].double()
    turn = angle.double() * (2 * math.pi / 2**32)
    error = definition._box_muller(lowest, angle).double() / radius - torch.stack((turn.cos(), turn.sin()), dim=-1)
    assert error.abs().max() <= 4 * HALF_ULP
