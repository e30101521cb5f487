"""Triton grouped matmul: tokens sorted by expert times each expert's matrix; the ends of the groups stay on the device.

Two ways, by how many tokens an expert has. Few: `grouped_codes` decodes tiles of b as it multiplies, so that b is read
once, as it is stored. Many: b is decoded to bfloat16 first, WORKSPACE bytes at a time, so that each of its elements is
decoded once and not once for every tile of tokens. Both multiply on bfloat16 tensor cores, which is exact for formats
whose values without outer scales are bfloat16 numbers; outer scales multiply the FP32 sums.

`grouped_wgrad` is the gradient of the matrices: the product along each expert's tokens. Nothing here asks the device
for the offsets, and grids follow from shapes alone, so that CUDA graphs capture all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Operand, Problem, Requires, kernel
from microscale.errors import InputError
from microscale.kernels.cublas.exact import BFLOAT16_BITS, significant_bits
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import dequantize, properties, ptx_tables
from microscale.kernels.triton.constants import only
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.format import FormatSpec

MANY = 256  # tokens for each expert from which b is decoded beforehand: faster at 512 on an H200
WORKSPACE = 2**30  # bytes of b that are decoded beforehand at a time; one expert's matrix, if that is larger
FLATTEN = True  # whether programs load their next tile while they store one, where the copy engine loads
DEPTH = 64  # of tiles of bfloat16 along the contraction: 128 bytes
BAND = 8  # tiles of tokens that go through an expert's columns together
# Derived in `kernels/cublas/two_pass.py`; values below 2**-126 keep the digits that bfloat16 has there.
BOUND = "(1.25 K + 8) 2**-23 sum |a| |b|: decoded for 16-bit tensor cores, FP32 sums of exact products; one rounding"


class Tile(NamedTuple):
    """A tile of the product, rows by columns, `depth` at a time; a program's warps and stages; how many an SM holds."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int


# -- what is taken -----------------------------------------------------------------------------------------------------


def is_decoded(operand: Operand) -> bool:
    """Return True for a plain operand, or one whose values, outer scales aside, are bfloat16 numbers."""
    fmt = operand.format
    return fmt is None or (dequantize._fits(fmt) and significant_bits(fmt) <= BFLOAT16_BITS)


def _exact(problem: Problem) -> bool:
    return all(map(is_decoded, problem.operands))


def _late(problem: Problem) -> bool:
    return all(o.outer != "mixed" for o in problem.operands)


def _has_codes(operand: Operand) -> bool:
    fmt = operand.format
    return fmt is not None and operand.axis == -2 and fmt.element.kind != "codebook" and dequantize._has_runs(fmt)


def _few(problem: Problem) -> bool:
    """Whether there are fewer than MANY tokens for each expert, both numbers rounded up to powers of two."""
    tokens, experts = (max(o.shape[0] - 1, 0).bit_length() for o in problem.operands)
    return tokens - experts < MANY.bit_length() - 1


def _requires(*checks: tuple[str, Callable[[Problem], bool]]) -> Requires:
    return Requires(
        devices=("cuda",), min_capability=(8, 0), dtypes=("bfloat16",), layouts=layout.LAYOUTS, packages=("triton",),
        checks=checks,
    )  # fmt: skip


_PRODUCT = (
    ("needs formats whose values, outer scales aside, are bfloat16 numbers", _exact),
    ("needs outer scales that are the same all along K", _late),
)

# -- kernels -----------------------------------------------------------------------------------------------------------


@kernel(
    "grouped_matmul", "triton.grouped_matmul", priority=20, bound=BOUND,
    requires=_requires(
        *_PRODUCT,
        ("needs a block-scaled b, its blocks along K, in runs of eight 4-, 6- or 8-bit codes",
         lambda p: _has_codes(p.operands[1])),
        (f"needs fewer than {MANY} tokens for each expert", _few),
    ),
)  # fmt: skip
def grouped_matmul(a: torch.Tensor | Parts, b: Parts, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N], tiles of b decoded in registers.

    Arguments as `reference.grouped_matmul`.
    """
    experts, columns, size = b.qdata.shape[0], b.qdata.shape[2], b.size
    a_TK, a_outer = values_of(a)
    out, done = _result((a_TK.shape[0], columns), a_TK, size * experts, out_dtype)
    if done:
        return out
    codes, swizzle = _in_rows(b.qdata.transpose(-1, -2)), b.layout == layout.SWIZZLED
    scale = _in_rows(b.scale if swizzle else b.scale.transpose(-1, -2))
    blocks = -(-size // b.format.block)
    # of swizzled scales, what 128 rows take
    scale_row = 128 * (-(-blocks // layout.TILE_COLUMNS) * layout.TILE_COLUMNS) if swizzle else scale.stride(1)
    outers = Outers.of(a_outer, spread(b, (experts, 1, columns)))
    tile = codes_tile(a_TK.shape[0], experts, size, properties.capability(out.device))
    sizes = (*out.shape, size, experts, blocks, a_TK.stride(0), *codes.stride()[:2], scale.stride(0), scale_row)
    launch(
        _jit().grouped_codes, _grid(tile, out, experts),
        (a_TK, codes, scale, outers.a, outers.b, offsets.contiguous(), out, *sizes, *outers.strides),
        codes_constants(b.format, tile, experts, size % tile.depth == 0, outers.which, swizzle), tile.warps,
    )  # fmt: skip
    return out


@kernel(
    "grouped_matmul", "triton.grouped_two_pass", priority=10, requires=_requires(*_PRODUCT),
    bound=BOUND,
)  # fmt: skip
def grouped_two_pass(
    a: torch.Tensor | Parts, b: torch.Tensor | Parts, offsets: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N], b decoded beforehand if it is not plain.

    Arguments as `reference.grouped_matmul`. Several matrices are decoded at a time, into WORKSPACE bytes.
    """
    (experts, size, columns) = b.shape if isinstance(b, torch.Tensor) else _logical(b)
    a_TK, a_outer = values_of(a)
    out, done = _result((a_TK.shape[0], columns), a_TK, size * experts, out_dtype)
    if done:
        return out
    offsets = offsets.contiguous()
    if isinstance(b, torch.Tensor):
        _multiply(a_TK, b, Outers.of(a_outer, None), offsets, out, 0)
        return out
    b_outer, step = spread(b, (experts, 1, columns)), max(1, WORKSPACE // (2 * size * columns))
    for first in range(0, experts, step):
        part = slice(first, min(experts, first + step))
        outers = Outers.of(a_outer, None if b_outer is None else b_outer[part])
        _multiply(a_TK, _decoded(b, part), outers, offsets, out, first)
    return out


@kernel(
    "grouped_wgrad", "triton.grouped_wgrad", priority=10, requires=_requires(),
    bound=BOUND.replace("K", "T"),
)  # fmt: skip
def grouped_wgrad(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return dy.T @ x of each group of rows of dy [T, N] and x [T, K]: [E, N, K]; as `reference.grouped_wgrad`."""
    experts, height, columns = offsets.shape[0], dy.shape[1], x.shape[1]
    out, done = _result((experts, height, columns), x, dy.shape[0], out_dtype)
    if done:
        return out
    down = (_in_columns(dy), _in_columns(x))
    dy, x = (t if there else _in_rows(t) for t, there in zip((dy, x), down, strict=True))
    tile = wgrad_tile(height, columns, properties.capability(x.device))
    tiles = experts * -(-height // tile.rows) * -(-columns // tile.columns)
    steps = (t.stride(1 if there else 0) for t, there in zip((dy, x), down, strict=True))
    sizes = (dy.shape[0], height, columns, experts, *steps)
    launch(
        _jit().grouped_transposed, min(tiles, tile.resident * properties.multiprocessors(x.device)),
        (dy, x, offsets.contiguous(), out, *sizes), wgrad_constants(tile, down), tile.warps,
    )  # fmt: skip
    return out


# -- operands ----------------------------------------------------------------------------------------------------------


class Outers(NamedTuple):
    """What multiplies the sums: factors for rows of a and for experts and columns of b, FP32, or placeholders."""

    a: torch.Tensor | None
    b: torch.Tensor | None
    strides: tuple[int, int, int]
    which: tuple[bool, bool]

    @classmethod
    def of(cls, a: torch.Tensor | None, b: torch.Tensor | None) -> Outers:
        """Make them of FP32 a [T, 1] and b [E, 1, N], None where there are none."""
        strides = (0 if a is None else a.stride(0), *((0, 0) if b is None else (b.stride(0), b.stride(2))))
        return cls(a, b, strides, (a is not None, b is not None))


def values_of(a: torch.Tensor | Parts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the bfloat16 values of a [T, K] in rows, and the outer scales of its rows."""
    if isinstance(a, torch.Tensor):
        return _in_rows(a), None
    values = _decoded(a, slice(None))
    return _in_rows(values), spread(a, (values.shape[0], 1))


def _decoded(parts: Parts, part: slice) -> torch.Tensor:
    """The bfloat16 values of an operand without its outer scale; of b, of some of its matrices."""
    qdata, scale = parts.qdata, parts.scale
    if qdata.dim() == 3:
        qdata, scale = qdata[part], scale[part]
    qdata = qdata.movedim(parts.axis, -1)
    scale = scale.movedim(parts.axis, -1) if parts.layout == layout.STRIDED else scale
    values = dequantize.dequantize(qdata, scale, None, parts.format, parts.size, parts.layout, torch.bfloat16)
    return values.movedim(-1, parts.axis)


def _logical(b: Parts) -> tuple[int, int, int]:
    shape = list(b.qdata.shape)
    shape[b.axis] = b.size
    return shape[0], shape[1], shape[2]


def spread(parts: Parts, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the outer scale as a view of `shape`, which is 1 along K."""
    outer = parts.outer_scale
    if outer is None:
        return None
    if outer.dim() and outer.shape[-1 if len(shape) == 2 else -2] != 1:
        raise InputError("grouped_matmul of an outer scale that changes along K", "requantize the operand as a whole")
    return outer.expand(shape)


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    """The same values, neighbours along the last dimension side by side, and bytes from a multiple of four on."""
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        t = t.contiguous()
    return t.clone(memory_format=torch.contiguous_format) if t.data_ptr() % 4 and t.dtype == torch.uint8 else t


def _in_columns(t: torch.Tensor) -> bool:
    """Whether neighbours along the first dimension lie side by side, in groups of eight that 16 bytes hold.

    So are operands that were decoded from blocks along the tokens.
    """
    return t.stride(0) == 1 and not (t.shape[0] % 8 or t.stride(1) % 8 or t.data_ptr() % 16)


def _result(
    shape: tuple[int, ...], like: torch.Tensor, depth: int, out_dtype: torch.dtype
) -> tuple[torch.Tensor, bool]:
    """An output to be filled, and whether that is done: it is empty, or there is nothing to sum up."""
    if depth:
        out = torch.empty(shape, dtype=out_dtype, device=like.device)
        return out, not out.numel()
    return torch.zeros(shape, dtype=out_dtype, device=like.device), True


# -- launches ----------------------------------------------------------------------------------------------------------


def _multiply(
    a: torch.Tensor, b: torch.Tensor, outers: Outers, offsets: torch.Tensor, out: torch.Tensor, first: int
) -> None:
    """Fill the rows of `out` that belong to the experts from `first` on, b holding their matrices [count, K, N]."""
    (count, size, columns), experts = b.shape, offsets.shape[0]
    across = b.stride(1) == 1 or size == 1
    matrices = _in_rows(b.transpose(-1, -2) if across else b)
    capability = properties.capability(a.device)
    copies = capability is not None and capability >= (9, 0) and _has_copies(a, matrices, across)
    tile = values_tile(a.shape[0], experts, columns, capability, copies)
    sizes = (*out.shape, size, experts, first, count, a.stride(0), *matrices.stride()[:2])
    even = size % tile.depth == 0
    known = values_constants(tile, experts, even, outers.which, across, copies)
    left, right = (a, matrices) if not copies else _descriptors(a, matrices, across, tile)
    launch(
        _jit().grouped_values, _grid(tile, out, count),
        (left, right, outers.a, outers.b, offsets, out, *sizes, *outers.strides), known, tile.warps,
    )  # fmt: skip


def _has_copies(a: torch.Tensor, matrices: torch.Tensor, across: bool) -> bool:
    """Whether the copy engine reads both operands: rows start at multiples of 16 bytes, matrices follow each other.

    Tiles may reach over the end of a group or matrix, into rows and columns that are then not stored. Not so along K:
    there they may only reach over the end of everything, which counts as zeros.
    """
    step, row, _ = matrices.stride()
    aligned = not any(t.data_ptr() % 16 for t in (a, matrices)) and a.stride(0) % 8 == row % 8 == 0
    stacked = matrices.shape[0] == 1 or step == matrices.shape[1] * row
    return aligned and stacked and (across or matrices.shape[1] % DEPTH == 0)


def _descriptors(a: torch.Tensor, matrices: torch.Tensor, across: bool, tile: Tile) -> tuple[Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    count, height, width = matrices.shape
    block = [tile.columns, tile.depth] if across else [tile.depth, tile.columns]
    return (
        TensorDescriptor(a, list(a.shape), list(a.stride()), [tile.rows, tile.depth]),
        TensorDescriptor(matrices, [count * height, width], [matrices.stride(1), 1], block),
    )


def _grid(tile: Tile, out: torch.Tensor, groups: int) -> int:
    """Programs: as many as tiles at the most, or as the device holds. A group that is not empty has a token."""
    rows, columns = out.shape
    tiles = (rows + min(rows, groups) * (tile.rows - 1)) // tile.rows * -(-columns // tile.columns)
    return max(1, min(tiles, tile.resident * properties.multiprocessors(out.device)))


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_grouped

    return jit_grouped


# -- tiles and constexpr arguments -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def codes_tile(tokens: int, experts: int, size: int, capability: tuple[int, int] | None) -> Tile:
    """Return the tile of `grouped_codes`: as many rows as an expert has tokens, were they spread evenly.

    The more rows, the fewer times b is decoded. Tiles of 64 rows and more are for warp groups.
    """
    rows = min(256 if _is_large(capability) else 128, max(16, properties.power_of_two_at_least(-(-tokens // experts))))
    if rows < 64:
        return Tile(rows, 64, 128 if size % 128 == 0 or size % 64 else 64, 4, 4, 6)
    return Tile(rows, 128, DEPTH, 4 if rows == 64 else 8, 4, 2 if rows == 64 else 1)


@functools.lru_cache(maxsize=1024)
def values_tile(tokens: int, experts: int, columns: int, capability: tuple[int, int] | None, copies: bool) -> Tile:
    """Return the tile of `grouped_values`; large ones are for the 227 KiB of data center chips since Hopper."""
    each = -(-tokens // experts)
    if each > 64 and columns > 128 and copies and _is_large(capability):
        return Tile(128, 256, DEPTH, 8, 4, 1)
    if each > 64:
        return Tile(128, 128, DEPTH, 8, 3, 1)
    return Tile(64 if each > 16 else 16, 128, DEPTH, 4, 3, 2)


def _is_large(capability: tuple[int, int] | None) -> bool:
    """Whether a program may have 227 KiB of shared memory, and warps multiply in groups."""
    return capability is not None and (9, 0) <= capability < (12, 0)


@functools.lru_cache(maxsize=1024)
def wgrad_tile(height: int, columns: int, capability: tuple[int, int] | None) -> Tile:
    """Return the tile of `grouped_transposed`."""
    if _is_large(capability) and height > 64 and columns > 128:
        return Tile(128, 256, DEPTH, 8, 4, 1)
    return Tile(128 if height > 64 else 64, 128, DEPTH, 8, 3, 1)


@functools.lru_cache(maxsize=1024)
def codes_constants(
    fmt: FormatSpec, tile: Tile, experts: int, even: bool, outers: tuple[bool, bool], swizzle: bool
) -> Mapping[str, Any]:
    """Return the constexpr arguments of `grouped_codes`."""
    known = dict(dequantize.run_constants(fmt, even, dequantize.ANY_ROWS, False, swizzle, dequantize.NONE))
    known |= _tile_constants(tile, experts, outers) | {"EVEN": even, "LOOK_UP": "", "LOOK_UP_IN": ""}
    if ptx_tables.has_table(fmt.element) and not properties.interpreted():
        known |= {"LOOK_UP": f"{{ {''.join(ptx_tables.look_up(fmt.element))} }}", "LOOK_UP_IN": ptx_tables.CONSTRAINTS}
    return only(_jit().grouped_codes, known)


@functools.lru_cache(maxsize=1024)
def values_constants(
    tile: Tile, experts: int, even: bool, outers: tuple[bool, bool], across: bool, copies: bool
) -> Mapping[str, Any]:
    """Return the constexpr arguments of `grouped_values`."""
    return {**_tile_constants(tile, experts, outers), "EVEN": even, "ACROSS": across, "COPIES": copies,
            "FLATTEN": copies and FLATTEN}  # fmt: skip


@functools.lru_cache(maxsize=1024)
def wgrad_constants(tile: Tile, down: tuple[bool, bool] = (False, False)) -> Mapping[str, Any]:
    """Return the constexpr arguments of `grouped_transposed`; `down`: which operands are stored column by column."""
    known = _tile_constants(tile, 1, (False, False)) | {"A_DOWN": down[0], "B_DOWN": down[1]}
    return only(_jit().grouped_transposed, known)


def _tile_constants(tile: Tile, experts: int, outers: tuple[bool, bool]) -> dict[str, Any]:
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.stages, "BAND": BAND,
        "LANES": properties.power_of_two_at_least(experts), "A_OUTER": outers[0], "B_OUTER": outers[1],
        "INTERPRETED": properties.interpreted(),
    }  # fmt: skip
