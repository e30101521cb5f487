"""Grouped matmul of experts in layout `fragments` that no kernel for that layout takes: decoded to bfloat16 beforehand.

What `triton.grouped_two_pass` does with the plain layout, so a way out and not a fast one for few tokens: experts that
were prepared on another GPU than they are on now (sm_80, Blackwell), the gradient of the tokens, whose contraction is
not along the blocks, and whatever `triton.grouped_fragments_wide` refuses. Experts are whole tiles of this layout, so
that some of them can be decoded by themselves, WORKSPACE bytes at a time, from the order they lie in: nothing is
restored in memory. Nothing asks the device for the offsets.
"""

from __future__ import annotations

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference.matmul import Operand, Parts
from microscale.kernels.triton import fragments, grouped
from microscale.numerics import layout


def has_experts(problem: Problem) -> bool:
    """Return True for experts that `microscale.prepare` made, whichever of their dimensions is contracted."""
    experts = problem.operands[1]
    return experts.layout == layout.FRAGMENTS and len(experts.shape) == 3 and experts.axis in (-1, -2)


@kernel(
    "grouped_matmul", "triton.grouped_restored", priority=5, bound=grouped.BOUND,
    requires=Requires(
        devices=("cuda",), min_capability=(8, 0), dtypes=("bfloat16",), packages=("triton",),
        layouts=(*layout.LAYOUTS, layout.FRAGMENTS),
        checks=(
            ("needs experts that microscale.prepare made", has_experts),
            ("needs tokens in a layout that quantize writes", lambda p: p.operands[0].layout in layout.LAYOUTS),
            *grouped._PRODUCT,
        ),
    ),
)  # fmt: skip
def grouped_matmul(a: Operand, b: Operand, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N]; arguments as `reference.grouped_matmul`."""
    assert isinstance(b, Parts)
    experts, size, columns = grouped._logical(b)
    x, a_outer = grouped.values_of(a)
    out, done = grouped._result((x.shape[0], columns), x, size * experts, out_dtype)
    if done:
        return out
    offsets = offsets.contiguous()
    b_outer, step = grouped.spread(b, (experts, 1, columns)), max(1, grouped.WORKSPACE // (2 * size * columns))
    for first in range(0, experts, step):
        part = slice(first, min(experts, first + step))
        outers = grouped.Outers.of(a_outer, None if b_outer is None else b_outer[part])
        grouped._multiply(x, _decoded(b, part), outers, offsets, out, first)
    return out


def _decoded(b: Parts, part: slice) -> torch.Tensor:
    """The bfloat16 values [e, K, N] of some experts without their outer scales."""
    qdata, scale = (t[part].movedim(b.axis, -1).contiguous() for t in (b.qdata, b.scale))
    return fragments.decode(qdata, scale, b.format).movedim(-1, b.axis)
