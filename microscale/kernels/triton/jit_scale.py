"""Jitted code of scales: from a block's amax to its stored scale and factor. See `microscale.numerics.scaling`."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton import amax
from microscale.kernels.triton.jit_common import bits_of, float_of, power_of_two
from microscale.kernels.triton.jit_encode import decode_magnitude, round_float

FROM_AMAX = tl.constexpr(amax.FROM_AMAX)
FROM_SCALE = tl.constexpr(amax.FROM_SCALE)
FROM_PARTS = tl.constexpr(amax.FROM_PARTS)
FROM_VALUES = tl.constexpr(amax.FROM_VALUES)
BY_ROW = tl.constexpr(amax.BY_ROW)
BY_MATRIX = tl.constexpr(amax.BY_MATRIX)


# -- the outer scale ---------------------------------------------------------------------------------------------------


@triton.jit
def outer_from_amax(amax, TOP: tl.constexpr):
    """(amax, encode, decode) as microscale.numerics.scaling.outer_from_amax; TOP is element max x scale_max."""
    encode = tl.minimum(tl.div_rn(TOP, amax), 3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    encode = tl.where(amax == 0, 1.0, encode)
    return amax, encode, tl.div_rn(1.0, encode)


@triton.jit
def outer_from_scale(scale, TOP: tl.constexpr):
    """(amax, encode, decode) as microscale.numerics.scaling.outer_from_scale."""
    decode = tl.where(scale == 0, 1.0, scale)
    encode = tl.minimum(tl.div_rn(1.0, decode), 3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    return decode * TOP, encode, decode


@triton.jit
def order_key(v):
    """int32 that orders finite magnitudes as numbers do; anything that is not finite is negative. See `key_to_float`.

    The bits without the sign, those of 16-bit numbers in the upper half, plus what takes infinity to the sign bit.
    """
    if v.dtype == tl.float32:
        b, lift = bits_of(v), 0x00800000
    elif v.dtype == tl.bfloat16:
        b, lift = v.to(tl.int16, bitcast=True).to(tl.int32) << 16, 0x00800000
    else:
        b, lift = v.to(tl.int16, bitcast=True).to(tl.int32) << 16, 0x04000000
    return (b & 0x7FFFFFFF) + lift


@triton.jit
def zero_key(DTYPE: tl.constexpr):
    """The key of 0, where a maximum over keys starts."""
    return 0x04000000 if DTYPE.is_fp16() else 0x00800000


@triton.jit
def key_to_float(key, DTYPE: tl.constexpr):
    """FP32 magnitude of a key made from numbers of DTYPE."""
    b = key - zero_key(DTYPE)
    if DTYPE.is_fp16():
        return (b >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return float_of(b)


@triton.jit
def amax_of_values(source, count, LANES: tl.constexpr):
    """FP32 amax over the finite ones of `count` numbers; every program reads them all, so `count` is small."""
    DTYPE: tl.constexpr = source.dtype.element_ty
    lane = tl.arange(0, LANES)
    best = tl.full((LANES,), zero_key(DTYPE), tl.int32)
    for start in range(0, count, LANES):
        values = tl.load(source + start + lane, mask=start + lane < count, other=0.0)
        best = tl.maximum(best, order_key(values))
    return key_to_float(tl.max(best, axis=0), DTYPE)


@triton.jit
def outer_scale(
    source, decode, count, row, rows, live, OUTER: tl.constexpr, LANES: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """(amax, encode, decode) for blocks: numbers, or tensors like `row`. The kinds of OUTER: `amax.py`.

    row: rows of the blocks, of matrices of `rows` rows; live: those that are there.
    """
    if OUTER == FROM_AMAX:
        return outer_from_amax(tl.load(source), TOP)
    elif OUTER == FROM_SCALE:
        return outer_from_scale(tl.load(source), TOP)
    elif OUTER == FROM_PARTS:  # positive numbers order as their bits do
        parts = bits_of(tl.load(source + tl.arange(0, LANES)))
        return outer_from_amax(float_of(tl.max(parts, axis=0)), TOP)
    elif OUTER == FROM_VALUES:
        return outer_from_amax(amax_of_values(source, count, LANES), TOP)
    elif OUTER >= BY_ROW:
        index = row if OUTER == BY_ROW else row // rows
        encode = tl.load(source + index, mask=live, other=1.0)
        amax = tl.load(source + count + index, mask=live, other=1.0)
        return amax, encode, tl.load(decode + index, mask=live, other=1.0)
    else:
        return 1.0, 1.0, 1.0


# -- block scales ------------------------------------------------------------------------------------------------------


@triton.jit
def normalized_exponent(a, CARRY: tl.constexpr):
    """floor(log2 a) of FP32 a > 0, subnormals included, after adding CARRY to the mantissa bits."""
    small = a < 1.1754943508222875e-38
    y = tl.where(small, a * 16777216.0, a)
    return ((bits_of(y) + CARRY) >> 23) - 127 - tl.where(small, 24, 0)


@triton.jit
def exponent_codes(
    amax, RULE: tl.constexpr, E_MAX: tl.constexpr, E_EMAX: tl.constexpr, E_PRECISION: tl.constexpr,
    S_BIAS: tl.constexpr, S_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Biased exponent codes (int32) of a finite amax."""
    if RULE == 2:
        exponent = normalized_exponent(tl.div_rn(amax, tl.full(amax.shape, E_MAX, tl.float32)), 0x7FFFFF)
    elif RULE == 1:
        exponent = normalized_exponent(amax, 0x7FFFFF) - E_EMAX
    elif RULE == 3:
        exponent = normalized_exponent(amax, 1 << (22 - E_PRECISION)) - E_EMAX
    else:
        exponent = normalized_exponent(amax, 0) - E_EMAX
    return tl.minimum(tl.maximum(exponent + S_BIAS, 0), S_MAX_CODE)


@triton.jit
def scale_and_value(
    amax_bits, encode, multiplier, HAS_OUTER: tl.constexpr, SEARCHED: tl.constexpr, EXPONENT_ONLY: tl.constexpr,
    RULE: tl.constexpr, E_MAX: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr,
    E_PRECISION: tl.constexpr, S_BIAS: tl.constexpr, S_WIDE: tl.constexpr, S_MANTISSA: tl.constexpr,
    S_LOWEST: tl.constexpr, S_WIDTH: tl.constexpr, S_MAX: tl.constexpr, S_MAX_CODE: tl.constexpr,
    S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_SUBNORMALS: tl.constexpr,
):  # fmt: skip
    """Stored scale (int32 code, or FP32 where S_WIDE), its FP32 value, and whether that is a number.

    SEARCHED: the scale of one candidate, `multiplier` times the amax, in the order of the search. The value of a code
    that is not a number is garbage.
    """
    finite = amax_bits < 0x7F800000
    amax = float_of(amax_bits)
    if EXPONENT_ONLY:
        if SEARCHED:
            amax = amax * multiplier
            finite = amax < float("inf")
        scale = exponent_codes(amax, RULE, E_MAX, E_EMAX, E_PRECISION, S_BIAS, S_MAX_CODE)
        return tl.where(finite, scale, S_NAN_CODE), power_of_two(scale - S_BIAS), finite
    else:
        if HAS_OUTER and not SEARCHED:
            value = amax * (encode * E_INVERSE)
        else:
            value = tl.div_rn(amax, tl.full(amax.shape, E_MAX, tl.float32))
        if SEARCHED:
            if HAS_OUTER:
                value = value * encode
            value = value * multiplier
        if HAS_OUTER:  # a given outer scale may be anything
            finite = finite & (value == value)
        if S_WIDE:
            value = tl.minimum(tl.maximum(value, 1.1754943508222875e-38), 3.4028234663852886e38)
            return tl.where(finite, value, float("nan")), value, finite
        else:
            if S_WIDTH > 8:
                value = tl.maximum(value, 1.1754943508222875e-38)
            magnitude = tl.minimum(tl.abs(value) if HAS_OUTER else value, S_MAX)
            scale = round_float(magnitude, 0, S_MANTISSA, S_LOWEST, False, S_SUBNORMALS)
            if HAS_OUTER:
                if S_SIGNED:
                    scale = tl.where(bits_of(value) < 0, scale | (1 << (S_WIDTH - 1)), scale)
                else:
                    scale = tl.where(bits_of(value) < 0, 0, scale)
            number = decode_magnitude(scale, S_MANTISSA, S_LOWEST, S_WIDTH, HAS_OUTER and S_SIGNED, S_SUBNORMALS)
            return tl.where(finite, scale, S_NAN_CODE), number, finite


@triton.jit
def factor_of(scale, value, finite, decode, HAS_OUTER: tl.constexpr, EXPONENT_ONLY: tl.constexpr, S_BIAS: tl.constexpr):
    """What elements are multiplied with before encoding, NaN for scales that are not numbers.

    `scale`, `value`, `finite` as `scale_and_value` returns them; `decode`: the outer scale.
    """
    if EXPONENT_ONLY:
        factor = power_of_two(S_BIAS - scale)
    else:
        if HAS_OUTER:
            value = value * decode
        factor = tl.div_rn(tl.full(value.shape, 1.0, tl.float32), value)
        factor = tl.minimum(factor, 3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(finite, factor, float("nan"))


@triton.jit
def scale_and_factor(
    amax_bits, encode, decode, HAS_OUTER: tl.constexpr, EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr,
    E_MAX: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_PRECISION: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr,
    S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_WIDTH: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_NATIVE: tl.constexpr,
    S_SIGNED: tl.constexpr = True, S_SUBNORMALS: tl.constexpr = True,
    multiplier=1.0, SEARCHED: tl.constexpr = False,
):  # fmt: skip
    """Stored scale (int32 code, or FP32 when S_WIDE) and the factor that elements are multiplied with.

    S_NATIVE: the scale is E4M3 and the hardware converts it, rounding to nearest even and saturating. For `multiplier`
    and SEARCHED see `scale_and_value`.
    """
    if S_NATIVE and not SEARCHED:
        finite = amax_bits < 0x7F800000
        amax = float_of(amax_bits)
        if HAS_OUTER:
            value = amax * (encode * E_INVERSE)
        else:
            value = tl.div_rn(amax, tl.full(amax.shape, E_MAX, tl.float32))
        native = tl.where(finite, value, float("nan")).to(tl.float8e4nv)
        divisor = native.to(tl.float32)
        if HAS_OUTER:
            divisor = divisor * decode
        # The same IEEE result as the division, in a third of the instructions.
        factor = tl.inline_asm_elementwise(
            "rcp.rn.f32 $0, $1;", "=r,r", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
        factor = tl.minimum(factor, 3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
        return native.to(tl.uint8, bitcast=True), factor
    else:
        scale, value, finite = scale_and_value(
            amax_bits, encode, multiplier, HAS_OUTER, SEARCHED, EXPONENT_ONLY, RULE, E_MAX, E_INVERSE, E_EMAX,
            E_PRECISION, S_BIAS, S_WIDE, S_MANTISSA, S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE, S_SIGNED,
            S_SUBNORMALS,
        )  # fmt: skip
        return scale, factor_of(scale, value, finite, decode, HAS_OUTER, EXPONENT_ONLY, S_BIAS)
