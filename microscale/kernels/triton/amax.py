"""Outer scales on the device: which amax they come from, and in how few launches.

A kernel that quantizes takes its outer scale in one of the kinds below and computes what is left to compute itself
(`jit_scale.outer_scale`). Launches before it, for x of any strides:

    one number, given (an amax or a scale)      none
    one number, dynamic, x dense and small      none: every program reads all of x
    one number, dynamic                         one: PARTS programs leave partial maxima, which every program reads
    one for each row                            one
    one for each matrix                         one if matrices are small, else two
    several, given                              one

A whole tensor's amax is a few hundred partial maxima in memory of this call alone. An atomic maximum would need a cell
that starts at zero: one more launch, or a cell that the last program resets, which an interrupted kernel or a second
stream leaves wrong. Reading the parts costs a program about 20 instructions a thread.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import Matrices, as_matrices
from microscale.numerics import scaling
from microscale.spec.format import FormatSpec

NONE, FROM_AMAX, FROM_SCALE, FROM_PARTS, FROM_VALUES, BY_ROW, BY_MATRIX = range(7)

PARTS = 256  # programs that share a whole tensor: two for each multiprocessor, nearly
SMALL = 16384  # elements of a tensor that every program reads as a whole; above, a launch of its own is faster
LONG = 65536  # elements of a matrix that one program may read
LANES = 4096  # elements that a program has in flight
WARPS = 4


class Outer(NamedTuple):
    """An outer scale as kernels take it.

    One number for all, whose `decode` [1] the kernel writes: FROM_AMAX, FROM_SCALE, from source FP32 [1], an amax or a
    decode scale; FROM_PARTS, FROM_VALUES, from the amax over `count` numbers at source, PARTS of FP32, or any number of
    any dtype, the finite ones of them. Arrays: BY_ROW, BY_MATRIX, whose source FP32 [2, count] has encode scales and
    amaxes, and whose decode [count] is written already. `result` is what quantize returns.
    """

    kind: int
    source: torch.Tensor
    count: int  # type: ignore[assignment]  # hides the method of tuples
    decode: torch.Tensor
    result: torch.Tensor

    @property
    def lanes(self) -> int:
        """How many numbers a program reads at a time: OUTER_LANES of the kernels."""
        return 1024 if self.kind == FROM_VALUES else PARTS


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_amax

    return jit_amax


def outer_of(
    x: torch.Tensor, fmt: FormatSpec, amax: torch.Tensor | None, outer_scale: torch.Tensor | None
) -> Outer | None:
    """Return the outer scale for quantizing x [..., R, K], not empty; None for a format without one.

    `amax` and `outer_scale` as `reference.quantize` takes them.
    """
    if fmt.outer_scale is None:
        return None
    if outer_scale is not None:
        return _given(x, fmt, outer_scale, FROM_SCALE)
    if amax is not None:
        return _given(x, fmt, amax, FROM_AMAX)
    per, rank = fmt.outer_scale.per, x.dim()
    kept = 0 if per == "tensor" else rank - 1 if per == "row" or rank < 2 else rank - 2
    shape = () if per == "tensor" else (*x.shape[:kept], *(1,) * (rank - kept))
    count = math.prod(x.shape[:kept])
    decode = torch.empty(shape, dtype=torch.float32, device=x.device)
    if count == 1:
        source, made = _parts(x, 1)
        return Outer(FROM_PARTS if made else FROM_VALUES, source, source.numel(), decode, decode)
    source = torch.empty((2, count), dtype=torch.float32, device=x.device)
    if per == "row":
        _rows(as_matrices(x), source, decode, fmt)
    else:
        _rows(as_matrices(_parts(x, count)[0]), source, decode, fmt)
    return Outer(BY_ROW if per == "row" else BY_MATRIX, source, count, decode, decode)


def _given(x: torch.Tensor, fmt: FormatSpec, given: torch.Tensor, kind: int) -> Outer:
    decode = torch.empty(given.shape, dtype=torch.float32, device=x.device)
    if given.numel() == 1:
        return Outer(kind, given, 1, decode, decode)
    result, shape = decode, x.shape[:-1]
    if given.shape == (*shape, 1):
        per = BY_ROW
    elif given.shape == (*shape[:-1], 1, 1):
        per = BY_MATRIX
    else:  # broadcast along some other axes: as one for each row
        make = scaling.outer_from_scale if kind == FROM_SCALE else scaling.outer_from_amax
        result, per, given = make(given, fmt).decode, BY_ROW, given.expand(*shape, 1)
        decode = torch.empty(given.shape, dtype=torch.float32, device=x.device)
    count = given.numel()
    source = torch.empty((2, count), dtype=torch.float32, device=x.device)
    constants = _entries_constants(fmt, kind == FROM_SCALE)
    launch(_jit().outer_entries, -(-count // 1024), (given.contiguous(), source, decode, count), constants, WARPS)
    return Outer(per, source, count, decode, result)


@functools.lru_cache(maxsize=1024)
def _entries_constants(fmt: FormatSpec, from_scale: bool) -> dict[str, Any]:
    return {"SIZE": 1024, "FROM_SCALE": from_scale, "TOP": properties.format_constants(fmt)["OUTER_TOP"]}


# -- amaxes ------------------------------------------------------------------------------------------------------------


def _parts(x: torch.Tensor, count: int) -> tuple[torch.Tensor, bool]:
    """Return ([count, n] numbers whose finite amaxes are those of the `count` leading parts of x; are they parts?).

    Parts are partial maxima in FP32, PARTS of them for all of x. Other numbers are those of x itself or, where it is
    not dense, the amaxes of its rows.
    """
    dense = _dense(x, count)
    if dense is None:
        seen = as_matrices(x)
        dense = torch.empty(seen.total_rows, dtype=torch.float32, device=x.device)
        _rows(seen, dense, None, None)
    length = dense.numel() // count
    if length <= (LONG if count > 1 else SMALL if dense.numel() == x.numel() else 4 * PARTS):
        return dense if count == 1 else dense.reshape(count, length), False
    parts = PARTS if count == 1 else min(PARTS, properties.power_of_two_at_least(max(1, 4 * PARTS // count)))
    found = torch.empty((count, parts), dtype=torch.float32, device=x.device)
    size = min(4 * LANES, max(1024, properties.power_of_two_at_least(length // (2 * parts))))
    constants = _parts_constants(parts, size, count == 1)
    launch(_jit().partial_amax, count * parts, (dense, found, length), constants, size // 1024)
    return found, True


def _dense(x: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return x with axes permuted within each of its `count` leading parts so that it is contiguous, if that can be."""
    if x.is_contiguous():
        return x
    if x.dim() > 1 and x.mT.is_contiguous():
        return x.mT
    if count == 1:
        strides = x.stride()
        x = x.permute(sorted(range(x.dim()), key=lambda axis: -strides[axis]))
        return x if x.is_contiguous() else None
    return None


@functools.lru_cache(maxsize=64)
def _parts_constants(parts: int, size: int, alone: bool) -> dict[str, Any]:
    return {"PARTS": parts, "SIZE": size, "ALONE": alone}


def row_amaxes(x: Matrices, out: torch.Tensor) -> None:
    """Write the amax over finite values of every row to out, FP32 [total rows]."""
    _rows(x, out, None, None)


def _rows(x: Matrices, source: torch.Tensor, decode: torch.Tensor | None, fmt: FormatSpec | None) -> None:
    """Write the amax of every row to source [rows]; or, where decode is given, the outer scales that follow."""
    constants = _rows_constants(properties.power_of_two_at_least(x.columns), x.down, x.batched, fmt)
    args = (x.data, source, source if decode is None else decode, x.total_rows, x.rows, x.columns, *x.strides)
    launch(_jit().row_amax, -(-x.total_rows // constants["ROWS"]), args, constants, WARPS)


@functools.lru_cache(maxsize=1024)
def _rows_constants(columns: int, down: bool, batched: bool, fmt: FormatSpec | None) -> dict[str, Any]:
    lanes = min(columns, 64 if down else LANES)
    top = 0.0 if fmt is None else properties.format_constants(fmt)["OUTER_TOP"]
    return {"ROWS": min(256, LANES // lanes), "LANES": lanes, "BATCHED": batched, "FINISH": fmt is not None, "TOP": top}
