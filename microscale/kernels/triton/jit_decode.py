"""From stored codes to FP32, exactly: whole tensors of codes, or the eight codes of a run out of a thread's words.

Everything is shifts, masks and products with powers of two, so that the interpreter runs it too; the two pieces of PTX
below only save instructions. A float code is moved to where FP32 (or f16, two codes in a register) has its sign,
exponent and mantissa; the number it then is, subnormal or not, is too small by a fixed power of two, LIFT. Tables are
looked up in the registers of other threads: half a warp holds the 16 values.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, float_of

_HALVES = tl.constexpr("{ .reg .b16 l, h;  mov.b32 {l, h}, $2;  cvt.f32.f16 $0, l;  cvt.f32.f16 $1, h; }")
_LIFTED_HALVES = tl.constexpr(
    "{ .reg .b16 l, h;  .reg .b32 p;  fma.rn.f16x2 p, $2, $3, $4;  mov.b32 {l, h}, p;"
    "  cvt.f32.f16 $0, l;  cvt.f32.f16 $1, h; }"
)
_LOOK_UP = tl.constexpr(
    "{ .reg .b32 lane, value, code;  .reg .b64 place;  mov.u32 lane, %laneid;  and.b32 lane, lane, 15;"
    "  mad.wide.u32 place, lane, 4, $9;  ld.global.nc.b32 value, [place];"
    # 0x100F: from lanes 0 to 15 of the thread's own half of the warp; higher bits of the code are ignored
    + "".join(
        f"\n  shr.u32 code, $8, {4 * i};  shfl.sync.idx.b32 ${i}, value, code, 0x100F, 0xFFFFFFFF;" for i in range(8)
    )
    + " }"
)
_EIGHT_FLOATS = tl.constexpr("=f," * 8)


@triton.jit
def lift(values, LIFT: tl.constexpr):
    """values * 2**LIFT; 2**LIFT itself may be above FP32."""
    if LIFT > 127:
        values = values * (2.0**127)
        return values * (2.0 ** (LIFT - 127))
    elif LIFT != 0:
        return values * (2.0**LIFT)
    else:
        return values


@triton.jit
def _with_specials(values, magnitude, TOP: tl.constexpr, NEXT: tl.constexpr, NAN: tl.constexpr):
    """Replace codes whose magnitude is above TOP: by NaN (1), or by infinity at NEXT and NaN above it (2)."""
    if NAN == 0:
        return values
    else:
        special = tl.full(magnitude.shape, 0x7FC00000, tl.int32)
        if NAN == 2:
            special = tl.where(magnitude == NEXT, (bits_of(values) & -0x80000000) | 0x7F800000, special)
        return tl.where(magnitude > TOP, float_of(special), values)


# -- tensors of codes --------------------------------------------------------------------------------------------------


@triton.jit
def decode(
    codes, table, KIND: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr,
    SIGNED: tl.constexpr, NAN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """FP32 values of int32 codes: floats (KIND 0), two's complement integers (1), codes of a table (2)."""
    if KIND == 2:
        return tl.load(table + codes)
    elif KIND == 1:
        signed = tl.where(codes >= (1 << (WIDTH - 1)), codes - (1 << WIDTH), codes)
        return lift(signed.to(tl.float32), -MANTISSA)
    else:
        magnitude = codes & ((1 << (WIDTH - SIGNED)) - 1)
        values = lift(float_of(magnitude << (23 - MANTISSA)), 126 + LOWEST)
        if SIGNED:
            values = float_of(bits_of(values) | ((codes >> (WIDTH - 1)) << 31))
        return _with_specials(values, magnitude, TOP, TOP + 1, NAN)


@triton.jit
def decode_scale(
    stored, table, WIDE: tl.constexpr, EXPONENT_ONLY: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr, LOWEST: tl.constexpr, SIGNED: tl.constexpr, NAN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """FP32 values of stored scales: FP32 (WIDE), bare exponents, or floats of up to 8 bits."""
    if WIDE:
        return stored.to(tl.float32)
    elif EXPONENT_ONLY:
        codes = stored.to(tl.int32)
        # 2**-127, the smallest, is subnormal: exponent field 0, mantissa one half
        powers = tl.maximum((codes + (127 - BIAS)) << 23, 0x00400000)
        return float_of(tl.where(codes > TOP, 0x7FC00000, powers))
    else:
        return decode(stored.to(tl.int32), table, 0, WIDTH, MANTISSA, LOWEST, SIGNED, NAN, TOP)


# -- runs of eight codes, in words -------------------------------------------------------------------------------------


@triton.jit
def _code(words, i: tl.constexpr, WIDTH: tl.constexpr):
    """Code i of a run in the low bits, with others above it."""
    at: tl.constexpr = i * WIDTH % 32
    low = words[i * WIDTH // 32]
    if at + WIDTH > 32:
        return ((low >> at) & ((1 << (32 - at)) - 1)) | (words[i * WIDTH // 32 + 1] << (32 - at))
    else:
        return low >> at


@triton.jit
def _code_on_top(words, i: tl.constexpr, WIDTH: tl.constexpr):
    """Code i of a run in the high bits, with others below it."""
    at: tl.constexpr = i * WIDTH % 32
    if at + WIDTH > 32:
        return _code(words, i, WIDTH) << (32 - WIDTH)
    else:
        return words[i * WIDTH // 32] << (32 - WIDTH - at)


@triton.jit
def _float_pair(word, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, NAN: tl.constexpr):
    """The f16 of the float codes on top of the two halves of a word, times 2**-LIFT."""
    unit: tl.constexpr = 0x00010001 << (10 - MANTISSA)
    magnitude = (word >> (6 - WIDTH + MANTISSA)) & (unit * ((1 << (WIDTH - 1)) - 1))
    if NAN == 1:  # four exponent bits: one above the largest magnitude is 2**14, which makes it a NaN of f16
        magnitude = magnitude | ((magnitude + unit) & 0x40004000)
    return magnitude | (word & -0x7FFF8000)


@triton.jit
def _integer_pair(word, WIDTH: tl.constexpr):
    """The f16 of 1024 + half the range + the integer codes at the bottom of the two halves of a word."""
    # flipping the sign bit adds half the range; below the exponent of 1024 the sum is an integer of f16
    return (word & (0x00010001 * ((1 << WIDTH) - 1))) ^ (0x00010001 * (0x6400 + (1 << (WIDTH - 1))))


@triton.jit
def _halves(pair, OFFSET: tl.constexpr, LIFT: tl.constexpr, INTERPRETED: tl.constexpr):
    """FP32 of the two f16 in a word, less the integer OFFSET, times 2**LIFT; exact in f16."""
    f: tl.constexpr = (tl.float32, tl.float32)
    if INTERPRETED:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        if OFFSET:
            return lift(low - OFFSET, LIFT), lift(high - OFFSET, LIFT)
        else:
            return lift(low, LIFT), lift(high, LIFT)
    elif LIFT == 0 and OFFSET == 0:
        # Written out, because the compiler first gathers halves of several words.
        return tl.inline_asm_elementwise(_HALVES, "=f,=f,r", [pair], dtype=f, is_pure=True, pack=1)
    else:
        power = tl.full(pair.shape, 0x00010001 * ((15 + LIFT) << 10), tl.int32)
        if OFFSET:  # 1024 + half the range: f16 has an exponent of 10 + 15, and the half in its mantissa
            minus: tl.constexpr = 0x00010001 * (0x6400 + (LIFT << 10) + OFFSET - 1024) - (1 << 31) + (1 << 15)
        else:
            minus: tl.constexpr = (1 << 15) - (1 << 31)  # -0, which keeps the sign of zeros
        offset = tl.full(pair.shape, minus, tl.int32)
        return tl.inline_asm_elementwise(
            _LIFTED_HALVES, "=f,=f,r,r,r", [pair, power, offset], dtype=f, is_pure=True, pack=1
        )


@triton.jit
def _pair(
    words, i: tl.constexpr, INTEGER: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, NAN: tl.constexpr
):
    """The f16 of codes i and i + 16 / WIDTH of a run, which are in the same places of the halves of a word."""
    at: tl.constexpr = i * WIDTH % 32
    word = words[i * WIDTH // 32]
    if INTEGER:
        return _integer_pair(word >> at, WIDTH)
    else:
        return _float_pair(word << (16 - WIDTH - at), WIDTH, MANTISSA, NAN)


@triton.jit
def decode_run(
    words, table, FORM: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, NAN: tl.constexpr,
    TOP: tl.constexpr, LIFT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The eight FP32 values of a run of WIDTH-bit codes in `words`; LIFT 0 leaves the lifting to the caller.

    FORM: 0 floats, 1 integers, 2 tables of 16, 3 and 4 floats and integers of 4 or 8 bits that are exact in f16.
    """
    values = ()
    if FORM > 2:
        OFFSET: tl.constexpr = (1024 + (1 << (WIDTH - 1))) * (FORM == 4)
        step: tl.constexpr = 16 // WIDTH
        for first in tl.static_range(0, 8, 2 * step):
            highs = ()
            for i in tl.static_range(first, first + step):
                pair = _pair(words, i, FORM == 4, WIDTH, MANTISSA, NAN)
                low, high = _halves(pair, OFFSET, LIFT, INTERPRETED)
                values += (low,)
                highs += (high,)
            values += highs
    elif FORM == 2:
        if INTERPRETED:
            for i in tl.static_range(8):
                values += (tl.load(table + ((words[0] >> (4 * i)) & 15)),)
        else:
            f: tl.constexpr = (tl.float32,) * 8
            values = tl.inline_asm_elementwise(
                _LOOK_UP, _EIGHT_FLOATS + "r,l", [words[0], table.to(tl.int64)], dtype=f, is_pure=True, pack=1
            )
    elif FORM == 1:
        half: tl.constexpr = 1 << (WIDTH - 1)
        for i in tl.static_range(8):
            # Flipping the sign bit adds half the range; below the exponent of 2**23 the sum is an FP32 integer.
            biased = (_code(words, i, WIDTH) & (2 * half - 1)) ^ (0x4B000000 + half)
            values += (lift(float_of(biased) - (8388608.0 + half), LIFT),)
    else:
        digits: tl.constexpr = ((1 << (WIDTH - 1)) - 1) << (23 - MANTISSA)
        for i in tl.static_range(8):
            moved = (_code_on_top(words, i, WIDTH) >> (9 - WIDTH + MANTISSA)) & (digits | -0x80000000)
            value = _with_specials(
                float_of(moved), moved & digits, TOP << (23 - MANTISSA), (TOP + 1) << (23 - MANTISSA), NAN
            )
            values += (lift(value, LIFT),)
    return values
