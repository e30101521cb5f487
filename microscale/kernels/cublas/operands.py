"""Operands of a product as matrices [B, F, K], K being contracted, cut into pieces that fit a workspace.

`a` [..., M, K] has its M free and `b` [..., K, N] its N, so both are handled alike and the product is a @ b.mT. A
block-scaled operand is decoded when a cut of it is asked for; a plain one is used where it lies.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from microscale.kernels.cublas import exact
from microscale.kernels.cublas.library import matrix, readable
from microscale.kernels.reference.dequantize import dequantize as reference_dequantize
from microscale.kernels.reference.matmul import Operand
from microscale.kernels.triton import epilogue
from microscale.kernels.triton.dequantize import dequantize as triton_dequantize
from microscale.kernels.triton.fragments import dequantize as fragments_dequantize
from microscale.numerics import fragments, layout
from microscale.spec.format import FormatSpec

FREE_TILE = 128  # cuts are multiples of it where they can be: rows of a GEMM's tile, and of a swizzled one
DECODED_BYTES = 2  # of workspace for each element decoded to 16 bits
SPLIT_BYTES = 10  # for each that is split: an FP32 value and its pieces
PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # of plain values, in bfloat16


class Cut(NamedTuple):
    """A range of matrices and one of their free dimension."""

    first: int
    last: int
    start: int
    stop: int


class Term(NamedTuple):
    """Matrices [b, f, K] of 16-bit floats and the power of two that they count with."""

    values: torch.Tensor
    factor: float


def decode(
    qdata: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor | None, fmt: FormatSpec, columns: int, kind: str,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return values [..., R, columns] as `reference.dequantize`, at memory's speed on a GPU. `kind`: the layout."""
    if kind == layout.FRAGMENTS:
        run = fragments_dequantize if qdata.is_cuda else reference_dequantize
        return run(qdata, scale, outer, fmt, columns, kind, dtype)
    run = triton_dequantize if qdata.is_cuda else reference_dequantize
    return run(qdata, scale, outer, fmt, columns, kind, dtype)


def pieces_in(dtype: torch.dtype, fmt: FormatSpec | None, plain: torch.dtype, mixed: bool) -> int | None:
    """Return how many matrices of a 16-bit `dtype` an operand is the exact sum of; None for one that is no such sum.

    `plain`: its dtype if it has no format. `mixed`: an outer scale that varies along the contraction is in its values.
    """
    if dtype == torch.float16:
        fits = plain == torch.float16 if fmt is None else exact.fits_float16(fmt) and not mixed
        return 1 if fits else None
    if fmt is None:
        return PIECES.get(plain)
    return exact.pieces_of(exact.FP32_BITS if mixed else exact.significant_bits(fmt))


@dataclasses.dataclass
class Side:
    """One operand. `values` if it is plain; else codes and scales with the blocks along the last dimension.

    values [B, F, K]; codes [B, R, bytes] with R = F, or R = K if the blocks run across, along F. `outer` is what
    decoding multiplies by, `late` what the product is multiplied by: FP32 () or [B, F, 1] with sizes of 1.
    """

    batch: int
    free: int
    depth: int
    values: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    format: FormatSpec | None = None
    layout: str = layout.STRIDED
    across: bool = False
    outer: torch.Tensor | None = None
    late: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        held = self.values if self.values is not None else self.codes
        assert held is not None
        return held.device

    def pieces_in(self, dtype: torch.dtype) -> int | None:
        """Return how many matrices of a 16-bit dtype it is the sum of, if it is."""
        plain = torch.float32 if self.values is None else self.values.dtype
        return pieces_in(dtype, self.format, plain, self.outer is not None)

    def bytes_per_row(self, pieces: int) -> int:
        """Return the workspace that one row along F takes, as a sum of so many matrices."""
        if pieces != 1:
            return SPLIT_BYTES * self.depth
        return 0 if self.values is not None and matrix(self.values) is not None else DECODED_BYTES * self.depth

    def is_whole(self, cut: Cut) -> bool:
        """Return True for the cut that is all of it."""
        return cut == (0, self.batch, 0, self.free)

    @property
    def step(self) -> int:
        """What cuts of F start at multiples of."""
        if self.format is None:
            return 1
        swizzled = self.layout == layout.SWIZZLED
        if self.layout == layout.FRAGMENTS:
            part = fragments.DEPTH if self.format.block < fragments.DEPTH else self.format.block
            return part if self.across else fragments.ROWS
        if self.across:
            return self.format.block * (layout.TILE_COLUMNS if swizzled else 1)
        return layout.TILE_ROWS if swizzled else 1

    def terms(self, cut: Cut, dtype: torch.dtype, pieces: int, power: torch.Tensor | None = None) -> list[Term]:
        """Return a cut as `pieces` matrices that a GEMM can read, largest first. `power`: a scalar to decode by."""
        found = self._cut(cut, dtype if pieces == 1 else torch.float32, power)
        if pieces == 1:
            return [Term(readable(found), 1.0)]
        made = epilogue.split(found, pieces) if found.is_cuda else exact.split(found, pieces)
        return [Term(readable(t), exact.PIECE_SCALE**-i) for i, t in enumerate(made)]

    def _cut(self, cut: Cut, dtype: torch.dtype, power: torch.Tensor | None) -> torch.Tensor:
        matrices, part = slice(cut.first, cut.last), slice(cut.start, cut.stop)
        if self.values is not None:
            return self.values if self.is_whole(cut) else self.values[matrices, part]
        assert self.codes is not None and self.scale is not None and self.format is not None
        columns = cut.stop - cut.start if self.across else self.depth
        blocks = slice(cut.start // self.format.block, -(-cut.stop // self.format.block))
        outer = self.outer
        if outer is None:
            outer = power
        elif outer.dim():
            rows, along = (slice(None), blocks) if self.across else (part, slice(None))
            outer = outer if outer.shape[0] == 1 else outer[matrices]
            outer = outer if outer.shape[1] == 1 else outer[:, rows]
            outer = outer if outer.shape[2] == 1 else outer[:, :, along]
        whole = self.is_whole(cut)
        codes, scale = (self.codes, self.scale) if whole else (self._codes(cut), self._scales(cut))
        made = decode(codes, scale, outer, self.format, columns, self.layout, dtype)
        return made.transpose(-1, -2) if self.across else made

    def _codes(self, cut: Cut) -> torch.Tensor:
        """The codes of a cut, which starts at a multiple of `step`."""
        assert self.codes is not None and self.format is not None
        codes, block, size = self.codes[cut.first : cut.last], self.format.block, self.format.block_bytes
        if not self.across:
            return codes[:, cut.start : cut.stop]
        if self.layout == layout.FRAGMENTS:
            return _tiles(codes, self.free, cut)
        return codes[..., cut.start // block * size : -(-cut.stop // block) * size]

    def _scales(self, cut: Cut) -> torch.Tensor:
        """The scales of a cut, which starts at a multiple of `step`."""
        assert self.scale is not None and self.format is not None
        scale, block = self.scale[cut.first : cut.last], self.format.block
        if self.layout == layout.SWIZZLED:
            return self._swizzled(scale, cut)
        if not self.across:
            return scale[:, cut.start : cut.stop]
        if self.layout == layout.FRAGMENTS:
            return scale if block >= fragments.DEPTH else _tiles(scale, self.free, cut)
        return scale[..., cut.start // block : -(-cut.stop // block)]

    def _swizzled(self, blobs: torch.Tensor, cut: Cut) -> torch.Tensor:
        """The part of blobs [B, n] that is a cut's blob."""
        assert self.format is not None
        rows, columns = (self.depth, self.free) if self.across else (self.free, self.depth)
        full_rows, full_columns = layout.padded(rows, -(-columns // self.format.block))
        tile = layout.TILE_ROWS * layout.TILE_COLUMNS
        tiles = blobs.unflatten(-1, (full_rows // layout.TILE_ROWS, full_columns // layout.TILE_COLUMNS, tile))
        if self.across:
            tiles = tiles[:, :, cut.start // self.step : -(-cut.stop // self.step)]
        else:
            tiles = tiles[:, cut.start // self.step : -(-cut.stop // self.step)]
        return tiles.flatten(1)


def _tiles(t: torch.Tensor, columns: int, cut: Cut) -> torch.Tensor:
    """A cut along the columns of codes or scales [B, R, n] in layout fragments, whose tiles follow each other."""
    batch, rows, _ = t.shape
    tiles = t.reshape(batch, rows // fragments.ROWS, columns // fragments.DEPTH, -1)
    part = tiles[:, :, cut.start // fragments.DEPTH : cut.stop // fragments.DEPTH]
    return part.reshape(batch, rows, -1)


# -- from the arguments of a kernel ------------------------------------------------------------------------------------


def shape_of(operand: Operand) -> tuple[int, ...]:
    """Return the logical shape of an operand."""
    if isinstance(operand, torch.Tensor):
        return tuple(operand.shape)
    sizes = list(operand.qdata.shape)
    sizes[operand.axis] = operand.size
    return tuple(sizes)


def sides(a: Operand, b: Operand) -> tuple[Side, Side, tuple[int, ...]]:
    """Return both operands and the shape of their product, a [..., M, K] @ b [..., K, N], broadcast as torch.matmul.

    Leading dimensions of `a` become rows where `b` has none and nothing stands in the way.
    """
    a_shape, b_shape = shape_of(a), shape_of(b)
    lead = a_shape[:-2] or b_shape[:-2]
    if len(a_shape) > 2 and len(b_shape) > 2 and a_shape[:-2] != b_shape[:-2]:
        lead = tuple(torch.broadcast_shapes(a_shape[:-2], b_shape[:-2]))
    shape = (*lead, a_shape[-2], b_shape[-1])
    if math.prod(b_shape[:-2]) == 1 and math.prod(a_shape[:-2]) != 1 and _has_rows(a):
        return _flat(a, a_shape), _side(b, b_shape, lead, -2), shape
    return _side(a, a_shape, lead, -1), _side(b, b_shape, lead, -2), shape


def _has_rows(a: Operand) -> bool:
    """Whether the leading dimensions of `a` can join its rows: a swizzled matrix is padded at its end."""
    return isinstance(a, torch.Tensor) or (a.axis == -1 and a.layout == layout.STRIDED)


def _flat(a: Operand, shape: tuple[int, ...]) -> Side:
    rows, depth = math.prod(shape[:-1]), shape[-1]
    if isinstance(a, torch.Tensor):
        return Side(1, rows, depth, a.reshape(1, rows, depth))
    codes = a.qdata.reshape(1, rows, a.qdata.shape[-1])
    outer = a.outer_scale
    if outer is not None and outer.numel() > 1:
        outer = outer.expand(*shape[:-1], outer.shape[-1]).reshape(1, rows, outer.shape[-1])
    side = Side(1, rows, depth, None, codes, a.scale.reshape(1, rows, a.scale.shape[-1]), a.format, a.layout)
    return _with_outer(side, outer)


def _side(operand: Operand, shape: tuple[int, ...], lead: tuple[int, ...], contraction: int) -> Side:
    """An operand in its own matrices, or in those of the product where it has several."""
    own = shape[:-2]
    batch = 1 if math.prod(own) == 1 else math.prod(lead)
    depth, free = shape[contraction], shape[-3 - contraction]

    def matrices(t: torch.Tensor, dims: int) -> torch.Tensor:
        tail = t.shape[t.dim() - dims :]
        return t.reshape(1, *tail) if batch == 1 else t.expand(*lead, *tail).reshape(batch, *tail)

    def turned(t: torch.Tensor) -> torch.Tensor:
        return t if contraction == -1 else t.transpose(-1, -2)

    if isinstance(operand, torch.Tensor):
        return Side(batch, free, depth, turned(matrices(operand, 2)))
    across = operand.axis != contraction

    def blocked_last(t: torch.Tensor) -> torch.Tensor:
        return t if operand.axis == -1 else t.transpose(-1, -2)

    swizzled = operand.layout == layout.SWIZZLED
    codes = matrices(blocked_last(operand.qdata), 2)
    scale = matrices(operand.scale, 1) if swizzled else matrices(blocked_last(operand.scale), 2)
    outer = operand.outer_scale
    if outer is not None and outer.numel() > 1:
        several = math.prod(outer.shape[:-2]) != 1
        outer = turned(matrices(outer, 2) if several else outer.reshape(1, *outer.shape[-2:]))
    side = Side(batch, free, depth, None, codes, scale, operand.format, operand.layout, across)
    return _with_outer(side, outer)


def _with_outer(side: Side, outer: torch.Tensor | None) -> Side:
    """Put an outer scale, () or [B, F, K] with sizes of 1, to where it belongs: after the product if it can be."""
    if outer is None:
        return side
    if outer.numel() == 1:
        side.late = outer.reshape(())
    elif outer.shape[2] == 1 and (outer.shape[1] == 1 or not side.across):
        side.late = outer
    else:
        side.outer = outer.transpose(-1, -2) if side.across else outer
    return side
