"""The definition of the noise, in plain torch operations that run on any device.

z is a pure function of (seed, query, parameter name, element index of the whole parameter):

- key      = 64 bits of BLAKE2b(seed, name)
- counter  = (block low, block high, query, purpose), a block being the elements that one call of
             Philox4x32-10 (Salmon et al., SC 2011) serves: 4 normals, 128 signs, 8 roundings
- normal   = Box-Muller. Logarithm, sine and cosine are polynomials written out below, so that
             every step is one IEEE float32 operation and no math library's version matters.

Nothing else enters: not rank, world size, engine, dtype of the weights, chunk or iteration order.
The kernels of other backends are tested against this file bit for bit.
"""

import hashlib
from typing import Literal

import torch

Distribution = Literal["normal", "rademacher"]

# Purposes keep the three streams of a parameter apart.
NORMAL, RADEMACHER, ROUNDING = 0, 1, 2
ELEMENTS_PER_BLOCK = {NORMAL: 4, RADEMACHER: 128, ROUNDING: 8}
PURPOSE = {"normal": NORMAL, "rademacher": RADEMACHER}

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF

# ln(1 + f) = f - f^2/2 + f^3 P(f) on sqrt(1/2) - 1 <= f < sqrt(2) - 1: P, lowest power first.
LOG = (
    0.333333283662796,
    -0.25000298023223877,
    0.20001468062400818,
    -0.16642247140407562,
    0.14202174544334412,
    -0.12972238659858704,
    0.12712307274341583,
    -0.08101558685302734,
)
LN2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3
# sin(a) = a + a^3 S(a^2) and cos(a) = 1 - a^2/2 + a^4 C(a^2) on |a| <= pi/4.
SINE = (-0.166666641831398, 0.008332748897373676, -0.0001958794891834259)
COSINE = (0.0416666641831398, -0.0013888300163671374, 2.454758941894397e-05)
TURN = 1.462918119976564e-09  # 2 pi / 2^32: an angle in units of 2^-32 turns, as radians


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Philox key of a parameter in a step: two 32-bit words. `seed` lies in [0, 2**64)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: tuple, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four words of counter (int64 tensors or ints below 2**32) to four of output."""
    x0, x1, x2, x3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        # Products wrap modulo 2**64; masking makes the arithmetic shift a logical one.
        p0, p1 = x0 * PHILOX_MULTIPLIERS[0], x2 * PHILOX_MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & MASK32) ^ x1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ x3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return x0, x1, x2, x3


def _words(key: tuple[int, int], query: int, purpose: int, start: int, stop: int, device) -> torch.Tensor:
    """Philox words of the blocks that cover elements [start, stop): int64 [blocks, 4]."""
    size = ELEMENTS_PER_BLOCK[purpose]
    return _words_of(
        torch.arange(start // size, -(-stop // size), dtype=torch.int64, device=device), key, query, purpose
    )


def _words_of(blocks: torch.Tensor, key: tuple[int, int], query: int, purpose: int) -> torch.Tensor:
    """Philox words of blocks [...]: int64 [..., 4]."""
    return torch.stack(philox((blocks & MASK32, blocks >> 32, query, purpose), key), dim=-1)


def _polynomial(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _logarithm(u: torch.Tensor) -> torch.Tensor:
    shifted = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = shifted >> 23
    f = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    square = f * f
    return exponent.float() * LN2 + ((f - 0.5 * square) + (square * f) * _polynomial(f, LOG))


def _box_muller(radial: torch.Tensor, angular: torch.Tensor) -> torch.Tensor:
    """Two words to two normals: float32 [..., 2]."""
    u = radial.float() * 2.0**-32 + 2.0**-33  # in (0, 1]; the product is exact
    # Through float64, since torch's float32 square root is not correctly rounded on every processor.
    radius = torch.sqrt((-2.0 * _logarithm(u)).double()).float()
    quadrant = ((angular + 2**29) >> 30) & 3
    a = (((angular + 2**29) & (2**30 - 1)) - 2**29).float() * TURN
    square = a * a
    sine = a + (a * square) * _polynomial(square, SINE)
    cosine = (1.0 - 0.5 * square) + (square * square) * _polynomial(square, COSINE)
    odd = (quadrant & 1).bool()
    x, y = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    x = torch.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = torch.where(quadrant >= 2, -y, y)
    return torch.stack((radius * x, radius * y), dim=-1)


def noise(
    seed: int, name: str, start: int, stop: int, *, query: int = 0, distribution: Distribution = "normal", device="cpu"
) -> torch.Tensor:
    """Noise of elements [start, stop) of the flattened parameter `name`: float32 [stop - start]."""
    purpose = PURPOSE[distribution]
    z = _values(_words(key_of(seed, name), query, purpose, start, stop, device), purpose)
    offset = start % ELEMENTS_PER_BLOCK[purpose]
    return z.reshape(-1)[offset : offset + stop - start]


def noise_of_rows(
    seed: int, name: str, rows: torch.Tensor, width: int, query: int, distribution: Distribution
) -> torch.Tensor:
    """Noise of elements [row * width, (row + 1) * width) for each of `rows` (int64 [n]): float32 [n, width]."""
    purpose = PURPOSE[distribution]
    size = ELEMENTS_PER_BLOCK[purpose]
    first = rows * width
    # As many blocks for each row as the worst placed one touches.
    blocks = (first // size)[:, None] + torch.arange((width + 2 * size - 2) // size, device=rows.device)
    z = _values(_words_of(blocks, key_of(seed, name), query, purpose), purpose).flatten(1)
    return z.gather(1, (first % size)[:, None] + torch.arange(width, device=rows.device))


def _values(words: torch.Tensor, purpose: int) -> torch.Tensor:
    """Noise of blocks from their words [..., 4]: float32 [..., elements per block]."""
    if purpose == NORMAL:
        return torch.cat((_box_muller(words[..., 0], words[..., 1]), _box_muller(words[..., 2], words[..., 3])), dim=-1)
    bits = (words[..., None] >> torch.arange(32, device=words.device)) & 1
    return (1 - 2 * bits).float().flatten(-2)


def rounding_bits(seed: int, name: str, start: int, stop: int, device="cpu") -> torch.Tensor:
    """16 random bits an element, for stochastic rounding to bfloat16: int32 [stop - start]."""
    words = _words(key_of(seed, name), 0, ROUNDING, start, stop, device)
    halves = (words[:, :, None] >> torch.tensor([0, 16], device=device)) & 0xFFFF
    offset = start % ELEMENTS_PER_BLOCK[ROUNDING]
    return halves.reshape(-1)[offset : offset + stop - start].to(torch.int32)


def step_seed(seed: int, step: int) -> int:
    """Seed of step `step` of a run: 53 bits, which every JSON reader keeps exactly."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + step.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11
