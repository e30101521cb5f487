"""Two MX operands on the FP8 tensor cores of sm_90, by experts: `rows_e4m3` for tokens sorted by expert.

Every token's row and every column of every expert's matrix becomes E4M3 codes times one power of two, or has that form
already (FP8 with a scale per token); prepared experts become the same from the order they lie in. torch's grouped
product (CUTLASS; cuBLAS has none for this) multiplies those by groups, with the two powers on its FP32 sums. What
differs from the exact product is what `rows_e4m3` says: elements far below their row's largest, and sums of FP8 tensor
cores, which go into FP32 every 128 along K (`use_fast_accum=False`). So the kernel is not exact, and `exact_products()`
keeps it out.

Outer scales are constant along K here, so they join the FP32 scales of rows. The ends of the groups stay on the device:
torch's kernel makes each group's problem there. It leaves rows after the last end as they were in memory, which are set
to zero behind it. Memory beside the result: one byte for each element of both operands.

The gradient of the weights, whose contraction runs along the tokens, does not go this way: torch's function for it
stops the device at a group without tokens, and scales would be needed for each column of each group.
"""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, scaled_grouped_mm  # type: ignore[attr-defined]  # its stubs lack it

from microscale.dispatch import Operand, Problem, Requires, kernel
from microscale.kernels.cublas.rows_e4m3 import BOUND, HOPPER, MULTIPLE, _rows, _takes, is_aligned
from microscale.kernels.reference.matmul import Operand as Value
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton.rows_after import zero_rows_after
from microscale.numerics import layout

# Where it pays, on an H200. Encoding a weight anew takes 0.36 ps for 4 bits and 0.48 for 8, whatever tokens there are:
# with 512 tokens for each of 8 experts of 14336 x 4096, 0.65 ms instead of 0.75 for mxfp4 and 0.69 instead of 0.71 for
# mxfp8. But with 1024 tokens for each of 128 experts of 1536 x 2048 the products of a training step took 1.7 times as
# long as by `triton.grouped_wgmma`; why was not looked for.
MANY = 512  # tokens for each expert; both numbers are rounded up to powers of two, by which selections are cached
LARGE = 4096  # rows and columns of a matrix, rounded up likewise
MOST_EXPERTS = 512  # torch takes up to 1023; the power of two below


def blocked_along_k(problem: Problem) -> bool:
    """Return True for tokens [T, K] and matrices [E, K, N] that are both stored in blocks along the contraction."""
    first, second = problem.operands
    return _is_blocked(first, -1, 2) and _is_blocked(second, -2, 3)


def _is_blocked(operand: Operand, axis: int, dims: int) -> bool:
    return operand.format is not None and operand.axis == axis and len(operand.shape) == dims


def is_ready(problem: Problem) -> bool:
    """Return True for matrices that lie as rows of E4M3 already, which nothing is read for beforehand."""
    weight = problem.operands[1]
    return weight.layout == layout.STRIDED and is_aligned(weight.format, weight.one_block)


def many_tokens(problem: Problem) -> bool:
    """Return True if there are MANY tokens for each expert, both numbers rounded up to powers of two; or `is_ready`.

    Of prepared experts twice as many: the other kernel for these is as fast with as many.
    """
    if is_ready(problem):
        return True
    tokens, experts = (max(o.shape[0] - 1, 0).bit_length() for o in problem.operands)
    prepared = problem.operands[1].layout == layout.FRAGMENTS
    return tokens - experts >= MANY.bit_length() - 1 + prepared


def large_matrices(problem: Problem) -> bool:
    """Return True if the experts' matrices have LARGE rows and columns, both rounded up to powers of two."""
    return all((n - 1).bit_length() >= (LARGE - 1).bit_length() for n in problem.operands[1].shape[-2:])


@kernel(
    "grouped_matmul", "cublas.grouped_rows_e4m3", priority=40, native=("cuda",), exact=False, bound=BOUND,
    requires=Requires(
        devices=("cuda",), min_capability=HOPPER, max_capability=HOPPER, packages=("triton",),
        layouts=(*layout.LAYOUTS, layout.FRAGMENTS),
        checks=(
            ("needs tokens and one matrix for each expert, both block-scaled along the contraction", blocked_along_k),
            ("needs float elements of 4, 6 or 8 bits that E4M3 can hold, and exponent scales or one scale for each row",
             lambda p: all(map(_takes, p.operands))),
            ("needs rows that E4M3 holds exactly, and `prepare` found that this weight has others",
             lambda p: all(o.exact_rows is not False for o in p.operands)),
            ("needs bfloat16 output", lambda p: p.out_dtype == "bfloat16"),
            (f"needs columns in multiples of {MULTIPLE}", lambda p: p.operands[1].shape[-1] % MULTIPLE == 0),
            (f"needs at most {MOST_EXPERTS} experts", lambda p: 0 < p.operands[1].shape[0] <= MOST_EXPERTS),
            (f"needs matrices of more than {LARGE // 2} by {LARGE // 2}, or it is slower", large_matrices),
            (f"needs {MANY} tokens for each expert, twice as many if prepared, or rows that lie ready, or it is slower",
             many_tokens),
        ),
    ),
)  # fmt: skip
def grouped_matmul(a: Value, b: Value, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N], bfloat16; how near: `rows_e4m3`.

    Arguments as `reference.grouped_matmul`.
    """
    assert isinstance(a, Parts) and isinstance(b, Parts)
    tokens, (experts, _, columns) = a.qdata.shape[0], b.qdata.shape
    if not (tokens and experts and columns and a.size):
        return torch.zeros(tokens, columns, dtype=out_dtype, device=a.qdata.device)
    codes, scale = _rows(a, a.qdata, a.scale, a.outer_scale)
    turned = b.outer_scale.mT if b.outer_scale is not None and b.outer_scale.dim() else b.outer_scale
    b_codes, b_scale = _rows(b, b.qdata.mT, b.scale if b.layout == layout.SWIZZLED else b.scale.mT, turned)
    offsets = offsets.contiguous()  # torch reads it as if it were
    out = scaled_grouped_mm(
        codes, b_codes.mT, scale.reshape(tokens).contiguous(), ScalingType.RowWise,
        b_scale.reshape(experts, columns).contiguous(), ScalingType.RowWise,
        offs=offsets, output_dtype=out_dtype, use_fast_accum=False,
    )  # fmt: skip
    zero_rows_after(out, offsets)
    return out
