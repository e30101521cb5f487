"""Reference matmul and grouped matmul: FP32 products and accumulation, outer scales and bias in FP32, one rounding.

An operand is a plain tensor, or the parts of a block-scaled one with its blocks along any axis (`Parts`). An outer
scale that is constant along the contraction multiplies the accumulator; one that is not goes into the operand.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.reference.dequantize import dequantize
from microscale.spec.format import FormatSpec


@dataclasses.dataclass(frozen=True)
class Parts:
    """A block-scaled operand without the subclass: `axis` (negative) is the blocked dimension, `size` its length.

    `exact_rows`: as of a tensor's `Meta`. `unit`: all block scales are 1 (what they were is the outer scale now).
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    outer_scale: torch.Tensor | None
    format: FormatSpec
    axis: int
    size: int
    layout: str
    exact_rows: bool | None = None
    unit: bool = False

    def dequantize(self, dtype: torch.dtype, *, with_outer: bool = True) -> torch.Tensor:
        """Return the values in the operand's own orientation."""
        outer = self.outer_scale if with_outer else None
        if outer is not None and outer.dim():
            outer = outer.movedim(self.axis, -1)
        # Swizzled scales are blobs of the [rows, blocks] matrix already; there is no axis to move.
        scale = self.scale.movedim(self.axis, -1) if self.layout != "swizzle_32_4_4" else self.scale
        qdata = self.qdata.movedim(self.axis, -1)
        values = dequantize(qdata, scale, outer, self.format, self.size, self.layout, dtype)
        return values.movedim(-1, self.axis)


Operand = torch.Tensor | Parts


def _factor(operand: Operand, contraction: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return FP32 values and the outer scale to apply to the accumulator (None: already inside, or there is none)."""
    if isinstance(operand, torch.Tensor):
        return operand.to(torch.float32), None
    outer = operand.outer_scale
    late = outer is not None and (outer.dim() == 0 or outer.shape[contraction] == 1)
    return operand.dequantize(torch.float32, with_outer=not late), outer if late else None


@contextlib.contextmanager
def _ieee_fp32(device: torch.device) -> Iterator[None]:
    """Keep TF32, reduced-precision modes and autocast, which a user may have switched on, out of the oracle."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False), _ieee_fp32(device):
            yield
        return
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@kernel(
    "matmul", "reference.matmul", requires=Requires(), native=("cpu",),
    bound="FP32 accumulation over exact operands, one rounding; defines correctness",
)  # fmt: skip
def matmul(a: Operand, b: Operand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [..., K, N] + bias, leading axes broadcast as torch.matmul does."""
    a_MK, a_outer = _factor(a, -1)
    b_KN, b_outer = _factor(b, -2)
    with _ieee_fp32(a_MK.device):
        out = torch.matmul(a_MK, b_KN)
    for outer in (a_outer, b_outer):
        out = out if outer is None else out * outer
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


@kernel(
    "grouped_matmul", "reference.grouped_matmul", requires=Requires(), native=("cpu",),
    bound="FP32 accumulation over exact operands, one rounding; defines correctness",
)  # fmt: skip
def grouped_matmul(a: Operand, b: Operand, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N]: [T, N].

    `offsets` int32 [E] are the ends of each expert's rows; groups may be empty; rows after the last end are zero.
    """
    a_TK = a if isinstance(a, torch.Tensor) else a.dequantize(torch.float32)
    b_EKN = b if isinstance(b, torch.Tensor) else b.dequantize(torch.float32)
    a_TK, b_EKN = a_TK.to(torch.float32), b_EKN.to(torch.float32)
    out = torch.zeros(a_TK.shape[0], b_EKN.shape[-1], dtype=out_dtype, device=a_TK.device)
    start = 0
    with _ieee_fp32(a_TK.device):
        for expert, stop in enumerate(offsets.tolist()):
            if stop > start:
                out[start:stop] = torch.matmul(a_TK[start:stop], b_EKN[expert]).to(out_dtype)
            start = max(start, stop)
    return out
