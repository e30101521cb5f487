"""Triton `align_rows`: an MX operand as E4M3 codes with one power of two per row; see `jit_align_rows.py`.

Bytes per element: those of the format read once and one written, 1.53 for a 4-bit element and 2.03 for an 8-bit one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import properties
from microscale.kernels.triton.align_fragments import align_fragments
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.format import FormatSpec

TILE = 2048  # elements of one load: 8 or 16 bytes a thread, so that a thread stores the 16 that it loaded
UNROLL = 4  # loads in flight
WARPS = 4
ENOUGH = 4096  # rows of programs that fill a GPU, so that each takes its rows whole, in
LOOPS = 64  # rounds at most
STEP = 1024  # scales of one look for the largest, but no more looks than
STEPS = 16
FIVE = 5  # exponent bits that only E5M2 has, among what is taken


def align_rows(
    qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec, columns: int, scale_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (float8_e4m3fn [..., R, columns padded to 16], FP32 [..., R, 1]); arguments as the reference's.

    Bit-equal to the reference. Formats are those that the reference's `fits` accepts; qdata and scale are made
    contiguous if they are not. What is in layout `fragments` is for `align_fragments.py`.
    """
    if scale_layout == layout.FRAGMENTS:
        return align_fragments(qdata, scale, fmt)
    shape = qdata.shape[:-1]
    width = -(-columns // reference.ALIGN) * reference.ALIGN
    codes = torch.empty((*shape, width), dtype=torch.uint8, device=qdata.device)
    row_scales = torch.empty((*shape, 1), dtype=torch.float32, device=qdata.device)
    total = row_scales.numel()
    if not columns:
        row_scales.fill_(2.0**reference.SMALLEST_ROW)
    elif total:
        rows = shape[-1] if shape else 1
        blocks = -(-columns // fmt.block)
        swizzle = scale_layout == layout.SWIZZLED
        grid, constants = plan(fmt, total, blocks, columns, swizzle)
        args = (_aligned(qdata), scale.contiguous(), codes, row_scales, total, rows, blocks, columns, width)
        launch(_jit().align_rows, grid, args, constants, WARPS)
    return codes.view(torch.float8_e4m3fn), row_scales


@functools.lru_cache(maxsize=1024)
def plan(fmt: FormatSpec, total: int, blocks: int, columns: int, swizzle: bool) -> tuple[int, Mapping[str, Any]]:
    """Return (programs, constexpr arguments) for `total` rows of `blocks` blocks."""
    tile = TILE // fmt.block
    per_row = min(tile, properties.power_of_two_at_least(blocks))
    rows, tiles = tile // per_row, -(-blocks // per_row)
    unroll = next((u for u in (4, 3, 2) if tiles % u == 0), min(UNROLL, tiles))  # full programs have no masks
    loops = -(-blocks // (per_row * unroll))
    if total // rows < ENOUGH or loops > LOOPS:
        loops = 1
    whole = per_row * unroll * loops
    ragged = columns != blocks * fmt.block or columns % reference.ALIGN != 0
    even = blocks % whole == 0 and total % rows == 0
    longest = max(STEP // rows, properties.power_of_two_at_least(-(-blocks // STEPS)))
    step = min(longest, properties.power_of_two_at_least(blocks))
    shape = (rows, per_row, unroll, loops, step, -(-blocks // step))
    return -(-total // rows) * -(-blocks // whole), constants_of(fmt, shape, even, ragged, swizzle)


@functools.lru_cache(maxsize=1024)
def constants_of(fmt: FormatSpec, tile: tuple[int, ...], even: bool, ragged: bool, swizzle: bool) -> Mapping[str, Any]:
    """Return the constexpr arguments; one object for the same ones. `tile`: ROWS to STEPS."""
    element, (rows, blocks, unroll, loops, step, steps) = fmt.element, tile
    ours = properties.element_constants("", element)
    return {
        "BLOCK": fmt.block, "ROWS": rows, "BLOCKS": blocks, "UNROLL": unroll, "LOOPS": loops,
        "STEP": step, "STEPS": steps, "EVEN": even, "RAGGED": ragged, "SWIZZLE": swizzle,
        "S_BIAS": fmt.scale.bias or 0, "S_NAN": fmt.scale.nan_code, "LIFT": reference.lift(element),
        "WIDTH": element.width, "MANTISSA": ours["MANTISSA"], "BIAS": element.bias or 0, "TOP": ours["TOP"],
        "FIVE": element.exponent == FIVE, "HAS_SPECIAL": element.has_nan or element.inf,
        "NATIVE": not properties.interpreted(),
    }  # fmt: skip


def _aligned(qdata: torch.Tensor) -> torch.Tensor:
    """qdata, dense and on 16 bytes, so that words can be read of it."""
    dense = qdata.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_align_rows

    return jit_align_rows
