"""Triton dequantize: one kernel for every format and layout; see `jit_dequantize.py`.

Bytes for a 4-bit format to bf16: 0.5 + 1/block + 2 per element, read and written once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.quantize import LANES, WARPS
from microscale.numerics import codec, layout
from microscale.spec.format import FormatSpec


@kernel(
    "dequantize",
    "triton.dequantize",
    priority=10,
    requires=Requires(
        devices=("cuda",),
        packages=("triton",),
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
    shape, blocks = qdata.shape[:-1], -(-columns // fmt.block)
    out = torch.empty((*shape, columns), dtype=out_dtype, device=qdata.device)
    if not out.numel():
        return out
    dense, scale = qdata.contiguous(), scale.contiguous()
    outer, row_stride, block_stride = _outer(outer_scale, shape, scale)
    total = dense.numel() // fmt.block_bytes
    lanes = properties.power_of_two_at_least(fmt.block)
    per_program = max(1, LANES // lanes)
    kind = 0 if outer_scale is None else 2 if row_stride or block_stride else 1
    constants = {
        **properties.dequantize_constants(fmt), "BLOCKS": per_program, "BLOCK_P2": lanes, "OUTER": kind,
        "SWIZZLE": scale_layout == layout.SWIZZLED, "FLAT": columns % fmt.block == 0 and lanes == fmt.block,
        "WIDE": out.numel() + per_program * lanes >= 2**31, "INTERPRETED": properties.interpreted(),
    }  # fmt: skip
    args = (
        dense, scale, outer, codec.decode_table(fmt.element, qdata.device), out,
        total, shape[-1] if shape else 1, columns, blocks, row_stride, block_stride,
    )  # fmt: skip
    launch(_jit().dequantize_rows, -(-total // per_program), args, constants, WARPS)
    return out


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_dequantize

    return jit_dequantize


def _fits(fmt: FormatSpec | None) -> bool:
    if fmt is None or not (fmt.element.kind != "float" or fmt.element.subnormals):
        return False
    scale = fmt.scale
    return scale.exponent_only or scale.torch_dtype == "float32" or (scale.width <= 8 and scale.subnormals)


def _outer(outer: torch.Tensor | None, shape: tuple[int, ...], scale: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The outer scale as a dense array with strides per row and per block (0: shared)."""
    if outer is None:
        return scale, 0, 0
    if outer.numel() == 1:
        return outer, 0, 0
    width = outer.shape[-1]
    dense = outer.expand(*shape, width).reshape(-1, width).contiguous()
    return dense, width, int(width > 1)
