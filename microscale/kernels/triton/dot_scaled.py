"""Two block-scaled operands on Blackwell by Triton's `dot_scaled`: the pairs for which `cublas.scaled_mm` has no name.

E4M3, E5M2 and E2M1 elements in any pair with E8M0 scales per 32, and E2M1 with E4M3 scales per 16, whose sign the
instructions do not read (no scale of a quantizer is negative); outer scales of
tensors and of rows, any bias and output dtype, all in FP32 before the one rounding. What the instructions are is the
compiler's choice: `tcgen05.mma` with block scales on sm_100 and sm_103; on sm_120 `mma.sync` with block scales where
both elements have one width, and multiplication in bfloat16, which holds these products' operands exactly, where
E4M3 meets E2M1. Compiled for all three, run on none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference.matmul import Operand, Parts
from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

BLACKWELL = (10, 0)
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 128, 128, 128
GROUP = 8  # tiles of rows whose operands stay in the cache together
WARPS = 4
DEPTH = 32  # of which K is a multiple
NONE, SCALAR, BY_ROW = range(3)  # outer scales


def element_name(element: ElementSpec) -> str | None:
    """Return what `tl.dot_scaled` calls an element, or None if it does not know it."""
    if properties.is_e2m1(element):
        return "e2m1"
    if properties.is_fp8(element) and element.subnormals:
        return "e4m3" if element.mantissa == 3 else "e5m2"
    return None


def scale_kind(fmt: FormatSpec) -> str | None:
    """Return which scales of `tl.dot_scaled` a format's are: "e8m0" per 32, "e4m3" per 16, or None."""
    scale = fmt.scale
    if scale.exponent_only and (scale.width, scale.bias, scale.nan, fmt.block) == (8, 127, "all_ones", 32):
        return "e8m0"
    if element_name(scale) == "e4m3" and fmt.block == 16 and element_name(fmt.element) == "e2m1":
        return "e4m3"
    return None


def _known(problem: Problem) -> bool:
    formats = [o.format for o in problem.operands]
    if any(f is None or element_name(f.element) is None for f in formats):
        return False
    kinds = {scale_kind(f) for f in formats if f is not None}
    return len(kinds) == 1 and None not in kinds


def _blocked_along_k(problem: Problem) -> bool:
    first, second = problem.operands
    return first.axis == -1 and second.axis == -2 and len(second.shape) == 2


@kernel(
    "matmul", "triton.dot_scaled", priority=35, native=("cuda",),
    bound="exact products of codes and scales, summed in FP32 by tensor cores; one rounding",
    requires=Requires(
        devices=("cuda",), min_capability=BLACKWELL, packages=("triton",),
        layouts=(layout.STRIDED, layout.SWIZZLED),
        checks=(
            ("needs two operands of E4M3, E5M2 or E2M1 with E8M0 per 32, or of E2M1 with E4M3 per 16", _known),
            ("needs both blocked along the contraction, the second one matrix", _blocked_along_k),
            ("needs outer scales of tensors or rows, or none",
             lambda p: all(o.outer in (None, "scalar", "vector") for o in p.operands)),
            (f"needs K in multiples of {DEPTH}", lambda p: p.operands[1].shape[-2] % DEPTH == 0),
        ),
    ),
)  # fmt: skip
def matmul(a: Operand, b: Operand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias, rounded once from FP32."""
    assert isinstance(a, Parts) and isinstance(b, Parts)
    shape = (*a.qdata.shape[:-1], b.qdata.shape[-1])
    out = torch.empty(shape, dtype=out_dtype, device=a.qdata.device)
    if not out.numel():
        return out
    m, n = math.prod(shape[:-1]), shape[-1]
    a_codes, b_codes = a.qdata.reshape(m, -1).contiguous(), b.qdata.mT.contiguous()
    a_scales, a_swizzle = _scales(a)
    b_scales = (b.scale if b.layout == layout.SWIZZLED else b.scale.mT).contiguous()
    a_outer, a_kind = _outer(a.outer_scale, shape[:-1])
    turned = b.outer_scale if b.outer_scale is None or b.outer_scale.dim() < 2 else b.outer_scale.mT
    b_outer, b_kind = _outer(turned, (n,))
    strides = (0, 0)
    if bias is not None:
        bias = bias.expand(shape).reshape(m, n) if bias.dim() > 1 else bias.expand(m, n)
        strides = (bias.stride(0), bias.stride(1))
    constants = constants_of(
        a.format, b.format, (a_swizzle, b.layout == layout.SWIZZLED), (a_kind, b_kind), bias is not None
    )
    blocks = -(-a.size // a.format.block)
    held = [x if x is not None else a_scales for x in (a_outer, b_outer, bias)]
    args = (a_codes, a_scales, held[0], b_codes, b_scales, held[1], held[2], out, m, n, blocks,
            a_codes.shape[1], b_codes.shape[1], *strides)  # fmt: skip
    grid = -(-m // TILE_ROWS) * -(-n // TILE_COLUMNS)
    launch(_jit().dot_scaled, grid, args, constants, WARPS)
    return out


def _scales(a: Parts) -> tuple[torch.Tensor, bool]:
    """The scales of all rows of `a`, and whether they are one swizzled matrix."""
    lead, rows = a.qdata.shape[:-2], a.qdata.shape[-2]
    if a.layout != layout.SWIZZLED:
        return a.scale.contiguous(), False
    if math.prod(lead) == 1 or rows % layout.TILE_ROWS == 0:
        return a.scale.contiguous(), True
    return layout.unswizzle(a.scale, rows, -(-a.size // a.format.block)), False


def _outer(outer: torch.Tensor | None, rows: tuple[int, ...]) -> tuple[torch.Tensor | None, int]:
    """The outer scale as one number, or one for each row."""
    if outer is None:
        return None, NONE
    if outer.numel() == 1:
        return outer, SCALAR
    return outer.expand(*rows, 1).reshape(-1).contiguous(), BY_ROW


@functools.lru_cache(maxsize=1024)
def constants_of(
    a: FormatSpec, b: FormatSpec, swizzles: tuple[bool, bool], outers: tuple[int, int], bias: bool
) -> Mapping[str, Any]:
    """Return the constexpr arguments for two formats; one object for the same ones."""
    made: dict[str, Any] = {
        "BM": TILE_ROWS, "BN": TILE_COLUMNS, "BK": TILE_DEPTH, "GROUP": GROUP, "BLOCK": a.block,
        "E8M0": scale_kind(a) == "e8m0", "BIAS": bias, "INTERPRETED": properties.interpreted(),
    }  # fmt: skip
    for side, fmt, swizzle, outer in zip("AB", (a, b), swizzles, outers, strict=True):
        ours = properties.element_constants(f"{side}_", fmt.element)
        made |= {f"{side}_{name}": ours[f"{side}_{name}"] for name in ("WIDTH", "MANTISSA", "LOWEST", "NAN", "TOP")}
        made |= {side: element_name(fmt.element), f"{side}_SWIZZLE": swizzle, f"{side}_OUTER": outer}
    return made


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_dot_scaled

    return jit_dot_scaled
