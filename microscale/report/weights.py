"""The error of one weight in one format: SQNR, clipped and flushed shares, measured on the stored bytes.

    SQNR     = 10 log10( sum x**2 / sum (x - x_hat)**2 )   in dB, x_hat = dequantize(quantize(x)) in FP32
    clipped  : x > (top + step/2) * s   or   x < (bottom - step/2) * s,   s = decode(scale) * outer_scale > 0
    flushed  : x != 0 and x_hat == 0

where top and bottom are the largest and smallest value of the element and step is the gap to its neighbour. Up to half
a step beyond top is ordinary rounding; what lies further out would have got another code if there were one. A block
whose scale is zero has no range: its values are flushed, not clipped.

The weight is quantized whole (its outer scale needs it); everything else is done in chunks of rows with FP64 sums, so
memory beyond the weight and its codes is bounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Self

import torch

from microscale import ops
from microscale.nn.diagnostics import clipping_edges
from microscale.numerics import hadamard
from microscale.report.results import FormatResult, LayerError, decibels
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor

CHUNK = 1 << 19  # values in flight at once, about 60 bytes of temporaries each
SEED = 0  # of stochastic rounding, so that a report is reproducible


@dataclasses.dataclass
class Tally:
    """Sums over values; tallies of chunks and of layers add up. Only values finite before and after count as error."""

    values: int = 0
    nonzero: int = 0
    clipped: int = 0
    flushed: int = 0
    lost: int = 0
    signal: float = 0.0
    noise: float = 0.0
    stored_bytes: int = 0

    def __iadd__(self, other: Tally) -> Self:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB; None where there is no noise, or no signal to hold it against."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None

    def layer(self, name: str) -> LayerError:
        """Return this tally as the record of one layer."""
        clipped, flushed = self.clipped / max(1, self.values), self.flushed / max(1, self.nonzero)
        return LayerError(name, self.values, self.sqnr_db, clipped, flushed, self.lost)


def measure(weight: torch.Tensor, quantizer: QuantizerSpec) -> Tally:
    """Return the tally of one weight [..., N, K] of any float dtype, quantized along its last axis.

    With a Hadamard transform the error is measured after it; the transform is orthogonal, so the SQNR is the same.
    """
    seed = SEED if quantizer.rounding == "stochastic" else None
    q = ops.quantize(weight, quantizer, generator=seed)
    total = Tally(stored_bytes=q.stored_bytes)
    for part, stored in _chunks(weight, q):
        if quantizer.hadamard is not None:
            part = hadamard.hadamard(part.float(), quantizer.hadamard.size, quantizer.hadamard.sign)
        total += _measure_chunk(part.double(), stored)
    return total


def _chunks(weight: torch.Tensor, q: BlockScaledTensor) -> Iterator[tuple[torch.Tensor, BlockScaledTensor]]:
    """Cut both along the leading dimensions into pieces of at most CHUNK values, or one row."""
    if weight.numel() <= CHUNK or weight.dim() == 1:
        yield weight, q
        return
    step = max(1, CHUNK // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], step):
        part, stored = weight[start : start + step], q[start : start + step]
        if step == 1 and weight.dim() > 2:
            yield from _chunks(part[0], stored[0])  # type: ignore[arg-type]
        else:
            yield part, stored  # type: ignore[misc]


def _measure_chunk(x: torch.Tensor, q: BlockScaledTensor) -> Tally:
    """x: FP64, the shape of q."""
    values = q.dequantize(torch.float32).double()
    finite = torch.isfinite(x)
    valid = finite & torch.isfinite(values)
    lost = int((finite & ~valid).sum())
    x, values = torch.where(valid, x, 0.0), torch.where(valid, values, 0.0)

    scale = q.scales().double()
    if q.outer_scale is not None:
        scale = scale * q.outer_scale.double()
    low, high = clipping_edges(q.format.element)
    reach = scale.repeat_interleave(q.format.block, -1)[..., : x.shape[-1]]
    clipped = ((x > high * reach) | (x < low * reach)) & (reach > 0)
    nonzero = x != 0
    return Tally(
        values=x.numel(),
        nonzero=int(nonzero.sum()),
        clipped=int(clipped.sum()),
        flushed=int((nonzero & (values == 0)).sum()),
        lost=lost,
        signal=float(x.square().sum()),
        noise=float((x - values).square().sum()),
    )


class FormatTally:
    """The layers of one format as they come in; `result` sums them up."""

    def __init__(self, quantizer: QuantizerSpec) -> None:
        self.quantizer = quantizer
        self.layers: list[LayerError] = []
        self.total = Tally()
        self.seconds = 0.0

    def add(self, name: str, tally: Tally, seconds: float) -> None:
        """Count one layer in."""
        self.layers.append(tally.layer(name))
        self.total += tally
        self.seconds += seconds

    def result(self, other_bytes: int) -> FormatResult:
        """Return the summary; `other_bytes` is what the model holds beside these layers."""
        fmt, total = self.quantizer.format, self.total
        summed = total.layer("")
        levels = [row.sqnr_db for row in self.layers if row.sqnr_db is not None]
        worst = min(self.layers, key=lambda row: decibels(row.sqnr_db))
        return FormatResult(
            format=self.quantizer.name,
            description=fmt.description,
            element=fmt.element.name,
            block=fmt.identity()["block"],
            scale=fmt.scale.name,
            outer_scale=None if fmt.outer_scale is None else f"{fmt.outer_scale.dtype} per {fmt.outer_scale.per}",
            bits_per_value=fmt.bits_per_value,
            stored_bits_per_value=8 * total.stored_bytes / max(1, total.values),
            layer_bytes=total.stored_bytes,
            model_bytes=total.stored_bytes + other_bytes,
            sqnr_db_mean=sum(levels) / len(levels) if levels else None,
            sqnr_db_overall=summed.sqnr_db,
            sqnr_db_worst=worst.sqnr_db,
            worst_layer=worst.name,
            clipped=summed.clipped,
            flushed=summed.flushed,
            lost=summed.lost,
            seconds=self.seconds,
            layers=tuple(self.layers),
        )
