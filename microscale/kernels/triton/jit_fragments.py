"""Gluon: a few rows of bfloat16 times a weight in layout `fragments`; see `fragments.py` for the plan of it.

Gluon, because the inline assembly counts on which thread has what: thread 32 w + l of a program is lane l of warp w,
and has four neighbouring registers of every [threads, 4] tensor.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from microscale.kernels.triton.gluon_names import together


@gluon.jit
def _load(
    words, scales, at, last, block_at, group_at, scale_at, four, lane,
    UNITS: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Load the weight's vectors and scales of a step, or of the last one where there is no further: x is zero there.

    They are read once, so they must not push anything else out of the L2 cache.
    """
    place = block_at + gl.minimum(at, last - 1)
    w = ()
    w_place = (place * (WIDTH * 128) + group_at + lane * 4)[:, None] + four
    for v in gl.static_range(UNITS * WIDTH // 4):
        w = w + (gl.load(words + w_place + v * 128, eviction_policy="evict_first"),)
    s = ()
    for i in gl.static_range((UNITS + 1) // 2):
        if BLOCK < 64:
            s = s + (gl.load(scales + place * (1024 // BLOCK) + scale_at + i, eviction_policy="evict_first"),)
        else:
            s = s + (lane * 0 + 0x7F7F7F7F,)
    return w, s


@gluon.jit
def _inputs(x, at, last, input_at, row, rows, half_depth, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Load the B operands of a step: two [threads, 4] tensors for every 8 rows of x, from row 8 * FIRST on."""
    inside = (at < last)[:, None]
    b = ()
    for n in gl.static_range(FIRST, FIRST + COUNT):
        there = inside & (row + 8 * n < rows)
        source = x + (row + 8 * n) * half_depth + ((at * 32)[:, None] + input_at)
        b = b + (gl.load(source, mask=there, other=0), gl.load(source + 4, mask=there, other=0))
    return b


@gluon.jit
def _step(
    acc, words, scales, inputs, byte, UNITS: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr, NT: gl.constexpr,
    DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr, MMA: gl.constexpr, MMA_IN: gl.constexpr,
):  # fmt: skip
    """Decode what was loaded, and multiply."""
    groups: gl.constexpr = UNITS * 2 // HELD
    per_group: gl.constexpr = HELD * WIDTH // 8
    types: gl.constexpr = (gl.int32,) * (HELD // 2 * 4)
    made = ()
    for group in gl.static_range(groups):
        scale = scales[group * HELD // 4]
        if UNITS == 1:
            scale = scale >> byte
        scale, _ = gl.broadcast(scale[:, None], words[0])
        given = words[group * per_group : (group + 1) * per_group] + (scale,)
        if group * HELD % 4 == 0:
            a = gl.inline_asm_elementwise(DECODE, DECODE_IN, given, types, is_pure=True, pack=4)
        else:
            a = gl.inline_asm_elementwise(DECODE_NEXT, DECODE_IN, given, types, is_pure=True, pack=4)
        for half in gl.static_range(HELD // 2):
            for n in gl.static_range(NT):
                c = acc[(group * (HELD // 2) + half) * NT + n]
                operands = a[4 * half : 4 * half + 4] + (inputs[2 * n], inputs[2 * n + 1], c)
                made = made + (gl.inline_asm_elementwise(MMA, MMA_IN, operands, gl.float32, is_pure=True, pack=4),)
    return made


@gluon.jit
def matmul_fragments(
    x, words, scales, outer, bias, out, parts, arrived, rows, columns, depth, steps_each, splits,
    UNITS: gl.constexpr, HELD: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr, NT: gl.constexpr,
    WN: gl.constexpr, WK: gl.constexpr, MOST: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr,
    DROP: gl.constexpr, DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
    MMA: gl.constexpr, MMA_IN: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ w.T; a program takes WN * UNITS * 16 columns and one of `splits` parts of K.

    x [M, K] bfloat16; words, scales: the weight in layout `fragments`, as bytes. OUTER: 0 none, 1 a number, 2 one per
    column. With MOST above 1, sums of the at most MOST parts go to parts FP32 [splits, M, N]; which program is the last
    of a tile, `arrived` says (see `arrivals.py`), and that one adds them up in their order. Else `out` has a matrix for
    each part. BLOCK: of a scale; 64 if there are none but FP32 ones of rows, in `outer`.
    """
    x = x.to(gl.pointer_type(gl.int32), bitcast=True)
    words = words.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int32), bitcast=True)
    T: gl.constexpr = 32 * WN * WK
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WN * WK, 1], [1, 0])
    column: gl.constexpr = gl.SliceLayout(0, layout)
    tid = gl.arange(0, T, gl.SliceLayout(1, layout))
    four = gl.arange(0, 4, column)
    lane, warp = tid & 31, tid >> 5
    g, t = lane >> 2, lane & 3
    part = gl.program_id(0) % splits
    tile = gl.program_id(0) // splits
    unit = (tile * WN + warp % WN) * UNITS  # in 16 rows of w
    steps = depth // 64
    first = part * steps_each
    last = gl.minimum(first + steps_each, steps)
    step = first + warp // WN
    unit = gl.where(unit * 16 < columns, unit, 0)  # past the end: what is not stored
    block_at = unit // 4 * steps
    group_at = (unit % 4) * (WIDTH * 32)
    PARTS: gl.constexpr = 64 // BLOCK
    scale_at = ((g * PARTS + t * 16 // BLOCK) * 8 + (unit % 4) * 2) // 4
    byte = (unit % 2) * 16
    zero = gl.zeros([T, 4], gl.float32, layout)
    acc = ()
    for _ in gl.static_range(UNITS * NT):
        acc = acc + (zero,)
    row, input_at, four = g[:, None], (t * 8)[:, None] + four[None, :], four[None, :]
    half = depth // 2
    # With few rows of x their operands are loaded a step ahead too; of many, registers hold only what is needed next.
    AHEAD: gl.constexpr = NT if NT <= 2 else 0
    w, s = _load(words, scales, step, last, block_at, group_at, scale_at, four, lane, UNITS, WIDTH, BLOCK)
    b = _inputs(x, step, last, input_at, row, rows, half, 0, AHEAD)
    for _ in range((last - first + 2 * WK - 1) // (2 * WK)):  # two steps, so that no register is moved
        ahead = step + WK
        next_w, next_s = _load(
            words, scales, ahead, last, block_at, group_at, scale_at, four, lane, UNITS, WIDTH, BLOCK
        )
        next_b = _inputs(x, ahead, last, input_at, row, rows, half, 0, AHEAD)
        b = b + _inputs(x, step, last, input_at, row, rows, half, AHEAD, NT - AHEAD)
        acc = _step(acc, w, s, b, byte, UNITS, HELD, WIDTH, NT, DECODE, DECODE_NEXT, DECODE_IN, MMA, MMA_IN)
        step += 2 * WK
        w, s = _load(words, scales, step, last, block_at, group_at, scale_at, four, lane, UNITS, WIDTH, BLOCK)
        b = _inputs(x, step, last, input_at, row, rows, half, 0, AHEAD)
        next_b = next_b + _inputs(x, ahead, last, input_at, row, rows, half, AHEAD, NT - AHEAD)
        acc = _step(
            acc, next_w, next_s, next_b, byte, UNITS, HELD, WIDTH, NT, DECODE, DECODE_NEXT, DECODE_IN, MMA, MMA_IN
        )
    mine = (out if MOST == 1 else parts) + part.to(gl.int64) * rows * columns
    for u in gl.static_range(UNITS):
        for n in gl.static_range(NT):
            if MOST == 1:
                _store(acc[u * NT + n], u, n, tile, outer, bias, mine, rows, columns, UNITS, WN, WK, OUTER, BIAS, DROP)
            else:
                _store(acc[u * NT + n], u, n, tile, outer, bias, mine, rows, columns, UNITS, WN, WK, 0, False, 1.0)
    if MOST > 1:
        together()
        others = gl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if others == splits - 1:
            _add(
                parts, tile * (WN * UNITS * 16), outer, bias, out, rows, columns, splits,
                WN * UNITS * 16, WN * WK, MOST, OUTER, BIAS, DROP,
            )  # fmt: skip
            gl.store(arrived + tile, 0)


@gluon.jit
def _store(
    acc, u: gl.constexpr, n: gl.constexpr, tile, outer, bias, out, rows, columns,
    UNITS: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr,
    DROP: gl.constexpr,
):  # fmt: skip
    """Add what the warps along K have, and store 16 columns of 8 rows of the result."""
    total = gl.sum(acc.reshape([WK, 32 * WN, 4]), axis=0) if WK > 1 else acc
    layout: gl.constexpr = total.type.layout
    tid = gl.arange(0, 32 * WN, gl.SliceLayout(1, layout))[:, None]
    four = gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    lane = tid & 31
    column = ((tile * WN + (tid >> 5)) * UNITS + u) * 16 + (lane >> 2) + (four >> 1) * 8
    row = n * 8 + (lane & 3) * 2 + (four & 1)
    _finish(total * DROP, row, column, outer, bias, out, rows, columns, OUTER, BIAS)


@gluon.jit
def _add(
    parts, first, outer, bias, out, rows, columns, splits,
    COLUMNS: gl.constexpr, WARPS: gl.constexpr, MOST: gl.constexpr, OUTER: gl.constexpr, BIAS: gl.constexpr,
    DROP: gl.constexpr,
):  # fmt: skip
    """Add all parts of COLUMNS columns of 8 rows of the result, and store."""
    place = gl.arange(0, 8 * COLUMNS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    row, column = place // COLUMNS, first + place % COLUMNS
    there = (row < rows) & (column < columns)
    source = parts + row * columns + column
    each = columns.to(gl.int64) * rows  # one row is a constant
    total = gl.load(source, mask=there, other=0, cache_modifier=".cg")  # where other SMs have written, no L1
    for part in gl.static_range(1, MOST):
        total += gl.load(source + part * each, mask=there & (part < splits), other=0, cache_modifier=".cg")
    _finish(total * DROP, row, column, outer, bias, out, rows, columns, OUTER, BIAS)


@gluon.jit
def _finish(total, row, column, outer, bias, out, rows, columns, OUTER: gl.constexpr, BIAS: gl.constexpr):
    """Scale, add the bias, round and store."""
    there = (row < rows) & (column < columns)
    if OUTER == 1:
        total = total * gl.load(outer)
    elif OUTER == 2:
        total = total * gl.load(outer + column, mask=there, other=0)
    if BIAS:
        total = total + gl.load(bias + column, mask=there, other=0).to(gl.float32)
    gl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=there)


@gluon.jit
def dequantize_fragments(
    words, scales, out, total, half_depth, HELD: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr,
    WARPS: gl.constexpr, DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
):  # fmt: skip
    """out [N, K] bfloat16, without the outer scale. A warp takes 64 x 64 of `total` such."""
    words = words.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int32), bitcast=True)
    out = out.to(gl.pointer_type(gl.int32), bitcast=True)
    T: gl.constexpr = 32 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    tid = gl.arange(0, T, gl.SliceLayout(1, layout))
    four = gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    lane = tid & 31
    g, t = lane >> 2, lane & 3
    step = gl.program_id(0) * WARPS + (tid >> 5)
    there = (step < total)[:, None]
    place = gl.minimum(step, total - 1)
    steps = half_depth // 32
    odd = t & 1
    # Of two neighbouring lanes' 16 codes each, a store takes those of one: whole sectors of 32 bytes.
    row, column = place // steps * 64 + g, place % steps * 32 + (t - odd) * 8 + odd * 4
    GROUPS: gl.constexpr = 8 // HELD
    VECTORS: gl.constexpr = HELD * WIDTH // 8
    types: gl.constexpr = (gl.int32,) * (2 * HELD)
    at = (place * (WIDTH * 128) + lane * 4)[:, None] + four
    loaded = ()
    for v in gl.static_range(GROUPS * VECTORS):  # all before the first store, which they could not pass
        loaded = loaded + (gl.load(words + at + v * 128, eviction_policy="evict_first"),)
    scale_at = place * (1024 // BLOCK) + (g * (64 // BLOCK) + t * 16 // BLOCK) * 2
    scale = (lane * 0 + 0x7F7F7F7F, lane * 0 + 0x7F7F7F7F)  # 1 for each row
    if BLOCK < 64:
        scale = (gl.load(scales + scale_at), gl.load(scales + scale_at + 1))
    swap = (odd != 0)[:, None]
    for group in gl.static_range(GROUPS):
        given = loaded[group * VECTORS : (group + 1) * VECTORS]
        word, _ = gl.broadcast(scale[group * HELD // 4][:, None], given[0])
        if group * HELD % 4 == 0:
            pairs = gl.inline_asm_elementwise(DECODE, DECODE_IN, given + (word,), types, is_pure=True, pack=4)
        else:
            pairs = gl.inline_asm_elementwise(DECODE_NEXT, DECODE_IN, given + (word,), types, is_pure=True, pack=4)
        for r in gl.static_range(HELD):
            first, second = pairs[2 * r], pairs[2 * r + 1]
            other = gl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=r,r", [gl.where(swap, first, second)],
                gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
            target = out + ((row + group * HELD * 8 + r * 8) * half_depth + column)[:, None] + four
            gl.store(target, gl.where(swap, other, first), mask=there)
            gl.store(target + 8, gl.where(swap, second, other), mask=there)
