"""Jitted code of elements: rounding FP32 to codes and back, random bytes, packing. See `microscale.numerics.codec`."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, float_of


@triton.jit
def round_float(
    a, random, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, STOCHASTIC: tl.constexpr, SUBNORMALS: tl.constexpr = True
):
    """Magnitude codes of FP32 a in [0, max] for a float element whose smallest normal number is 2**LOWEST."""
    KEPT: tl.constexpr = 23 - MANTISSA
    MAGIC: tl.constexpr = LOWEST - MANTISSA + 23
    b = bits_of(a)
    if STOCHASTIC:
        normal = (b >> KEPT) + ((((b >> (KEPT - 9)) & 511) + 2 * random + 1) >> 9)
    elif KEPT > 0:
        normal = (b + ((1 << (KEPT - 1)) - 1) + ((b >> KEPT) & 1)) >> KEPT
    else:
        normal = b
    if not SUBNORMALS:  # the code of 2**LOWEST is 0, and there is nothing below
        return tl.maximum(normal - ((127 + LOWEST) << MANTISSA), 0)
    else:
        if STOCHASTIC and MANTISSA - LOWEST + 9 < 128:
            small = ((a * (2.0 ** (MANTISSA - LOWEST + 9))).to(tl.int32) + 2 * random + 1) >> 9
        elif STOCHASTIC:  # one factor would overflow
            small = ((a * (2.0 ** (MANTISSA - LOWEST)) * 512.0).to(tl.int32) + 2 * random + 1) >> 9
        elif MAGIC < 128:
            small = bits_of(a + 2.0**MAGIC) - ((MAGIC + 127) << 23)
        else:
            small = bits_of(a * (2.0 ** (MANTISSA - LOWEST)) + 8388608.0) - 0x4B000000
        return tl.where(a < 2.0**LOWEST, small, normal - ((126 + LOWEST) << MANTISSA))


@triton.jit
def decode_magnitude(
    codes, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, WIDTH: tl.constexpr, SIGNED: tl.constexpr,
    SUBNORMALS: tl.constexpr,
):  # fmt: skip
    """FP32 values of int32 codes of a float element, with or without subnormals; NaN codes are the caller's."""
    magnitude = codes & ((1 << (WIDTH - SIGNED)) - 1)
    if SUBNORMALS:  # as bits of FP32, subnormal or not, the code is too small by a power of two
        value = float_of(magnitude << (23 - MANTISSA))
        if LOWEST > 1:
            value = value * 2.0**127 * 2.0 ** (LOWEST - 1)
        else:
            value = value * 2.0 ** (126 + LOWEST)
    else:
        value = float_of((magnitude + ((127 + LOWEST) << MANTISSA)) << (23 - MANTISSA))
    if SIGNED:
        value = float_of(bits_of(value) | ((codes >> (WIDTH - 1)) << 31))
    return value


@triton.jit
def _count_reached(y, edges, COUNT: tl.constexpr):
    """How many of COUNT rising numbers at `edges` are <= y; 0 for NaN."""
    rank = tl.zeros(y.shape, tl.int32)
    if COUNT <= 15:
        for i in tl.static_range(COUNT):
            rank += (y >= tl.load(edges + i)).to(tl.int32)
    else:
        for i in tl.static_range(8):
            probe = rank + (128 >> i)
            inside = probe <= COUNT
            edge = tl.load(edges + tl.where(inside, probe - 1, 0))
            rank = tl.where(inside & (y >= edge), probe, rank)
    return rank


@triton.jit
def _codebook_rank(y, random, thresholds, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The place of rounded y among the LEVELS sorted values of a codebook; NaN takes the last.

    `thresholds` holds LEVELS - 1 thresholds, then the values.
    """
    if STOCHASTIC:
        values = thresholds + (LEVELS - 1)
        x = tl.minimum(tl.maximum(y, tl.load(values)), tl.load(values + (LEVELS - 1)))
        low = _count_reached(x, values + 1, LEVELS - 2)
        below, above = tl.load(values + low), tl.load(values + low + 1)
        part = tl.div_rn(x - below, above - below)
        up = (part >= 1.0) | ((part * 512.0).to(tl.int32) + 2 * random + 1 >= 512)
        rank = low + up.to(tl.int32)
    else:
        rank = _count_reached(y, thresholds, LEVELS - 1)
    return tl.where(y != y, LEVELS - 1, rank)


@triton.jit
def encode(
    y, random, thresholds, code_of,
    KIND: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr,
    MAX_CODE: tl.constexpr, NAN_CODE: tl.constexpr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    SUBNORMALS: tl.constexpr = True, SYMMETRIC: tl.constexpr = True, LEVELS: tl.constexpr = 0,
):  # fmt: skip
    """Codes (int32) of FP32 y: round to nearest even or stochastically, saturate; NaN becomes NAN_CODE.

    LEVELS: the distinct values of a codebook; 0 says that all its 2**WIDTH are.
    """
    if KIND == 2:
        rank = _codebook_rank(y, random, thresholds, LEVELS if LEVELS > 0 else 1 << WIDTH, STOCHASTIC)
        return tl.load(code_of + rank).to(tl.int32)
    else:
        b = bits_of(y)
        magnitude_bits = b & 0x7FFFFFFF
        negative = b < 0
        if KIND == 0 or SYMMETRIC:
            a = tl.minimum(float_of(magnitude_bits), MAX)
        else:
            a = tl.minimum(float_of(magnitude_bits), tl.where(negative, MAX + 2.0 ** (-MANTISSA), MAX))
        if KIND == 0:
            codes = round_float(a, random, MANTISSA, LOWEST, STOCHASTIC, SUBNORMALS)
            if SIGNED:
                codes = codes | (((b >> 31) & 1) << (WIDTH - 1))
            else:
                codes = tl.where(negative, 0, codes)
        else:
            units = a * (2.0**MANTISSA)
            if STOCHASTIC:
                q = ((units * 512).to(tl.int32) + 2 * random + 1) >> 9
            else:
                q = bits_of(units + 8388608.0) - 0x4B000000
            codes = tl.where(negative, -q, q) & ((1 << WIDTH) - 1)
        return tl.where(magnitude_bits > 0x7F800000, NAN_CODE, codes)


@triton.jit
def round_to_element(
    y, thresholds, code_of,
    KIND: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr,
    MAX_CODE: tl.constexpr, NAN_CODE: tl.constexpr, SIGNED: tl.constexpr, SUBNORMALS: tl.constexpr,
    SYMMETRIC: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """FP32 values of the codes of y, rounded to nearest even. Lanes of NaN are the caller's."""
    if KIND == 2:
        return tl.load(thresholds + (LEVELS - 1) + _codebook_rank(y, 0, thresholds, LEVELS, False))
    else:
        codes = encode(
            y, 0, thresholds, code_of, KIND, WIDTH, MANTISSA, LOWEST, MAX, MAX_CODE, NAN_CODE, SIGNED, False,
            SUBNORMALS, SYMMETRIC, LEVELS,
        )  # fmt: skip
        if KIND == 0:
            return decode_magnitude(codes, MANTISSA, LOWEST, WIDTH, SIGNED, SUBNORMALS)
        else:
            signed = tl.where(codes >= (1 << (WIDTH - 1)), codes - (1 << WIDTH), codes)
            return signed.to(tl.float32) * (2.0 ** (-MANTISSA))


@triton.jit
def random_bytes(seed, index):
    """Byte index % 16 of the Philox block of counter index // 16; see microscale.numerics.rounding."""
    key, offset = tl.load(seed), tl.load(seed + 1)
    counter = index >> 4
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = offset.to(tl.uint32) + tl.zeros_like(c0)
    c3 = (offset >> 32).to(tl.uint32) + tl.zeros_like(c0)
    r0, r1, r2, r3 = tl.philox(key.to(tl.uint64), c0, c1, c2, c3)
    word = (index >> 2) & 3
    chosen = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    return ((chosen >> ((index & 3) * 8).to(tl.uint32)) & 255).to(tl.int32)


@triton.jit
def store_packed(
    qdata, codes, block, live, BLOCK: tl.constexpr, BLOCK_P2: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store codes [BLOCKS, BLOCK_P2] as a little-endian bit stream, GROUP codes to GROUP * WIDTH / 8 bytes."""
    GROUPS: tl.constexpr = BLOCK_P2 // GROUP
    OCTETS: tl.constexpr = GROUP * WIDTH // 8
    if GROUP == 2:
        low, high = tl.split(tl.reshape(codes.to(tl.int32), (BLOCKS, GROUPS, 2)))
        codes = low | (high << WIDTH)
    elif GROUP > 2:
        shift = (tl.arange(0, GROUP) * WIDTH)[None, None, :]
        if GROUP * WIDTH > 31:
            codes = codes.to(tl.int64)
        codes = tl.sum(tl.reshape(codes, (BLOCKS, GROUPS, GROUP)) << shift, axis=2)
    group = tl.arange(0, GROUPS)
    if BLOCK == BLOCK_P2:
        mask = live[:, None]
    else:
        mask = live[:, None] & (group * GROUP < BLOCK)[None, :]
    start = qdata + block[:, None] * BLOCK_BYTES + group[None, :] * OCTETS
    for i in tl.static_range(OCTETS):
        tl.store(start + i, ((codes >> (8 * i)) & 255).to(tl.uint8), mask=mask)
