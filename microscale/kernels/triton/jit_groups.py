"""Jitted code of groups of rows whose ends are known on the device only."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_group_amax(row_amax, offsets, out, groups, rows, LANES: tl.constexpr):
    """Give every row its group's amax: program i has the rows from offsets[i - 1] to offsets[i], the last the rest."""
    pid = tl.program_id(0)
    start = tl.load(offsets + pid - 1, mask=pid > 0, other=0).to(tl.int32)
    stop = tl.load(offsets + pid, mask=pid < groups, other=rows).to(tl.int32)
    start, stop = tl.minimum(tl.maximum(start, 0), rows), tl.minimum(tl.maximum(stop, 0), rows)
    lane = tl.arange(0, LANES)
    best = tl.zeros((LANES,), tl.float32)
    for first in range(start, stop, LANES):
        best = tl.maximum(best, tl.load(row_amax + first + lane, mask=first + lane < stop, other=0.0))
    found = tl.max(best, axis=0)
    for first in range(start, stop, LANES):
        tl.store(out + first + lane, tl.zeros((LANES,), tl.float32) + found, mask=first + lane < stop)
