"""Jitted code of the blocks that a thread owns: their scales, their candidates, their codes.

Used by the kernels of `jit_blocks.py`. The unit is a *run*: the blocks that a Hadamard group spans, or one block.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, float_of, power_of_two
from microscale.kernels.triton.jit_encode import decode_magnitude
from microscale.kernels.triton.jit_scale import normalized_exponent, scale_and_factor
from microscale.kernels.triton.jit_words import amax_bits, encode_sixteen, high, low, random_words, sixteen_of


@triton.jit
def _scale_of(
    bits, encode, decode, HAS_OUTER: tl.constexpr, PORTABLE: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr, E_MAX: tl.constexpr, E_INVERSE: tl.constexpr,
    E_EMAX: tl.constexpr, S_BIAS: tl.constexpr, S_WIDE: tl.constexpr, S_MANTISSA: tl.constexpr,
    S_LOWEST: tl.constexpr, S_WIDTH: tl.constexpr, S_MAX: tl.constexpr, S_MAX_CODE: tl.constexpr,
    S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Stored scale and factor of a block from the bits of its amax, a bf16.

    Every rule of a power-of-two scale is floor(log2) after CARRY was added to the mantissa; that holds for `rceil`
    too, because amax / max of two 8-bit significands is never within rounding of a power of two.
    """
    if EXPONENT_ONLY:
        exponent = normalized_exponent(float_of(bits), CARRY) - E_EMAX
        scale = tl.minimum(tl.maximum(exponent + S_BIAS, 0), S_MAX_CODE)
        finite = bits < 0x7F800000
        factor = tl.where(finite, power_of_two(S_BIAS - scale), float("nan"))
        return tl.where(finite, scale, S_NAN_CODE), factor
    else:
        return scale_and_factor(
            bits, encode, decode, HAS_OUTER, False, 4, E_MAX, E_INVERSE, E_EMAX, 0, S_BIAS, S_WIDE, S_MANTISSA,
            S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE, S_IS_E4M3 and not PORTABLE, S_SIGNED,
        )  # fmt: skip


# -- candidates --------------------------------------------------------------------------------------------------------


@triton.jit
def _nearest_e2m1(a):
    """The E2M1 number nearest to FP32 a >= 0, ties to even: adding 2**22 times a's power of two, at least 1."""
    a = tl.minimum(a, 6.0)
    power = tl.maximum(float_of(bits_of(a) & 0x7F800000), 1.0)
    return tl.fma(power, -4194304.0, tl.fma(power, 4194304.0, a))


@triton.jit
def _over(a, divisor, inverse):
    """a / divisor, rounded once, by Markstein's two multiply-adds; `inverse` is 1 / divisor, rounded.

    For normal quotients. An error's square is zero, or does not feel the quotient, where this one is not.
    """
    quotient = a * inverse
    return tl.fma(tl.fma(quotient, -divisor, a), inverse, quotient)


@triton.jit
def _squared_error(words, FIRST: tl.constexpr, COUNT: tl.constexpr, factor, one, three_halves):
    """The sum of squares of dequantized minus given, element after element, over a block of E2M1.

    `one` and `three_halves` are what codes of 1 and 1.5 dequantize to; the other numbers are these times powers of two,
    exactly (where they would not be normal numbers, squares are zero).
    """
    total = tl.zeros_like(factor)
    for i in tl.static_range(2 * COUNT):
        w = words[FIRST + i // 2]
        x = tl.abs(high(w) if i % 2 else low(w))
        b = bits_of(_nearest_e2m1(x * factor))
        value = tl.where((b & 0x400000) != 0, three_halves, one)
        d = tl.fma(value, float_of(b & 0x7F800000), -x)
        total = d * d if i == 0 else total + d * d
    return total


@triton.jit
def _best_candidate(
    words, FIRST: tl.constexpr, COUNT: tl.constexpr, bits, outer_amax, encode, decode, multipliers,
    CANDIDATES: tl.constexpr, HAS_OUTER: tl.constexpr, PORTABLE: tl.constexpr, OUTER_TOP: tl.constexpr,
    E_MAX: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, S_BIAS: tl.constexpr, S_WIDE: tl.constexpr,
    S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_WIDTH: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Stored scale and factor of the candidate with the least squared error: microscale.numerics.scaling.search."""
    best_scale, best_factor = tl.zeros_like(bits), tl.zeros_like(float_of(bits))
    least = best_factor
    finite = bits < 0x7F800000
    amax = float_of(bits)
    inverse = 1.0 / OUTER_TOP if HAS_OUTER else 1.0
    shared = tl.div_rn(amax, tl.full(amax.shape, E_MAX, tl.float32))
    if HAS_OUTER:
        shared = shared * encode
    for k in tl.static_range(CANDIDATES):
        multiplier = tl.load(multipliers + k)
        if S_IS_E4M3 and not PORTABLE:
            native = tl.where(finite, shared * multiplier, float("nan")).to(tl.float8e4nv)
            scale, value = native.to(tl.uint8, bitcast=True).to(tl.int32), native.to(tl.float32)
            factor = tl.inline_asm_elementwise(
                "rcp.rn.f32 $0, $1;", "=r,r", [value * decode if HAS_OUTER else value], dtype=tl.float32,
                is_pure=True, pack=1,
            )  # fmt: skip
            factor = tl.minimum(factor, 3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
        else:
            scale, factor = scale_and_factor(
                bits, encode, decode, HAS_OUTER, False, 4, E_MAX, E_INVERSE, E_EMAX, 0, S_BIAS, S_WIDE, S_MANTISSA,
                S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE, False, S_SIGNED, True, multiplier, True,
            )  # fmt: skip
            value = decode_magnitude(scale, S_MANTISSA, S_LOWEST, S_WIDTH, False, True)
        one, three_halves = value, value * 1.5
        most = _nearest_e2m1(amax * factor) * value
        if HAS_OUTER:
            one, three_halves = value * outer_amax, (value * 1.5) * outer_amax
            most = most * outer_amax
            one, three_halves = _over(one, OUTER_TOP, inverse), _over(three_halves, OUTER_TOP, inverse)
        error = _squared_error(words, FIRST, COUNT, factor, one, three_halves)
        error = tl.where(most == float("inf"), most, error)  # where the reference overflows before it divides
        if k == 0:
            best_scale, best_factor, least = scale, factor, error
        else:
            better = error < least
            best_scale = tl.where(better, scale, best_scale)
            best_factor, least = tl.where(better, factor, best_factor), tl.where(better, error, least)
    return tl.where(finite, best_scale, S_NAN_CODE), tl.where(finite, best_factor, float("nan"))


# -- runs --------------------------------------------------------------------------------------------------------------


@triton.jit
def quantize_run(
    words, bits, counter, outer_amax, encode, decode, seed, thresholds, code_of, multipliers,
    RUN: tl.constexpr, HAS_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr, STOCHASTIC: tl.constexpr,
    ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr, PORTABLE: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize the blocks of a run: a tuple of its scales, and one of the words of its codes.

    `bits`: FP32 bits of the amax that the (one) block shares with others, or () for each block's own. `counter`: of
    the run's first sixteen elements, for stochastic rounding. CANDIDATES: how many `multipliers` the scale rule tries,
    by squared error, for E2M1; 0 for none.
    """
    scales, codes = (), ()
    if ENCODER == 5:
        table = sixteen_of(thresholds, 15)
    else:
        table = thresholds
    for b in tl.static_range(RUN // BLOCK):
        if len(bits) == 0:
            amax = amax_bits(words, b * BLOCK // 2, BLOCK // 2, PORTABLE)
        else:
            amax = bits[0]
        if CANDIDATES > 0:
            scale, factor = _best_candidate(
                words, b * BLOCK // 2, BLOCK // 2, amax, outer_amax, encode, decode, multipliers, CANDIDATES,
                HAS_OUTER, PORTABLE, OUTER_TOP, E_MAX, E_INVERSE, E_EMAX, S_BIAS, S_WIDE, S_MANTISSA, S_LOWEST,
                S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE, S_SIGNED, S_IS_E4M3,
            )  # fmt: skip
        else:
            scale, factor = _scale_of(
                amax, encode, decode, HAS_OUTER, PORTABLE, EXPONENT_ONLY, CARRY, E_MAX, E_INVERSE, E_EMAX, S_BIAS,
                S_WIDE, S_MANTISSA, S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE, S_SIGNED, S_IS_E4M3,
            )  # fmt: skip
        scales = scales + (scale if S_WIDE else scale.to(tl.uint8),)
        for i in tl.static_range(BLOCK // 16):
            if STOCHASTIC:
                random = random_words(tl.load(seed), tl.load(seed + 1), counter + (b * (BLOCK // 16) + i))
            else:
                random = ()
            codes = codes + encode_sixteen(
                words, b * BLOCK // 2 + 8 * i, factor, amax < 0x7F800000, random, table, code_of,
                ENCODER, PTX, CONSTRAINTS, STOCHASTIC, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX, E_MAX_CODE,
                E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS,
            )  # fmt: skip
    return scales, codes
