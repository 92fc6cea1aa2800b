"""Perturbation, fused update and digest for CPU memory: numba kernels over slices of a range.

Bit-equal to `plain.py`: the same float32 operations in the same order, which LLVM neither
reorders nor contracts without fastmath. Each kernel walks its range in chunks that stay in the
first-level cache and keeps Philox words as structure of arrays, and loops over whole chunks run over
slices from their first element: an index that might be negative would be wrapped, by a gather in place of a load.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch

from addax_ds.core import noise as definition
from addax_ds.core.noise import NORMAL, PURPOSE, ROUNDING, key_of
from addax_ds.core.plain import Perturbation, Step

CHUNK = 2048  # elements; a multiple of every block size
_PARALLEL_FROM = 1 << 16  # elements below which a thread costs more than it brings

_M0, _M1 = (np.uint64(word) for word in definition.PHILOX_MULTIPLIERS)
_W0, _W1 = (np.uint32(word) for word in definition.PHILOX_WEYL)
_LOG = tuple(np.float32(c) for c in definition.LOG)
_SINE = tuple(np.float32(c) for c in definition.SINE)
_COSINE = tuple(np.float32(c) for c in definition.COSINE)
_LN2, _TURN = np.float32(definition.LN2), np.float32(definition.TURN)
_HALF_BITS = np.int32(definition.SQRT_HALF_BITS)
_ONE, _TWO, _HALF = np.float32(1.0), np.float32(2.0), np.float32(0.5)
_2M32, _2M33 = np.float32(2.0**-32), np.float32(2.0**-33)

_compile = numba.njit(cache=True, nogil=True)


@_compile
def _philox_blocks(out, first, count, query, purpose, key0, key1):
    """Words of `count` blocks from block `first`: out[word, block], uint32."""
    x0, x1, x2, x3 = out[0], out[1], out[2], out[3]
    for b in range(count):
        block = np.uint64(first + b)
        x0[b] = np.uint32(block & np.uint64(0xFFFFFFFF))
        x1[b] = np.uint32(block >> np.uint64(32))
        x2[b] = np.uint32(query)
        x3[b] = np.uint32(purpose)
    for b in range(count):
        a0, a1, a2, a3 = x0[b], x1[b], x2[b], x3[b]
        k0, k1 = key0, key1
        for _ in range(10):
            p0 = np.uint64(a0) * _M0
            p1 = np.uint64(a2) * _M1
            a0 = np.uint32(np.uint32(p1 >> np.uint64(32)) ^ a1 ^ k0)
            a1 = np.uint32(p1)
            a2 = np.uint32(np.uint32(p0 >> np.uint64(32)) ^ a3 ^ k1)
            a3 = np.uint32(p0)
            k0 = np.uint32(k0 + _W0)
            k1 = np.uint32(k1 + _W1)
        x0[b], x1[b], x2[b], x3[b] = a0, a1, a2, a3


@_compile
def _box_muller_blocks(radial, angular, count):
    """`count` pairs of words to pairs of normals, in the memory of the words."""
    u, second = radial.view(np.float32), angular.view(np.float32)
    bits = radial.view(np.int32)
    for b in range(count):
        u[b] = np.float32(radial[b]) * _2M32 + _2M33
    for b in range(count):
        shifted = np.int32(bits[b] - _HALF_BITS)
        exponent = np.float32(np.int32(shifted >> np.int32(23)))
        bits[b] = np.int32(np.int32(shifted & np.int32(0x7FFFFF)) + _HALF_BITS)
        f = u[b] - _ONE
        p = _LOG[7]
        p = p * f + _LOG[6]
        p = p * f + _LOG[5]
        p = p * f + _LOG[4]
        p = p * f + _LOG[3]
        p = p * f + _LOG[2]
        p = p * f + _LOG[1]
        p = p * f + _LOG[0]
        square = f * f
        log = exponent * _LN2 + ((f - _HALF * square) + (square * f) * p)
        radius = np.sqrt(-_TWO * log)
        word = np.uint32(angular[b] + np.uint32(1 << 29))
        quadrant = np.int32(word >> np.uint32(30))
        a = np.float32(np.int32(word & np.uint32((1 << 30) - 1)) - np.int32(1 << 29)) * _TURN
        square = a * a
        sine = a + (a * square) * ((_SINE[2] * square + _SINE[1]) * square + _SINE[0])
        cosine = (_ONE - _HALF * square) + (square * square) * (
            (_COSINE[2] * square + _COSINE[1]) * square + _COSINE[0]
        )
        odd = (quadrant & 1) != 0
        x = sine if odd else cosine
        y = cosine if odd else sine
        x = -x if quadrant == 1 or quadrant == 2 else x
        y = -y if quadrant >= 2 else y
        u[b] = radius * x
        second[b] = radius * y


@_compile
def _noise_chunk(z, words, first, query, purpose, key0, key1):
    """Words of the chunk that starts at element `first`, a multiple of CHUNK; normals also to z[CHUNK]."""
    if purpose == NORMAL:
        count = CHUNK // 4
        _philox_blocks(words, first // 4, count, query, purpose, key0, key1)
        _box_muller_blocks(words[0], words[1], count)
        _box_muller_blocks(words[2], words[3], count)
        normals = words.view(np.float32)
        a, b, c, d = normals[0], normals[1], normals[2], normals[3]
        for i in range(count):
            z[4 * i] = a[i]
            z[4 * i + 1] = b[i]
            z[4 * i + 2] = c[i]
            z[4 * i + 3] = d[i]
    else:
        _philox_blocks(words, first // 128, CHUNK // 128, query, purpose, key0, key1)


@_compile
def _signed(scale, word, bit):
    sign = np.uint32(word << np.uint32(31 - bit)) & np.uint32(0x80000000)
    return np.uint32(np.float32(scale).view(np.uint32) ^ sign).view(np.float32)  # numba views scalars of numpy only


@_compile
def _add_signs(result, value, words, scale):
    """result = value + scale z for a whole chunk of signs."""
    for b in range(CHUNK // 128):
        for w in range(4):
            word, begin = words[w, b], 128 * b + 32 * w
            moved, still = result[begin : begin + 32], value[begin : begin + 32]
            for i in range(32):
                moved[i] = still[i] + _signed(scale, word, i)


@_compile
def _add_noise(result, value, z, words, skip, scale, purpose):
    """result = value + scale z, for the elements of a chunk from `skip` on.

    Signs are taken from the bits of their words: a pass over a z in memory costs as much as all else.
    """
    if purpose == NORMAL:
        part = z[skip : skip + result.size]
        for i in range(result.size):
            result[i] = value[i] + part[i] * scale
        return
    if result.size == CHUNK:
        _add_signs(result, value, words, scale)
    else:
        for i in range(result.size):
            place = skip + i
            result[i] = value[i] + _signed(scale, words[(place >> 5) & 3, place >> 7], place & 31)


@_compile
def _load(target, stored, wide):
    """Float32 values of stored weights; bfloat16 comes as its 16 bits."""
    if wide:
        values = stored.view(np.float32)
        for i in range(stored.size):
            target[i] = values[i]
    else:
        bits = target.view(np.uint32)
        for i in range(stored.size):
            bits[i] = np.uint32(stored[i]) << np.uint32(16)


@_compile
def _store(stored, values, random, use_random):
    """Write float32 values as stored bfloat16 weights: to nearest even, or stochastically."""
    bits = values.view(np.uint32)
    for i in range(stored.size):
        word = bits[i]
        finite = (word & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        if use_random:
            up = np.uint32(random[i])
        else:
            up = np.uint32(np.uint32(0x7FFF) + np.uint32((word >> np.uint32(16)) & np.uint32(1)))
        nan = np.uint32(0x400000) if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint32(0)
        rounded = np.uint32(word + up) if finite else np.uint32(word | nan)
        stored[i] = np.uint16(rounded >> np.uint32(16))


@_compile
def _draw(out, start, begin, end, query, purpose, key0, key1):
    """out[begin:end] of a range that starts at element `start`."""
    z = np.empty(CHUNK, np.float32)
    words = np.empty((4, CHUNK // 4), np.uint32)
    zeros = np.full(CHUNK, np.float32(-0.0))  # minus zero is what leaves every number as it is
    element = start + begin
    while element < start + end:
        first = element - element % CHUNK
        stop = min(first + CHUNK, start + end)
        _noise_chunk(z, words, first, query, purpose, key0, key1)
        _add_noise(out[element - start : stop - start], zeros, z, words, element - first, np.float32(1.0), purpose)
        element = stop


@_compile
def _perturb(weight, plus, minus, read, write, element, count, scale, query, purpose, key0, key1, wide, in_place):
    """plus, minus[write:write + count] from weight[read:read + count], elements from `element` on.

    An empty plus or minus is not wanted. in_place: whether the other is the weight itself: vector
    code needs memory apart.
    """
    z = np.empty(CHUNK, np.float32)
    words = np.empty((4, CHUNK // 4), np.uint32)
    loaded = np.empty(CHUNK, np.float32)
    result = np.empty(CHUNK, np.float32)
    unused = np.empty(0, np.uint16)
    done = 0
    while done < count:
        first = (element + done) - (element + done) % CHUNK
        skip = element + done - first
        part = min(CHUNK - skip, count - done)
        _noise_chunk(z, words, first, query, purpose, key0, key1)
        stored = weight[read + done : read + done + part]
        if wide and not in_place:
            value = stored.view(np.float32)
        else:
            value = loaded
            _load(loaded, stored, wide)
        for side, signed in ((plus, scale), (minus, -scale)):
            if side.size > 0:
                stored = side[write + done : write + done + part]
                if wide:
                    _add_noise(stored.view(np.float32), value, z, words, skip, signed, purpose)
                else:
                    _add_noise(result[:part], value, z, words, skip, signed, purpose)
                    _store(stored, result, unused, False)
        done += part


@_compile
def _perturb_rows(weight, plus, minus, rows, width, begin, end, scale, query, purpose, key0, key1, wide):
    """plus[i], minus[i] = row rows[i] of the weight, moved, for i in [begin, end)."""
    for i in range(begin, end):
        element = rows[i] * width
        _perturb(
            weight, plus, minus, element, i * width, element, width, scale, query, purpose, key0, key1, wide, False
        )


@_compile
def _update(
    local, start, begin, end, gradient, gradient_weight, coefficients, lr, decay, purpose, key0, key1, wide, stochastic
):
    """local[begin:end] of a shard that starts at element `start`; gradient: float32, may be empty."""
    z = np.empty(CHUNK, np.float32)
    words = np.empty((4, CHUNK // 4), np.uint32)
    loaded = np.empty(CHUNK, np.float32)
    direction, moved = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    random = np.empty(CHUNK, np.uint16)
    rounding = np.empty((4, CHUNK // 8), np.uint32)
    stochastic = stochastic and not wide
    infinite, left_out = np.uint32(0x7F800000), np.int64(0)  # the exponent of what is not finite
    element = start + begin
    while element < start + end:
        first = element - element % CHUNK
        count = min(first + CHUNK, start + end) - element
        skip = element - first
        offset = element - start
        if gradient.size > 0:
            part = gradient[offset : offset + count]
            exponents, bad = part.view(np.uint32), np.uint32(0)
            for i in range(count):
                bad += np.uint32((exponents[i] & infinite) == infinite)
            for i in range(count):
                direction[i] = part[i] * gradient_weight
            if bad > 0:
                left_out += np.int64(bad)
                for i in range(count):
                    if (exponents[i] & infinite) == infinite:
                        direction[i] = np.float32(0.0)
        else:
            direction[:count] = np.float32(0.0)
        for query in range(coefficients.size):
            _noise_chunk(z, words, first, query, purpose, key0, key1)
            _add_noise(moved[:count], direction, z, words, skip, coefficients[query], purpose)
            direction, moved = moved, direction  # vector code needs memory apart
        stored = local[offset : offset + count]
        if wide:
            value = stored.view(np.float32)
        else:
            value = loaded
            _load(loaded, stored, wide)
        for i in range(count):
            value[i] = value[i] * decay - direction[i] * lr
        if stochastic:
            _philox_blocks(rounding, first // 8, CHUNK // 8, 0, ROUNDING, key0, key1)
            for i in range(count):
                position = skip + i
                word = rounding[(position >> 1) & 3, position >> 3]
                random[i] = np.uint16((word >> np.uint32(16 * (position & 1))) & np.uint32(0xFFFF))
        if not wide:
            _store(stored, value, random, stochastic)
        element += count
    return left_out


@_compile
def _digest(bits, start, begin, end):
    """Sum modulo 2**64 of a mix of every element's bits and index: no order, no sharding in it."""
    total = np.uint64(0)
    for i in range(begin, end):
        word = np.uint64(bits[i]) ^ (np.uint64(start + i + 1) * np.uint64(0x9E3779B97F4A7C15))
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += word ^ (word >> np.uint64(31))
    return total


def _memory(tensor: torch.Tensor, unit: Any) -> np.ndarray:
    """A contiguous tensor's memory as an array of ctypes `unit`: a view, never a copy.

    By address, because `Tensor.numpy()` marks the storage as one that cannot be resized, and FSDP2
    resizes the storage of gathered weights.
    """
    return np.ctypeslib.as_array((unit * tensor.numel()).from_address(tensor.data_ptr()))


def _stored(weights: torch.Tensor) -> np.ndarray:
    """The memory of weights as unsigned integers of their width."""
    if weights.dtype == torch.float32:
        return _memory(weights, ctypes.c_uint32)
    if weights.dtype == torch.bfloat16:
        return _memory(weights, ctypes.c_uint16)
    raise TypeError(f"weights are {weights.dtype}: load the model in float32 or bfloat16")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="addax-noise")


def _split(numel: int, kernel) -> list:
    """Run kernel(begin, end) over slices of [0, numel) on torch's number of threads."""
    threads = torch.get_num_threads()
    if threads == 1 or numel < _PARALLEL_FROM:
        return [kernel(0, numel)]
    size = -(-numel // (threads * CHUNK)) * CHUNK
    slices = [(begin, min(begin + size, numel)) for begin in range(0, numel, size)]
    return list(_pool(threads).map(lambda ends: kernel(*ends), slices))


def _key(seed: int, name: str) -> tuple[np.uint32, np.uint32]:
    low, high = key_of(seed, name)
    return np.uint32(low), np.uint32(high)


def draw(seed, name, start, stop, query, distribution, device) -> torch.Tensor:
    """See `plain.draw`."""
    out = torch.empty(stop - start)
    memory, key, purpose = out.numpy(), _key(seed, name), PURPOSE[distribution]
    _split(out.numel(), lambda begin, end: _draw(memory, start, begin, end, query, purpose, *key))
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
    weight = weight.detach().contiguous()  # kept by name: the arrays are only views of memory
    memory = _stored(weight)
    first, second = (memory[:0] if side is None else _stored(side) for side in (plus, minus))
    in_place = any(side is not None and side.data_ptr() == weight.data_ptr() for side in (plus, minus))
    common = (np.float32(point.scale), *_stream(name, point), weight.dtype == torch.float32, in_place)
    _split(
        weight.numel(),
        lambda begin, end: _perturb(memory, first, second, begin, begin, start + begin, end - begin, *common),
    )


def perturb_rows(
    weight: torch.Tensor, rows: torch.Tensor, name: str, point: Perturbation
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `plain.perturb_rows`."""
    weight = weight.detach().contiguous()
    width = weight.numel() // weight.shape[0]
    plus, minus = (weight.new_empty(len(rows), *weight.shape[1:]) for _ in range(2))
    memory, index = (_stored(weight), _stored(plus), _stored(minus)), rows.numpy()
    common = (np.float32(point.scale), *_stream(name, point), weight.dtype == torch.float32)
    _perturb_rows(*memory, index, width, 0, len(rows), *common)  # a batch's rows are few: one thread
    return plus, minus


def _stream(name: str, point: Perturbation) -> tuple:
    """What names a parameter's noise in a direction, as kernels take it."""
    return (point.query, PURPOSE[point.distribution], *_key(point.seed, name))


def update(
    local: torch.Tensor,
    start: int,
    gradient: torch.Tensor | None,
    name: str,
    step: Step,
    left_out: torch.Tensor | None = None,
) -> None:
    """See `plain.update`."""
    if local.numel() == 0:
        return
    memory, wide = _stored(local), local.dtype == torch.float32
    # Kept by name: the array below is only a view of its memory.
    gradient = None if gradient is None else gradient.detach().float().contiguous()
    g = np.empty(0, np.float32) if gradient is None else _memory(gradient, ctypes.c_float)
    coefficients = np.array(step.coefficients, np.float32)
    scalars = np.float32(step.lr), np.float32(1.0 - step.lr * step.weight_decay)
    weight, purpose, key = np.float32(step.gradient_weight), PURPOSE[step.distribution], _key(step.seed, name)
    counts = _split(
        local.numel(),
        lambda begin, end: _update(
            memory, start, begin, end, g, weight, coefficients, *scalars, purpose, *key, wide, step.stochastic
        ),
    )
    if left_out is not None and any(counts):
        left_out += sum(map(int, counts))


def digest(local: torch.Tensor, start: int) -> int:
    """Digest of a flat shard: a sum modulo 2**64, so the sums of the shards add up to the whole's."""
    if local.numel() == 0:
        return 0
    local = local.contiguous()
    memory = _stored(local)
    return (
        sum(int(part) for part in _split(local.numel(), lambda begin, end: _digest(memory, start, begin, end))) % 2**64
    )
