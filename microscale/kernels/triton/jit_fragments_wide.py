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
def _fetch_x(x, x_shared, full, stage, step, last, x_row, N: gl.constexpr):
    """Begin to copy a step's tile of x; nothing where there is no further step."""
    mbarrier.expect(full.index(stage), N * 128, pred=step < last)
    tma.async_copy_global_to_shared(x, [x_row, step * 64], full.index(stage), x_shared.index(stage), pred=step < last)


@gluon.jit
def _fetch_w(
    words, scales, w_shared, s_shared, stage, step, last, w_at, s_at,
    VECTORS: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Begin to copy what this thread will read itself of the weight and its scales, of the last step past it."""
    place = gl.minimum(step, last - 1)
    w_from = words + (w_at + place * (WIDTH * 128))
    for v in gl.static_range(VECTORS):
        async_copy.async_copy_global_to_shared(w_shared[v].index(stage), w_from + v * 128)
    if BLOCK < 64:
        s_from = scales + (s_at + place * (1024 // BLOCK))
        for v in gl.static_range(VECTORS * 2 // WIDTH):
            async_copy.async_copy_global_to_shared(s_shared[v].index(stage), s_from + v)
    async_copy.commit_group()


@gluon.jit
def _decode(
    w_shared, s_shared, stage, flat: gl.constexpr, GROUP: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK: gl.constexpr, DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """Read a group of vectors of this thread, and decode it: eight bfloat16 tensors [threads, 4] for each unit."""
    per_group: gl.constexpr = HELD * WIDTH // 8
    types: gl.constexpr = (gl.bfloat16,) * (HELD * 4)
    given = ()
    for v in gl.static_range(per_group):
        given = given + (w_shared[GROUP * per_group + v].index(stage).load(flat),)
    if BLOCK < 64:
        scale = s_shared[GROUP * HELD // 4].index(stage).load(gl.SliceLayout(1, flat))
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
    """Eight bfloat16 tensors [threads, 4] -> the A operand [64, 64]: nothing moves but names of registers."""
    made = ()
    for i in gl.static_range(8):
        spread = parts[i].reshape([4, 8, 4, 2, 2]).permute([0, 3, 1, 2, 4])  # warp, row + 8, row, pair, half
        made = made + (spread.reshape([64, 8]),)
    late0 = gl.join(made[0], made[1])
    late1 = gl.join(made[2], made[3])
    late2 = gl.join(made[4], made[5])
    late3 = gl.join(made[6], made[7])
    whole = gl.join(gl.join(late0, late1), gl.join(late2, late3))  # row, place, late, low bit of step, high bit
    return gl.convert_layout(whole.permute([0, 4, 3, 2, 1]).reshape([64, 64]), layout, assert_trivial=True)


@gluon.jit
def matmul_wide(
    x, words, scales, outer, bias, out, parts, rows, columns, steps, tiles_x, total, each,
    UNITS: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr,
    DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """out [M, columns] = x @ w.T for x [M, K], a descriptor of blocks [N, 64], as `order_pairs` leaves it.

    A tile is N rows of x and 64 * UNITS columns of the result, a step 64 of K; tiles_x counts tiles of x. Program p
    takes steps [p, p + 1) * each of `total`, those of all tiles. Where it has a tile's steps only in part, its FP32
    sums go to parts [program, 2, UNITS, 64, N]: those of a tile's first steps to the second place. BLOCK: of a scale;
    64 if there are none but FP32 ones of rows, in `outer`.
    """
    words = words.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int32), bitcast=True)
    T: gl.constexpr = 128
    VECTORS: gl.constexpr = UNITS * WIDTH // 4
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    line: gl.constexpr = gl.SliceLayout(1, flat)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    x_shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 64], gl.NVMMASharedLayout(128, 16, 2))
    rows_of_four: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words_of_lane: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_shared = ()
    for _v in gl.static_range(VECTORS):  # each its own, so that the compiler sees that copies do not meet
        w_shared = w_shared + (gl.allocate_shared_memory(gl.int32, [STAGES, T, 4], rows_of_four),)
    s_shared = ()
    for _v in gl.static_range(UNITS // 2 if BLOCK < 64 else 0):
        s_shared = s_shared + (gl.allocate_shared_memory(gl.int32, [STAGES, T], words_of_lane),)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    together()
    tid = gl.arange(0, T, line)
    lane, warp = tid & 31, tid >> 5
    PARTS: gl.constexpr = 64 // BLOCK
    GROUPS: gl.constexpr = UNITS * 2 // HELD
    program = gl.program_id(0)
    at = program * each
    end = gl.minimum(at + each, total)
    stage = 0
    phase = 0
    while at < end:
        tile = at // steps
        first = at % steps
        last = gl.minimum(steps, first + end - at)
        tile_w = tile // tiles_x
        x_row = (tile % tiles_x) * N
        unit = (tile_w * 4 + warp) * UNITS  # in 16 rows of w
        unit = gl.where(unit * 16 < columns, unit, 0)  # past the end: what is not stored
        block_at = unit // 4 * steps
        w_at = (block_at * (WIDTH * 128) + (unit % 4) * (WIDTH * 32) + lane * 4)[:, None]
        w_at += gl.arange(0, 4, gl.SliceLayout(0, flat))[None, :]
        s_at = block_at * (1024 // BLOCK) + (((lane >> 2) * PARTS + (lane & 3) * 16 // BLOCK) * 8 + (unit % 4) * 2) // 4
        for s in gl.static_range(STAGES - 1):
            into = gl.where(stage + s >= STAGES, stage + s - STAGES, stage + s)
            _fetch_w(words, scales, w_shared, s_shared, into, first + s, last, w_at, s_at, VECTORS, WIDTH, BLOCK)
        gdc_wait()  # from here on x is what `order_pairs` made; the weight was there before it began
        for s in gl.static_range(STAGES - 1):
            into = gl.where(stage + s >= STAGES, stage + s - STAGES, stage + s)
            _fetch_x(x, x_shared, full, into, first + s, last, x_row, N)
        acc = ()
        for _u in gl.static_range(UNITS - 1):
            acc = acc + (gl.zeros([64, N], gl.float32, sums),)
        late = warpgroup_mma_init(gl.zeros([64, N], gl.float32, sums))
        late_a = gl.zeros([64, 64], gl.bfloat16, a_layout)
        for step in range(first, last):
            async_copy.wait_group(STAGES - 2)
            b = x_shared.index(stage).permute((1, 0))
            following = gl.where(stage == STAGES - 1, 0, stage + 1)
            made = ()
            if GROUPS == 1:  # ptxas would decode into registers that the product in flight still reads
                before, _late_a = warpgroup_mma_wait(0, deps=(late, late_a))
            for group in gl.static_range(GROUPS):
                a = _decode(w_shared, s_shared, stage, flat, group, HELD, WIDTH, BLOCK, DECODE, DECODE_NEXT, DECODE_IN)
                if group == 0:
                    mbarrier.wait(full.index(stage), phase)
                for half in gl.static_range(HELD // 2):
                    # One product is in flight while the next operand is decoded, across steps too. Its operand's
                    # registers must stay as they are until then: see tests/kernels/wgmma_hazards.py.
                    operand = _operand(a[8 * half : 8 * half + 8], a_layout)
                    if group + half == 0:
                        now = warpgroup_mma(operand, b, acc[0], is_async=True)
                        if GROUPS > 1:
                            before, _late_a = warpgroup_mma_wait(1, deps=(late, late_a))
                        now_a = operand
                    elif group * (HELD // 2) + half < UNITS - 1:
                        then = warpgroup_mma(operand, b, acc[group * (HELD // 2) + half], is_async=True)
                        done, _now_a = warpgroup_mma_wait(1, deps=(now, now_a))
                        made = made + (done,)
                        now, now_a = then, operand
                    else:
                        late = warpgroup_mma(operand, b, before, is_async=True)
                        late_a = operand
                        into = gl.where(stage == 0, STAGES - 1, stage - 1)
                        ahead = step + STAGES - 1
                        together()  # the step before has been multiplied: its operands can be overwritten
                        _fetch_x(x, x_shared, full, into, ahead, last, x_row, N)
                        _fetch_w(
                            words, scales, w_shared, s_shared, into, ahead, last, w_at, s_at, VECTORS, WIDTH, BLOCK
                        )
                        done, _now_a = warpgroup_mma_wait(1, deps=(now, now_a))
                        made = made + (done,)
            acc = made
            phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
            stage = following
        done, _late_a = warpgroup_mma_wait(0, deps=(late, late_a))
        acc = acc + (done,)
        async_copy.wait_group(0)
        slot = (program * 2 + gl.where(first == 0, 1, 0)).to(gl.int64) * (64 * UNITS * N)
        for u in gl.static_range(UNITS):
            if (first == 0) & (last == steps):
                _store(acc[u], u, tile_w, x_row, outer, bias, out, rows, columns, UNITS, N, OUTER, BIAS, DROP)
            else:
                row = gl.arange(0, 64, gl.SliceLayout(1, sums))[:, None]
                place = row * N + gl.arange(0, N, gl.SliceLayout(0, sums))[None, :]
                gl.store(parts + slot + u * 64 * N + place, acc[u])
        at += last - first
    gdc_launch_dependents()


@gluon.jit
def _store(
    acc, u: gl.constexpr, tile_w, x_row, outer, bias, out, rows, columns,
    UNITS: gl.constexpr, N: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr,
    DROP: gl.constexpr,
):  # fmt: skip
    """Scale, add the bias, round, and store 16 columns of each warp for N rows of the result."""
    spread: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [4, 1], [0, 1])
    total = gl.convert_layout(acc, spread) * DROP
    line = gl.arange(0, 64, gl.SliceLayout(1, spread))[:, None]
    column = ((tile_w * 4 + line // 16) * UNITS + u) * 16 + line % 16
    row = x_row + gl.arange(0, N, gl.SliceLayout(0, spread))[None, :]
    inside = column < columns
    if OUTER == 1:
        total = total * gl.load(outer)
    elif OUTER == 2:
        total = total * gl.load(outer + column, mask=inside, other=0)
    if BIAS:
        total = total + gl.load(bias + column, mask=inside, other=0).to(gl.float32)
    place = row.to(gl.int64) * columns + column
    gl.store(out + place, total.to(out.dtype.element_ty), mask=inside & (row < rows))
