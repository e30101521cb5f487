"""Reference amax of groups of rows: tokens sorted by expert."""

from __future__ import annotations

import torch

from microscale.dispatch import Requires, kernel
from microscale.numerics import scaling


@kernel("group_amax", "reference.group_amax", requires=Requires(), native=("cpu",), bound="defines correctness")
def group_amax(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return for every row of x [T, K] the FP32 amax over finite values of its group: [T, 1].

    Group i ends before row offsets[i]; what comes after the last end is a group too. No value is read by the host.
    """
    rows = scaling.finite_amax(x, "row")[:, 0]
    group = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype), right=True)
    found = torch.zeros(offsets.numel() + 1, dtype=torch.float32, device=x.device)
    return found.scatter_reduce_(0, group, rows, "amax")[group][:, None]
