"""Two block-scaled operands on Blackwell, which multiplies blocks and their scales itself: `torch...F.scaled_mm`.

    E4M3 with E8M0 per 32      cuBLASLt, sm_100 and later
    E2M1 with E8M0 per 32      CUTLASS inside torch, compute capability 10.x only; it has no bias
    E2M1 with E4M3 per 16      cuBLASLt, sm_100 and later; both outer scales are one factor of the FP32 sums

What the call wants: codes as torch's FP8 and FP4 dtypes, `a` row-major and `b` column-major, K in multiples of 32 and N
of 16, scales swizzled and contiguous, bfloat16 out and bias. Scales in layout strided are swizzled on every call: store
them swizzled (`to_layout`). Compiled nowhere and run nowhere by this project's machines: what is tested is that calls
keep the contract.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from microscale.dispatch import Problem, Requires, kernel
from microscale.errors import InputError
from microscale.kernels.cublas.rows_e4m3 import MULTIPLE, blocked_along_k, epilogue_takes
from microscale.kernels.reference.matmul import Operand as Value
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import properties
from microscale.numerics import layout
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

BLACKWELL = (10, 0)
DEPTH = 32  # of which K is a multiple


class Recipe(NamedTuple):
    """How torch names a format: dtypes of codes and scales, and the blocks."""

    codes: torch.dtype
    scales: torch.dtype
    blocks: ScalingType

    @property
    def in_torch(self) -> bool:
        """True for the one product that torch brings itself, without a bias and for compute capability 10.x only."""
        return self.codes == torch.float4_e2m1fn_x2 and self.scales == torch.float8_e8m0fnu


def _is_e4m3(element: ElementSpec) -> bool:
    return properties.is_fp8(element) and element.mantissa == 3 and element.subnormals


def _is_e8m0(scale: ElementSpec) -> bool:
    return scale.exponent_only and scale.width == 8 and scale.bias == 127 and scale.nan == "all_ones"


def recipe_of(fmt: FormatSpec | None) -> Recipe | None:
    """Return what torch calls a format, or None if it has no name for it."""
    if fmt is None:
        return None
    codes = torch.float4_e2m1fn_x2 if properties.is_e2m1(fmt.element) else None
    codes = torch.float8_e4m3fn if _is_e4m3(fmt.element) else codes
    if codes is None:
        return None
    if _is_e8m0(fmt.scale) and fmt.block == 32:
        return Recipe(codes, torch.float8_e8m0fnu, ScalingType.BlockWise1x32)
    if _is_e4m3(fmt.scale) and fmt.block == 16 and codes == torch.float4_e2m1fn_x2:
        return Recipe(codes, torch.float8_e4m3fn, ScalingType.BlockWise1x16)
    return None


def _one_recipe(problem: Problem) -> bool:
    first, second = (recipe_of(o.format) for o in problem.operands)
    return first is not None and first == second


def _backend_is_here(problem: Problem) -> bool:
    found = recipe_of(problem.operands[0].format)
    return found is None or not found.in_torch or (problem.capability or BLACKWELL)[0] == BLACKWELL[0]


def _adds_bias(problem: Problem) -> bool:
    found = recipe_of(problem.operands[0].format)
    return epilogue_takes(problem.bias) and (problem.bias is None or found is None or not found.in_torch)


@kernel(
    "matmul", "cublas.scaled_mm", priority=40, native=("cuda",),
    bound="exact products of codes and scales, summed in FP32 by tensor cores; one rounding",
    requires=Requires(
        devices=("cuda",), min_capability=BLACKWELL, layouts=(layout.STRIDED, layout.SWIZZLED),
        checks=(
            ("needs both operands block-scaled along the contraction, the second one matrix", blocked_along_k),
            ("needs two operands alike: E4M3 or E2M1 with E8M0 per 32, or E2M1 with E4M3 per 16", _one_recipe),
            ("needs outer scales of the whole tensor, or none",
             lambda p: all(o.outer in (None, "scalar") for o in p.operands)),
            ("needs compute capability 10.x for E2M1 with E8M0", _backend_is_here),
            ("needs bfloat16 output", lambda p: p.out_dtype == "bfloat16"),
            (f"needs K in multiples of {DEPTH} and N of {MULTIPLE}",
             lambda p: p.operands[1].shape[-2] % DEPTH == 0 and p.operands[1].shape[-1] % MULTIPLE == 0),
            ("needs no bias (E2M1 with E8M0), or one bfloat16 number a column", _adds_bias),
        ),
    ),
)  # fmt: skip
def matmul(a: Value, b: Value, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias, bfloat16. Raises InputError for a bias that cannot be added in FP32."""
    assert isinstance(a, Parts) and isinstance(b, Parts)
    shape = (*a.qdata.shape[:-1], b.qdata.shape[-1])
    recipe = recipe_of(a.format)
    assert recipe is not None
    if not (math.prod(shape) and a.size):
        empty = torch.zeros(shape, dtype=out_dtype, device=a.qdata.device)
        return empty if bias is None else (empty + bias).to(out_dtype)
    joins = bias is None or (bias.dtype == torch.bfloat16 and bias.shape == shape[-1:])
    if bias is not None and (recipe.in_torch or not joins):
        hint = "add it to the product, or multiply under microscale.use_backend('triton')"
        raise InputError(f"scaled_mm cannot add a bias {list(bias.shape)} of {bias.dtype} to this product", hint)
    outers = [a.outer_scale, b.outer_scale]
    levels = 1 if outers == [None, None] else 2
    scales = [_scales(part, blob, recipe, levels) for part, blob in ((a, _blob_a(a)), (b, _blob_b(b)))]
    recipes = [recipe.blocks, ScalingType.TensorWise][:levels]
    swizzles = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE][:levels]
    first = _dense(a.qdata.reshape(-1, a.qdata.shape[-1])).view(recipe.codes)
    second = _dense(b.qdata.mT).view(recipe.codes).t()
    out = scaled_mm(
        first, second, scales[0], recipes, scales[1], recipes, swizzles, swizzles,
        bias=None if bias is None else bias.contiguous(), output_dtype=out_dtype,
    )  # fmt: skip
    return out.reshape(shape)


def _dense(codes: torch.Tensor) -> torch.Tensor:
    """Codes, contiguous and on 16 bytes."""
    dense = codes.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


def _blob_a(a: Parts) -> torch.Tensor:
    """The swizzled scales of the rows of all matrices, one after the other."""
    lead, rows = a.qdata.shape[:-2], a.qdata.shape[-2]
    if a.layout == layout.SWIZZLED:
        if math.prod(lead) == 1 or rows % layout.TILE_ROWS == 0:  # tiles of rows follow each other
            return a.scale.reshape(-1)
        scale = layout.unswizzle(a.scale, rows, a.size // a.format.block)
    else:
        scale = a.scale
    return layout.swizzle(scale.reshape(-1, scale.shape[-1]))


def _blob_b(b: Parts) -> torch.Tensor:
    return b.scale.reshape(-1) if b.layout == layout.SWIZZLED else layout.swizzle(b.scale.mT)


def _scales(part: Parts, blob: torch.Tensor, recipe: Recipe, levels: int) -> list[torch.Tensor]:
    """The scales of one operand, level by level; an outer scale that only the other one has is 1 here."""
    dense = blob.contiguous()
    inner = (dense if dense.data_ptr() % 16 == 0 else dense.clone()).view(recipe.scales)
    if levels == 1:
        return [inner]
    outer = part.outer_scale
    return [inner, torch.ones((), device=blob.device) if outer is None else outer.reshape(())]
