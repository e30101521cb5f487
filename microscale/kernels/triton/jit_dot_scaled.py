"""The jitted product of two block-scaled matrices by `tl.dot_scaled`: on Blackwell, MMA instructions that take scales.

The interpreter knows no `dot_scaled`; there the tiles are decoded and multiplied in FP32, which tests all the rest.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import scale_offset
from microscale.kernels.triton.jit_decode import decode, decode_scale


@triton.jit
def _scales(scales, row, rows, start, blocks, BLOCKS: tl.constexpr, SWIZZLE: tl.constexpr, TYPED: tl.constexpr):
    """Scale codes [rows of a tile, BLOCKS], zero outside. TYPED: as E4M3, else the bytes of E8M0."""
    column = start + tl.arange(0, BLOCKS)
    place = scale_offset(row[:, None], column[None, :], rows, blocks, SWIZZLE)
    codes = tl.load(scales + place, mask=(row < rows)[:, None] & (column < blocks)[None, :], other=0)
    if TYPED:
        return codes.to(tl.float8e4nv, bitcast=True)
    else:
        return codes


@triton.jit
def _codes(qdata, row, rows, start, width, BYTES: tl.constexpr):
    """Bytes of codes [rows of a tile, BYTES], zero outside."""
    column = start + tl.arange(0, BYTES)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(qdata + row[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0)


@triton.jit
def _values(
    codes, scale, ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr, LOWEST: tl.constexpr, NAN: tl.constexpr, TOP: tl.constexpr, E8M0: tl.constexpr,
):  # fmt: skip
    """FP32 values of a tile, in the interpreter."""
    wide = codes.to(tl.int32)
    if WIDTH == 4:
        wide = tl.reshape(tl.join(wide & 15, wide >> 4), (ROWS, DEPTH))
    values = decode(wide, None, 0, WIDTH, MANTISSA, LOWEST, 1, NAN, TOP)
    if E8M0:
        factor = decode_scale(scale, None, False, True, 127, 8, 0, 0, 0, 1, 254)
    else:
        factor = decode_scale(scale, None, False, False, 7, 8, 3, -6, 1, 1, 126)
    values = tl.reshape(values, (ROWS, DEPTH // BLOCK, BLOCK)) * factor[:, :, None]
    return tl.reshape(values, (ROWS, DEPTH))


@triton.jit
def _outer(outer, index, inside, KIND: tl.constexpr):
    """FP32 outer scales of rows: KIND 1 one for all, 2 one each."""
    if KIND == 2:
        return tl.load(outer + index, mask=inside, other=0.0)
    else:
        return tl.load(outer)


@triton.jit
def _store(out, values, live, INTERPRETED: tl.constexpr):
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion truncates.
        b = values.to(tl.int32, bitcast=True)
        even = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.int16)
        rounded = tl.where((b & 0x7FFFFFFF) > 0x7F800000, tl.full(b.shape, 0x7FC0, tl.int16), even)
        tl.store(out, rounded.to(tl.bfloat16, bitcast=True), mask=live)
    else:
        tl.store(out, values.to(out.dtype.element_ty), mask=live)


@triton.jit
def dot_scaled(
    a, a_scales, a_outer, b, b_scales, b_outer, bias, out, m, n, blocks, a_width, b_width, bias_row, bias_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    A: tl.constexpr, A_WIDTH: tl.constexpr, A_MANTISSA: tl.constexpr, A_LOWEST: tl.constexpr, A_NAN: tl.constexpr,
    A_TOP: tl.constexpr, A_SWIZZLE: tl.constexpr, A_OUTER: tl.constexpr,
    B: tl.constexpr, B_WIDTH: tl.constexpr, B_MANTISSA: tl.constexpr, B_LOWEST: tl.constexpr, B_NAN: tl.constexpr,
    B_TOP: tl.constexpr, B_SWIZZLE: tl.constexpr, B_OUTER: tl.constexpr,
    E8M0: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out [m, n] = (a @ b.T) * a_outer * b_outer + bias of codes a [m, a_width bytes], b [n, b_width bytes].

    Scales [m, blocks] and [n, blocks], or their 128 x 4 tiles. A, B: what `tl.dot_scaled` calls the elements. OUTER: 0
    none, 1 one for all, 2 by row. bias has strides (bias_row, bias_column). GROUP: tiles of rows that go together.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = (m + BM - 1) // BM, (n + BN - 1) // BN
    first = pid // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inner = pid % (GROUP * tiles_n)
    row = (first + inner % size) * BM + tl.arange(0, BM)
    column = (inner // size) * BN + tl.arange(0, BN)
    TYPED: tl.constexpr = not E8M0 and not INTERPRETED
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, (blocks * BLOCK + BK - 1) // BK):
        x = _codes(a, row, m, step * (BK * A_WIDTH // 8), a_width, BK * A_WIDTH // 8)
        y = _codes(b, column, n, step * (BK * B_WIDTH // 8), b_width, BK * B_WIDTH // 8)
        x_scale = _scales(a_scales, row, m, step * (BK // BLOCK), blocks, BK // BLOCK, A_SWIZZLE, TYPED)
        y_scale = _scales(b_scales, column, n, step * (BK // BLOCK), blocks, BK // BLOCK, B_SWIZZLE, TYPED)
        if INTERPRETED:
            x = _values(x, x_scale, BM, BK, BLOCK, A_WIDTH, A_MANTISSA, A_LOWEST, A_NAN, A_TOP, E8M0)
            y = _values(y, y_scale, BN, BK, BLOCK, B_WIDTH, B_MANTISSA, B_LOWEST, B_NAN, B_TOP, E8M0)
            total += tl.dot(x, tl.trans(y), input_precision="ieee")
        else:
            total = tl.dot_scaled(x, x_scale, A, tl.trans(y), y_scale, B, total)
    if A_OUTER > 0:
        factor = _outer(a_outer, row, row < m, A_OUTER)
        if A_OUTER == 2:
            factor = factor[:, None]
        total = total * factor
    if B_OUTER > 0:
        factor = _outer(b_outer, column, column < n, B_OUTER)
        if B_OUTER == 2:
            factor = factor[None, :]
        total = total * factor
    live = (row < m)[:, None] & (column < n)[None, :]
    if BIAS:
        where = row[:, None].to(tl.int64) * bias_row + column[None, :] * bias_column
        total += tl.load(bias + where, mask=live, other=0.0).to(tl.float32)
    _store(out + row[:, None].to(tl.int64) * n + column[None, :], total, live, INTERPRETED)
