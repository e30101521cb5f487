"""Exact FP32 helpers: exponents from bits, powers of two, true division."""

from __future__ import annotations

import torch

FLT_MAX = torch.finfo(torch.float32).max
FLT_TINY = torch.finfo(torch.float32).tiny  # 2**-126, the smallest normal


def divide(x: torch.Tensor, constant: float) -> torch.Tensor:
    """Return FP32 `x / constant`, IEEE-rounded on every device."""
    return x / torch.full((), constant, dtype=torch.float32, device=x.device)


def normalized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split FP32 x >= 0 into (y, shift), y normal (or zero) with x = y * 2**shift: subnormals are lifted by 2**24."""
    small = x < FLT_TINY
    return torch.where(small, x * 2.0**24, x), torch.where(small, -24, 0).to(torch.int32)


def floor_log2(x: torch.Tensor) -> torch.Tensor:
    """Return exact floor(log2 x) as int32 for FP32 x > 0; zero gives -151, below every exponent in use."""
    y, shift = normalized(x)
    return (y.view(torch.int32) >> 23) - 127 + shift


def ceil_log2(x: torch.Tensor) -> torch.Tensor:
    """Return exact ceil(log2 x) as int32 for FP32 x > 0; zero gives -151."""
    y, shift = normalized(x)
    return ((y.view(torch.int32) + 0x7FFFFF) >> 23) - 127 + shift


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return FP32 2**exponent for int32 exponents in [-126, 127], exactly."""
    return ((exponent + 127) << 23).view(torch.float32)
