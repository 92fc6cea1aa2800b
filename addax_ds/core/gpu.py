"""Perturbation and fused update for GPU memory: Triton kernels, one read and one write of memory each.

Bit-equal to `plain.py`: the same float32 operations in the same order, with their fusion into
multiply-adds switched off. A program takes one tile of a parameter's elements, which starts at a
multiple of TILE whatever the range, so that no Philox block is shared between programs. Tested
on an H200 and, on CPUs, under Triton's interpreter.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from addax_ds.core import noise as definition
from addax_ds.core.noise import PURPOSE, key_of
from addax_ds.core.plain import Perturbation, Step

TILE = tl.constexpr(1024)  # elements; a multiple of every block size
_M0, _M1 = (tl.constexpr(word) for word in definition.PHILOX_MULTIPLIERS)
_W0, _W1 = (tl.constexpr(word) for word in definition.PHILOX_WEYL)
_NORMAL, _RADEMACHER, _ROUNDING = (
    tl.constexpr(purpose) for purpose in (definition.NORMAL, definition.RADEMACHER, definition.ROUNDING)
)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = map(tl.constexpr, definition.LOG)
_S0, _S1, _S2 = map(tl.constexpr, definition.SINE)
_C0, _C1, _C2 = map(tl.constexpr, definition.COSINE)
_LN2, _TURN = tl.constexpr(definition.LN2), tl.constexpr(definition.TURN)
_HALF_BITS = tl.constexpr(definition.SQRT_HALF_BITS)
_2M32, _2M33 = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)
_QUARTER, _EIGHTH = tl.constexpr(1 << 30), tl.constexpr(1 << 29)  # of a turn, in units of 2^-32

# A GPU's cast rounds, in one instruction; that of Triton's interpreter does not.
_CAST_CUTS_OFF = tl.constexpr(triton.knobs.runtime.interpret)

# These change from call to call and must not make a kernel of their own each.
_VARYING = ["query", "queries", "key0", "key1"]
_EXACT = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _philox(tile, size: tl.constexpr, per: tl.constexpr, query, purpose: tl.constexpr, key0, key1):
    """Words for TILE // per parts of a tile; a block serves `size` elements, so size // per parts share one."""
    block = tile * (TILE // size)
    part = tl.arange(0, TILE // per).to(tl.uint32)
    # A tile's blocks start at a multiple of their number: nothing carries into the high word.
    a0 = (block & 0xFFFFFFFF).to(tl.uint32) + part * per // size
    a1 = (block >> 32).to(tl.uint32) + part * 0
    a2 = query.to(tl.uint32) + part * 0
    a3 = part * 0 + purpose
    k0 = key0.to(tl.uint32, bitcast=True)
    k1 = key1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        p0 = a0.to(tl.uint64) * _M0
        p1 = a2.to(tl.uint64) * _M1
        a0 = (p1 >> 32).to(tl.uint32) ^ a1 ^ k0
        a1 = p1.to(tl.uint32)
        a2 = (p0 >> 32).to(tl.uint32) ^ a3 ^ k1
        a3 = p0.to(tl.uint32)
        k0 += _W0
        k1 += _W1
    return a0, a1, a2, a3


@triton.jit
def _box_muller(radial, angular):
    """Two words to two normals."""
    u = radial.to(tl.float32) * _2M32 + _2M33
    shifted = u.to(tl.int32, bitcast=True) - _HALF_BITS
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + _HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.0 + _L7
    p = p * f + _L6
    p = p * f + _L5
    p = p * f + _L4
    p = p * f + _L3
    p = p * f + _L2
    p = p * f + _L1
    p = p * f + _L0
    square = f * f
    log = exponent * _LN2 + ((f - 0.5 * square) + (square * f) * p)
    radius = tl.sqrt_rn(-2.0 * log)
    word = angular + _EIGHTH
    quadrant = word >> 30
    a = ((word & (_QUARTER - 1)).to(tl.int32) - _EIGHTH).to(tl.float32) * _TURN
    square = a * a
    sine = a + (a * square) * ((_S2 * square + _S1) * square + _S0)
    cosine = (1.0 - 0.5 * square) + (square * square) * ((_C2 * square + _C1) * square + _C0)
    odd = (quadrant & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = tl.where(quadrant >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _noise(tile, query, purpose: tl.constexpr, key0, key1):
    """z of a tile: float32 [TILE]."""
    if purpose == _NORMAL:
        w0, w1, w2, w3 = _philox(tile, 4, 4, query, _NORMAL, key0, key1)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        # The last index is the fastest, and that of the outer join.
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (TILE,))
    # A thread that serves 8 neighbours computes their word itself, four words of which it drops.
    w0, w1, w2, w3 = _philox(tile, 128, 8, query, _RADEMACHER, key0, key1)
    place = tl.arange(0, TILE // 8)
    number = place // 4 % 4
    word = tl.where(number < 2, tl.where(number == 0, w0, w1), tl.where(number == 2, w2, w3))
    shift = (place % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
    bit = (word[:, None] >> shift.to(tl.uint32)) & 1
    return tl.reshape(1.0 - 2.0 * bit.to(tl.float32), (TILE,))


@triton.jit
def _rounding_bits(tile, key0, key1):
    """16 random bits an element of a tile: int32 [TILE]."""
    w0, w1, w2, w3 = _philox(tile, 8, 8, key0 * 0, _ROUNDING, key0, key1)
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), (TILE,)).to(tl.int32)


@triton.jit
def _rounded(value, up):
    """Float32 values that bfloat16 holds: `up` (int32) is added below the bits that stay."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + up) & -65536).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded)


@triton.jit
def _store(pointer, value, inside):
    """Write float32 values as stored weights, to nearest even."""
    if _CAST_CUTS_OFF and pointer.dtype.element_ty == tl.bfloat16:
        value = _rounded(value, 0x7FFF + (value.to(tl.int32, bitcast=True) >> 16 & 1))
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _place(start, count, tile):
    """Where a tile lies in a range of `count` elements from `start` on: memory offset and mask."""
    base = tile * TILE - start
    offset = tl.arange(0, TILE)
    inside = (offset >= tl.maximum(-base, 0).to(tl.int32)) & (offset < tl.minimum(count - base, TILE).to(tl.int32))
    return base, offset, inside


@triton.jit(do_not_specialize=_VARYING)
def _draw(out, start, count, query, key0, key1, purpose: tl.constexpr):
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    base, offset, inside = _place(start, count, tile)
    tl.store(out + base + offset, _noise(tile, query, purpose, key0, key1), mask=inside)


@triton.jit
def _perturb_tile(
    weight,
    plus,
    minus,
    start,
    count,
    tile,
    scale,
    query,
    key0,
    key1,
    purpose: tl.constexpr,
    has_plus: tl.constexpr,
    has_minus: tl.constexpr,
):
    base, offset, inside = _place(start, count, tile)
    value = tl.load(weight + base + offset, mask=inside, other=0.0).to(tl.float32)
    step = _noise(tile, query, purpose, key0, key1) * scale
    if has_plus:
        _store(plus + base + offset, value + step, inside)
    if has_minus:
        _store(minus + base + offset, value - step, inside)


@triton.jit(do_not_specialize=_VARYING)
def _perturb(
    weight,
    plus,
    minus,
    start,
    count,
    scale,
    query,
    key0,
    key1,
    purpose: tl.constexpr,
    has_plus: tl.constexpr,
    has_minus: tl.constexpr,
):
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    _perturb_tile(weight, plus, minus, start, count, tile, scale, query, key0, key1, purpose, has_plus, has_minus)


@triton.jit(do_not_specialize=_VARYING)
def _perturb_rows(weight, plus, minus, rows, width, scale, query, key0, key1, purpose: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    start = tl.load(rows + place) * width
    tile = start // TILE + tl.program_id(1)
    above, below = plus + place * width, minus + place * width
    _perturb_tile(weight + start, above, below, start, width, tile, scale, query, key0, key1, purpose, True, True)


@triton.jit(do_not_specialize=_VARYING)
def _update(
    local,
    gradient,
    left_out,
    start,
    count,
    gradient_weight,
    coefficients,
    queries,
    lr,
    decay,
    key0,
    key1,
    purpose: tl.constexpr,
    has_gradient: tl.constexpr,
    counts: tl.constexpr,
    stochastic: tl.constexpr,
):
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    base, offset, inside = _place(start, count, tile)
    direction = tl.zeros((TILE,), tl.float32)
    if has_gradient:
        part = tl.load(gradient + base + offset, mask=inside, other=0.0).to(tl.float32)
        finite = tl.abs(part) < float("inf")
        direction = tl.where(finite, part, 0.0) * gradient_weight
        if counts:
            unusable = TILE - tl.sum(finite.to(tl.int32))
            if unusable > 0:
                tl.atomic_add(left_out, unusable.to(tl.int64))
    for query in range(queries):  # as many as a schedule may come to, in one kernel
        direction += _noise(tile, key0 * 0 + query, purpose, key0, key1) * tl.load(coefficients + query)
    value = tl.load(local + base + offset, mask=inside, other=0.0).to(tl.float32)
    value = value * decay - direction * lr
    if stochastic:
        value = _rounded(value, _rounding_bits(tile, key0, key1))
    _store(local + base + offset, value, inside)


def _tiles(start: int, count: int) -> int:
    """Tiles that elements [start, start + count) touch."""
    return (start + count - 1) // TILE.value - start // TILE.value + 1 if count else 0


def _key(seed: int, name: str) -> list[int]:
    """Both words as signed integers: one type whatever their value."""
    return [word - (word >> 31 << 32) for word in key_of(seed, name)]


def _check(weights: torch.Tensor) -> None:
    if weights.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weights are {weights.dtype}: load the model in float32 or bfloat16")


def _launch(kernel: Any, grid: tuple[int, ...], memory: torch.Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(memory):  # Triton itself takes the current device
        kernel[grid](memory, *arguments, **_EXACT)


def draw(seed, name, start, stop, query, distribution, device) -> torch.Tensor:
    """See `plain.draw`."""
    out = torch.empty(stop - start, device=device)
    if out.numel():
        grid = (_tiles(start, out.numel()),)
        _launch(_draw, grid, out, start, out.numel(), query, *_key(seed, name), PURPOSE[distribution])
    return out


def perturb(
    weight: torch.Tensor,
    start: int,
    plus: torch.Tensor | None,
    minus: torch.Tensor | None,
    name: str,
    point: Perturbation,
) -> None:
    """See `plain.perturb`."""
    _check(weight)
    weight = weight.detach().contiguous()
    sides: list[Any] = [weight if side is None else side for side in (plus, minus)]
    if weight.numel():
        grid, wanted = (_tiles(start, weight.numel()),), (plus is not None, minus is not None)
        _launch(_perturb, grid, weight, *sides, start, weight.numel(), point.scale, *_stream(name, point), *wanted)


def perturb_rows(
    weight: torch.Tensor, rows: torch.Tensor, name: str, point: Perturbation
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `plain.perturb_rows`."""
    _check(weight)
    weight = weight.detach().contiguous()
    width = weight.numel() // weight.shape[0]
    plus, minus = (weight.new_empty(len(rows), *weight.shape[1:]) for _ in range(2))
    if plus.numel():
        grid = (len(rows), -(-width // TILE.value) + 1)
        _launch(_perturb_rows, grid, weight, plus, minus, rows, width, point.scale, *_stream(name, point))
    return plus, minus


def _stream(name: str, point: Perturbation) -> tuple:
    """What names a parameter's noise in a direction, as kernels take it."""
    return (point.query, *_key(point.seed, name), PURPOSE[point.distribution])


@lru_cache(maxsize=1 << 14)  # replays take many steps in turn, parameter by parameter
def _in_memory(coefficients: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A step's coefficients, for all of its updates; nothing waits for their copy but what reads them."""
    made = torch.tensor(coefficients, dtype=torch.float32)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def update(
    local: torch.Tensor,
    start: int,
    gradient: torch.Tensor | None,
    name: str,
    step: Step,
    left_out: torch.Tensor | None = None,
) -> None:
    """See `plain.update`; the number of what is left out stays on the device, which need not wait for it."""
    _check(local)
    if not local.numel():
        return
    _launch(
        _update,
        (_tiles(start, local.numel()),),
        local,
        local if gradient is None else gradient.detach().contiguous(),
        local if left_out is None else left_out,
        start,
        local.numel(),
        step.gradient_weight,
        _in_memory(step.coefficients, local.device),
        len(step.coefficients),
        step.lr,
        1.0 - step.lr * step.weight_decay,
        *_key(step.seed, name),
        PURPOSE[step.distribution],
        gradient is not None,
        gradient is not None and left_out is not None,
        local.dtype == torch.bfloat16 and step.stochastic,
    )
