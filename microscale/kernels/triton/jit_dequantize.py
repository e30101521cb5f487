"""The jitted code of dequantize: one source for every format and layout, specialised by its properties."""

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, decode_float, float_of, power_of_two, scale_offset


@triton.jit
def _decode(
    codes, table, KIND: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr,
    SIGNED: tl.constexpr, NAN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """FP32 values of int32 codes. NAN: 0 none, 1 codes above TOP are NaN, 2 infinity right above TOP, then NaN."""
    if KIND == 2:
        return tl.load(table + codes)
    elif KIND == 1:
        signed = tl.where(codes >= (1 << (WIDTH - 1)), codes - (1 << WIDTH), codes)
        return signed.to(tl.float32) * (2.0 ** (-MANTISSA))
    else:
        value = decode_float(codes, MANTISSA, LOWEST, WIDTH, SIGNED)
        if NAN > 0:
            magnitude = codes & ((1 << (WIDTH - SIGNED)) - 1)
            special = float_of(tl.full(codes.shape, 0x7FC00000, tl.int32))
            if NAN == 2:
                infinity = float_of(0x7F800000 | ((codes >> (WIDTH - 1)) << 31))
                special = tl.where(magnitude == TOP + 1, infinity, special)
            value = tl.where(magnitude > TOP, special, value)
        return value


@triton.jit
def _decode_scale(
    scales, place, live, WIDE: tl.constexpr, EXPONENT_ONLY: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr, LOWEST: tl.constexpr, SIGNED: tl.constexpr, NAN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    stored = tl.load(scales + place, mask=live, other=0)
    if WIDE:
        return stored.to(tl.float32)
    elif EXPONENT_ONLY:
        code = stored.to(tl.int32)
        nan = float_of(tl.full(code.shape, 0x7FC00000, tl.int32))
        return tl.where(code > TOP, nan, power_of_two(tl.minimum(code, TOP) - BIAS))
    else:
        return _decode(stored.to(tl.int32), scales, 0, WIDTH, MANTISSA, LOWEST, SIGNED, NAN, TOP)


@triton.jit
def _store_rounded(out, values, mask, INTERPRETED: tl.constexpr):
    """Store FP32 values rounded to nearest even to out's dtype."""
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion truncates; compiled, the hardware's rounds to nearest even.
        b = bits_of(values)
        even = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.int16)
        rounded = tl.where((b & 0x7FFFFFFF) > 0x7F800000, tl.full(b.shape, 0x7FC0, tl.int16), even)
        tl.store(out, rounded.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(out, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_rows(
    qdata, scales, outer, table, out,
    total, rows, columns, blocks, outer_row_stride, outer_block_stride,
    BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_P2: tl.constexpr,
    OUTER: tl.constexpr, SWIZZLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, S_BIAS: tl.constexpr, S_WIDE: tl.constexpr, S_WIDTH: tl.constexpr,
    S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_SIGNED: tl.constexpr, S_NAN: tl.constexpr,
    S_TOP: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr,
    E_LOWEST: tl.constexpr, E_SIGNED: tl.constexpr, E_NAN: tl.constexpr, E_TOP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Values of `total` blocks along rows of `columns` elements: (code * scale) * outer, rounded once to out's dtype.

    FLAT: columns are whole blocks of BLOCK_P2 lanes, so that block i starts at i * BLOCK. OUTER: 0 none, 1 one for all,
    2 by row and block.
    """
    first = tl.program_id(0) * BLOCKS
    if WIDE:
        first = first.to(tl.int64)
    block = first + tl.arange(0, BLOCKS)
    live = block < total
    if not FLAT or SWIZZLE or OUTER == 2:
        row, column_block = block // blocks, block % blocks
    else:
        row, column_block = block, block
    if SWIZZLE:
        place = scale_offset(row, column_block, rows, blocks, True)
    else:
        place = block
    scale = _decode_scale(
        scales, place, live, S_WIDE, EXPONENT_ONLY, S_BIAS, S_WIDTH, S_MANTISSA, S_LOWEST, S_SIGNED, S_NAN, S_TOP
    )
    if OUTER == 2:
        factor = tl.load(outer + row * outer_row_stride + column_block * outer_block_stride, mask=live, other=1.0)
    elif OUTER == 1:
        factor = tl.load(outer)
    lane = tl.arange(0, BLOCK_P2)
    if FLAT and E_WIDTH == 4:
        octet = tl.arange(0, BLOCK // 2)
        two = tl.load(qdata + block[:, None] * BLOCK_BYTES + octet[None, :], mask=live[:, None], other=0).to(tl.int32)
        codes = tl.reshape(tl.join(two & 15, two >> 4), (BLOCKS, BLOCK))
    elif FLAT and E_WIDTH == 8:
        codes = tl.load(qdata + block[:, None] * BLOCK_BYTES + lane[None, :], mask=live[:, None], other=0).to(tl.int32)
    else:
        inside = live[:, None] & (lane < BLOCK)[None, :]
        bit = lane * E_WIDTH
        start = qdata + block[:, None] * BLOCK_BYTES
        word = tl.load(start + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
        if GROUP > 2:  # a code may cross into the next byte
            crosses = inside & (bit % 8 + E_WIDTH > 8)[None, :]
            word = word | (tl.load(start + (bit // 8 + 1)[None, :], mask=crosses, other=0).to(tl.int32) << 8)
        codes = (word >> (bit % 8)[None, :]) & ((1 << E_WIDTH) - 1)
    values = _decode(codes, table, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_SIGNED, E_NAN, E_TOP) * scale[:, None]
    if OUTER == 2:
        values = values * factor[:, None]
    elif OUTER == 1:
        values = values * factor
    if FLAT:
        _store_rounded(out + block[:, None] * BLOCK + lane[None, :], values, live[:, None], INTERPRETED)
    else:
        column = column_block[:, None] * BLOCK + lane[None, :]
        mask = live[:, None] & (column < columns) & (lane < BLOCK)[None, :]
        _store_rounded(out + row[:, None].to(tl.int64) * columns + column, values, mask, INTERPRETED)
