"""Reference of the fused producers: SiLU(gate) * up and RMSNorm, rounded to the input dtype, then quantized.

Whoever fuses them must give the codes and scales that `reference.quantize` gives for the rounded tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.reference.quantize import CHUNK, quantize
from microscale.numerics import activations
from microscale.spec.quantizer import QuantizerSpec

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@kernel("silu_mul_quantize", "reference.silu_mul_quantize", requires=Requires(), native=("cpu",),
        bound="defines correctness")  # fmt: skip
def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Quantize silu(gate) * up [..., R, K] along the last axis; the other arguments and results as `quantize`."""
    y = _by_rows(activations.silu_mul, gate, up)
    return quantize(y, spec, amax, outer_scale, seed, scale_layout)


@kernel("rms_norm_quantize", "reference.rms_norm_quantize", requires=Requires(), native=("cpu",),
        bound="defines correctness")  # fmt: skip
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Quantize x / rms(x) * weight, x [..., R, K] and weight [K]; the other arguments and results as `quantize`."""
    y = _by_rows(lambda part: activations.rms_norm(part, weight, eps), x)
    return quantize(y, spec, amax, outer_scale, seed, scale_layout)


def _by_rows(compute: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    """Apply a function of rows to [..., K] operands, some rows at a time: it needs many FP64 temporaries."""
    first = operands[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if first.numel():
        columns = first.shape[-1]
        step = max(1, CHUNK // columns)
        parts = zip(*(t.reshape(-1, columns).split(step) for t in (out, *operands)), strict=True)
        for target, *part in parts:
            target.copy_(compute(*part))
    return out
