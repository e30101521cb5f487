"""Triton dequantize: two kernels for every format and layout; see `jit_dequantize.py`.

Bytes for a 4-bit format to bf16: 0.5 + 1/block + 2 per element, read and written once. Which kernel serves a call, and
everything else that does not depend on addresses, is a plan, made once for a shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.numerics import codec, layout
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

# Dense rows of whole blocks: each of 128 threads takes four runs of eight codes, 128 apart.
RUN = 8
THREADS, RUNS = 128, 4
# Everything else: lanes of a program, few enough registers to hold the tile.
LANES, LANE_WARPS = 2048, 2
LANES_OF_WARP, MOST_WARPS = 2048, 32  # where one block is more than a program's lanes: 64 values a thread

NONE, SCALAR, BY_ROW, BY_BLOCK = range(4)  # outer scales
FLOAT, INTEGER, CODEBOOK, HALF_FLOAT, HALF_INTEGER = range(5)  # what a run of codes is decoded as
ANY_ROWS, WHOLE_ROWS, PARTS_OF_ROWS = range(3)  # how programs lie in rows: unimportant, each in one, across several
IDLE = 1.25  # threads for each that is needed, so that programs lie in one row


@kernel(
    "dequantize",
    "triton.dequantize",
    priority=10,
    requires=Requires(
        devices=("cuda",),
        packages=("triton",),
        layouts=layout.LAYOUTS,
        checks=(("needs an E8M0-like or FP32 scale, or subnormals", lambda p: _fits(p.operands[0].format)),),
    ),
)
def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    fmt: FormatSpec,
    columns: int,
    scale_layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return values [..., R, columns]; arguments as `reference.dequantize`."""
    shape = qdata.shape[:-1]
    out = torch.empty((*shape, columns), dtype=out_dtype, device=qdata.device)
    if not out.numel():
        return out
    dense, scale = qdata.contiguous(), scale.contiguous()
    outer, kind = _outer(outer_scale, shape, scale)
    plan = _plan(fmt, shape, columns, scale_layout, kind, dense.data_ptr() % 4 == 0)
    table = codec.decode_table(fmt.element, qdata.device) if fmt.element.kind == "codebook" else scale
    launch(plan.kernel, plan.grid, (dense, scale, outer, table, out, *plan.sizes), plan.constants, plan.warps)
    return out


def _fits(fmt: FormatSpec | None) -> bool:
    if fmt is None or not (fmt.element.kind != "float" or fmt.element.subnormals):
        return False
    scale = fmt.scale
    return scale.exponent_only or scale.torch_dtype == "float32" or (scale.width <= 8 and scale.subnormals)


def _outer(outer: torch.Tensor | None, shape: tuple[int, ...], scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The outer scale as a dense array, and what there is one of; without one, a placeholder."""
    if outer is None:
        return scale, NONE
    if outer.numel() == 1:
        return outer, SCALAR
    width = outer.shape[-1]
    dense = outer.expand(*shape, width).reshape(-1, width).contiguous()
    return dense, BY_ROW if width == 1 else BY_BLOCK


# -- plans -------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a call is served: a jitted kernel, its grid, ints and constants. The same constants are the same object."""

    kernel: Any
    grid: int
    sizes: tuple[int, ...]
    constants: Mapping[str, Any]
    warps: int


@functools.lru_cache(maxsize=1024)
def _plan(fmt: FormatSpec, shape: tuple[int, ...], columns: int, scale_layout: str, outer: int, aligned: bool) -> Plan:
    """The plan for codes of `shape` rows. `aligned`: they start at a multiple of four bytes."""
    blocks, swizzle = -(-columns // fmt.block), scale_layout == layout.SWIZZLED
    rows, total = shape[-1] if shape else 1, math.prod(shape) * blocks
    scales = total // (rows * blocks) * math.prod(layout.padded(rows, blocks)) if swizzle else total
    if aligned and columns % fmt.block == 0 and scales < 2**31:
        made = _plan_of_runs(fmt, total, rows, blocks, swizzle, outer)
        if made is not None:
            return made
    lanes = properties.power_of_two_at_least(fmt.block)
    per_program = max(1, LANES // lanes)
    flat = columns % fmt.block == 0 and lanes == fmt.block
    wide = max((total + per_program) * lanes, scales) >= 2**31
    by_block = int(outer == BY_BLOCK)
    sizes = (total, rows, columns, blocks, blocks if by_block else 1, by_block)
    constants = row_constants(fmt, swizzle, min(outer, BY_ROW), flat, wide)
    warps = min(MOST_WARPS, max(LANE_WARPS, lanes // LANES_OF_WARP))
    return Plan(_jit().dequantize_rows, -(-total // per_program), sizes, constants, warps)


def _plan_of_runs(fmt: FormatSpec, total: int, rows: int, blocks: int, swizzle: bool, outer: int) -> Plan | None:
    """The plan for dense rows of whole blocks; None for what `dequantize_runs` does not do."""
    per_block, span = fmt.block // RUN, THREADS * RUNS  # runs of a block and of a program
    runs, row = total * per_block, blocks * per_block
    if not _has_runs(fmt) or runs >= 2**31 or outer == BY_BLOCK:
        return None
    way, even, grid = ANY_ROWS, runs % span == 0, -(-runs // span)
    matrices = swizzle and total != rows * blocks
    if swizzle or outer == BY_ROW:
        chunks = -(-row // span)
        if span % (per_block * layout.TILE_COLUMNS) == 0 and chunks * span <= IDLE * row:
            way, even, grid = WHOLE_ROWS, row % span == 0, runs // row * chunks
        elif span % per_block == 0 and row + span < 2**20 and not (matrices and rows * row < span):
            way = PARTS_OF_ROWS
        else:
            return None
    constants = run_constants(fmt, even, way, matrices, swizzle, outer)
    return Plan(_jit().dequantize_runs, grid, (runs, rows, blocks), constants, THREADS // 32)


def _has_runs(fmt: FormatSpec) -> bool:
    """Whether `dequantize_runs` decodes a format: a program takes whole blocks, or blocks whole programs."""
    element, per_block = fmt.element, fmt.block // RUN
    if fmt.block % RUN or per_block & (per_block - 1):
        return False
    if element.kind == "codebook":
        return element.width == 4
    # a run of 6-bit codes is a word and a half, so that an odd number of them would end inside a word
    return element.width in (4, 8) or (element.width == 6 and per_block > 1)


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_dequantize

    return jit_dequantize


# -- constexpr arguments -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def row_constants(fmt: FormatSpec, swizzle: bool, outer: int, flat: bool, wide: bool) -> Mapping[str, Any]:
    """Return the constexpr arguments of `dequantize_rows`."""
    lanes = properties.power_of_two_at_least(fmt.block)
    return {
        **_format_constants(fmt), "BLOCKS": max(1, LANES // lanes), "BLOCK_P2": lanes, "OUTER": outer,
        "SWIZZLE": swizzle, "FLAT": flat, "WIDE": wide, "INTERPRETED": properties.interpreted(),
    }  # fmt: skip


@functools.lru_cache(maxsize=1024)
def run_constants(
    fmt: FormatSpec, even: bool, way: int, matrices: bool, swizzle: bool, outer: int
) -> Mapping[str, Any]:
    """Return the constexpr arguments of `dequantize_runs`."""
    unused = ("BLOCK_BYTES", "GROUP", "E_KIND", "E_LOWEST", "E_SIGNED")
    form, lift = _form(fmt.element), _lift(fmt.element)
    return {
        **{k: v for k, v in _format_constants(fmt).items() if k not in unused}, "E_FORM": form, "E_LIFT": lift,
        "FOLD": form != HALF_INTEGER and _folds(fmt.scale, lift), "T": THREADS, "RUNS": RUNS, "EVEN": even,
        "ROWS": way, "MATRICES": matrices, "OUTER": outer, "SWIZZLE": swizzle,
        "INTERPRETED": properties.interpreted(),
    }  # fmt: skip


def _format_constants(fmt: FormatSpec) -> dict[str, Any]:
    made = properties.dequantize_constants(fmt)
    for prefix, element in (("E_", fmt.element), ("S_", fmt.scale)):
        if element.nan == "ieee" and not element.inf:
            made[f"{prefix}NAN"] = 1  # all of the top exponent is NaN
    return made


HALF_BIAS, FP32_BIAS = 15, 127


def _form(element: ElementSpec) -> int:
    """What a run is decoded as; the HALF forms where the codes of two elements are exact as f16 in one word."""
    narrow = element.width in (4, 8)
    if element.kind == "codebook":
        return CODEBOOK
    if element.kind == "int":
        return HALF_INTEGER if narrow and (element.fraction or 0) < HALF_BIAS else INTEGER
    exponent, bias, nan = element.exponent or 0, element.bias or 0, element.nan
    if exponent == 5:
        same = bias == HALF_BIAS and nan == "ieee" and element.inf
    else:  # f16 has more exponents, so the bias may differ, but no NaN among them except where one is made
        same = exponent < 5 and 0 <= bias <= HALF_BIAS and (nan == "none" or (exponent == 4 and nan == "all_ones"))
    return HALF_FLOAT if narrow and same else FLOAT


def _lift(element: ElementSpec) -> int:
    """The power of two that a run's codes are short of, as they stand in f16 or FP32."""
    if element.kind != "float":
        return -(element.fraction or 0)
    return (HALF_BIAS if _form(element) == HALF_FLOAT else FP32_BIAS) - (element.bias or 0)


def _folds(scale: ElementSpec, lift: int) -> bool:
    """Whether every scale times 2**lift is an FP32 number, so that it may be lifted in the place of eight codes."""
    if lift == 0:
        return True
    if scale.width > 8:
        return False
    lifted = [abs(value) * 2.0**lift for value in scale.table if abs(value) < 2.0**128]
    return all(value < 2.0**128 and properties.fp32(value) == value for value in lifted)
