"""Gluon: bfloat16 rows times coded matrices on Hopper's tensor cores; see `wgmma.py` for the plan of it.

A program has the transposed tile of the product, BN columns (of the codes, the left operand, in registers) by BM rows
(of x, the right one, in shared memory). Stages of x and of codes are filled by the copy engine; while the tensor cores
multiply one, the threads decode the next. Programs take tile after tile, and load the first stages of the next tile
while they finish one.
"""
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from microscale.kernels.triton import jit_sixes
from microscale.kernels.triton.gluon_names import together

# -- who has what ------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _bases(BN, BK, WARPS):
    """Registers, lanes and warps of pairs of codes [BN, BK / 2], as the left operand of wgmma has pairs of values."""
    registers = [[8, 0], [0, 4], *([0, 8 << i] for i in range((BK // 16).bit_length() - 1))]
    rows = 16 * WARPS
    while rows < BN:
        registers.append([rows, 0])
        rows *= 2
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return registers, lanes, [[16 << i, 0] for i in range(WARPS.bit_length() - 1)]


@gluon.constexpr_function
def _pairs_layout(BN, BK, WARPS):
    registers, lanes, warps = _bases(BN, BK, WARPS)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BN, BK // 2])


@gluon.constexpr_function
def _blocks_layout(BN, BK, BLOCK, WARPS):
    """The same of [BN, blocks, pairs of a block]."""
    half = BLOCK // 2
    registers, lanes, warps = [[[n, k // half, k % half] for n, k in part] for part in _bases(BN, BK, WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BN, BK // BLOCK, half])


# -- the schedule ------------------------------------------------------------------------------------------------------


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _end(offsets, group, rows):
    """Where a group ends, between 0 and `rows`; -1 is the group before the first."""
    stop = gl.load(offsets + group, mask=group >= 0, other=0)
    return gl.minimum(gl.maximum(stop, 0), rows)


@gluon.jit
def _summed_tiles(offsets, groups, rows, BM: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr):
    """Tiles of rows up to and with each group [LANES], and of all of them."""
    lane = gl.arange(0, LANES, gl.BlockedLayout([1], [32], [WARPS], [0]))
    group = gl.minimum(lane, groups - 1)
    start, stop = _end(offsets, group - 1, rows), _end(offsets, group, rows)
    tiles = gl.where(lane < groups, (gl.maximum(stop - start, 0) + (BM - 1)) // BM, 0)
    return gl.associative_scan(tiles, 0, _add), gl.sum(tiles, 0)


@gluon.jit
def _place(
    tile, upto, offsets, groups, rows, column_tiles, steps, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr,
    GROUPED: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """A tile's group, first row, end of the group, first column, its part of K, and the first and number of its steps.

    A group's tiles go in bands of BAND tiles of rows, in a band column by column. Of what is past the last tile nothing
    is used.
    """
    each = (steps + SPLITS - 1) // SPLITS
    split = tile % SPLITS
    tile = tile // SPLITS
    if GROUPED:
        before = upto * column_tiles <= tile
        group = gl.minimum(gl.sum(before.to(gl.int32), 0), groups - 1)
        within = tile - gl.max(gl.where(before, upto, 0), 0) * column_tiles
        start, stop = _end(offsets, group - 1, rows), _end(offsets, group, rows)
    else:
        group, within, start, stop = 0, tile, 0, rows
    band = within // (BAND * column_tiles)
    within -= band * (BAND * column_tiles)
    high = gl.maximum(gl.minimum((stop - start + (BM - 1)) // BM - band * BAND, BAND), 1)
    row = start + (band * BAND + within % high) * BM
    return group, row, stop, within // high * BN, split, split * each, gl.minimum(each, steps - split * each)


# -- loading and decoding ----------------------------------------------------------------------------------------------


@gluon.jit
def _fetch(x, codes, rest, full, x_stages, code_stages, rest_stages, stage, row, code_row, step, wanted):
    """Have the copy engine fill a stage, if that is wanted. `rest`: what of a row follows after `codes`, or None."""
    bar = full.index(stage)
    depth: gl.constexpr = x.block_type.shape[1]
    first: gl.constexpr = codes.block_type.shape[1]
    if rest is None:
        mbarrier.expect(bar, x.block_type.nbytes + codes.block_type.nbytes, pred=wanted)
        at = step * first
    else:
        both: gl.constexpr = codes.block_type.nbytes + rest.block_type.nbytes
        mbarrier.expect(bar, x.block_type.nbytes + both, pred=wanted)
        at = step * (first + rest.block_type.shape[1])
        tma.async_copy_global_to_shared(rest, [code_row, at + first], bar, rest_stages.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(x, [row, step * depth], bar, x_stages.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(codes, [code_row, at], bar, code_stages.index(stage), pred=wanted)


@gluon.jit
def _pairs(
    codes, rest, lanes, stage, PAIRS: gl.constexpr, WARPS: gl.constexpr, GATHER: gl.constexpr, GATHER_IN: gl.constexpr
):
    """The pairs of codes of a stage, brought together by GATHER where `rest` has some of them."""
    if rest is None:
        return codes.index(stage).load(PAIRS)
    else:
        return jit_sixes.pairs_of(codes.index(stage), rest.index(stage), lanes, PAIRS, WARPS, GATHER, GATHER_IN)


@gluon.jit
def _scale_rows(scales, group, n, scale_group, scale_row, SWIZZLE: gl.constexpr):
    """Where the scales of rows n of a group start."""
    if SWIZZLE:
        within = (n >> 7) * scale_row + ((n & 31) * 16 + ((n >> 5) & 3) * 4)
        return scales + (group.to(gl.int64) * scale_group + within)
    else:
        return scales + (group.to(gl.int64) * scale_group + n.to(gl.int64) * scale_row)


@gluon.jit
def _load_scales(rows, step, blocks, BK: gl.constexpr, BLOCK: gl.constexpr, SWIZZLE: gl.constexpr, WIDE: gl.constexpr):
    """Of each row, the FP32 scale of a step (WIDE), or the word of four scales that has those of the step."""
    block = gl.minimum(step * BK // BLOCK, blocks - 1)
    if SWIZZLE:
        block = (block >> 2) * 512 + (block & 3)
    if WIDE:
        return gl.load(rows + block)
    else:
        return gl.load((rows + (block & -4)).to(gl.pointer_type(gl.int32), bitcast=True))


@gluon.jit
def _decode(
    pairs, word, step, OPERAND: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr, TABLE: gl.constexpr,
    DECODE: gl.constexpr, DECODE_IN: gl.constexpr, SCALE: gl.constexpr, SCALE_IN: gl.constexpr,
):  # fmt: skip
    """bfloat16 values of pairs of codes as wgmma takes them, with their scales or (SCALE "") without; a tuple.

    TABLE: the parts of values whose sum they are, the smaller first.
    """
    BN: gl.constexpr = pairs.shape[0]
    BK: gl.constexpr = pairs.shape[1] * 2
    given = (pairs.to(gl.int32),)
    if SCALE != "":
        PARTS: gl.constexpr = _blocks_layout(BN, BK, BLOCK, WARPS)
        block = gl.arange(0, BK // BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))
        byte = word[:, None] >> ((step * (BK // BLOCK) % 4 + block) * 8)[None, :]
        one = gl.inline_asm_elementwise(SCALE, SCALE_IN, [byte], dtype=gl.int32, is_pure=True, pack=1)
        scale = gl.expand_dims(one, 2).broadcast_to([BN, BK // BLOCK, BLOCK // 2]).reshape([BN, BK // 2])
        given = given + (gl.convert_layout(scale, pairs.type.layout, assert_trivial=True),)
    if TABLE:
        four: gl.constexpr = (gl.int16,) * 4
        made = gl.inline_asm_elementwise(DECODE, DECODE_IN, given, dtype=four, is_pure=True, pack=1)
        return (_joined(made[2], made[3], OPERAND), _joined(made[0], made[1], OPERAND))
    else:
        two: gl.constexpr = (gl.int16,) * 2
        made = gl.inline_asm_elementwise(DECODE, DECODE_IN, given, dtype=two, is_pure=True, pack=1)
        return (_joined(made[0], made[1], OPERAND),)


@gluon.jit
def _joined(first, second, OPERAND: gl.constexpr):
    values = gl.join(first, second).reshape([first.shape[0], first.shape[1] * 2]).to(gl.bfloat16, bitcast=True)
    return gl.convert_layout(values, OPERAND, assert_trivial=True)


@gluon.jit
def _start(values, right, sums, WIDE: gl.constexpr):
    """Have the tensor cores add values @ right to the sums, or (WIDE) put it in their place."""
    token = warpgroup_mma(values[0], right, sums, use_acc=not WIDE, is_async=True)
    if len(values) == 2:
        token = warpgroup_mma(values[1], right, token, is_async=True)
    return token


# -- the result --------------------------------------------------------------------------------------------------------


@gluon.jit
def _finish(
    acc, out, a_outer, b_outer, bias, a_outer_row, b_outer_group, b_outer_column, group, row, stop, column, split, rows,
    columns, A_OUTER: gl.constexpr, B_OUTER: gl.constexpr, BIAS: gl.constexpr, PARTS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Store a transposed tile of sums, times the outer scales, plus the bias, in PARTS parts."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    n = column + gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
    m = row + gl.arange(0, BM, gl.SliceLayout(0, acc.type.layout))
    if A_OUTER:
        acc = acc * gl.load(a_outer + m.to(gl.int64) * a_outer_row, mask=m < stop, other=1.0)[None, :]
    if B_OUTER:
        place = b_outer + (group.to(gl.int64) * b_outer_group + n * b_outer_column)
        acc = acc * gl.load(place, mask=n < columns, other=1.0)[:, None]
    if BIAS:
        acc = acc + gl.load(bias + n, mask=n < columns, other=0.0).to(gl.float32)[:, None]
    WIDE: gl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    LANES: gl.constexpr = min(32, BN // WIDE)
    OUT: gl.constexpr = gl.BlockedLayout([WIDE, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    made = gl.convert_layout(acc.to(out.dtype.element_ty), OUT)
    n = column + gl.arange(0, BN, gl.SliceLayout(1, OUT))
    m = row + gl.arange(0, BM, gl.SliceLayout(0, OUT))
    place = out + ((split * rows + m).to(gl.int64) * columns)[None, :] + n[:, None]
    gl.store(place, made, mask=(m < stop)[None, :] & (n < columns)[:, None])


@gluon.jit
def _zero_rest(out, offsets, groups, rows, columns, WARPS: gl.constexpr):
    """Store zeros in the rows after the last end."""
    SIZE: gl.constexpr = WARPS * 256
    start = _end(offsets, groups - 1, rows)
    out += start.to(gl.int64) * columns
    left = (rows - start).to(gl.int64) * columns
    lane = gl.arange(0, SIZE, gl.BlockedLayout([8], [32], [WARPS], [0]))
    nothing = (lane * 0).to(out.dtype.element_ty)
    for part in range(gl.program_id(0), (left + SIZE - 1) // SIZE, gl.num_programs(0)):
        place = part.to(gl.int64) * SIZE + lane
        gl.store(out + place, nothing, mask=place < left)


# -- the product -------------------------------------------------------------------------------------------------------


@gluon.jit
def multiply_codes(
    x, codes, rest, scales, a_outer, b_outer, bias, offsets, out, rows, columns, size, groups, blocks, scale_group,
    scale_row, a_outer_row, b_outer_group, b_outer_column,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    BAND: gl.constexpr, LANES: gl.constexpr, SPLITS: gl.constexpr, GROUPED: gl.constexpr, BLOCK: gl.constexpr,
    SWIZZLE: gl.constexpr, WIDE: gl.constexpr, A_OUTER: gl.constexpr, B_OUTER: gl.constexpr, BIAS: gl.constexpr,
    TABLE: gl.constexpr, DECODE: gl.constexpr, DECODE_IN: gl.constexpr, SCALE: gl.constexpr, SCALE_IN: gl.constexpr,
    GATHER: gl.constexpr, GATHER_IN: gl.constexpr, BASE: gl.constexpr,
):  # fmt: skip
    """out [SPLITS, rows, columns] = x [rows, size] times a matrix of codes [groups * columns, pairs], by group of rows.

    x, codes, rest: descriptors; rest is None unless pairs are to be gathered, see `jit_sixes.py`. WIDE: scales are
    FP32, and multiply what a step of BK sums up; then BK divides BLOCK. Else they multiply the values, and BLOCK
    divides BK. TABLE: a value is the sum of two bfloat16. Every part of K has at least STAGES - 1 steps.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PAIRS: gl.constexpr = _pairs_layout(BN, BK, WARPS)
    if WIDE:
        SCALED: gl.constexpr = gl.SliceLayout(1, MMA)
    else:
        SCALED: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, _blocks_layout(BN, BK, BLOCK, WARPS)))
    x_stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], x.layout)
    code_stages = gl.allocate_shared_memory(codes.dtype, [STAGES, BN, codes.block_type.shape[1]], codes.layout)
    rest_stages, lanes = None, None
    if rest is not None:
        rest_stages = gl.allocate_shared_memory(rest.dtype, [STAGES, BN, rest.block_type.shape[1]], rest.layout)
        lanes = jit_sixes.lanes_of(BN, WARPS, BASE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    column_tiles, steps = (columns + BN - 1) // BN, size // BK
    if GROUPED:
        upto, row_tiles = _summed_tiles(offsets, groups, rows, BM, LANES, WARPS)
    else:
        upto, row_tiles = 0, (rows + BM - 1) // BM
    total, programs = row_tiles * column_tiles * SPLITS, gl.num_programs(0)
    tile = gl.program_id(0)
    group, row, stop, column, split, first, count = _place(
        tile, upto, offsets, groups, rows, column_tiles, steps, BM, BN, BAND, GROUPED, SPLITS
    )
    for ready in gl.static_range(STAGES - 1):
        wanted = (tile < total) & (ready < count)
        _fetch(
            x, codes, rest, full, x_stages, code_stages, rest_stages, ready, row, group * columns + column,
            first + ready, wanted,
        )  # fmt: skip
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), total, programs):
        following = tile + programs
        next_group, next_row, next_stop, next_column, next_split, next_first, next_count = _place(
            following, upto, offsets, groups, rows, column_tiles, steps, BM, BN, BAND, GROUPED, SPLITS
        )
        n = gl.minimum(column + gl.arange(0, BN, SCALED), columns - 1)
        scale_rows = _scale_rows(scales, group + 0, n, scale_group, scale_row, SWIZZLE)
        sums = gl.zeros([BN, BM], gl.float32, MMA)
        acc = sums
        scale = _load_scales(scale_rows, first, blocks, BK, BLOCK, SWIZZLE, WIDE)
        mbarrier.wait(full.index(stage), phase)
        values = _decode(
            _pairs(code_stages, rest_stages, lanes, stage, PAIRS, WARPS, GATHER, GATHER_IN), scale, first, OPERAND,
            BLOCK, WARPS, TABLE, DECODE, DECODE_IN, SCALE, SCALE_IN,
        )  # fmt: skip
        ahead = _load_scales(scale_rows, first + 1, blocks, BK, BLOCK, SWIZZLE, WIDE)
        for i in range(count):
            token = _start(values, x_stages.index(stage).permute((1, 0)), sums, WIDE)
            # All warps have waited for the step before, so its stage is free.
            together()
            left = i + (STAGES - 1) - count
            here = left < 0
            _fetch(
                x, codes, rest, full, x_stages, code_stages, rest_stages,
                gl.where(stage == 0, STAGES - 1, stage - 1), gl.where(here, row, next_row),
                gl.where(here, group * columns + column, next_group * columns + next_column),
                gl.where(here, first + i + (STAGES - 1), next_first + left), here | (following < total),
            )  # fmt: skip
            last = stage == STAGES - 1
            stage, phase = gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)
            mbarrier.wait(full.index(stage), phase, pred=i + 1 < count)
            after = _decode(
                _pairs(code_stages, rest_stages, lanes, stage, PAIRS, WARPS, GATHER, GATHER_IN), ahead, first + i + 1,
                OPERAND, BLOCK, WARPS, TABLE, DECODE, DECODE_IN, SCALE, SCALE_IN,
            )  # fmt: skip
            further = _load_scales(scale_rows, first + i + 2, blocks, BK, BLOCK, SWIZZLE, WIDE)
            sums = warpgroup_mma_wait(0, deps=(token,) + values)[0]
            if WIDE:
                acc = gl.fma(sums, gl.expand_dims(scale, 1).broadcast_to([BN, BM]), acc)
            values, scale, ahead = after, ahead, further
        if not WIDE:
            acc = sums
        _finish(
            acc, out, a_outer, b_outer, bias, a_outer_row, b_outer_group, b_outer_column, group, row, stop, column,
            split, rows, columns, A_OUTER, B_OUTER, BIAS, 1, WARPS,
        )  # fmt: skip
        group, row, stop, column = next_group, next_row, next_stop, next_column
        split, first, count = next_split, next_first, next_count
    if GROUPED:
        _zero_rest(out, offsets, groups, rows, columns, WARPS)
