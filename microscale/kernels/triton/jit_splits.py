"""Adding what several programs have of a product, in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def add_splits(
    parts, outer, bias, out, columns, total,
    SPLITS: tl.constexpr, OUTER: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out [M, N] = sum of parts FP32 [SPLITS, M, N] * outer + bias, rounded. OUTER: 0 none, 1 one, 2 per column."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = place < total
    value = tl.load(parts + place, mask=there, other=0)
    for i in tl.static_range(1, SPLITS):
        value += tl.load(parts + i * total + place, mask=there, other=0)
    if OUTER == 1:
        value *= tl.load(outer)
    elif OUTER == 2:
        value *= tl.load(outer + place % columns, mask=there, other=0)
    if BIAS:
        value += tl.load(bias + place % columns, mask=there, other=0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=there)
