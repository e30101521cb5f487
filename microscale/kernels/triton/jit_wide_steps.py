"""What goes before and after `matmul_wide`: x in the order of fragments, and the sums of tiles that programs share."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def order_pairs(x, out, total, SIZE: tl.constexpr, CHAIN: tl.constexpr):
    """out [M, K] = x, both of 16 bits, their `total` pairs in the order in which tensor cores count K of `fragments`.

    Of 32 pairs, lane t's pair 2 s + j of 8 goes to step s, half j, place t. CHAIN: what comes next may begin.
    """
    if CHAIN:
        gdc_launch_dependents()
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    out = out.to(tl.pointer_type(tl.int32), bitcast=True)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    pair = place & 31
    source = (place - pair) + (pair & 3) * 8 + (pair >> 3) * 2 + ((pair >> 2) & 1)
    tl.store(out + place, tl.load(x + source, mask=place < total, other=0), mask=place < total)


@triton.jit
def add_tiles(
    parts, outer, bias, out, rows, columns, steps, tiles_x, each,
    WARPS: tl.constexpr, UNITS: tl.constexpr, N: tl.constexpr, OUTER: tl.constexpr, BIAS: tl.constexpr,
    DROP: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Add what programs have of each tile that several took, in their order; scale, add the bias, round and store.

    A program of this takes 16 columns and N rows of the result. For the arguments see `matmul_wide`. CHAIN: it may
    begin before that has ended.
    """
    if CHAIN:
        gdc_wait()
    tile = tl.program_id(0) // (WARPS * UNITS)
    sixteen = tl.program_id(0) % (WARPS * UNITS)
    tile_w, tile_x = tile // tiles_x, tile % tiles_x
    first, last = tile_w * steps // each, (tile_w * steps + steps - 1) // each
    if first == last:
        return
    line = tl.arange(0, 16)[:, None]
    token = tl.arange(0, N)[None, :]
    unit, warp = sixteen // WARPS, sixteen % WARPS
    place = (unit * 16 * WARPS + warp * 16 + line) * N + token
    SLOT: tl.constexpr = 16 * WARPS * UNITS * N
    both = tl.full([], 2 * SLOT, tl.int64)  # a program's two slots
    value = tl.load(parts + both * (first * tiles_x + tile_x) + SLOT + place)
    for group in range(first + 1, last + 1):
        value += tl.load(parts + both * (group * tiles_x + tile_x) + place)
    value *= DROP
    column = ((tile_w * WARPS + warp) * UNITS + unit) * 16 + line
    row = tile_x * N + token
    inside = column < columns
    if OUTER == 1:
        value *= tl.load(outer)
    elif OUTER == 2:
        value *= tl.load(outer + column, mask=inside, other=0)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * columns + column, value.to(out.dtype.element_ty), mask=inside & (row < rows))
