"""A stand-in for `torch.nn.functional.scaled_grouped_mm`, row-wise, 2D x 3D, that refuses what the CUDA one refuses.

What it enforces was read in torch's sources (GroupedBlas.cpp, GroupedMMUtils.h, ScaledGroupMM.cu, GroupMMCommon.cuh):
dtypes, shapes, strides and addresses of the matrices, scales' dtypes, ranks, contiguity and counts, offsets, what it
lacks (a bias, other outputs), and how many groups there may be. What is after the last group is left as memory was: NaN
here. The product is FP64 over the decoded operands, rounded to FP32 before the scales and once more to the output.
"""

import dataclasses

import torch
from torch.nn.functional import ScalingType

from microscale.numerics import codec
from tests.kernels.scaled_mm_double import E4M3, ContractError, need, tuple_of

__all__ = ["ContractError", "GroupedDouble"]


def is_transposed(t):
    """`check_valid_strides_and_return_transposed` of a matrix of bytes, or of several."""
    need(t.data_ptr() % 16 == 0, "matrices start on 16 bytes")
    (rows, columns), (row, column) = t.shape[-2:], t.stride()[-2:]
    if row == 1 and column >= max(1, rows):
        need(column % 16 == 0, "strides are multiples of 16 bytes")
        return True
    need(column == 1 and row >= max(1, columns), f"strides {t.stride()} of {tuple(t.shape)}")
    need(row % 16 == 0, "strides are multiples of 16 bytes")
    return False


@dataclasses.dataclass
class GroupedDouble:
    """`double(...)` is the call; `calls` the shapes of the left operand, the right one and the offsets."""

    calls: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def __call__(
        self, mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None,
        bias=None, offs=None, output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False,
    ):  # fmt: skip
        need(mat_a.dim() == 2 and mat_b.dim() == 3, "tokens and a matrix for each group")
        need(mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn, f"E4M3, not {mat_a.dtype} and {mat_b.dtype}")
        need(not is_transposed(mat_a) and is_transposed(mat_b), "a in rows, b in columns")
        (tokens, depth), (groups, depth_b, columns) = mat_a.shape, mat_b.shape
        need(depth == depth_b and depth % 16 == 0 and columns % 16 == 0, f"K {depth}, {depth_b}, N {columns}")
        need(groups < 1024, f"{groups} groups")
        need(offs.dim() == 1 and offs.dtype == torch.int32 and offs.shape[0] == groups, f"offsets {offs}")
        need(offs.is_contiguous() and offs.device == mat_a.device, "offsets are read as dense, where the matrices are")
        need(bias is None and output_dtype == torch.bfloat16, f"no bias, and bfloat16, not {output_dtype}")
        need(not contraction_dim and not use_fast_accum, "defaults, and FP32 sums every 128")
        need(not tuple_of(swizzle_a) and not tuple_of(swizzle_b), "scales of rows lie as they are")
        need(tuple_of(scale_recipe_a) == tuple_of(scale_recipe_b) == (ScalingType.RowWise,), "row-wise")
        need(scale_a.dtype == scale_b.dtype == torch.float32, "FP32 scales")
        need(scale_a.shape == (tokens,) and scale_a.is_contiguous(), f"scales {scale_a.shape} of rows")
        need(scale_b.shape == (groups, columns) and scale_b.stride(1) == 1, f"scales {scale_b.shape} of columns")
        self.calls.append((tokens, groups, columns))
        out = torch.full((tokens, columns), torch.nan, dtype=output_dtype)
        values_a = codec.decode(mat_a.view(torch.uint8), E4M3).double()
        values_b = codec.decode(mat_b.mT.contiguous().view(torch.uint8), E4M3).double()
        start = 0
        for group, stop in enumerate(offs.tolist()):
            need(start <= stop <= tokens, "ends rise and stay within the tokens")
            rows = slice(start, stop)
            sums = (values_a[rows] @ values_b[group].t()).float()
            out[rows] = (sums * scale_a[rows, None] * scale_b[group]).to(output_dtype)
            start = stop
        return out
