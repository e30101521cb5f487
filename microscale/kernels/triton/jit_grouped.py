"""The jitted code of grouped products: programs walk tiles of groups whose ends only the device knows.

Every program sums up how many tiles of rows each group needs, and takes every n-th tile of them all, n being the number
of programs; so the grid follows from bounds that the host knows, and groups are padded to tiles in the schedule, not in
memory. The rows after the last end become zeros.

Of the two products of tokens and matrices, `grouped_codes` decodes tiles of b as it goes, `grouped_values` reads b as
bfloat16. `grouped_transposed` is the product along each group's tokens.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, widen
from microscale.kernels.triton.jit_decode import decode_run, decode_scale, lift

# -- the schedule ------------------------------------------------------------------------------------------------------


@triton.jit
def _end(offsets, group, rows):
    """Where a group ends, between 0 and `rows`; -1 is the group before the first."""
    stop = tl.load(offsets + group, mask=group >= 0, other=0)
    return tl.minimum(tl.maximum(stop, 0), rows)


@triton.jit
def _summed_tiles(offsets, first, count, rows, BM: tl.constexpr, LANES: tl.constexpr):
    """Tiles of rows up to and with each of the `count` groups from `first` on [LANES], and of all of them."""
    lane = tl.arange(0, LANES)
    group = first + tl.minimum(lane, count - 1)
    start, stop = _end(offsets, group - 1, rows), _end(offsets, group, rows)
    tiles = tl.where(lane < count, (tl.maximum(stop - start, 0) + (BM - 1)) // BM, 0)
    return tl.cumsum(tiles, 0), tl.sum(tiles, 0)


@triton.jit
def _place(tile, upto, offsets, first, rows, column_tiles, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """A tile's group, counted from `first`, its first row, the end of the group, and its first column.

    A group's tiles go in bands of BAND tiles of rows, in a band column by column, so that tiles that run at the same
    time share rows and columns.
    """
    before = upto * column_tiles <= tile
    group = tl.sum(before.to(tl.int32), 0)
    within = tile - tl.max(tl.where(before, upto, 0), 0) * column_tiles
    start, stop = _end(offsets, first + group - 1, rows), _end(offsets, first + group, rows)
    band = within // (BAND * column_tiles)
    within -= band * (BAND * column_tiles)
    high = tl.minimum((stop - start + (BM - 1)) // BM - band * BAND, BAND)
    return group, start + (band * BAND + within % high) * BM, stop, within // high * BN


@triton.jit
def _multiply_add(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a @ b of bfloat16, in FP32."""
    if INTERPRETED:  # it would multiply the bits
        return tl.dot(widen(a), widen(b), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _store(out, acc, live, INTERPRETED: tl.constexpr):
    """Store FP32 values, rounded to nearest even to out's dtype."""
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion truncates; compiled, the hardware's rounds to nearest even.
        b = bits_of(acc)
        even = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.int16)
        rounded = tl.where((b & 0x7FFFFFFF) > 0x7F800000, tl.full(b.shape, 0x7FC0, tl.int16), even)
        tl.store(out, rounded.to(tl.bfloat16, bitcast=True), mask=live)
    else:
        tl.store(out, acc.to(out.dtype.element_ty), mask=live)


@triton.jit
def _finish(
    acc, out, a_outer, b_outer, a_outer_row, b_outer_group, b_outer_column, group, row, stop, column, columns,
    BM: tl.constexpr, BN: tl.constexpr, A_OUTER: tl.constexpr, B_OUTER: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Store a tile of sums, times the outer scales."""
    m = row + tl.arange(0, BM)
    n = column + tl.arange(0, BN)
    if A_OUTER:
        acc *= tl.load(a_outer + m.to(tl.int64) * a_outer_row, mask=m < stop, other=1.0)[:, None]
    if B_OUTER:
        place = b_outer + group.to(tl.int64) * b_outer_group + n * b_outer_column
        acc *= tl.load(place, mask=n < columns, other=1.0)[None, :]
    place = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    _store(place, acc, (m < stop)[:, None] & (n < columns)[None, :], INTERPRETED)


@triton.jit
def _zero_rest(out, offsets, groups, rows, columns, SIZE: tl.constexpr):
    """Store zeros in the rows after the last end."""
    start = _end(offsets, groups - 1, rows)
    out += start.to(tl.int64) * columns
    left = (rows - start).to(tl.int64) * columns
    for part in tl.range(tl.program_id(0), (left + SIZE - 1) // SIZE, tl.num_programs(0), num_stages=1):
        place = part * SIZE + tl.arange(0, SIZE)
        tl.store(out + place, tl.zeros((SIZE,), out.dtype.element_ty), mask=place < left)


# -- codes -------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(place, live, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=live, other=0)


@triton.jit
def _load_runs(words, left, BN: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The words of the next RUNS runs of eight codes of BN rows, of which `left` runs are there."""
    if WIDTH == 4:
        t = tl.arange(0, RUNS)[None, :]
        return (_load(words + t, t < left, EVEN),)
    elif WIDTH == 8:
        t = tl.arange(0, RUNS * 2)[None, :]
        return tl.split(tl.reshape(_load(words + t, t < left * 2, EVEN), (BN, RUNS, 2)))
    else:  # a run starts on a word, or in the middle of one
        t = tl.arange(0, RUNS)[None, :]
        low = _load(words + ((t * 3) >> 1), t < left, EVEN)
        high = _load(words + ((t * 3) >> 1) + 1, t < left, EVEN)
        odd = (t & 1) == 1
        return tl.where(odd, ((low >> 16) & 0xFFFF) | (high << 16), low), tl.where(odd, high >> 16, high)


@triton.jit
def _load_codes(
    words, scales, step, blocks, BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    SWIZZLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes of BN rows from column step * BK on, as words of runs, and the stored scale of each block."""
    RUNS: tl.constexpr = BK // 8
    PER_BLOCK: tl.constexpr = BLOCK // 8
    codes = _load_runs(words + step * (RUNS * WIDTH // 4), blocks * PER_BLOCK - step * RUNS, BN, RUNS, WIDTH, EVEN)
    if BLOCK <= BK:
        block = step * (BK // BLOCK) + tl.arange(0, BK // BLOCK)[None, :]
    else:
        block = step * RUNS // PER_BLOCK + tl.arange(0, 1)[None, :]
    live = block < blocks
    if SWIZZLE:
        block = (block >> 2) * 512 + (block & 3)
    return codes, _load(scales + block, live, EVEN)


@triton.jit
def _decoded(
    words, stored, k, size, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, FOLD: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, S_BIAS: tl.constexpr, S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr,
    S_LOWEST: tl.constexpr, S_SIGNED: tl.constexpr, S_NAN: tl.constexpr, S_TOP: tl.constexpr, E_FORM: tl.constexpr,
    E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_NAN: tl.constexpr, E_TOP: tl.constexpr, E_LIFT: tl.constexpr,
    LOOK_UP: tl.constexpr, LOOK_UP_IN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Values of runs, times the scale `stored` for each block: bfloat16 [BN, BK], exact unless below 2**-126."""
    RUNS: tl.constexpr = BK // 8
    BLOCKS: tl.constexpr = stored.shape[1]
    scale = decode_scale(
        stored, stored, False, EXPONENT_ONLY, S_BIAS, S_WIDTH, S_MANTISSA, S_LOWEST, S_SIGNED, S_NAN, S_TOP
    )
    if RUNS != BLOCKS:
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, BLOCKS, RUNS // BLOCKS)), (BN, RUNS))
    if LOOK_UP != "":
        half = scale.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        both = half | (half << 16)
        halves: tl.constexpr = (tl.int16,) * 8
        run = tl.inline_asm_elementwise(LOOK_UP, LOOK_UP_IN, [words[0], both], dtype=halves, is_pure=True, pack=1)
    else:
        if FOLD:
            scale = lift(scale, E_LIFT)
            values = decode_run(words, stored, E_FORM, E_WIDTH, E_MANTISSA, E_NAN, E_TOP, 0, INTERPRETED)
        else:
            values = decode_run(words, stored, E_FORM, E_WIDTH, E_MANTISSA, E_NAN, E_TOP, E_LIFT, INTERPRETED)
        run = ()
        for i in tl.static_range(8):
            run += (values[i] * scale,)
    even = tl.join(tl.join(run[0], run[4]), tl.join(run[2], run[6]))
    odd = tl.join(tl.join(run[1], run[5]), tl.join(run[3], run[7]))
    tile = tl.reshape(tl.join(even, odd), (BN, BK))
    if LOOK_UP != "":
        tile = tile.to(tl.bfloat16, bitcast=True)
    else:
        tile = tile.to(tl.bfloat16)
    if EVEN:
        return tile
    else:  # what pads the last block is of no account, whatever it is
        return tl.where((k + tl.arange(0, BK) < size)[None, :], tile, 0.0)


@triton.jit
def grouped_codes(
    a, codes, scales, a_outer, b_outer, offsets, out, rows, columns, size, groups, blocks, a_row, code_group, code_row,
    scale_group, scale_row, a_outer_row, b_outer_group, b_outer_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
    LANES: tl.constexpr, EVEN: tl.constexpr, A_OUTER: tl.constexpr, B_OUTER: tl.constexpr, SWIZZLE: tl.constexpr,
    BLOCK: tl.constexpr, FOLD: tl.constexpr, EXPONENT_ONLY: tl.constexpr, S_BIAS: tl.constexpr, S_WIDTH: tl.constexpr,
    S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_SIGNED: tl.constexpr, S_NAN: tl.constexpr,
    S_TOP: tl.constexpr, E_FORM: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_NAN: tl.constexpr,
    E_TOP: tl.constexpr, E_LIFT: tl.constexpr, LOOK_UP: tl.constexpr, LOOK_UP_IN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows of a [rows, size], bfloat16, times their group's matrix, stored as rows of codes.

    Rows of codes start at multiples of four bytes. EVEN: `size` is a multiple of BK. A tile of b is decoded while the
    one before is multiplied.
    """
    column_tiles = (columns + BN - 1) // BN
    upto, row_tiles = _summed_tiles(offsets, 0, groups, rows, BM, LANES)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), num_stages=1):
        group, row, stop, column = _place(tile, upto, offsets, 0, rows, column_tiles, BM, BN, BAND)
        m = tl.minimum(row + tl.arange(0, BM), stop - 1)
        n = tl.minimum(column + tl.arange(0, BN), columns - 1)
        a_place = a + m.to(tl.int64)[:, None] * a_row
        code_place = codes + group.to(tl.int64) * code_group + n.to(tl.int64)[:, None] * code_row
        code_place = code_place.to(tl.pointer_type(tl.int32), bitcast=True)
        scale_place = scales + group.to(tl.int64) * scale_group
        if SWIZZLE:
            scale_place += (n >> 7)[:, None] * scale_row + ((n & 31) * 16 + ((n >> 5) & 3) * 4)[:, None]
        else:
            scale_place += n.to(tl.int64)[:, None] * scale_row
        acc = tl.zeros((BM, BN), tl.float32)
        steps = (size + BK - 1) // BK
        words, stored = _load_codes(code_place, scale_place, 0, blocks, BN, BK, BLOCK, E_WIDTH, SWIZZLE, EVEN)
        b_tile = _decoded(
            words, stored, 0, size, BN, BK, EVEN, FOLD, EXPONENT_ONLY, S_BIAS, S_WIDTH, S_MANTISSA, S_LOWEST, S_SIGNED,
            S_NAN, S_TOP, E_FORM, E_WIDTH, E_MANTISSA, E_NAN, E_TOP, E_LIFT, LOOK_UP, LOOK_UP_IN, INTERPRETED,
        )  # fmt: skip
        for step in tl.range(0, steps, num_stages=STAGES):
            k = step * BK + tl.arange(0, BK)[None, :]
            a_tile = _load(a_place + k, k < size, EVEN)
            ahead = tl.minimum(step + 1, steps - 1)
            words, stored = _load_codes(code_place, scale_place, ahead, blocks, BN, BK, BLOCK, E_WIDTH, SWIZZLE, EVEN)
            acc = _multiply_add(a_tile, tl.trans(b_tile), acc, INTERPRETED)
            b_tile = _decoded(
                words, stored, ahead * BK, size, BN, BK, EVEN, FOLD, EXPONENT_ONLY, S_BIAS, S_WIDTH, S_MANTISSA,
                S_LOWEST, S_SIGNED, S_NAN, S_TOP, E_FORM, E_WIDTH, E_MANTISSA, E_NAN, E_TOP, E_LIFT, LOOK_UP,
                LOOK_UP_IN, INTERPRETED,
            )  # fmt: skip
        _finish(
            acc, out, a_outer, b_outer, a_outer_row, b_outer_group, b_outer_column, group, row, stop, column, columns,
            BM, BN, A_OUTER, B_OUTER, INTERPRETED,
        )  # fmt: skip
    _zero_rest(out, offsets, groups, rows, columns, 1024)


# -- values ------------------------------------------------------------------------------------------------------------


@triton.jit
def grouped_values(
    a, b, a_outer, b_outer, offsets, out, rows, columns, size, groups, first, count, a_row, b_group, b_row,
    a_outer_row, b_outer_group, b_outer_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
    LANES: tl.constexpr, EVEN: tl.constexpr, A_OUTER: tl.constexpr, B_OUTER: tl.constexpr, ACROSS: tl.constexpr,
    COPIES: tl.constexpr, FLATTEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows of a [rows, size] times their group's matrix of b, both bfloat16, of the `count` groups from `first` on.

    b holds the matrices of these groups, as [columns, size] (ACROSS) or [size, columns]. COPIES: a and b are
    descriptors of matrices [rows, size] and [count * columns, size] or [count * size, columns] for the copy engine.
    FLATTEN: the loads of a program's next tile start before the sums of the last are stored.
    """
    column_tiles = (columns + BN - 1) // BN
    upto, row_tiles = _summed_tiles(offsets, first, count, rows, BM, LANES)
    programs = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, num_stages=1, flatten=FLATTEN):
        group, row, stop, column = _place(tile, upto, offsets, first, rows, column_tiles, BM, BN, BAND)
        if not COPIES:
            m = tl.minimum(row + tl.arange(0, BM), stop - 1)
            n = column + tl.arange(0, BN)
            a_place = a + m.to(tl.int64)[:, None] * a_row
            b_place = b + group.to(tl.int64) * b_group
            if ACROSS:
                b_place += tl.minimum(n, columns - 1).to(tl.int64)[:, None] * b_row
            else:  # neighbours in memory stay neighbours, so that they are loaded together
                b_place += n[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(0, (size + BK - 1) // BK, num_stages=STAGES):
            if COPIES:
                a_tile = a.load([row, step * BK])
                if ACROSS:
                    b_tile = tl.trans(b.load([group * columns + column, step * BK]))
                else:
                    b_tile = b.load([group * size + step * BK, column])
            else:
                k = step * BK + tl.arange(0, BK)
                a_tile = _load(a_place + k[None, :], (k < size)[None, :], EVEN)
                if ACROSS:
                    b_tile = tl.trans(_load(b_place + k[None, :], (k < size)[None, :], EVEN))
                else:
                    live = (n < columns)[None, :]
                    if not EVEN:
                        live &= (k < size)[:, None]
                    b_tile = tl.load(b_place + k.to(tl.int64)[:, None] * b_row, mask=live, other=0)
            acc = _multiply_add(a_tile, b_tile, acc, INTERPRETED)
        _finish(
            acc, out, a_outer, b_outer, a_outer_row, b_outer_group, b_outer_column, group, row, stop, column, columns,
            BM, BN, A_OUTER, B_OUTER, INTERPRETED,
        )  # fmt: skip
    if first + count == groups:
        _zero_rest(out, offsets, groups, rows, columns, 1024)


@triton.jit
def _tokens(
    t, row, k, n, start, stop, width, BLANK: tl.constexpr, DOWN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens k of columns n of t [tokens, width], as [k, n], zeros but from `start` to `stop` and within the width.

    DOWN: neighbours in memory are the tokens of a column, `row` elements before those of the next; k then starts at a
    multiple of eight, and eight are loaded together. WHOLE: `start` and `stop` are such multiples, too.
    """
    if DOWN:
        live = (n < width)[:, None] & (k // 8 < (stop + 7) // 8)[None, :]
        tile = tl.load(t + n.to(tl.int64)[:, None] * row + k[None, :], mask=live, other=0)
        if not WHOLE:
            tile = tl.where(((k >= start) & (k < stop))[None, :], tile, 0)
        return tl.trans(tile)
    else:
        live = (k < stop)[:, None] & (n < width)[None, :]
        if BLANK:
            live &= (k >= start)[:, None]
        return tl.load(t + k.to(tl.int64)[:, None] * row + n[None, :], mask=live, other=0)


@triton.jit
def _sum_tokens(
    a, b, a_row, b_row, m, n, start, stop, height, columns, acc, BK: tl.constexpr, STAGES: tl.constexpr,
    A_DOWN: tl.constexpr, B_DOWN: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + the tokens from `start` to `stop` of columns m of a, transposed, times those of columns n of b."""
    BLANK: tl.constexpr = (A_DOWN or B_DOWN) and not WHOLE
    first = start
    if A_DOWN or B_DOWN:
        first = start // 8 * 8
    for step in tl.range(0, (tl.maximum(stop - first, 0) + BK - 1) // BK, num_stages=STAGES):
        k = first + step * BK + tl.arange(0, BK)
        a_tile = _tokens(a, a_row, k, m, start, stop, height, BLANK, A_DOWN, WHOLE)
        b_tile = _tokens(b, b_row, k, n, start, stop, columns, BLANK, B_DOWN, WHOLE)
        acc = _multiply_add(tl.trans(a_tile), b_tile, acc, INTERPRETED)
    return acc


@triton.jit
def grouped_transposed(
    a, b, offsets, out, rows, height, columns, groups, a_row, b_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
    A_DOWN: tl.constexpr, B_DOWN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of each group, its rows of a [rows, height], transposed, times its rows of b [rows, columns]; both bfloat16.

    A_DOWN, B_DOWN: that operand is stored column by column, `a_row` or `b_row` elements from one to the next, which
    like `rows` are multiples of eight. Groups that are, too, go from memory to the tensor cores without a detour.
    """
    row_tiles, column_tiles = (height + BM - 1) // BM, (columns + BN - 1) // BN
    per_group = row_tiles * column_tiles
    for tile in tl.range(tl.program_id(0), groups * per_group, tl.num_programs(0), num_stages=1):
        group = tile // per_group
        within = tile - group * per_group
        band = within // (BAND * column_tiles)
        within -= band * (BAND * column_tiles)
        high = tl.minimum(row_tiles - band * BAND, BAND)
        m = (band * BAND + within % high) * BM + tl.arange(0, BM)
        n = within // high * BN + tl.arange(0, BN)
        start, stop = _end(offsets, group - 1, rows), _end(offsets, group, rows)
        acc = tl.zeros((BM, BN), tl.float32)
        if A_DOWN or B_DOWN:
            if ((start | stop) & 7) == 0:
                acc = _sum_tokens(
                    a, b, a_row, b_row, m, n, start, stop, height, columns, acc, BK, STAGES, A_DOWN, B_DOWN, True,
                    INTERPRETED,
                )  # fmt: skip
            else:
                acc = _sum_tokens(
                    a, b, a_row, b_row, m, n, start, stop, height, columns, acc, BK, 2, A_DOWN, B_DOWN, False,
                    INTERPRETED,
                )  # fmt: skip
        else:
            acc = _sum_tokens(
                a, b, a_row, b_row, m, n, start, stop, height, columns, acc, BK, STAGES, A_DOWN, B_DOWN, True,
                INTERPRETED,
            )  # fmt: skip
        place = out + (group.to(tl.int64) * height + m.to(tl.int64)[:, None]) * columns + n[None, :]
        _store(place, acc, (m < height)[:, None] & (n < columns)[None, :], INTERPRETED)
