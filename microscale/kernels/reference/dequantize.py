"""Reference dequantize: (decode(qdata) * decode(scale)) * outer_scale in FP32, then one rounding."""

from __future__ import annotations

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.reference.quantize import CHUNK
from microscale.numerics import codec, fragments, layout, packing
from microscale.spec.format import FormatSpec


@kernel("dequantize", "reference.dequantize", requires=Requires(), native=("cpu",), bound="defines correctness")
def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    fmt: FormatSpec,
    columns: int,
    scale_layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return values [..., R, columns] of qdata [..., R, bytes] blocked along the last axis.

    `outer_scale` broadcasts against the scales [..., R, blocks]; None counts as 1.
    """
    fmt = fmt.for_row(columns)
    blocks, shape = -(-columns // fmt.block), qdata.shape[:-1]
    if scale_layout == layout.SWIZZLED:
        scale = layout.unswizzle(scale, shape[-1] if shape else 1, blocks).reshape(*shape, blocks)
    elif scale_layout == layout.FRAGMENTS:
        qdata, scale = fragments.restore(qdata, scale, fmt, columns)
    out = torch.empty((*shape, columns), dtype=out_dtype, device=qdata.device)
    if not out.numel():
        return out
    rows = out.numel() // columns
    q2, s2, out2 = qdata.reshape(rows, -1), scale.reshape(rows, blocks), out.view(rows, columns)
    o2 = None
    if outer_scale is not None:
        width = outer_scale.shape[-1] if outer_scale.dim() else 1
        o2 = outer_scale.expand(*shape, width).reshape(rows, width)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = codec.decode(packing.unpack(q2[part], fmt.element.width), fmt.element).unflatten(
            -1, (blocks, fmt.block)
        )
        values = values * codec.decode(s2[part], fmt.scale)[..., None]
        if o2 is not None:
            values = values * o2[part][..., None]
        out2[part] = values.flatten(-2)[:, :columns].to(out_dtype)
    return out
