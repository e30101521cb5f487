"""Jitted code around a GEMM: finishing FP32 sums, joining outer scales, bfloat16 pieces of numbers and their sums."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish_sums(
    sums, left, right, bias, out, rows, columns,
    sums_matrix, sums_row, left_matrix, left_row, right_matrix, right_column,
    bias_matrix, bias_row, bias_column, out_matrix, out_row,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out [B, M, N] = sums * left [B, M, 1] * right [B, 1, N] + bias, rounded once. A program: WIDTH columns of a row.

    Strides follow the tensor's name; 0 repeats. LEFT, RIGHT, BIAS: whether there is such a thing.
    """
    chunks = tl.cdiv(columns, WIDTH)
    line, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    matrix, row = (line // rows).to(tl.int64), (line % rows).to(tl.int64)
    column = chunk * WIDTH + tl.arange(0, WIDTH)
    there, column = column < columns, column.to(tl.int64)
    value = tl.load(sums + matrix * sums_matrix + row * sums_row + column, mask=there, other=0.0)
    if LEFT:
        value *= tl.load(left + matrix * left_matrix + row * left_row)
    if RIGHT:
        value *= tl.load(right + matrix * right_matrix + column * right_column, mask=there, other=0.0)
    if BIAS:
        place = matrix * bias_matrix + row * bias_row + column * bias_column
        value += tl.load(bias + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + matrix * out_matrix + row * out_row + column, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def combine_scales(first, second, alpha, power):
    """alpha * power = first * second; power is 2**-64 where the product is below 2**-64, 2**64 above that, else 1."""
    one, other = tl.load(first), tl.load(second)
    size = tl.abs(one * other)
    down = tl.where(size < 5.421010862427522e-20, 4294967296.0, tl.where(size > 18446744073709551616.0, 2.0**-32, 1.0))
    up = tl.where(size < 5.421010862427522e-20, 2.0**-64, tl.where(size > 18446744073709551616.0, 2.0**64, 1.0))
    tl.store(alpha, (one * down) * (other * down))
    tl.store(power, up)


@triton.jit
def split_values(x, pieces, total, COUNT: tl.constexpr, SCALE: tl.constexpr, SIZE: tl.constexpr):
    """Cut x [total] into COUNT pieces of 8 bits: pieces [COUNT, total], the bits of bfloat16 as int16.

    Each is SCALE times larger than it counts after the one before. What is not finite stands in the first.
    """
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < total
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    bits = tl.where(magnitude > 0x7F800000, bits | 0x00400000, bits)  # NaN stays one without its lower bits
    for i in tl.static_range(COUNT):
        top = bits & -65536
        tl.store(pieces + i * total + place, (bits >> 16).to(tl.int16), mask=there)
        rest = (bits.to(tl.float32, bitcast=True) - top.to(tl.float32, bitcast=True)) * SCALE
        bits = tl.where(finite, rest.to(tl.int32, bitcast=True), 0)


@triton.jit
def join_pieces(sums, bias, out, columns, total, SCALE: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """out [total] = sums[0] + SCALE * sums[1] + bias, rounded once; sums [2, total], bias [columns] repeats."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < total
    value = tl.load(sums + place, mask=there, other=0.0)
    value += tl.load(sums + total + place, mask=there, other=0.0) * SCALE
    if BIAS:
        value += tl.load(bias + place % columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=there)
