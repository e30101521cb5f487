"""The jitted code of `align_rows`; what it computes is in `kernels/reference/align_rows.py`.

A program takes ROWS rows, or a part of one. It reads all scales of its rows first, a 32nd of the data, for their
largest; programs of the same row find them in the cache. Codes are then read once.

All arithmetic is FP16, where each code is exact, and its product with a power of two is exact unless it rounds to zero
in E4M3 anyway. Compiled, the hardware converts: a code of fewer bits is moved to where E4M3 has its sign, exponent and
mantissa, and is then too small by a power of two. The interpreter's own conversions are wrong, so there the bits of
FP16 numbers are rounded: those of an E4M3 number times 2**-8 are its code and seven zeros.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import power_of_two, scale_offset
from microscale.kernels.triton.jit_decode import _code as code_of_run

_ROW_FLOOR = tl.constexpr(-126)
_ROW_TOP = tl.constexpr(127)


def _nibbles(mantissa: int) -> tl.constexpr:
    """PTX that makes, of four bytes with two 4-bit codes each, four bytes of the low and four of the high ones.

    Each byte has the sign on top and the other three bits above 3 - mantissa zeros.
    """
    bits, up = 0x07070707 << (3 - mantissa), 3 - mantissa
    return tl.constexpr(
        f"{{ .reg .b32 a, b;  shl.b32 a, $2, {up};  and.b32 a, a, {bits};  shl.b32 b, $2, 4;"
        f"  and.b32 b, b, 0x80808080;  or.b32 $0, a, b;"
        f"  shr.u32 a, $2, {4 - up};  and.b32 a, a, {bits};  and.b32 b, $2, 0x80808080;  or.b32 $1, a, b; }}"
    )


_NIBBLES = tl.constexpr(tuple(_nibbles(mantissa) for mantissa in range(4)))


@triton.jit
def _half(bits):
    """FP16 of int32 bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _half_power(exponent, nan):
    """FP16 2**exponent for exponents up to 15, zero below -24, NaN where `nan`."""
    normal = (exponent + 15) << 10
    subnormal = tl.where(exponent < -24, 0, 1 << tl.maximum(exponent + 24, 0))
    return _half(tl.where(nan, 0x7E00, tl.where(exponent < -14, subnormal, normal)))


@triton.jit
def _load_codes(base, live, BLOCK: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """What `_codes` makes the codes of the blocks at `base` of: bytes, or three words for each 16 codes of 6 bits."""
    if WIDTH == 6:
        words = base.to(tl.pointer_type(tl.int32))[:, None] + (tl.arange(0, BLOCK // 16) * 3)[None, :]
        if EVEN:
            return tl.load(words), tl.load(words + 1), tl.load(words + 2)
        else:
            inside = live[:, None]
            return (
                tl.load(words, mask=inside, other=0),
                tl.load(words + 1, mask=inside, other=0),
                tl.load(words + 2, mask=inside, other=0),
            )
    else:
        place = base[:, None] + tl.arange(0, BLOCK * WIDTH // 8)[None, :]
        if EVEN:
            return tl.load(place)
        else:
            return tl.load(place, mask=live[:, None], other=0)


@triton.jit
def _two(words, i: tl.constexpr, MANTISSA: tl.constexpr, EMBED: tl.constexpr):
    return tl.join(_six_bits(words, i, MANTISSA, EMBED), _six_bits(words, i + 8, MANTISSA, EMBED))


@triton.jit
def _four(words, i: tl.constexpr, MANTISSA: tl.constexpr, EMBED: tl.constexpr):
    return tl.join(_two(words, i, MANTISSA, EMBED), _two(words, i + 4, MANTISSA, EMBED))


@triton.jit
def _eight(words, i: tl.constexpr, MANTISSA: tl.constexpr, EMBED: tl.constexpr):
    return tl.join(_four(words, i, MANTISSA, EMBED), _four(words, i + 2, MANTISSA, EMBED))


@triton.jit
def _six_bits(words, i: tl.constexpr, MANTISSA: tl.constexpr, EMBED: tl.constexpr):
    """Code i of 16 of 6 bits as uint8; EMBED: with its parts where E4M3 has them."""
    code = code_of_run(words, i, 6)
    if EMBED:
        code = ((code << 2) & 0x80) | ((code & 0x1F) << (3 - MANTISSA))
    return code.to(tl.uint8)


@triton.jit
def _codes(
    loaded, S: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, EMBED: tl.constexpr
):
    """One code a lane of what `_load_codes` gave, as uint8. EMBED: sign, exponent and mantissa where E4M3 has them."""
    if WIDTH == 4:
        if EMBED:
            low, high = tl.inline_asm_elementwise(
                _NIBBLES[MANTISSA], "=r,=r,r", [loaded], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
            )
        else:
            low, high = loaded & 15, loaded >> 4
        return tl.reshape(tl.join(low, high), (S, BLOCK))
    elif WIDTH == 6:
        return tl.reshape(tl.join(_eight(loaded, 0, MANTISSA, EMBED), _eight(loaded, 1, MANTISSA, EMBED)), (S, BLOCK))
    else:
        return loaded


@triton.jit
def _e4m3_native(
    codes, shift, nan, BIAS: tl.constexpr, FIVE: tl.constexpr,
):  # fmt: skip
    """E4M3 of codes * 2**shift as uint8, by the hardware's conversions. FIVE: the codes are E5M2, else see `_codes`."""
    if FIVE:
        half = codes.to(tl.float8e5, bitcast=True).to(tl.float16)
        # 2**-24 is the smallest factor, and too large for what is still a number in E4M3: two steps. Infinity is kept,
        # and the conversion would saturate it: its product with zero is NaN.
        first = tl.maximum(shift, -14)
        scaled = half * _half_power(first, nan)[:, None] * _half_power(shift - first, nan)[:, None]
        half = scaled + half * 0.0
    else:
        half = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        half = half * _half_power(shift + 7 - BIAS, nan)[:, None]
    return half.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _e4m3_integer(
    codes, shift, nan, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr,
    HAS_SPECIAL: tl.constexpr,
):  # fmt: skip
    """The same of codes as they are stored, by rounding the bits of FP16 numbers that are 2**-8 of what they mean."""
    wide = codes.to(tl.int32)
    magnitude = wide & ((1 << (WIDTH - 1)) - 1)
    half = (magnitude << (10 - MANTISSA)).to(tl.int16).to(tl.float16, bitcast=True)
    exponent = shift + 7 - BIAS
    first = tl.maximum(exponent, -14)
    half = half * _half_power(first, nan)[:, None] * _half_power(exponent - first, nan)[:, None]
    b = half.to(tl.int16, bitcast=True).to(tl.int32)
    rounded = tl.minimum((b + 0x3F + ((b >> 7) & 1)) >> 7, 0x7E)
    special = b >= 0x7C00
    if HAS_SPECIAL:
        special = special | (magnitude > TOP)
    return tl.where(special, 0x7F, rounded | (((wide >> (WIDTH - 1)) & 1) << 7)).to(tl.uint8)


@triton.jit
def _largest(
    scales, row, inside, rows, blocks, ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    SWIZZLE: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """The largest scale code of each row, NaN apart; 0 if there is none."""
    top = tl.zeros((ROWS, STEP), tl.int32)
    for step in tl.static_range(STEPS):
        column = step * STEP + tl.arange(0, STEP)
        place = scale_offset(row[:, None], column[None, :], rows, blocks, SWIZZLE)
        live = inside[:, None] & (column < blocks)[None, :]
        codes = tl.load(scales + place, mask=live, other=0).to(tl.int32)
        top = tl.maximum(top, tl.where(codes == NAN, 0, codes))
    return tl.max(top, 1)


@triton.jit
def align_rows(
    qdata, scales, out, row_scales, total, rows, blocks, columns, width,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, UNROLL: tl.constexpr, LOOPS: tl.constexpr,
    STEP: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr, SWIZZLE: tl.constexpr,
    S_BIAS: tl.constexpr, S_NAN: tl.constexpr, LIFT: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, TOP: tl.constexpr, FIVE: tl.constexpr, HAS_SPECIAL: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Codes [total, width] and FP32 scales [total] of `total` rows of `blocks` blocks, in matrices of `rows` rows.

    A program takes ROWS rows of BLOCKS blocks, LOOPS * UNROLL times along the row. EVEN: programs are full. RAGGED:
    the last block of a row ends beyond `columns`.
    """
    S: tl.constexpr = ROWS * BLOCKS
    chunks = (blocks + BLOCKS * UNROLL * LOOPS - 1) // (BLOCKS * UNROLL * LOOPS)
    pid = tl.program_id(0)
    group = pid // chunks
    chunk = pid - group * chunks
    row = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    top = _largest(scales, row, inside, rows, blocks, ROWS, STEP, STEPS, SWIZZLE, S_NAN)
    exponent = tl.minimum(tl.maximum(top - S_BIAS - LIFT, _ROW_FLOOR), _ROW_TOP)
    if chunk == 0:
        tl.store(row_scales + row, power_of_two(exponent), mask=inside)

    lane = tl.arange(0, BLOCK)
    i = tl.arange(0, S)
    row = group.to(tl.int64) * ROWS + i // BLOCKS
    inside = row < total
    exponent = tl.reshape(tl.broadcast_to(exponent[:, None], (ROWS, BLOCKS)), (S,))
    qdata += row * blocks * (BLOCK * WIDTH // 8)
    for loop in range(0, LOOPS):
        start = (chunk * LOOPS + loop) * (BLOCKS * UNROLL) + i % BLOCKS
        loaded = ()
        stored = ()
        for j in tl.static_range(UNROLL):
            block = start + j * BLOCKS
            live = inside & (block < blocks)
            loaded += (_load_codes(qdata + block * (BLOCK * WIDTH // 8), live, BLOCK, WIDTH, EVEN),)
            place = scales + scale_offset(row, block, rows, blocks, SWIZZLE)
            if EVEN:
                stored += (tl.load(place),)
            else:
                stored += (tl.load(place, mask=live, other=0),)

        for j in tl.static_range(UNROLL):
            block = start + j * BLOCKS
            stored_scale = stored[j].to(tl.int32)
            nan = stored_scale == S_NAN
            shift = stored_scale - S_BIAS - exponent
            codes = _codes(loaded[j], S, BLOCK, WIDTH, MANTISSA, NATIVE)
            if NATIVE:
                values = _e4m3_native(codes, shift, nan, BIAS, FIVE)
            else:
                values = _e4m3_integer(codes, shift, nan, WIDTH, MANTISSA, BIAS, TOP, HAS_SPECIAL)
            column = block[:, None] * BLOCK + lane[None, :]
            place = out + row[:, None] * width + column
            if EVEN and not RAGGED:
                tl.store(place, values)
            elif RAGGED:
                values = tl.where(column < columns, values, 0)
                tl.store(place, values, mask=inside[:, None] & (column < width))
            else:
                tl.store(place, values, mask=(inside & (block < blocks))[:, None])


@triton.jit
def fragment_row_scales(
    scales, row_scales, steps,
    SIZE: tl.constexpr, STEPS: tl.constexpr, S_BIAS: tl.constexpr, S_NAN: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """FP32 scales [N] of rows whose block scales lie in layout `fragments`: [N / 64, steps, SIZE]. A program: 64 rows.

    The scales of a step are [row % 8, block, row // 8]. STEPS are looked at together.
    """
    strip = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    top = tl.zeros((STEPS, SIZE), tl.int32)
    for first in range(0, steps, STEPS):
        step = first + tl.arange(0, STEPS)
        place = scales + (strip * steps + step)[:, None] * SIZE + lane[None, :]
        codes = tl.load(place, mask=(step < steps)[:, None], other=0).to(tl.int32)
        top = tl.maximum(top, tl.where(codes == S_NAN, 0, codes))
    largest = tl.max(tl.reshape(tl.max(top, 0), (8, SIZE // 64, 8)), 1)
    exponent = tl.minimum(tl.maximum(largest - S_BIAS - LIFT, _ROW_FLOOR), _ROW_TOP)
    row = strip * 64 + tl.arange(0, 8)[:, None] + tl.arange(0, 8)[None, :] * 8
    tl.store(row_scales + row, power_of_two(exponent))
