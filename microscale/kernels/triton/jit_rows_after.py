"""Jitted code of `rows_after`."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zero_rows_after(out, offsets, groups, rows, columns, stride, WIDTH: tl.constexpr):
    """Zero out [rows, columns] from row offsets[groups - 1] on. Each program takes one row of as many as there are."""
    first = tl.maximum(tl.load(offsets + (groups - 1)), 0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    zeros = tl.zeros((WIDTH,), out.dtype.element_ty)
    for row in range(first + tl.program_id(0), rows, tl.num_programs(0)):
        for start in range(0, columns, WIDTH):
            tl.store(out + row * stride + start + lane, zeros, mask=start + lane < columns)
