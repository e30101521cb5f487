"""Any product in two passes: decode to 16-bit floats in a bounded workspace, multiply by cuBLAS on tensor cores.

The operands are exact, so the error is that of adding up. Let S be the sum of |a| |b| over K for an element of the
result. Tensor cores add some products and the sum so far (n + 1 terms, n = 4 to 16) aligned to the largest of them, in
24 bits or more, and cut off what is below: each of them loses less than 2**-23 of the largest, which is at most S, and
so does the sum. There are K / n such steps, so

    |error| <= (K (1 + 1 / n) + 8) 2**-23 S, then one rounding          at most (1.25 K + 8) 2**-23 S

the 8 being the FP32 operations after it: partial sums of K if cuBLAS splits it, the outer scales and the bias, terms.
`two_pass` takes operands that are bfloat16 numbers (or both float16), except that values below 2**-126, which only
blocks at the very end of E8M0's range have, keep no digits below 2**-133. `split_two_pass` takes all others as
exact sums of 2 or 3 matrices of bfloat16 (`exact.py`), and multiplies each by each, smallest first, but the last by the
last, which is below 2**-30 S. The pieces of a number add up in magnitude too, so S, and with it the bound, is the same.

Memory beside the result: a workspace for decoded operands (a 64th of the device's memory, but 128 to 512 MiB: see
`workspace`), and as much again for FP32 sums where the result is not written by the GEMM itself: with outer scales of
rows, columns or experts, split operands, or a bias if the result is no FP32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from microscale import dispatch
from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.cublas import library
from microscale.kernels.cublas.operands import FREE_TILE, Cut, Side, Term, pieces_in, sides
from microscale.kernels.reference.matmul import Operand
from microscale.kernels.triton import dequantize, epilogue
from microscale.numerics import layout

WORKSPACE, LEAST_WORKSPACE, SHARE = 512 << 20, 128 << 20, 64  # bytes; and which part of the device's memory, between
LAST_PRODUCT = 4  # of pieces i and j, i + j is below it

BOUND = "(1.25 K + 8) 2**-23 sum |a| |b|: decoded for 16-bit tensor cores, FP32 sums of exact products; one rounding"


# -- what it takes -----------------------------------------------------------------------------------------------------


def _pieces(operand: dispatch.Operand, dtype: torch.dtype) -> int | None:
    plain = torch.float32 if operand.format is not None else getattr(torch, operand.dtype)
    return pieces_in(dtype, operand.format, plain, operand.outer == "mixed")


def _one_by_one(problem: Problem) -> bool:
    """Whether one product of 16-bit matrices is exact."""
    both = [[_pieces(o, dtype) for o in problem.operands] for dtype in (torch.bfloat16, torch.float16)]
    return [1, 1] in both


def _decodable(problem: Problem) -> bool:
    decoder = next(k for k in dispatch.kernels("dequantize") if k.run is dequantize.dequantize)
    one = (Problem("dequantize", (o,), "cuda") for o in problem.operands if o.format is not None)
    return all(accepts(p) for p in one for _, accepts in decoder.requires.checks)


def _is_known(operand: dispatch.Operand) -> bool:
    return operand.format is not None or operand.dtype in ("bfloat16", "float16", "float32")


_CHECKS: tuple[tuple[str, Callable[[Problem], bool]], ...] = (
    ("needs a torch built with CUDA", lambda p: torch.version.cuda is not None or not torch.cuda.is_available()),
    ("needs plain operands in bfloat16, float16 or float32", lambda p: all(_is_known(o) for o in p.operands)),
    ("needs blocks along rows or columns of matrices", lambda p: all(o.axis >= -2 for o in p.operands)),
    ("needs formats that triton.dequantize takes", _decodable),
)
_ONE = ("needs operands exact in bfloat16 (or both in float16), the outer scale constant along K", _one_by_one)


def _requires(*checks: tuple[str, Callable[[Problem], bool]]) -> Requires:
    return Requires(
        devices=("cuda",),
        min_capability=(8, 0),
        layouts=(*layout.LAYOUTS, layout.FRAGMENTS),
        packages=("triton",),
        checks=(*_CHECKS, *checks),
    )


# -- the kernels -------------------------------------------------------------------------------------------------------


@kernel("matmul", "cublas.split_two_pass", priority=15, requires=_requires(), bound=BOUND)
def split_two_pass(a: Operand, b: Operand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [..., K, N] + bias; arguments and result as `reference.matmul`."""
    return two_pass(a, b, bias, out_dtype)


@kernel("matmul", "cublas.two_pass", priority=20, requires=_requires(_ONE), bound=BOUND)
def two_pass(a: Operand, b: Operand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [..., K, N] + bias; arguments and result as `reference.matmul`."""
    left, right, shape = sides(a, b)
    out = torch.empty(shape, dtype=out_dtype, device=left.device)
    if out.numel():
        added = None if bias is None else bias.expand(shape).reshape(-1, left.free, right.free)
        _Product(left, right, out.view(-1, left.free, right.free), added).run()
    return out


class _Product:
    """left [B, M, K] @ right [B, N, K].mT, then outer scales and bias, to out [B, M, N]; chunk by chunk."""

    def __init__(self, left: Side, right: Side, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.left, self.right, self.out, self.bias = left, right, out, bias
        self.dtype, self.pieces = _sixteen_bits(left, right)
        self.late = [side.late for side in (left, right) if side.late is not None]
        self.direct = (  # the GEMM writes the result itself
            self.pieces == (1, 1)
            and left.depth > 0
            and out.dtype in library.OUT_DTYPES[self.dtype]
            and all(t.dim() == 0 for t in self.late)
            and (len(self.late) < 2 or self.dtype == torch.bfloat16)  # float16 lacks the powers of `combined`
            and (bias is None or out.dtype == torch.float32)  # cuBLAS rounds once more on its way to a narrow C
        )
        self.alpha: torch.Tensor | float = 1.0
        self.power: torch.Tensor | None = None
        if self.direct and len(self.late) == 2:
            self.alpha, self.power = combined(*self.late)
        elif self.direct and self.late:
            self.alpha = self.late[0]
        self.held: dict[bool, tuple[Cut, list[Term]]] = {}

    def run(self) -> None:
        """Fill `out`."""
        sides = (self.left, self.right)
        sums = 0 if self.direct or self.out.dtype == torch.float32 else 4
        batch, rows, columns = self.out.shape
        row_bytes = tuple(side.bytes_per_row(n) for side, n in zip(sides, self.pieces, strict=True))
        plan = plan_of(
            (batch, rows, columns), row_bytes, tuple(side.step for side in sides), sums, workspace(self.out.device)
        )
        across, down = list(cuts(columns, plan.columns)), list(cuts(rows, plan.rows))
        pairs = [(m, n) for m in down for n in across] if plan.rows_outside else [(m, n) for n in across for m in down]
        for first, last in cuts(batch, plan.matrices):
            for m, n in pairs:
                self._block(Cut(first, last, *m), Cut(first, last, *n))

    def _block(self, rows: Cut, columns: Cut) -> None:
        left = self._terms(self.left, rows, self.power)
        right = self._terms(self.right, columns, None)
        place = (slice(rows.first, rows.last), slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        target, bias = self.out, self.bias
        if target.shape != (rows.last - rows.first, rows.stop - rows.start, columns.stop - columns.start):
            target, bias = target[place], None if bias is None else bias[place]
        if self.direct:
            if bias is not None:
                target.copy_(bias)
            library.gemm(left[0].values, right[0].values.mT, target, self.alpha, bias is not None)
            return
        sums = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        self._sum(left, right, sums)
        down, along = _late(self.left, rows), _late(self.right, columns)
        if sums is not target or any(t is not None for t in (down, along, bias)):
            finish(sums, down, along.mT if along is not None and along.dim() else along, bias, target)

    def _terms(self, side: Side, cut: Cut, power: torch.Tensor | None) -> list[Term]:
        """The terms of a cut, kept until another cut of that side is asked for."""
        which, cut = side is self.left, cut if side.batch > 1 else cut._replace(first=0, last=1)
        if which in self.held and self.held[which][0] == cut:
            return self.held[which][1]
        self.held.pop(which, None)  # its memory serves the next
        made = side.terms(cut, self.dtype, self.pieces[0 if which else 1], power)
        self.held[which] = (cut, made)
        return made

    def _sum(self, left: list[Term], right: list[Term], sums: torch.Tensor) -> None:
        """Add the products of all terms up in FP32, smallest first."""
        if self.left.depth == 0:
            sums.zero_()
            return
        pairs = [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < LAST_PRODUCT]
        pairs.sort(key=lambda pair: pair[0].factor * pair[1].factor)
        for count, (a, b) in enumerate(pairs):
            if count and count == len(pairs) - 1:
                # Zero times infinity: what is infinite or NaN in an operand is so in its first piece.
                sums.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            library.gemm(a.values, b.values.mT, sums, a.factor * b.factor, count > 0)


def _sixteen_bits(left: Side, right: Side) -> tuple[torch.dtype, tuple[int, int]]:
    """The dtype that both operands are decoded to or cut into, and how many matrices of it each is the sum of."""
    pieces = left.pieces_in(torch.bfloat16), right.pieces_in(torch.bfloat16)
    if pieces != (1, 1) and left.pieces_in(torch.float16) == right.pieces_in(torch.float16) == 1:
        return torch.float16, (1, 1)
    assert pieces[0] is not None and pieces[1] is not None
    return torch.bfloat16, (pieces[0], pieces[1])


def _late(side: Side, cut: Cut) -> torch.Tensor | None:
    """The outer scales of a cut, () or [B, F, 1] with sizes of 1, that its sums are multiplied by."""
    late = side.late
    if late is None or late.dim() == 0:
        return late
    late = late if late.shape[0] == 1 else late[cut.first : cut.last]
    return late if late.shape[1] == 1 else late[:, cut.start : cut.stop]


def finish(
    sums: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write sums * left * right + bias to out, rounded once; shapes as `triton.epilogue.finish`. Changes the sums."""
    if sums.is_cuda:
        epilogue.finish(sums, left, right, bias, out)
        return
    for factor in (left, right):
        if factor is not None:
            sums.mul_(factor)
    if bias is not None:
        sums.add_(bias)
    if sums is not out:
        out.copy_(sums)


def combined(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP32 scalars whose product is first * second: one to multiply by, and a power of two to decode with.

    The second is 1 unless the product of the outer scales of two tiny (or huge) tensors is outside FP32's range, though
    not the result, which is their sums times it.
    """
    if first.is_cuda:
        return epilogue.combined(first, second)
    size = (first * second).abs()
    root = torch.where(size < 2.0**-64, 2.0**-32, torch.where(size > 2.0**64, 2.0**32, 1.0))
    return (first / root) * (second / root), root * root


# -- chunks ------------------------------------------------------------------------------------------------------------


def workspace(device: torch.device) -> int:
    """Return the bytes of the workspace on a device: small enough to spare, large enough for few, large products."""
    return min(WORKSPACE, max(LEAST_WORKSPACE, _memory(device) // SHARE))


@functools.cache
def _memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else WORKSPACE * SHARE


class Plan(NamedTuple):
    """Matrices, rows and columns of the result computed at a time, and whether rows are the outer loop."""

    matrices: int
    rows: int
    columns: int
    rows_outside: bool


@functools.lru_cache(maxsize=4096)
def plan_of(
    shape: tuple[int, int, int], row_bytes: tuple[int, ...], steps: tuple[int, ...], sum_bytes: int, space: int
) -> Plan:
    """Return how a product of shape [B, M, N] is cut so that its workspaces hold.

    Args:
        shape: of the result.
        row_bytes: workspace for a row of M and one of N; 0 where an operand is used as it lies.
        steps: what cuts of M and N are multiples of; a single step is taken even if it does not fit.
        sum_bytes: of an element of the result, for FP32 sums; 0 if there are none.
        space: bytes of either workspace.
    """
    batch, m, n = shape
    left, right = m * row_bytes[0], n * row_bytes[1]
    if left + right <= space and m * n * sum_bytes <= space:
        return Plan(max(1, min(batch, space // max(left + right, m * n * sum_bytes, 1))), m, n, True)
    half = space // 2
    rows, columns = m, n
    if left + right > space:
        if left > half:
            rows = _size(m, (space - min(right, half)) // row_bytes[0], steps[0])
        if right > half:
            columns = _size(n, (space - min(left, half)) // row_bytes[1], steps[1])
    if rows * columns * sum_bytes > space:
        rows = _size(m, min(rows, space // (columns * sum_bytes)), steps[0])
        columns = _size(n, min(columns, max(1, space // (rows * sum_bytes))), steps[1])
    many_rows, many_columns = rows < m, columns < n
    outside = left + right * (-(-m // rows) if many_columns else 1)
    inside = right + left * (-(-n // columns) if many_rows else 1)
    return Plan(1, rows, columns, outside < inside)


def _size(length: int, most: int, step: int) -> int:
    """The size of even cuts of a length, at most `most` if that is a step; multiples of tiles if they fit."""
    unit = math.lcm(step, FREE_TILE)
    unit = unit if unit <= most else step
    most = max(unit, most // unit * unit)
    count = -(-length // most)
    return min(length, -(-length // (count * unit)) * unit)


def cuts(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the cuts of a length."""
    for start in range(0, length, size):
        yield start, min(start + size, length)
