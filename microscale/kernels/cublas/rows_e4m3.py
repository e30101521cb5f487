"""Two MX operands on the FP8 tensor cores of sm_89 and sm_90, which know no block scales: rows with one exponent each.

Every row of `a` and every column of `b` becomes E4M3 codes times one power of two (`align_rows`), and cuBLAS (CUTLASS
below sm_90) multiplies those, with the two powers on its FP32 sums. A row of E4M3 codes that is one block, as FP8 with
a scale per token is, has that form already and is multiplied as it lies; its FP32 scale is one more factor of the sums.
A prepared weight becomes the same codes and powers from the order it lies in.
What differs from the exact product:

operands  An element that ends up below 2**-6 of its row's power of two s loses bits, at most 2**-10 s; s itself is at
          most 2**-7 of the largest number that the row's top block can hold. E2M1 loses nothing while the exponents of
          a row's blocks span at most 14. The sum over K is off by no more than
          2**-10 (s_a sum |b| + s_b sum |a|) + 2**-20 K s_a s_b, about 1e-5 of sum |a| |b| where rows are alike.
          `microscale.prepare` looks whether all rows of a weight of 4 or 6 bits are exact, and this kernel refuses one
          that it found is not. One that nobody looked at is taken.
sums      FP8 tensor cores keep some 13 bits below the largest of 32 products and the sum so far and cut off the rest,
          whoever calls them; every 128 along K what they have goes into FP32 sums (`use_fast_accum=False`). That is
          below the rounding to bfloat16 which follows, but not below FP32's.

So the kernel is not exact, and `exact_products()` keeps it out. Memory beside the result: one byte for each element of
both operands and, for a bias that the epilogue does not take, an FP32 product.
"""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, scaled_mm

from microscale.dispatch import Operand, Problem, Requires, kernel
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.reference.matmul import Operand as Value
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import properties
from microscale.kernels.triton.align_rows import align_rows
from microscale.numerics import codec, layout
from microscale.spec.format import FormatSpec

MULTIPLE = 16  # of N, as of K, which align_rows pads
ADA, HOPPER = (8, 9), (9, 0)


def blocked_along_k(problem: Problem) -> bool:
    """Return True if both operands are stored in blocks along the contraction, the second as one matrix."""
    first, second = problem.operands
    return first.format is not None and first.axis == -1 and is_weight(second)


def is_weight(operand: Operand) -> bool:
    """Return True for one block-scaled matrix [K, N] in blocks along K."""
    return operand.format is not None and operand.axis == -2 and len(operand.shape) == 2


BOUND = (
    "operands to 2**-10 of a power of two per row (1e-5 of an MX product; E2M1 exact while a row's exponents span 14), "
    "summed by FP8 tensor cores: 13 bits in steps of 32, FP32 every 128; one rounding"
)


def is_aligned(fmt: FormatSpec | None, one_block: bool) -> bool:
    """Return True for an operand whose rows are E4M3 codes under one power of two as they are stored."""
    if fmt is None or not one_block:
        return False
    element, scale = fmt.element, fmt.scale
    e4m3 = properties.is_fp8(element) and element.mantissa == reference.TARGET.mantissa and element.subnormals
    return e4m3 and scale.exponent_only and scale.width == 8


def _takes(operand: Operand) -> bool:
    if operand.one_block and operand.layout == layout.FRAGMENTS:  # its codes, in this order, are no rows
        return False
    aligned = operand.layout == layout.STRIDED and is_aligned(operand.format, operand.one_block)
    return (aligned or reference.fits(operand.format)) and operand.outer in (None, "scalar", "vector")


def _gives(problem: Problem) -> bool:
    """Whether the result is bfloat16; or FP32 that becomes bfloat16, which CUTLASS does not write."""
    at_last = problem.rounded == "bfloat16" and (problem.capability or ADA) >= HOPPER
    return problem.out_dtype == "bfloat16" or at_last


def epilogue_takes(bias: Operand | None) -> bool:
    """Return True if a bias (None: none is known of) is one bfloat16 number a column, which the epilogue adds."""
    return bias is None or (bias.dtype == "bfloat16" and len(bias.shape) == 1 and bias.shape[0] != 1)


@kernel(
    "matmul", "cublas.rows_e4m3", priority=30, native=("cuda",), exact=False, bound=BOUND,
    requires=Requires(
        devices=("cuda",), min_capability=ADA, max_capability=HOPPER, packages=("triton",),
        layouts=(*layout.LAYOUTS, layout.FRAGMENTS),
        checks=(
            ("needs both operands block-scaled along the contraction, the second one matrix", blocked_along_k),
            ("needs float elements of 4, 6 or 8 bits that E4M3 can hold, and exponent scales or one scale for each row",
             lambda p: all(map(_takes, p.operands))),
            ("needs rows that E4M3 holds exactly, and `prepare` found that this weight has others",
             lambda p: all(o.exact_rows is not False for o in p.operands)),
            ("needs bfloat16 output", _gives),
            (f"needs columns in multiples of {MULTIPLE}", lambda p: p.operands[1].shape[-1] % MULTIPLE == 0),
            ("needs a bias of one bfloat16 number a column, or none", lambda p: epilogue_takes(p.bias)),
        ),
    ),
)  # fmt: skip
def matmul(a: Value, b: Value, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias, bfloat16 (or FP32 that will be rounded to it); how near: the module."""
    assert isinstance(a, Parts) and isinstance(b, Parts)
    shape = (*a.qdata.shape[:-1], b.qdata.shape[-1])
    if not (torch.Size(shape).numel() and a.size):
        empty = torch.zeros(shape, dtype=out_dtype, device=a.qdata.device)
        return empty if bias is None else (empty + bias).to(out_dtype)
    codes, scale = _rows(a, a.qdata, a.scale, a.outer_scale)
    turned = b.outer_scale.mT if b.outer_scale is not None and b.outer_scale.dim() else b.outer_scale
    b_codes, b_row_scale = _rows(b, b.qdata.mT, b.scale if b.layout == layout.SWIZZLED else b.scale.mT, turned)
    joins = bias is not None and bias.dtype == out_dtype == torch.bfloat16 and bias.shape == shape[-1:]
    out = scaled_mm(
        codes.reshape(-1, codes.shape[-1]), b_codes.t(), scale.reshape(-1, 1), ScalingType.RowWise,
        b_row_scale.reshape(1, -1), ScalingType.RowWise, bias=bias if joins else None,
        output_dtype=out_dtype if joins or bias is None else torch.float32, use_fast_accum=False,
    ).reshape(shape)  # fmt: skip
    return out if joins or bias is None else (out + bias).to(out_dtype)


def _rows(
    part: Parts, qdata: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., R, K padded] and FP32 [..., R, 1] of an operand, given with its blocks along the last dimension."""
    if is_aligned(part.format, part.size <= part.format.block) and part.layout == layout.STRIDED:
        dense = qdata[..., : part.size]
        dense = torch.nn.functional.pad(dense, (0, extra)) if (extra := -part.size % MULTIPLE) else dense.contiguous()
        dense = dense.clone() if dense.data_ptr() % MULTIPLE else dense
        codes = dense.view(torch.float8_e4m3fn)
        if part.unit and outer is not None:
            return codes, outer
        powers = codec.decode(scale, part.format.scale)
    else:
        codes, powers = align_rows(qdata, scale, part.format, part.size, part.layout)
    return codes, powers if outer is None else powers * outer
