"""Reference of the fused cast for FP8 tensor cores: `quantize`, then `align_rows` of what it gave.

Every element is rounded twice, first under its block's scale and then under its row's power of two. Whoever fuses them
must round twice too: the codes are those of the quantized tensor, not of x.
"""

from __future__ import annotations

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference.align_rows import align_rows, fits
from microscale.kernels.reference.quantize import quantize
from microscale.numerics import layout
from microscale.spec.quantizer import QuantizerSpec


def becomes_rows(problem: Problem) -> bool:
    """Return True for a quantizer whose format `align_rows` takes."""
    return problem.quantizer is not None and fits(problem.quantizer.format)


def rounds_to_nearest(problem: Problem) -> bool:
    """Return True for a quantizer that needs no random numbers, which this op is not given."""
    return problem.quantizer is not None and problem.quantizer.rounding == "nearest_even"


CHECKS = (
    ("needs float elements of 4, 6 or 8 bits that E4M3 can hold, in blocks whose scales are exponents", becomes_rows),
    ("needs rounding to nearest: it is given no seed", rounds_to_nearest),
)


@kernel("quantize_rows", "reference.quantize_rows", requires=Requires(checks=CHECKS), native=("cpu",),
        bound="defines correctness")  # fmt: skip
def quantize_rows(x: torch.Tensor, spec: QuantizerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [..., R, K] as (float8_e4m3fn [..., R, K padded with zeros to 16], FP32 row powers [..., R, 1]).

    Rows and what becomes of NaN, infinity and zeros: as `reference.align_rows` of `reference.quantize`.
    """
    qdata, scale, _ = quantize(x, spec, None, None, None, layout.STRIDED)
    return align_rows(qdata, scale, spec.format, x.shape[-1], layout.STRIDED)
