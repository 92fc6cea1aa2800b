import math

import pytest
import torch

from addax_ds.core import noise as definition
from addax_ds.core.noise import key_of, noise, philox, rounding_bits, step_seed

ONES = 0xFFFFFFFF
NORMAL = ["-0x1.2eb8c80000000p-1", "0x1.165dc00000000p-1", "0x1.1c43de0000000p+0", "-0x1.12c66a0000000p-2"]
SIGNS = "++++++-+-+++---+"
STEP_SEED = 508604106994858


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # published with Random123 (Salmon et al., SC 2011)
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(counter, key)) == expected


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 4), (5, 777), (127, 129), (128, 1024)])
def test_any_range_is_a_slice_of_the_whole(distribution, start, stop):
    whole = noise(7, "w", 0, 1024, distribution=distribution)
    assert torch.equal(noise(7, "w", start, stop, distribution=distribution), whole[start:stop])


def test_an_empty_range_is_empty():
    assert noise(7, "w", 5, 5).shape == (0,)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_elements_past_32_bits_of_index_do_not_repeat_earlier_ones(distribution):
    far = noise(7, "w", 2**34, 2**34 + 512, distribution=distribution)
    further = noise(7, "w", 2**40, 2**40 + 512, distribution=distribution)
    near = noise(7, "w", 0, 512, distribution=distribution)
    assert not torch.equal(far, near) and not torch.equal(far, further)


def test_seed_name_query_and_purpose_each_give_a_stream_of_their_own():
    streams = [
        noise(1, "a", 0, 4096),
        noise(2, "a", 0, 4096),
        noise(1, "b", 0, 4096),
        noise(1, "a", 0, 4096, query=1),
        noise(1, "a", 0, 4096, distribution="rademacher"),
        (rounding_bits(1, "a", 0, 4096).float() - 32767.5) / 18918.6,
    ]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlations.abs().max() < 5 / math.sqrt(4096)


def test_normal_has_the_moments_and_tails_of_a_normal():
    n = 1 << 20
    z = noise(3, "w", 0, n).double()
    # Each moment's own standard error, times five.
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    ordered = z.sort().values
    expected = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    # Kolmogorov-Smirnov at p = 1e-4.
    assert (expected - steps).abs().max() < 2.23 / math.sqrt(n)


def test_rademacher_is_signs_in_balance():
    n = 1 << 20
    z = noise(3, "w", 0, n, distribution="rademacher")
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.double().mean()) < 5 / math.sqrt(n)


def test_normal_is_box_muller_of_its_words_to_four_ulps():
    words = definition._words(key_of(9, "w"), 0, definition.NORMAL, 0, 1 << 16, "cpu")
    z = noise(9, "w", 0, 1 << 16).view(-1, 4)
    for pair in (0, 2):
        u = (words[:, pair].float() * 2.0**-32 + 2.0**-33).double()  # the definition rounds the word to float32
        angle = words[:, pair + 1].double() * (2 * math.pi * 2.0**-32)
        radius = torch.sqrt(-2 * torch.log(u))
        exact = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
        # ulps of the radius: near a zero of the sine the angle's own rounding is what counts
        ulp = torch.finfo(torch.float32).eps * radius.clamp(min=1e-3)[:, None]
        assert ((z[:, pair : pair + 2].double() - exact).abs() / ulp).max() < 4


def test_the_noise_is_the_one_of_every_earlier_release():
    assert [x.hex() for x in noise(12345, "model.norm.weight", 6, 10).tolist()] == NORMAL
    signs = noise(12345, "model.norm.weight", 100, 116, query=2, distribution="rademacher")
    assert "".join("+" if sign > 0 else "-" for sign in signs) == SIGNS
    assert step_seed(0, 0) == STEP_SEED


def test_step_seeds_differ_and_survive_any_json_reader():
    seeds = [step_seed(root, step) for root in range(20) for step in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(int(float(seed)) == seed for seed in seeds)
