"""Jitted code of the candidate search: the error of every candidate for a block, and the winner of a block or tile.

The order of the additions is part of the result (`microscale.numerics.scaling.search`): over a block one element after
the other, over the rows of a tile by halving, over its blocks one after the other. So a lane is one block with one
candidate and walks along the block; it reads an element at a time, from the cache but for the first.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.constants import METRICS
from microscale.kernels.triton.jit_common import widen
from microscale.kernels.triton.jit_encode import round_to_element
from microscale.kernels.triton.jit_scale import factor_of, outer_scale, scale_and_value

MSE = tl.constexpr(METRICS["mse"])
MAE = tl.constexpr(METRICS["mae"])
LARGEST = tl.constexpr(METRICS["max"])


@triton.jit
def block_errors(
    start, inside, step, amax_bits, multipliers, outer_amax, outer_encode, outer_decode, thresholds, code_of,
    METRIC: tl.constexpr, HAS_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr, BLOCK: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr,
    E_PRECISION: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr,
    E_SUBNORMALS: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_SUBNORMALS: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr,
):  # fmt: skip
    """Errors FP32 [blocks, candidates], summed or maximal by METRIC over BLOCK elements of each block.

    start: addresses of the first elements [blocks]; inside: how many of a block's elements are there, the others being
    zeros; step: elements from one to the next; amax_bits [blocks]; multipliers [candidates]; the outer scale's parts
    [blocks, 1], or numbers.
    """
    bits = tl.broadcast_to(amax_bits[:, None], (amax_bits.shape[0], multipliers.shape[0]))
    scale, value, finite = scale_and_value(
        bits, outer_encode, multipliers[None, :], HAS_OUTER, True, EXPONENT_ONLY, RULE, E_MAX, E_INVERSE, E_EMAX,
        E_PRECISION, S_BIAS, S_WIDE, S_MANTISSA, S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE, S_SIGNED,
        S_SUBNORMALS,
    )  # fmt: skip
    factor = factor_of(scale, value, finite, outer_decode, HAS_OUTER, EXPONENT_ONLY, S_BIAS)
    value = tl.where(finite, value, float("nan"))
    total = tl.zeros(bits.shape, tl.float32)
    place = start
    for i in range(BLOCK):
        x = widen(tl.load(place, mask=i < inside, other=0.0))[:, None]
        place += step
        made = round_to_element(
            x * factor, thresholds, code_of, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX, E_MAX_CODE, E_NAN_CODE,
            E_SIGNED, E_SUBNORMALS, E_SYMMETRIC, E_LEVELS,
        )  # fmt: skip
        made = made * value
        if HAS_OUTER:
            made = tl.div_rn(made * outer_amax, OUTER_TOP)
        difference = tl.abs(made - x)
        if METRIC == MSE:
            total += difference * difference
        elif METRIC == MAE:
            total += difference
        else:
            total = tl.maximum(total, difference, propagate_nan=tl.PropagateNan.ALL)
    return total


@triton.jit
def first_best(errors):
    """Index [n] of the first smallest error of each row [n, candidates]; a NaN in the first place stays."""
    candidate = tl.arange(0, errors.shape[1])[None, :]
    key = tl.where(errors != errors, tl.where(candidate == 0, float("-inf"), float("inf")), errors)
    return tl.argmin(key, axis=1, tie_break_left=True)


@triton.jit
def tile_errors(
    x, errors, tile_bits, multipliers, source, decode, thresholds, code_of,
    total, count, rows, columns, tile_rows, tile_columns, matrix_stride, row_stride, column_stride,
    BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, OUTER_TOP: tl.constexpr, METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr,
    E_PRECISION: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr,
    E_SUBNORMALS: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_SUBNORMALS: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr,
):  # fmt: skip
    """Errors of `total` blocks of matrices padded to whole tiles: FP32 [matrices, rows, blocks, CANDIDATES].

    Blocks of rows and columns beyond a matrix are of zeros, with an outer scale of 1 in rows beyond it. tile_bits:
    what `jit_amax.tile_amax` gives; tile_rows, tile_columns: how many tiles a matrix has.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < total
    padded_blocks = tile_columns * TILE_BLOCKS
    padded_rows = tile_rows * TILE_ROWS
    line, column_block = block // padded_blocks, block % padded_blocks
    matrix, row = line // padded_rows, line % padded_rows
    there = live & (row < rows)
    tile = (matrix * tile_rows + row // TILE_ROWS) * tile_columns + column_block // TILE_BLOCKS
    bits = tl.load(tile_bits + tile, mask=live, other=0)
    outer_amax, outer_encode, outer_decode = outer_scale(
        source, decode, count, matrix * rows + row, rows, there, OUTER, OUTER_LANES, OUTER_TOP
    )
    if OUTER > 0:
        outer_amax = tl.where(there, outer_amax, 1.0)[:, None]
        outer_encode = tl.where(there, outer_encode, 1.0)[:, None]
        outer_decode = tl.where(there, outer_decode, 1.0)[:, None]
    candidate = tl.arange(0, CANDIDATES)
    found = block_errors(
        x + matrix * matrix_stride + row * row_stride + column_block * BLOCK * column_stride,
        tl.where(there, columns - column_block * BLOCK, 0), column_stride, bits, tl.load(multipliers + candidate),
        outer_amax, outer_encode, outer_decode, thresholds, code_of, METRIC, OUTER > 0, OUTER_TOP, BLOCK,
        EXPONENT_ONLY, RULE, E_INVERSE, E_EMAX, E_PRECISION, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX, E_MAX_CODE,
        E_NAN_CODE, E_SIGNED, E_SUBNORMALS, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX, S_MAX_CODE,
        S_NAN_CODE, S_SIGNED, S_SUBNORMALS, S_BIAS, S_WIDE,
    )  # fmt: skip
    tl.store(errors + block[:, None] * CANDIDATES + candidate[None, :], found, mask=live[:, None])


@triton.jit
def _combine(a, b, METRIC: tl.constexpr):
    if METRIC == LARGEST:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit
def tile_choice(
    errors, choice, total, tile_columns, TILE_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr, LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr, TILES: tl.constexpr, ENTRIES: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """Which candidate each of `total` tiles takes: choice int32 [total]. `errors`, see above, is used up.

    Rows are added by halving, ceil(height / 2) rows that stay and the others on top of them, LEVELS times; then the
    blocks of the one row left, in order. A program has TILES tiles, of whose halves it adds ENTRIES blocks at a time.
    """
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    live = tile < total
    pitch = tl.program_id(0).to(tl.int64) * 0 + tile_columns * TILE_BLOCKS  # blocks from one row to the next
    corner = (tile // tile_columns) * TILE_ROWS * pitch + (tile % tile_columns) * TILE_BLOCKS
    candidate = tl.arange(0, CANDIDATES)
    start = errors + corner[:, None] * CANDIDATES + candidate[None, :]
    height = pitch * 0 + TILE_ROWS
    for _ in range(LEVELS):
        half = (height + 1) // 2
        entries = (height - half) * TILE_BLOCKS
        above = half * pitch * CANDIDATES
        for first in range(0, entries, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            place = ((entry // TILE_BLOCKS) * pitch + entry % TILE_BLOCKS) * CANDIDATES
            low = start[:, None, :] + place[None, :, None]
            mask = live[:, None, None] & (entry < entries)[None, :, None]
            a = tl.load(low, mask=mask, other=0.0)
            b = tl.load(low + above, mask=mask, other=0.0)
            tl.store(low, _combine(a, b, METRIC), mask=mask)
        tl.debug_barrier()  # the next level reads what other threads have written
        height = half
    row = start
    total_error = tl.load(row, mask=live[:, None], other=0.0)
    for _ in range(1, TILE_BLOCKS):
        row += CANDIDATES
        total_error = _combine(total_error, tl.load(row, mask=live[:, None], other=0.0), METRIC)
    tl.store(choice + tile, first_best(total_error), mask=live)
