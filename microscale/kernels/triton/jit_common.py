"""Jitted code that quantize and dequantize share: bits of FP32, exact powers of two, where a scale stands."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    """The bits of FP32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(b):
    """FP32 of int32 bits."""
    return b.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """FP32 of bf16, fp16 or fp32; bf16 by its bits, because the interpreter's own conversion breaks its subnormals."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def power_of_two(exponent):
    """FP32 2**exponent for exponents in [-127, 127]; -127 is subnormal."""
    return float_of(tl.where(exponent == -127, 0x00400000, (exponent + 127) << 23))


@triton.jit
def decode_float(codes, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, WIDTH: tl.constexpr, SIGNED: tl.constexpr):
    """FP32 values of int32 codes of a float element with subnormals; NaN and infinity codes are the caller's."""
    magnitude = codes & ((1 << (WIDTH - SIGNED)) - 1)
    # As the bits of a (sub)normal FP32 number the code is too small by an exact power of two.
    value = float_of(magnitude << (23 - MANTISSA)) * (2.0 ** (126 + LOWEST))
    if SIGNED:
        value = float_of(bits_of(value) | ((codes >> (WIDTH - 1)) << 31))
    return value


@triton.jit
def scale_offset(row, column, rows, blocks, SWIZZLE: tl.constexpr):
    """Where the scale of a block stands: row-major, or in 128 x 4 tiles of its matrix of `rows` rows."""
    if not SWIZZLE:
        return row * blocks + column
    tile_columns = (blocks + 3) // 4
    matrix, r = row // rows, row % rows
    tile = (matrix * ((rows + 127) // 128) + r // 128) * tile_columns + column // 4
    return tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + column % 4
