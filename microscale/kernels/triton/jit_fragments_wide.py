"""Gluon: some tens to hundreds of rows of bfloat16 times a weight in layout `fragments`, by Hopper's `wgmma`.

See `fragments_wide.py` for the plan of it. As in `jit_fragments.py`, thread 32 w + l is lane l of warp w; a thread's
registers of the [threads, 4] tensors that the inline assembly decodes are what `wgmma` wants of its A operand.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.kernels.triton.gluon_names import together

X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)  # of a tile of x in shared memory


@gluon.jit
def _fetch_x(x, x_shared, full, stage, step, last, stop, x_row, beyond, N: gl.constexpr):
    """Begin to copy a step's tile of x; from the last step on what is `beyond`, zeros; from `stop` on nothing."""
    place = gl.where(step < last, x_row, beyond)
    mbarrier.expect(full.index(stage), N * 128, pred=step < stop)
    tma.async_copy_global_to_shared(x, [place, step * 64], full.index(stage), x_shared.index(stage), pred=step < stop)


@gluon.jit
def _fetch_w(
    words, scales, w_shared, s_shared, stage, step, last, w_at, s_at, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Begin to copy what this thread will read itself of the weight and its scales, of the last step past it."""
    place = gl.minimum(step, last - 1)
    w_from = words + (w_at + place * (WIDTH * 128))
    for v in gl.static_range(len(w_shared)):
        async_copy.async_copy_global_to_shared(w_shared[v].index(stage), w_from + v * 128)
    if BLOCK < 64:
        s_from = scales + (s_at + place * (1024 // BLOCK))
        for v in gl.static_range(len(s_shared)):
            async_copy.async_copy_global_to_shared(s_shared[v].index(stage), s_from + v)
    async_copy.commit_group()


@gluon.jit
def _decode(
    w_shared, s_shared, stage, byte, flat: gl.constexpr, GROUP: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK: gl.constexpr, DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """Read a group of vectors of this thread, and decode it: eight bfloat16 tensors [threads, 4] for each unit."""
    per_group: gl.constexpr = HELD * WIDTH // 8
    types: gl.constexpr = (gl.bfloat16,) * (HELD * 4)
    given = ()
    for v in gl.static_range(per_group):
        given = given + (w_shared[GROUP * per_group + v].index(stage).load(flat),)
    if BLOCK < 64:
        scale = s_shared[GROUP * HELD // 4].index(stage).load(gl.SliceLayout(1, flat)) >> byte
    else:  # 1 for each row
        scale = gl.full([given[0].shape[0]], 0x7F7F7F7F, gl.int32, gl.SliceLayout(1, flat))
    word, _same = gl.broadcast(scale[:, None], given[0])
    given = given + (word,)
    if GROUP * HELD % 4 == 0:
        made = gl.inline_asm_elementwise(DECODE, DECODE_IN, given, types, is_pure=True, pack=4)
    else:
        made = gl.inline_asm_elementwise(DECODE_NEXT, DECODE_IN, given, types, is_pure=True, pack=4)
    return made


@gluon.jit
def _operand(parts, layout: gl.constexpr):
    """Eight bfloat16 tensors [threads, 4] -> the A operand [threads / 2, 64]: nothing moves but names of registers."""
    WARPS: gl.constexpr = parts[0].shape[0] // 32
    made = ()
    for i in gl.static_range(8):
        spread = parts[i].reshape([WARPS, 8, 4, 2, 2]).permute([0, 3, 1, 2, 4])  # warp, row + 8, row, pair, half
        made = made + (spread.reshape([16 * WARPS, 8]),)
    late0 = gl.join(made[0], made[1])
    late1 = gl.join(made[2], made[3])
    late2 = gl.join(made[4], made[5])
    late3 = gl.join(made[6], made[7])
    whole = gl.join(gl.join(late0, late1), gl.join(late2, late3))  # row, place, late, low bit of step, high bit
    return gl.convert_layout(whole.permute([0, 4, 3, 2, 1]).reshape([16 * WARPS, 64]), layout, assert_trivial=True)


@gluon.jit
def _rings(
    flat: gl.constexpr, WARPS: gl.constexpr, UNITS: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Shared memory for STAGES steps of x, of the weight and of its scales, and what tells that x is there."""
    T: gl.constexpr = 32 * WARPS
    VECTORS: gl.constexpr = UNITS * WIDTH // 4
    x_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 64], gl.NVMMASharedLayout(128, 16, 2))
    rows_of_four: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words_of_lane: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_shared = ()
    for _v in gl.static_range(VECTORS):  # each its own, so that the compiler sees that copies do not meet
        w_shared = w_shared + (gl.allocate_shared_memory(gl.int32, [STAGES, T, 4], rows_of_four),)
    s_shared = ()
    for _v in gl.static_range((UNITS + 1) // 2 if BLOCK < 64 else 0):
        s_shared = s_shared + (gl.allocate_shared_memory(gl.int32, [STAGES, T], words_of_lane),)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    together()
    return x_shared, w_shared, s_shared, full


@gluon.jit
def _places(
    tile_w, lane, warp, steps, columns, flat: gl.constexpr, WARPS: gl.constexpr, UNITS: gl.constexpr,
    WIDTH: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Where a thread's words of a tile of columns, and of its scales, begin in a matrix of as many columns."""
    PARTS: gl.constexpr = 64 // BLOCK
    unit = (tile_w * WARPS + warp) * UNITS  # in 16 rows of w
    unit = gl.where(unit * 16 < columns, unit, 0)  # past the end: what is not stored
    block_at = unit // 4 * steps
    w_at = (block_at * (WIDTH * 128) + (unit % 4) * (WIDTH * 32) + lane * 4)[:, None]
    w_at += gl.arange(0, 4, gl.SliceLayout(0, flat))[None, :]
    s_at = block_at * (1024 // BLOCK) + (((lane >> 2) * PARTS + (lane & 3) * 16 // BLOCK) * 8 + (unit % 4) * 2) // 4
    return w_at, s_at


@gluon.jit
def _begin_w(
    words, scales, w_shared, s_shared, stage, first, last, w_at, s_at, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Begin to copy what a thread reads of the weight for a tile's first steps, all that there is room for but one."""
    for s in gl.static_range(STAGES - 1):
        into = gl.where(stage + s >= STAGES, stage + s - STAGES, stage + s)
        _fetch_w(words, scales, w_shared, s_shared, into, first + s, last, w_at, s_at, WIDTH, BLOCK)


@gluon.jit
def _begin_x(x, x_shared, full, stage, first, last, stop, x_row, beyond, N: gl.constexpr, STAGES: gl.constexpr):
    """Begin to copy x for the same steps."""
    for s in gl.static_range(STAGES - 1):
        into = gl.where(stage + s >= STAGES, stage + s - STAGES, stage + s)
        _fetch_x(x, x_shared, full, into, first + s, last, stop, x_row, beyond, N)


@gluon.jit
def _multiply(
    x, words, scales, rings, stage, phase, first, last, stop, x_row, beyond, w_at, s_at, byte,
    flat: gl.constexpr, WARPS: gl.constexpr, UNITS: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """A tile's sums over the steps from `first` to `last`, whose first ones are under way: UNITS of them, FP32.

    And where the rings stand then. All that was begun is done.

    One product (of UNITS == 1, or where a group of vectors is all of a step's) or two are in flight while the next
    operand is decoded, across steps too. Their operands' registers must stay as they are until then, which copies from
    one turn of a loop to the next would break: so a turn is as many steps as bring every operand back to the same
    registers (see tests/kernels/wgmma_hazards.py), and what is too many, up to `stop`, multiplies zeros.
    """
    COLUMNS: gl.constexpr = 16 * WARPS  # of a unit of all warps
    GROUPS: gl.constexpr = (UNITS * 2 + HELD - 1) // HELD
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    x_shared, w_shared, s_shared, full = rings
    zero = gl.zeros([COLUMNS, N], gl.float32, sums)
    no_a = gl.zeros([COLUMNS, 64], gl.bfloat16, a_layout)
    acc = ()
    for _u in gl.static_range(UNITS - 2):
        acc = acc + (zero,)
    older, older_a = warpgroup_mma_init(zero), no_a
    newer, newer_a = warpgroup_mma_init(zero), no_a
    only = zero
    for turn in range(first, stop, TURNS):
        for t in gl.static_range(TURNS):
            step = turn + t
            async_copy.wait_group(STAGES - 2)
            b = x_shared.index(stage).permute((1, 0))
            before = gl.where(stage == 0, STAGES - 1, stage - 1)
            made = ()
            if GROUPS == 1 and UNITS > 1:  # ptxas would decode into registers that products in flight still read
                done, _older_a = warpgroup_mma_wait(1, deps=(older, older_a))
                late, _newer_a = warpgroup_mma_wait(0, deps=(newer, newer_a))
                acc = (done, late)
            for group in gl.static_range(GROUPS):
                a = _decode(
                    w_shared, s_shared, stage, byte, flat, group, HELD, WIDTH, BLOCK, DECODE, DECODE_NEXT, DECODE_IN
                )
                if group == 0:
                    mbarrier.wait(full.index(stage), phase)
                for half in gl.static_range(HELD // 2 if UNITS > 1 else 1):
                    operand = _operand(a[8 * half : 8 * half + 8], a_layout)
                    if UNITS == 1:
                        begun = warpgroup_mma(operand, b, only, is_async=True)
                        only, _newer_a = warpgroup_mma_wait(1, deps=(begun, newer_a))
                        newer_a = operand
                    else:
                        if GROUPS > 1:
                            done, _older_a = warpgroup_mma_wait(1, deps=(older, older_a))
                            if group * (HELD // 2) + half < 2:  # of the step before
                                acc = acc + (done,)
                            else:
                                made = made + (done,)
                        older, older_a = newer, newer_a
                        newer = warpgroup_mma(operand, b, acc[group * (HELD // 2) + half], is_async=True)
                        newer_a = operand
                    if UNITS == 1 or group * (HELD // 2) + half == 1:
                        together()  # the step before has been multiplied: its operands can be overwritten
                        ahead = step + STAGES - 1
                        _fetch_x(x, x_shared, full, before, ahead, last, stop, x_row, beyond, N)
                        _fetch_w(words, scales, w_shared, s_shared, before, ahead, last, w_at, s_at, WIDTH, BLOCK)
            acc = made
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    if UNITS == 1:
        done, _newer_a = warpgroup_mma_wait(0, deps=(only, newer_a))
    else:
        done, _older_a = warpgroup_mma_wait(1, deps=(older, older_a))
        acc = acc + (done,)
        done, _newer_a = warpgroup_mma_wait(0, deps=(newer, newer_a))
    acc = acc + (done,)
    async_copy.wait_group(0)
    return acc, stage, phase


@gluon.constexpr_function
def _turns(UNITS, HELD):
    """Steps of a turn, see `_multiply`."""
    return 2 if UNITS == 1 else 1 if UNITS * 2 <= HELD else 3


@gluon.jit
def matmul_wide(
    x, words, scales, outer, bias, out, parts, rows, columns, steps, tiles_x, total, each,
    WARPS: gl.constexpr, UNITS: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr,
    DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """out [M, columns] = x @ w.T for x, a descriptor of blocks [N, 64] of [tiles_x * N, K], as `order_pairs` leaves it.

    A tile is N rows of x and 16 * WARPS * UNITS columns of the result, a step 64 of K; tiles_x counts tiles of x. For
    each of them a program of group g takes steps [g, g + 1) * each of `total`, those of all tiles of columns:
    neighbours read the same part of the weight at the same time, so all but one find it in the cache. Where a program
    has a tile's steps only in part, its FP32 sums go to parts [program, 2, UNITS, 16 * WARPS, N]: those of a tile's
    first steps to the second place. BLOCK: of a scale; 64 if there are none but FP32 ones of rows, in `outer`.
    """
    words = words.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int32), bitcast=True)
    COLUMNS: gl.constexpr = 16 * WARPS  # of a unit of all warps
    TURNS: gl.constexpr = _turns(UNITS, HELD)
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    rings = _rings(flat, WARPS, UNITS, WIDTH, BLOCK, N, STAGES)
    x_shared, w_shared, s_shared, full = rings
    tid = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, flat))
    lane, warp = tid & 31, tid >> 5
    byte = (warp % 2) * 16 if UNITS == 1 else warp * 0  # of its unit in a word of scales
    program = gl.program_id(0)
    x_row = program % tiles_x * N
    at = program // tiles_x * each
    end = gl.minimum(at + each, total)
    stage = 0
    phase = 0
    while at < end:
        tile_w = at // steps
        first = at % steps
        last = gl.minimum(steps, first + end - at)
        stop = first + (last - first + TURNS - 1) // TURNS * TURNS
        w_at, s_at = _places(tile_w, lane, warp, steps, columns, flat, WARPS, UNITS, WIDTH, BLOCK)
        _begin_w(words, scales, w_shared, s_shared, stage, first, last, w_at, s_at, WIDTH, BLOCK, STAGES)
        gdc_wait()  # from here on x is what `order_pairs` made; the weight was there before it began
        _begin_x(x, x_shared, full, stage, first, last, stop, x_row, tiles_x * N, N, STAGES)
        acc, stage, phase = _multiply(
            x, words, scales, rings, stage, phase, first, last, stop, x_row, tiles_x * N, w_at, s_at, byte, flat,
            WARPS, UNITS, HELD, WIDTH, BLOCK, N, STAGES, TURNS, DECODE, DECODE_NEXT, DECODE_IN,
        )  # fmt: skip
        slot = (program * 2 + gl.where(first == 0, 1, 0)).to(gl.int64) * (COLUMNS * UNITS * N)
        for u in gl.static_range(UNITS):
            if (first == 0) & (last == steps):
                _store(acc[u], u, tile_w, x_row, outer, bias, out, rows, columns, WARPS, UNITS, N, OUTER, BIAS, DROP)
            else:
                row = gl.arange(0, COLUMNS, gl.SliceLayout(1, sums))[:, None]
                place = row * N + gl.arange(0, N, gl.SliceLayout(0, sums))[None, :]
                gl.store(parts + slot + u * COLUMNS * N + place, acc[u])
        at += last - first
    gdc_launch_dependents()


@gluon.jit
def _store(
    acc, u: gl.constexpr, tile_w, x_row, outer, bias, out, rows, columns,
    WARPS: gl.constexpr, UNITS: gl.constexpr, N: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr,
    DROP: gl.constexpr, tokens=None, tokens_row=0,
):  # fmt: skip
    """Scale, add the bias, round, and store 16 columns of each warp for N rows of the result, up to `rows`.

    `tokens`: factors of the rows, `tokens_row` from each other.
    """
    spread: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [WARPS, 1], [0, 1])
    total = gl.convert_layout(acc, spread) * DROP
    line = gl.arange(0, 16 * WARPS, gl.SliceLayout(1, spread))[:, None]
    column = ((tile_w * WARPS + line // 16) * UNITS + u) * 16 + line % 16
    row = x_row + gl.arange(0, N, gl.SliceLayout(0, spread))[None, :]
    inside = column < columns
    if OUTER == 1:
        total = total * gl.load(outer)
    elif OUTER == 2:
        total = total * gl.load(outer + column, mask=inside, other=0)
    if tokens is not None:
        total = total * gl.load(tokens + row.to(gl.int64) * tokens_row, mask=row < rows, other=0)
    if BIAS:
        total = total + gl.load(bias + column, mask=inside, other=0).to(gl.float32)
    place = row.to(gl.int64) * columns + column
    gl.store(out + place, total.to(out.dtype.element_ty), mask=inside & (row < rows))
