"""Jitted code of amaxes: for outer scales over rows and whole matrices, and for scale tiles. One read of the input.

Maxima are taken over `order_key`s, int32 that order as finite magnitudes do, three or four instructions an element.
No atomics where one program sees all of a row; none for a tensor either, whose programs leave partial maxima to be
reduced by the programs of the next kernel. There is no state between calls, so streams may run at once.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, widen
from microscale.kernels.triton.jit_scale import key_to_float, order_key, outer_from_amax, outer_from_scale, zero_key


@triton.jit
def partial_amax(x, out, length, PARTS: tl.constexpr, SIZE: tl.constexpr, ALONE: tl.constexpr):
    """out FP32 [segments, PARTS]: amax over finite values of dense x [segments, length], each part by one program.

    ALONE: there is one segment; loads are then of 16 bytes whatever its length is.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    pid = tl.program_id(0)
    part = pid % PARTS
    lane = tl.arange(0, SIZE)
    best = tl.full((SIZE,), zero_key(DTYPE), tl.int32)
    whole = length // SIZE
    start = x + part.to(tl.int64) * SIZE
    if not ALONE:
        start += (pid // PARTS).to(tl.int64) * length
    for _ in range(part, whole, PARTS):
        best = tl.maximum(best, order_key(tl.load(start + lane)))
        start += PARTS * SIZE
    if part == whole % PARTS:  # `start` has come to the end, which may be ragged
        best = tl.maximum(best, order_key(tl.load(start + lane, mask=lane < length - whole * SIZE, other=0.0)))
    tl.store(out + pid, key_to_float(tl.max(best, axis=0), DTYPE))


@triton.jit
def row_amax(
    x, source, decode, total, rows, columns, matrix_stride, row_stride, column_stride,
    ROWS: tl.constexpr, LANES: tl.constexpr, BATCHED: tl.constexpr, FINISH: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Amax over finite values of `total` rows of matrices of `rows` rows; a program takes ROWS of them.

    FINISH: the outer scales follow, source FP32 [2, total] (encode scales, amaxes) and decode [total]; else the amaxes
    alone, source [total].
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < total
    if BATCHED:
        start = x + (row // rows) * matrix_stride + (row % rows) * row_stride
    else:
        start = x + row * row_stride
    lane = tl.arange(0, LANES)
    best = tl.full((ROWS, LANES), zero_key(DTYPE), tl.int32)
    for first in range(0, columns, LANES):
        column = first + lane
        inside = live[:, None] & (column < columns)[None, :]
        values = tl.load(start[:, None] + (column.to(tl.int64) * column_stride)[None, :], mask=inside, other=0.0)
        best = tl.maximum(best, order_key(values))
    found = key_to_float(tl.max(best, axis=1), DTYPE)
    if FINISH:
        _, made, inverse = outer_from_amax(found, TOP)
        tl.store(source + row, made, mask=live)
        tl.store(source + total + row, found, mask=live)
        tl.store(decode + row, inverse, mask=live)
    else:
        tl.store(source + row, found, mask=live)


@triton.jit
def outer_entries(given, source, decode, count, SIZE: tl.constexpr, FROM_SCALE: tl.constexpr, TOP: tl.constexpr):
    """Outer scales from `count` amaxes, or decode scales: source FP32 [2, count] (encode, amax), decode [count]."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    number = tl.load(given + place, mask=inside, other=1.0)
    if FROM_SCALE:
        amax, made, inverse = outer_from_scale(number, TOP)
    else:
        amax, made, inverse = outer_from_amax(number, TOP)
    tl.store(source + place, made, mask=inside)
    tl.store(source + count + place, amax, mask=inside)
    tl.store(decode + place, inverse, mask=inside)


@triton.jit
def tile_amax(
    x, out, rows, columns, tile_rows, tile_columns, groups, matrix_stride, row_stride, column_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Bits of max |x| over every tile of HEIGHT x WIDTH elements: out int32 [matrices, tile_rows, tile_columns].

    NaN and infinity count, and stand above every number. A program takes TILES neighbouring tiles, of which there are
    `groups` in a row; ROWS x LANES elements of each at a time. SPLIT programs share the rows of a tile; where there are
    several, `out` starts at 0 and they meet in it atomically.
    """
    pid = tl.program_id(0).to(tl.int64)
    split, place = pid % SPLIT, pid // SPLIT
    group, tile_row = place % groups, place // groups
    matrix, band = tile_row // tile_rows, tile_row % tile_rows
    start = x + matrix * matrix_stride
    PART: tl.constexpr = (HEIGHT + SPLIT - 1) // SPLIT
    first = band * HEIGHT + split * PART
    end = tl.minimum(tl.minimum(first + PART, (band + 1) * HEIGHT), rows)
    tile = group * TILES + tl.arange(0, TILES)
    lane = tl.arange(0, LANES)
    best = tl.zeros((ROWS, TILES, LANES), tl.int32)
    for top in range(first, end, ROWS):
        row = top + tl.arange(0, ROWS)
        line = start + row * row_stride
        for left in range(0, WIDTH, LANES):
            inner = left + lane
            column = tile[:, None] * WIDTH + inner[None, :]
            inside = (inner < WIDTH)[None, :] & (column < columns)
            values = tl.load(
                line[:, None, None] + (column * column_stride)[None, :, :],
                mask=(row < end)[:, None, None] & inside[None, :, :], other=0.0,
            )  # fmt: skip
            best = tl.maximum(best, bits_of(widen(values)) & 0x7FFFFFFF)
    found = tl.max(tl.max(best, axis=2), axis=0)
    place = out + tile_row * tile_columns + tile
    if SPLIT > 1:
        tl.atomic_max(place, found, mask=tile < tile_columns)
    else:
        tl.store(place, found, mask=tile < tile_columns)
