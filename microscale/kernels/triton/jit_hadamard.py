"""Jitted code of the block-diagonal Hadamard transform; bit-equal to `microscale.numerics.hadamard`."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, widen


@triton.jit
def _butterflies(v, STRIDE: tl.constexpr, LANES: tl.constexpr):
    """One stage: of lanes i and i + STRIDE, the sum and the difference."""
    pairs = tl.permute(tl.reshape(v, (LANES // (2 * STRIDE), 2, STRIDE)), (0, 2, 1))
    low, high = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (LANES,))


@triton.jit
def hadamard(
    x, out, signs, total, rows, columns, matrix_stride, row_stride, column_stride,
    SIZE: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr, SIGNED: tl.constexpr, LANES: tl.constexpr,
    FLAT: tl.constexpr, BATCHED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Transform groups of SIZE along rows of x into dense `out` of its dtype: `total` elements, a multiple of SIZE.

    x is matrices of `rows` rows of `columns` elements, a multiple of SIZE too; FLAT: dense, so that strides do not
    matter. FP32 butterflies of strides 1, 2, 4, ..., one multiplication by FACTOR, one rounding to nearest even.
    signs: FP32 [SIZE], +1 or -1, where SIGNED.
    """
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = place < total
    if FLAT:
        v = widen(tl.load(x + place, mask=inside, other=0.0))
    else:
        groups = columns // SIZE  # of a row
        group = tl.program_id(0).to(tl.int64) * (LANES // SIZE) + tl.arange(0, LANES // SIZE)
        row = group // groups
        if BATCHED:
            start = (row // rows) * matrix_stride + (row % rows) * row_stride
        else:
            start = row * row_stride
        start += (group % groups) * SIZE * column_stride
        lane = tl.arange(0, SIZE).to(tl.int64) * column_stride
        live = tl.broadcast_to((group * SIZE < total)[:, None], (LANES // SIZE, SIZE))
        v = tl.reshape(widen(tl.load(x + start[:, None] + lane[None, :], mask=live, other=0.0)), (LANES,))
    if SIGNED:
        v = v * tl.load(signs + tl.arange(0, LANES) % SIZE)
    for stage in tl.static_range(STAGES):
        v = _butterflies(v, 1 << stage, LANES)
    v = v * FACTOR
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion truncates; compiled, the hardware's rounds to nearest even.
        b = bits_of(v)
        even = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.int16)
        even = tl.where((b & 0x7FFFFFFF) > 0x7F800000, tl.full(b.shape, 0x7FC0, tl.int16), even)
        tl.store(out + place, even.to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out + place, v.to(out.dtype.element_ty), mask=inside)
