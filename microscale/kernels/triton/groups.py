"""Triton amax of groups of rows: the input read once, then one float per row; the ends stay on the device."""

from __future__ import annotations

import functools
from typing import Any

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.triton import amax
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import as_matrices

CONSTANTS = {"LANES": 1024}


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_groups

    return jit_groups


@kernel("group_amax", "triton.group_amax", priority=10, requires=Requires(devices=("cuda",), packages=("triton",)))
def group_amax(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the amax of every row's group [T, 1]; arguments as `reference.group_amax`."""
    out = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    if not x.numel():
        return out.zero_()
    rows = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    amax.row_amaxes(as_matrices(x), rows)
    groups = offsets.numel()
    launch(_jit().spread_group_amax, groups + 1, (rows, offsets.contiguous(), out, groups, x.shape[0]), CONSTANTS, 4)
    return out
