"""Operands of products: an FP32 scale that a whole row shares multiplies the sums, not the row's elements.

A row that is one block has one scale, constant along the contraction, as outer scales of rows are. So kernels get such
an operand as codes under powers of two (all 1) and an FP32 outer scale of rows. Then its values are exact in few bits:
E4M3 codes are bfloat16 numbers, which no E4M3 code times an FP32 scale is.

The sum of the products times the scale, rounded once more, is as near to the exact product as the sum of products with
rounded elements; both are within the bound that kernels state.
"""

from __future__ import annotations

import dataclasses

import torch

from microscale import dispatch
from microscale.kernels.reference.matmul import Operand, Parts
from microscale.numerics import layout
from microscale.spec.format import FormatSpec
from microscale.spec.powers import ONE, with_powers

_ones: dict[torch.device, torch.Tensor] = {}


def moves(fmt: FormatSpec, size: int, scale_layout: str, along: bool) -> bool:
    """Return True for an operand whose scale can leave its rows of `size` elements. `along`: they are contracted."""
    return along and 0 < size <= fmt.block and scale_layout != layout.SWIZZLED and fmt.scale.torch_dtype == "float32"


def late(x: Operand, contraction: int) -> Operand:
    """Return an operand that is contracted along -1 or -2 as kernels get it."""
    return x if isinstance(x, torch.Tensor) else late_parts(x, contraction)


def late_parts(x: Parts, contraction: int) -> Parts:
    """Return a block-scaled operand as `late` does."""
    if x.outer_scale is not None:
        return x
    if not moves(x.format, x.size, x.layout, x.axis == contraction):
        return x
    if x.layout == layout.FRAGMENTS:  # whose kernels do not read them
        codes = _one(x.scale.device).expand(x.scale.shape)
    else:
        codes = torch.full_like(x.scale, ONE, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return dataclasses.replace(x, scale=codes, outer_scale=x.scale, format=with_powers(x.format), unit=True)


def _one(device: torch.device) -> torch.Tensor:
    """One code of 1 on a device, [1, 1]; kept, unless a graph's capture made it, which may write over it later."""
    made = _ones.get(device)
    if made is None:
        made = torch.full((1, 1), ONE, dtype=torch.uint8, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _ones[device] = made
    return made


def describe(
    shape: tuple[int, ...], fmt: FormatSpec, axis: int, contraction: int, scale_layout: str, outer: str | None
) -> dispatch.Operand:
    """Describe a block-scaled operand of a product, as `late` makes it. `outer`: see `dispatch.Operand`."""
    size = shape[axis]
    if outer is None and moves(fmt, size, scale_layout, axis == contraction):
        several = any(n != 1 for d, n in enumerate(shape) if d != axis % len(shape))
        fmt, outer = with_powers(fmt), "vector" if several else "scalar"
    return dispatch.Operand(shape, "uint8", fmt, axis, scale_layout, outer, one_block=0 < size <= fmt.block)
