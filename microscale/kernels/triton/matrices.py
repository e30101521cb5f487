"""How kernels see a tensor of any rank and strides: matrices of rows, addressed by three strides."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Matrices(NamedTuple):
    """x as [matrices, rows, columns] with strides in elements, copied only where its leading axes do not collapse.

    `dense`: contiguous, so that row r of all rows starts at r * columns. `batched`: the rows of different matrices are
    not evenly spaced, so that a row's place needs its matrix.
    """

    data: torch.Tensor
    matrices: int
    rows: int
    columns: int
    strides: tuple[int, int, int]
    dense: bool
    batched: bool

    @property
    def down(self) -> bool:
        """True if neighbours in memory are of neighbouring rows."""
        return self.strides[1] == 1 and self.strides[2] != 1

    @property
    def total_rows(self) -> int:
        """Rows of all matrices."""
        return self.matrices * self.rows


def as_matrices(x: torch.Tensor) -> Matrices:
    """View x [..., R, K], of rank >= 1 and not empty, as matrices of rows."""
    shape = x.shape
    columns, rows = shape[-1], shape[-2] if len(shape) > 1 else 1
    if x.is_contiguous():
        count = x.numel() // (rows * columns)
        return Matrices(x, count, rows, columns, (rows * columns, columns, 1), True, False)
    if len(shape) < 3:
        strides = (0, x.stride(0) if len(shape) > 1 else 0, x.stride(-1))
        return Matrices(x, 1, rows, columns, strides, False, False)
    x = x.reshape(-1, rows, columns)
    step, row_step, column_step = x.stride()
    batched = x.shape[0] > 1 and rows > 1 and step != rows * row_step
    if rows == 1:
        row_step = step  # rows follow each other from matrix to matrix
    return Matrices(x, x.shape[0], rows, columns, (step, row_step, column_step), x.is_contiguous(), batched)
