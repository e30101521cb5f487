"""How jitted kernels are launched: one door for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def launch(kernel: Any, grid: int, args: tuple[Any, ...], constants: Mapping[str, Any], warps: int) -> None:
    """Launch a jitted kernel on `grid` programs with runtime `args` in order and constexpr `constants`.

    Without fused multiply-add: every operation that decides a bit is one IEEE operation.
    """
    kernel[(grid,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)
