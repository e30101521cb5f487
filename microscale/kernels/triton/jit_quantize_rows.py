"""The jitted code of `quantize_rows`: MX blocks rounded under their own scales, then under their row's power of two.

A thread owns PIECE elements of every chunk of a row, four words that it loads together, and keeps them in registers
until the row's largest block is known: x is read once. BLOCK / PIECE neighbouring threads share a block.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_blocks import _shared as shared
from microscale.kernels.triton.jit_common import float_of, power_of_two
from microscale.kernels.triton.jit_encode import decode_magnitude, encode
from microscale.kernels.triton.jit_runs import _scale_of as scale_of
from microscale.kernels.triton.jit_words import amax_bits, high, load_words, low, store_words, words_of

_ROW_FLOOR = tl.constexpr(-126)
_ROW_TOP = tl.constexpr(127)
_NOTHING_LEFT = tl.constexpr(-40)


@triton.jit
def _scale(
    bits, PORTABLE: tl.constexpr, CARRY: tl.constexpr, E_EMAX: tl.constexpr, S_BIAS: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr,
):  # fmt: skip
    """Stored scale and FP32 factor of blocks from the bits of their amax: `jit_runs._scale_of` of exponent scales."""
    return scale_of(
        bits, 1.0, 1.0, False, PORTABLE, True, CARRY, 0.0, 0.0, E_EMAX, S_BIAS, False, 0, 0, 8, 0.0, S_MAX_CODE,
        S_NAN_CODE, False, False,
    )  # fmt: skip


@triton.jit
def _rounded_twice(
    value, factor, power, finite, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr,
    E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr,
):  # fmt: skip
    """E4M3 codes (int32) of FP32 values, by integers, for the interpreter; the PTX does the same by conversions."""
    codes = encode(
        value * factor, 0, value, value, 0, 8, E_MANTISSA, E_LOWEST, E_MAX, E_MAX_CODE, E_NAN_CODE, True, False
    )
    again = decode_magnitude(codes, E_MANTISSA, E_LOWEST, 8, True, True) * power
    return tl.where(finite, encode(again, 0, value, value, 0, 8, 3, -6, 448.0, 0x7E, 0x7F, True, False), 0x7F)


@triton.jit
def quantize_rows(
    x, codes, powers, total, pieces,
    T: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr, SHARE: tl.constexpr, EVEN: tl.constexpr,
    LIFT: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr, NATIVE: tl.constexpr, PORTABLE: tl.constexpr,
    CARRY: tl.constexpr, E_EMAX: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr,
    E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, S_BIAS: tl.constexpr, S_MAX_CODE: tl.constexpr,
    S_NAN_CODE: tl.constexpr,
):  # fmt: skip
    """Codes [total, 8 pieces] and FP32 powers [total] of bf16 x [total, 8 pieces].

    T threads take T / LANES rows, of each LANES pieces of 8 elements CHUNKS times. SHARE: threads of a block. EVEN:
    rows are LANES * CHUNKS pieces, and programs full. LIFT: of `reference.align_rows`. NATIVE: by the hardware's
    conversions, with the text PTX.
    """
    ROWS: tl.constexpr = T // LANES
    first = tl.program_id(0).to(tl.int64) * ROWS
    x, codes = words_of(x) + first * pieces * 4, words_of(codes) + first * pieces * 2
    row, lane = tl.arange(0, T) // LANES, tl.arange(0, T) % LANES
    inside = first + row < total
    held, bits = (), ()
    top = tl.zeros((T,), tl.int32)
    for c in tl.static_range(CHUNKS):
        piece = c * LANES + lane
        live = tl.full((T,), True, tl.int1) if EVEN else inside & (piece < pieces)
        words = load_words(x, (row * pieces + piece) * 4, live, T, 4)
        most = shared(amax_bits(words, 0, 4, PORTABLE), T, SHARE)
        top = tl.maximum(top, tl.where(most < 0x7F800000, most, 0))
        held, bits = held + (words,), bits + (most,)
    largest, _ = _scale(shared(top, T, LANES), PORTABLE, CARRY, E_EMAX, S_BIAS, S_MAX_CODE, S_NAN_CODE)
    exponent = tl.minimum(tl.maximum(largest - S_BIAS - LIFT, _ROW_FLOOR), _ROW_TOP)
    tl.store(powers + first + row, power_of_two(exponent), mask=inside & (lane == 0))
    base = exponent + (S_BIAS + LIFT - 127)  # a block's second factor is 2**(its scale - base - 127)
    for c in tl.static_range(CHUNKS):
        piece = c * LANES + lane
        live = tl.full((T,), True, tl.int1) if EVEN else inside & (piece < pieces)
        scale, factor = _scale(bits[c], PORTABLE, CARRY, E_EMAX, S_BIAS, S_MAX_CODE, S_NAN_CODE)
        if NATIVE:
            words = held[c]
            power = float_of(tl.maximum(scale - base, 0) << 23)  # garbage for NaN blocks, whose codes are NaN already
            made = tl.inline_asm_elementwise(
                PTX, CONSTRAINTS, words + (factor, power), (tl.int32, tl.int32), is_pure=True, pack=1
            )
        else:
            power = power_of_two(tl.maximum(scale - base - 127 + LIFT, _NOTHING_LEFT))
            made = ()
            for i in tl.static_range(2):
                word = tl.zeros((T,), tl.int32)
                for j in tl.static_range(4):
                    source = held[c][2 * i + j // 2]
                    code = _rounded_twice(
                        high(source) if j % 2 else low(source), factor, power, scale != S_NAN_CODE, E_MANTISSA,
                        E_LOWEST, E_MAX, E_MAX_CODE, E_NAN_CODE,
                    )  # fmt: skip
                    word = word | (code << (8 * j))
                made = made + (word,)
        store_words(codes, (row * pieces + piece) * 2, live, made, T, 2)
