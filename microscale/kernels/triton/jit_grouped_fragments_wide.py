"""Gluon: rows of bfloat16 sorted by expert times prepared experts, on Hopper; see `grouped_fragments_wide.py`.

The schedule of groups is that of `jit_wgmma.py`, and what happens within a tile that of `jit_fragments_wide.py`.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.language.extra.cuda import gdc_wait

from microscale.kernels.triton import jit_fragments_wide as wide
from microscale.kernels.triton import jit_wgmma as schedule


@gluon.jit
def _of_group(
    words, scales, group, column, lane, warp, steps, columns, flat: gl.constexpr, WARPS: gl.constexpr,
    UNITS: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """A group's words and scales, and where a thread's ones of the tile at a column begin in them."""
    blocks = group.to(gl.int64) * (columns // 64 * steps)  # of 64 x 64 codes
    w_at, s_at = wide._places(
        column // (16 * WARPS * UNITS), lane, warp, steps, columns, flat, WARPS, UNITS, WIDTH, BLOCK
    )  # fmt: skip
    return words + blocks * (WIDTH * 128), scales + blocks * (1024 // BLOCK), w_at, s_at


@gluon.jit
def multiply_groups(
    x, words, scales, a_outer, b_outer, offsets, out, rows, columns, steps, groups, beyond, a_outer_row, b_outer_group,
    WARPS: gl.constexpr, UNITS: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, LANES: gl.constexpr, A_OUTER: gl.constexpr,
    OUTER: gl.constexpr, DROP: gl.constexpr, DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """out [rows, columns] = x @ w.T for each group of rows and its matrix of w [groups * columns, K], 64 steps of K.

    x, a descriptor of blocks [N, 64] of [beyond, K], as `order_pairs` leaves it, has N rows more than there are, so
    that every tile is whole; a tile may have rows of groups after its own, which are not stored. Programs take tile
    after tile, all of K, and begin to load the next one before they store one. The rows after the last group's end
    become zeros. A_OUTER: factors of rows, `a_outer_row` from each other; OUTER: 0 none, 1 a number for each group, 2
    one for each of its columns, `b_outer_group` from group to group.
    """
    words = words.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int32), bitcast=True)
    BN: gl.constexpr = 16 * WARPS * UNITS
    TURNS: gl.constexpr = wide._turns(UNITS, HELD)
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    rings = wide._rings(flat, WARPS, UNITS, WIDTH, BLOCK, N, STAGES)
    x_shared, w_shared, s_shared, full = rings
    tid = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, flat))
    lane, warp = tid & 31, tid >> 5
    byte = (warp % 2) * 16 if UNITS == 1 else warp * 0  # of its unit in a word of scales
    column_tiles = (columns + BN - 1) // BN
    until = (steps + TURNS - 1) // TURNS * TURNS
    upto, row_tiles = schedule._summed_tiles(offsets, groups, rows, N, LANES, WARPS)
    total, programs = row_tiles * column_tiles, gl.num_programs(0)
    tile = gl.program_id(0)
    group, row, stop, column, _split, _first, _count = schedule._place(
        tile, upto, offsets, groups, rows, column_tiles, steps, N, BN, BAND, True, 1
    )
    stage = 0
    phase = 0
    group_words, group_scales, w_at, s_at = _of_group(
        words, scales, group, column, lane, warp, steps, columns, flat, WARPS, UNITS, WIDTH, BLOCK
    )
    wide._begin_w(group_words, group_scales, w_shared, s_shared, stage, 0, steps, w_at, s_at, WIDTH, BLOCK, STAGES)
    gdc_wait()  # from here on x is what `order_pairs` made; weights and offsets were there before it began
    wanted = gl.where(tile < total, until, 0)
    wide._begin_x(x, x_shared, full, stage, 0, steps, wanted, row, beyond, N, STAGES)
    for tile in range(gl.program_id(0), total, programs):
        group_words, group_scales, w_at, s_at = _of_group(
            words, scales, group, column, lane, warp, steps, columns, flat, WARPS, UNITS, WIDTH, BLOCK
        )
        following = tile + programs
        next_group, next_row, next_stop, next_column, _split, _first, _count = schedule._place(
            following, upto, offsets, groups, rows, column_tiles, steps, N, BN, BAND, True, 1
        )
        acc, stage, phase = wide._multiply(
            x, group_words, group_scales, rings, stage, phase, 0, steps, until, row, beyond, w_at, s_at, byte, flat,
            WARPS, UNITS, HELD, WIDTH, BLOCK, N, STAGES, TURNS, DECODE, DECODE_NEXT, DECODE_IN,
        )  # fmt: skip
        # Into all stages but the last step's: all warps met there, when the products with the others were done.
        group_words, group_scales, w_at, s_at = _of_group(
            words, scales, next_group, next_column, lane, warp, steps, columns, flat, WARPS, UNITS, WIDTH, BLOCK
        )
        wide._begin_w(group_words, group_scales, w_shared, s_shared, stage, 0, steps, w_at, s_at, WIDTH, BLOCK, STAGES)
        wanted = gl.where(following < total, until, 0)
        wide._begin_x(x, x_shared, full, stage, 0, steps, wanted, next_row, beyond, N, STAGES)
        tokens = a_outer if A_OUTER else None
        for u in gl.static_range(UNITS):
            wide._store(
                acc[u], u, column // BN, row, b_outer + group.to(gl.int64) * b_outer_group, None, out, stop, columns,
                WARPS, UNITS, N, OUTER, False, DROP, tokens, a_outer_row,
            )  # fmt: skip
        group, row, stop, column = next_group, next_row, next_stop, next_column
    async_copy.wait_group(0)
    schedule._zero_rest(out, offsets, groups, rows, columns, WARPS)
