"""Gluon: a weight in layout `fragments` as E4M3 rows; see `align_fragments.py` for the plan of it.

As in `jit_fragments.py`, thread 32 w + l is lane l of warp w, and has four neighbouring registers of every [threads, 4]
tensor.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def align_fragments(
    words, scales, row_scales, out, steps, chunks,
    HELD: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
    DECODE: gl.constexpr, DECODE_NEXT: gl.constexpr, DECODE_IN: gl.constexpr,
    ENCODE: gl.constexpr, ENCODE_IN: gl.constexpr,
):  # fmt: skip
    """out int32 [N, K / 4]: four E4M3 codes a word. A program takes WARPS of the steps of 64 rows.

    words, scales int32: the weight; row_scales int32 [N]: FP32 bits of the rows' powers of two.
    """
    T: gl.constexpr = 32 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    tid = gl.arange(0, T, gl.SliceLayout(1, layout))
    four = gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    lane = tid & 31
    g, t = lane >> 2, lane & 3
    strip = gl.program_id(0) // chunks
    step = (gl.program_id(0) % chunks) * WARPS + (tid >> 5)
    factors = ()
    for r in gl.static_range(8):  # 2 to the other way, as bfloat16 in both halves
        bits = gl.load(row_scales + (strip * 64 + r * 8 + g))
        factors = factors + ((254 - (bits >> 23)) * 0x00800080,)
    GROUPS: gl.constexpr = 8 // HELD
    VECTORS: gl.constexpr = HELD * WIDTH // 8
    types: gl.constexpr = (gl.int32,) * (2 * HELD)
    scale_in = (g * (64 // BLOCK) + t * 16 // BLOCK) * 2
    row_at = (strip * 64 + g) * (steps * 16) + t * 4
    there = (step < steps)[:, None]
    place = strip * steps + gl.minimum(step, steps - 1)
    at = (place * (WIDTH * 128) + lane * 4)[:, None] + four
    loaded = ()
    for v in gl.static_range(GROUPS * VECTORS):  # all before the first store, which they could not pass
        loaded = loaded + (gl.load(words + at + v * 128, eviction_policy="evict_first"),)
    scale_at = place * (1024 // BLOCK) + scale_in
    scale = (gl.load(scales + scale_at), gl.load(scales + scale_at + 1))
    target = (row_at + step * 16)[:, None] + four
    for group in gl.static_range(GROUPS):
        given = loaded[group * VECTORS : (group + 1) * VECTORS]
        word, _ = gl.broadcast(scale[group * HELD // 4][:, None], given[0])
        if group * HELD % 4 == 0:
            pairs = gl.inline_asm_elementwise(DECODE, DECODE_IN, given + (word,), types, is_pure=True, pack=4)
        else:
            pairs = gl.inline_asm_elementwise(DECODE_NEXT, DECODE_IN, given + (word,), types, is_pure=True, pack=4)
        for r in gl.static_range(HELD):
            factor, _ = gl.broadcast(factors[group * HELD + r][:, None], given[0])
            taken = (pairs[2 * r], pairs[2 * r + 1], factor)
            codes = gl.inline_asm_elementwise(ENCODE, ENCODE_IN, taken, gl.int32, is_pure=True, pack=4)
            gl.store(out + (target + (group * HELD + r) * 8 * (steps * 16)), codes, mask=there)
