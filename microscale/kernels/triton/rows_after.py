"""Triton zeros for the rows after the last group, which other libraries' grouped products leave as they found them.

What is written is those rows alone, so it costs a launch where there are none.
"""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Any

import torch

from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch

RESIDENT, WARPS = 8, 4  # programs for each SM; warps of a program
CONSTANTS = MappingProxyType({"WIDTH": 1024})


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_rows_after

    return jit_rows_after


def zero_rows_after(out: torch.Tensor, offsets: torch.Tensor) -> None:
    """Zero the rows of out [T, N], neighbours side by side, from offsets[-1] on; offsets int32 [E], dense, E > 0."""
    rows, columns = out.shape
    if out.numel():
        grid = min(rows, RESIDENT * properties.multiprocessors(out.device))
        args = (out, offsets, offsets.shape[0], rows, columns, out.stride(0))
        launch(_jit().zero_rows_after, grid, args, CONSTANTS, WARPS)
