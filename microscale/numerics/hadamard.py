"""Block-diagonal Hadamard transform along the last axis, with one fixed order of additions.

`y = (x * sign) @ H / sqrt(size)` for every group of `size` elements, H the Sylvester matrix `(-1)**popcount(i & j)`.
Computed in FP32 as log2(size) butterfly stages with strides 1, 2, 4, ..., then one multiplication by
fp32(1/sqrt(size)); a kernel that keeps this order gives the same bits. H is symmetric, so the inverse is
`hadamard(y) * sign`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from microscale.errors import InputError
from microscale.spec.quantizer import HADAMARD_SIZES


def hadamard(
    x: torch.Tensor, size: int, sign: Sequence[int] | torch.Tensor | None = None, *, inverse: bool = False
) -> torch.Tensor:
    """Transform the last axis of x [..., K] in groups of `size`; returns x's dtype (FP32 arithmetic, one rounding).

    `sign` is a vector of +-1 of length `size`. Raises InputError if K is no multiple of `size`.
    """
    if size not in HADAMARD_SIZES:
        raise InputError(f"Hadamard size {size}", f"use one of {', '.join(map(str, HADAMARD_SIZES))}")
    if x.shape[-1] % size:
        raise InputError(
            f"a Hadamard transform of size {size} needs a last axis that is a multiple of it, got {x.shape[-1]}",
            "pad the tensor with torch.nn.functional.pad; padding inside would change the transformed values",
        )
    groups = x.to(torch.float32).unflatten(-1, (-1, size)) if x.numel() else x.to(torch.float32)
    if not x.numel():
        return x.clone()
    signs = None if sign is None else torch.as_tensor(sign, dtype=torch.float32, device=x.device)
    if signs is not None and not inverse:
        groups = groups * signs
    stride = 1
    while stride < size:
        pairs = groups.unflatten(-1, (size // (2 * stride), 2, stride))
        low, high = pairs.select(-2, 0), pairs.select(-2, 1)
        groups = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        stride *= 2
    groups = groups * (1.0 / math.sqrt(size))
    if signs is not None and inverse:
        groups = groups * signs
    return groups.flatten(-2).to(x.dtype)
