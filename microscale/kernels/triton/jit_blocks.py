"""Quantize kernels for dense bf16 whose threads own whole blocks: along rows, along columns, or both from one read.

See `jit_runs.py` for what a thread does with its blocks, `jit_words.py` for how it holds them, `ptx.py` for encoders.
In all kernels x and qdata are seen as 32-bit words, `count` and `source` describe the outer scale (`amax.py`), and
WRITES_OUTER has the first program write `decode`.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import scale_offset
from microscale.kernels.triton.jit_runs import quantize_run
from microscale.kernels.triton.jit_scale import outer_scale
from microscale.kernels.triton.jit_words import (
    amax_bits,
    hadamard_words,
    load_words,
    store_words,
    transpose_words,
    words_of,
)


@triton.jit
def _outer(
    source, decode, count, row, rows, live, OUTER: tl.constexpr, OUTER_LANES: tl.constexpr,
    WRITES_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr,
):  # fmt: skip
    """(amax, encode, decode) of the outer scale; the first program writes one that is a single number."""
    amax, encode, decoded = outer_scale(source, decode, count, row, rows, live, OUTER, OUTER_LANES, OUTER_TOP)
    if WRITES_OUTER:
        if tl.program_id(0) == 0:
            tl.store(decode, decoded)
    return amax, encode, decoded


@triton.jit
def _shared(bits, T: tl.constexpr, COUNT: tl.constexpr):
    """Give COUNT neighbouring threads the largest of their [T] values."""
    if COUNT > 1:
        most = tl.max(tl.reshape(bits, (T // COUNT, COUNT)), axis=1)
        bits = tl.reshape(tl.broadcast_to(most[:, None], (T // COUNT, COUNT)), (T,))
    return bits


@triton.jit
def quantize_runs(
    x, qdata, scales, source, decode, seed, thresholds, code_of, multipliers, total, count, rows, row_runs,
    T: tl.constexpr, RUN: tl.constexpr, TILE_ROWS: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr,
    SWIZZLE: tl.constexpr, TILED: tl.constexpr, TILES: tl.constexpr, PORTABLE: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, WRITES_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr,
    STOCHASTIC: tl.constexpr, HADAMARD: tl.constexpr, SIGNS: tl.constexpr, HADAMARD_FACTOR: tl.constexpr,
    ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize matrices of `rows` rows of `row_runs` runs of RUN elements; a thread owns TILE_ROWS runs of a column.

    `total` counts tiles of (PARTS * TILE_ROWS) x RUN that share an amax, PARTS threads each, and programs take them in
    order. TILED, for swizzled scales: a program takes TILES neighbouring 128 x 4 tiles of scales, and of each the rows
    whose scales are neighbouring bytes, so that they are stored together; padding gets zeros. PIECES: that many threads
    share a run, a block then, so that each stores 16 bytes beside its neighbour's.
    """
    x, qdata = words_of(x), words_of(qdata)
    NB: tl.constexpr = RUN // BLOCK
    OWNED: tl.constexpr = RUN // PIECES
    WORDS: tl.constexpr = OWNED // 2
    OUT: tl.constexpr = OWNED * E_WIDTH // 32
    L: tl.constexpr = T // PIECES
    pid = tl.program_id(0)
    lane = tl.arange(0, T) // PIECES
    piece = tl.arange(0, T) % PIECES
    if TILED:
        PER_TILE: tl.constexpr = 4 // NB  # runs of one row in a 128 x 4 tile
        PER_ROW: tl.constexpr = PER_TILE * TILES  # runs of one row that a program takes
        STEP: tl.constexpr = L // (4 * PER_ROW)  # how many of the 32 row groups of a tile a program takes
        tile_columns = (row_runs + PER_TILE - 1) // PER_TILE
        across = (tile_columns + TILES - 1) // TILES
        part = pid % (32 // STEP)
        tile_row = pid // (32 // STEP) // across
        tile_column = pid // (32 // STEP) % across * TILES + lane % PER_ROW // PER_TILE
        tile_rows = (rows + 127) // 128
        group = lane // (4 * PER_ROW) + part * STEP
        quarter = (lane // PER_ROW) % 4
        row = (tile_row % tile_rows) * 128 + quarter * 32 + group
        column = tile_column * PER_TILE + lane % PER_TILE
        live = (row < rows) & (column < row_runs)
        place = (tile_row * tile_columns + tile_column) * 512 + group * 16 + quarter * 4 + lane % PER_TILE * NB
        padded = (tile_column < tile_columns) & (piece == 0)
        row = tile_row // tile_rows * rows + row
        run = row * row_runs + column
    else:
        run = pid * (L // PARTS) + lane // PARTS
        live = run < total
        row, column = run, run
        if OUTER > 4 or TILE_ROWS > 1 or SWIZZLE:
            row, column = run // row_runs, run % row_runs
        if TILE_ROWS > 1:
            row = (row * PARTS + lane % PARTS) * TILE_ROWS
            run = row * row_runs + column
    outer_amax, encode, decoded = _outer(
        source, decode, count, row, rows, live, OUTER, OUTER_LANES, WRITES_OUTER, OUTER_TOP
    )
    tile = ()
    for r in tl.static_range(TILE_ROWS):
        words = load_words(x, ((run + r * row_runs) * PIECES + piece) * WORDS, live, T, WORDS)
        if HADAMARD > 0:
            words = hadamard_words(words, WORDS, HADAMARD, SIGNS, HADAMARD_FACTOR, PORTABLE)
        tile = tile + (words,)
    bits = ()
    if TILE_ROWS > 1 or PIECES > 1:
        shared = amax_bits(tile[0], 0, WORDS, PORTABLE)
        for r in tl.static_range(1, TILE_ROWS):
            shared = tl.maximum(shared, amax_bits(tile[r], 0, WORDS, PORTABLE))
        bits = (_shared(shared, T, PARTS * PIECES),)
    for r in tl.static_range(TILE_ROWS):
        here = run + r * row_runs
        mine = here * PIECES + piece
        made, codes = quantize_run(
            tile[r], bits, mine.to(tl.int64) * (OWNED // 16), outer_amax, encode, decoded, seed, thresholds, code_of,
            multipliers, OWNED, OUTER > 0, OUTER_TOP, STOCHASTIC, ENCODER, PTX, CONSTRAINTS, PORTABLE,
            BLOCK // PIECES, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST,
            E_MAX, E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX,
            S_MAX_CODE, S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
        )  # fmt: skip
        for b in tl.static_range(NB):
            if TILED:
                tl.store(scales + place + b, tl.where(live, made[b], 0), mask=padded)
            elif SWIZZLE:
                there = scale_offset(row + r, column * NB + b, rows, row_runs * NB, True)
                tl.store(scales + there, made[b], mask=live & (piece == 0))
            else:
                tl.store(scales + here * NB + b, made[b], mask=live & (piece == 0))
        store_words(qdata, mine * OUT, live, codes, T, OUT)


@triton.jit
def _grid_of(parts, GROUPS: tl.constexpr, WORDS: tl.constexpr, COUNT: tl.constexpr):
    """What each thread made of its two columns, COUNT parts each, as [2 * WORDS columns, GROUPS * COUNT].

    Thread t is group t // WORDS of the words t % WORDS; `parts` are the first column's, then the second's.
    """
    if COUNT == 1:
        made = tl.join(parts[0], parts[1])
    elif COUNT == 2:
        made = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    elif COUNT == 4:
        made = tl.join(
            tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6])),
            tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])),
        )
    else:
        made = tl.join(
            tl.join(
                tl.join(tl.join(parts[0], parts[8]), tl.join(parts[4], parts[12])),
                tl.join(tl.join(parts[2], parts[10]), tl.join(parts[6], parts[14])),
            ),
            tl.join(
                tl.join(tl.join(parts[1], parts[9]), tl.join(parts[5], parts[13])),
                tl.join(tl.join(parts[3], parts[11]), tl.join(parts[7], parts[15])),
            ),
        )
    whole = tl.reshape(made, (GROUPS, WORDS, 2, COUNT))
    return tl.reshape(tl.permute(whole, (1, 2, 0, 3)), (2 * WORDS, GROUPS * COUNT))


@triton.jit
def _quantize_columns(
    x, qdata, scales, source, decode, seed, thresholds, code_of, multipliers, count, matrix, first_group, first_word,
    rows, row_words,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, SWIZZLE: tl.constexpr, PORTABLE: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, WRITES_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr,
    STOCHASTIC: tl.constexpr, HADAMARD: tl.constexpr, SIGNS: tl.constexpr, HADAMARD_FACTOR: tl.constexpr,
    ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """GROUPS runs down the rows of WORDS words of a matrix: see `quantize_columns`."""
    NB: tl.constexpr = RUN // BLOCK
    OUT: tl.constexpr = RUN * E_WIDTH // 32
    groups, columns = rows // RUN, 2 * row_words
    lane = tl.arange(0, GROUPS * WORDS)
    group, word = first_group + lane // WORDS, first_word + lane % WORDS
    live = (word < row_words) & (group < groups)
    start = x + ((matrix * rows + group * RUN) * row_words + word)
    loaded = ()
    for i in tl.static_range(RUN):
        loaded = loaded + (tl.load(start + i * row_words, mask=live, other=0),)
    pair = transpose_words(loaded, RUN, PORTABLE)
    made, codes = (), ()
    for j in tl.static_range(2):
        words = pair[j]
        column = matrix * columns + 2 * word + j
        if HADAMARD > 0:
            words = hadamard_words(words, RUN // 2, HADAMARD, SIGNS, HADAMARD_FACTOR, PORTABLE)
        outer_amax, encode, decoded = _outer(
            source, decode, count, column, columns, live, OUTER, OUTER_LANES, WRITES_OUTER and j == 0, OUTER_TOP
        )
        some_scales, some_codes = quantize_run(
            words, (), (column * groups + group).to(tl.int64) * (RUN // 16), outer_amax, encode, decoded, seed,
            thresholds, code_of, multipliers, RUN, OUTER > 0, OUTER_TOP, STOCHASTIC, ENCODER, PTX, CONSTRAINTS,
            PORTABLE,
            BLOCK, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
            E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX, S_MAX_CODE,
            S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
        )  # fmt: skip
        made, codes = made + some_scales, codes + some_codes
    column = 2 * first_word + tl.arange(0, 2 * WORDS)
    inside = column < columns
    column = matrix * columns + column
    tile = _grid_of(codes, GROUPS, WORDS, OUT)
    at = first_group * OUT + tl.arange(0, GROUPS * OUT)
    mask = inside[:, None] & (at < groups * OUT)[None, :]
    tl.store(qdata + (column * (groups * OUT))[:, None] + at[None, :], tile, mask=mask)
    tile = _grid_of(made, GROUPS, WORDS, NB)
    at = first_group * NB + tl.arange(0, GROUPS * NB)
    mask = inside[:, None] & (at < groups * NB)[None, :]
    if SWIZZLE:
        place = scale_offset(column[:, None], at[None, :], columns, groups * NB, True)
    else:
        place = (column * (groups * NB))[:, None] + at[None, :]
    tl.store(scales + place, tile, mask=mask)


@triton.jit
def quantize_columns(
    x, qdata, scales, source, decode, seed, thresholds, code_of, multipliers, count, rows, row_words,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, SWIZZLE: tl.constexpr, PORTABLE: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, WRITES_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr,
    STOCHASTIC: tl.constexpr, HADAMARD: tl.constexpr, SIGNS: tl.constexpr, HADAMARD_FACTOR: tl.constexpr,
    ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize the columns of matrices of `rows` rows of `row_words` words; codes and scales are of the transpose.

    A program takes GROUPS runs down the rows of WORDS words. A thread owns one run of two columns: it loads a word of
    each row, so that a warp reads whole lines, and transposes words in registers. What the threads made of a column
    stands side by side in the output, GROUPS * RUN elements of it, and is stored together.
    """
    x, qdata = words_of(x), words_of(qdata)
    down = (rows // RUN + GROUPS - 1) // GROUPS
    across = (row_words + WORDS - 1) // WORDS
    pid = tl.program_id(0)
    _quantize_columns(
        x, qdata, scales, source, decode, seed, thresholds, code_of, multipliers, count, pid // down // across,
        pid % down * GROUPS, pid // down % across * WORDS, rows, row_words, WORDS, GROUPS, RUN, SWIZZLE, PORTABLE,
        OUTER, OUTER_LANES, WRITES_OUTER, OUTER_TOP, STOCHASTIC, HADAMARD, SIGNS, HADAMARD_FACTOR, ENCODER, PTX,
        CONSTRAINTS,
        BLOCK, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
        E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX, S_MAX_CODE,
        S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
    )  # fmt: skip


@triton.jit
def quantize_both(
    x, qdata, scales, source, decode, seed, multipliers, count,
    t_qdata, t_scales, t_source, t_decode, t_seed, t_count, thresholds, code_of, rows, row_words,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, T_RUN: tl.constexpr, PIECES: tl.constexpr,
    SWIZZLE: tl.constexpr, PORTABLE: tl.constexpr,
    T_OUTER: tl.constexpr, T_OUTER_LANES: tl.constexpr, T_WRITES_OUTER: tl.constexpr, T_STOCHASTIC: tl.constexpr,
    T_HADAMARD: tl.constexpr, T_SIGNS: tl.constexpr, T_HADAMARD_FACTOR: tl.constexpr, T_ENCODER: tl.constexpr,
    T_PTX: tl.constexpr, T_CONSTRAINTS: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, WRITES_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr,
    STOCHASTIC: tl.constexpr, HADAMARD: tl.constexpr, SIGNS: tl.constexpr, HADAMARD_FACTOR: tl.constexpr,
    ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize matrices along their rows and (names with t_) along their columns, reading memory once.

    A program takes a tile as `quantize_columns` does; then it reads the tile again, from the cache, to quantize its
    rows as `quantize_runs` does. Both have one format; rounding, Hadamard and outer scale are their own.
    """
    x, qdata, t_qdata = words_of(x), words_of(qdata), words_of(t_qdata)
    down = (rows // T_RUN + GROUPS - 1) // GROUPS
    across = (row_words + WORDS - 1) // WORDS
    pid = tl.program_id(0)
    first_group, first_word, matrix = pid % down * GROUPS, pid // down % across * WORDS, pid // down // across
    _quantize_columns(
        x, t_qdata, t_scales, t_source, t_decode, t_seed, thresholds, code_of, multipliers, t_count, matrix,
        first_group, first_word, rows, row_words, WORDS, GROUPS, T_RUN, SWIZZLE, PORTABLE, T_OUTER, T_OUTER_LANES,
        T_WRITES_OUTER, OUTER_TOP, T_STOCHASTIC, T_HADAMARD, T_SIGNS, T_HADAMARD_FACTOR, T_ENCODER, T_PTX,
        T_CONSTRAINTS,
        BLOCK, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
        E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX, S_MAX_CODE,
        S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
    )  # fmt: skip
    T: tl.constexpr = GROUPS * WORDS
    RUNS: tl.constexpr = 2 * WORDS // RUN  # in a row of the tile
    NB: tl.constexpr = RUN // BLOCK
    OWNED: tl.constexpr = RUN // PIECES
    OUT: tl.constexpr = OWNED * E_WIDTH // 32
    row_runs = 2 * row_words // RUN
    tl.static_assert(T_RUN * GROUPS * RUNS * PIECES % T == 0)  # every row of the tile has its thread
    for i in tl.static_range(T_RUN * GROUPS * RUNS * PIECES // T):
        lane = (i * T + tl.arange(0, T)) // PIECES
        piece = tl.arange(0, T) % PIECES
        row = first_group * T_RUN + lane // RUNS
        column = first_word * 2 // RUN + lane % RUNS
        live = (row < rows) & (column < row_runs)
        row = matrix * rows + row
        run = row * row_runs + column
        mine = run * PIECES + piece
        words = load_words(x, mine * (OWNED // 2), live, T, OWNED // 2)
        if HADAMARD > 0:
            words = hadamard_words(words, OWNED // 2, HADAMARD, SIGNS, HADAMARD_FACTOR, PORTABLE)
        bits = ()
        if PIECES > 1:
            bits = (_shared(amax_bits(words, 0, OWNED // 2, PORTABLE), T, PIECES),)
        outer_amax, encode, decoded = _outer(
            source, decode, count, row, rows, live, OUTER, OUTER_LANES, WRITES_OUTER and i == 0, OUTER_TOP
        )
        made, codes = quantize_run(
            words, bits, mine.to(tl.int64) * (OWNED // 16), outer_amax, encode, decoded, seed, thresholds, code_of,
            multipliers, OWNED, OUTER > 0, OUTER_TOP, STOCHASTIC, ENCODER, PTX, CONSTRAINTS, PORTABLE,
            BLOCK // PIECES, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST,
            E_MAX, E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX,
            S_MAX_CODE, S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
        )  # fmt: skip
        for b in tl.static_range(NB):
            if SWIZZLE:
                place = scale_offset(row, column * NB + b, rows, row_runs * NB, True)
            else:
                place = run * NB + b
            tl.store(scales + place, made[b], mask=live & (piece == 0))
        store_words(qdata, mine * OUT, live, codes, T, OUT)
