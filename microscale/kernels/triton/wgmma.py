"""bfloat16 rows times coded matrices on Hopper, dense or by group: decoded in registers, a step ahead of wgmma.

Fused, because decoding beforehand writes and reads 2 bytes for each weight, which a matrix with few hundred rows of x
does not pay for: 8 experts of 14336 x 4096 with 512 rows each take 285 us to decode from 4 bits, and 604 us to
multiply. Here the matrix is the left operand, which wgmma takes from registers, so decoded values never leave them: 128
columns of the product by up to 256 rows, for which 64 of K take the tensor cores 1024 cycles, and decoding them some
540 issue slots of each scheduler at the same time (`jit_wgmma.py`, `ptx_pairs.py`). Pairs of 4 or 8 bits are loaded
as such from shared memory; those of 6 bits are cut out of words, which takes a quarter more (`ptx_sixes.py`).

Scales that leave values exact in bfloat16 multiply the values. FP32 scales do not; they multiply FP32 sums, one for
each step of 64 or 128 along K, which are then added up in FP32. Errors, S being the sum of |a| |b| over K:

values    None, but that values below 2**-126 keep the digits that bfloat16 has there.
tables    A value of a codebook is the sum of two bfloat16, to 2**-16 of itself: 2**-16 S.
sums      Of K products without FP32 scales: (1 + 1/16) K 2**-23 S, as `kernels/cublas/two_pass.py` derives. With them
          (1 + 1/16) 128 2**-23 S in a step, 2**-24 S for each of the K / 64 steps that are added, 2**-24 S for a scale;
          sums of the second parts of tables, at most 2**-7 S, add 2**-7 of the first term.

With tables that is (128 + 138 + K / 128) 2**-23 S at most, which is below (1.25 K + 8) 2**-23 S from K = 208 on; with
other elements from K = 112 on. So K is at least DEEP where scales are FP32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Operand, Problem, Requires, kernel
from microscale.kernels.cublas.exact import BFLOAT16_BITS, significant_bits
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import properties, ptx_pairs, ptx_sixes
from microscale.kernels.triton.grouped import BOUND, Outers, spread, values_of
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.format import FormatSpec

DEEP = 256  # K from which FP32 scales are taken, see above
MOST_ROWS = 1024  # of x up to which a dense product is not decoded beforehand, where that is exact
COLUMNS, WARPS = 128, 8  # of a tile; of a program
SHARED = 200 << 10  # bytes of shared memory for stages, of 227 KiB; the rest is for results on their way out
UNITS = {4: torch.uint8, 6: torch.int32, 8: torch.int16}  # of codes for the copy engine, by their bits
REGISTERS = 65536  # of an SM
BAND = 8  # tiles of rows that go through the columns together


class Tile(NamedTuple):
    """Rows of x and depth along K of a tile, stages that are loaded ahead, and programs that an SM holds."""

    rows: int
    depth: int
    stages: int
    resident: int


# -- what is taken -----------------------------------------------------------------------------------------------------


def _has_codes(fmt: FormatSpec | None) -> bool:
    """Whether codes are decoded in pairs, and scales apply as they do here."""
    if fmt is None:
        return False
    if fmt.scale.torch_dtype == "float32":
        return fmt.block in (64, 128) and (ptx_pairs.has_pairs(fmt.element) or ptx_pairs.has_tables(fmt.element))
    exact = ptx_pairs.has_pairs(fmt.element) and ptx_pairs.has_scale(fmt.scale)
    return exact and fmt.block in (16, 32, 64) and significant_bits(fmt) <= BFLOAT16_BITS


def _is_matrix(operand: Operand, dims: int) -> bool:
    return _has_codes(operand.format) and operand.axis == -2 and len(operand.shape) == dims


def _is_deep(operand: Operand) -> bool:
    """Whether steps divide K, and words of scales its blocks; both are powers of two, as selections are cached."""
    fmt, size = operand.format, operand.shape[-2]
    if fmt is None or not size:
        return False
    if fmt.scale.torch_dtype == "float32":
        return size % fmt.block == 0 and size >= DEEP
    return size % max(64, 4 * fmt.block) == 0


def _few_rows(problem: Problem) -> bool:
    fmt = problem.operands[1].format
    rows = 1
    for n in problem.operands[0].shape[:-1]:
        rows *= 1 << max(0, n - 1).bit_length() if n else 0
    return rows > 0 and (rows <= MOST_ROWS or (fmt is not None and fmt.scale.torch_dtype == "float32"))


def _requires(dims: int, *checks: tuple[str, Callable[[Problem], bool]]) -> Requires:
    return Requires(
        devices=("cuda",), min_capability=(9, 0), max_capability=(9, 0), dtypes=("bfloat16",), layouts=layout.LAYOUTS,
        packages=("triton",),
        checks=(
            ("needs a block-scaled b, its blocks along K, of 4-, 6- or 8-bit codes that bfloat16 holds, times "
             "their scale or before an FP32 one", lambda p: _is_matrix(p.operands[1], dims)),
            ("needs a K in whole steps of 64 and four scales, and at least 256 for FP32 scales",
             lambda p: _is_deep(p.operands[1])),
            ("needs outer scales that are the same all along K", lambda p: all(o.outer != "mixed" for o in p.operands)),
            *checks,
        ),
    )  # fmt: skip


# -- kernels -----------------------------------------------------------------------------------------------------------


@kernel(
    "grouped_matmul", "triton.grouped_wgmma", priority=30, bound=BOUND,
    requires=_requires(3, ("needs tokens", lambda p: p.operands[0].shape[0] > 0)),
)  # fmt: skip
def grouped_matmul(a: torch.Tensor | Parts, b: Parts, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N]; arguments as `reference.grouped_matmul`."""
    x, a_outer = values_of(a)
    experts, _, columns = b.qdata.shape
    out = torch.empty(x.shape[0], columns, dtype=out_dtype, device=x.device)
    if out.numel():
        outers = Outers.of(a_outer, spread(b, (experts, 1, columns)))
        tile = tile_of(b.format, -(-x.shape[0] // experts), b.size, out_dtype)
        run(x, b, outers, None, offsets.contiguous(), out, tile)
    return out


@kernel(
    "matmul", "triton.wgmma", priority=25, bound=BOUND,
    requires=_requires(
        2,
        ("needs a plain left operand", lambda p: p.operands[0].format is None),
        (f"needs FP32 scales or at most {MOST_ROWS} rows", _few_rows),
        ("adds a bias of one number per column", lambda p: p.bias is None or len(p.bias.shape) == 1),
    ),
)  # fmt: skip
def matmul(a: torch.Tensor, b: Parts, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias; arguments and result as `reference.matmul`."""
    columns = b.qdata.shape[-1]
    x = a.reshape(-1, a.shape[-1])
    if not x.shape[0]:
        return torch.empty(*a.shape[:-1], columns, dtype=out_dtype, device=a.device)
    whole = Parts(b.qdata[None], b.scale[None], b.outer_scale, b.format, b.axis, b.size, b.layout)
    outers = Outers.of(None, spread(b, (1, 1, columns)))
    tile = tile_of(b.format, x.shape[0], b.size, out_dtype)
    made = dense(x, whole, outers, None if bias is None else bias.expand(columns).contiguous(), out_dtype, tile)
    return made.reshape(*a.shape[:-1], columns)


def dense(
    x: torch.Tensor, b: Parts, outers: Outers, bias: torch.Tensor | None, out_dtype: torch.dtype, tile: Tile
) -> torch.Tensor:
    """Return x [M, K] @ b [1, K, N] + bias, K in parts where there are few tiles, which are added in one order."""
    rows, columns = x.shape[0], b.qdata.shape[-1]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    splits = splits_of(tile, rows, columns, b.size, properties.multiprocessors(x.device))
    if splits == 1:
        run(x, b, outers, bias, None, out, tile)
        return out
    from microscale.kernels.triton import jit_splits

    parts = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    run(x, b, Outers.of(None, None), None, None, parts, tile)
    outer = outers.b if outers.b is None else outers.b.reshape(-1).contiguous()
    known = _sum_constants(splits, outer is not None, bias is not None)
    total = rows * columns
    args = (parts, parts if outer is None else outer, parts if bias is None else bias, out, columns, total)
    launch(jit_splits.add_splits, -(-total // known["SIZE"]), args, known, 4)
    return out


@functools.lru_cache(maxsize=64)
def _sum_constants(splits: int, outer: bool, bias: bool) -> Mapping[str, Any]:
    return {"SPLITS": splits, "OUTER": 2 if outer else 0, "BIAS": bias, "SIZE": 1024 if splits < 8 else 512}


# -- launches ----------------------------------------------------------------------------------------------------------


def run(
    x: torch.Tensor, b: Parts, outers: Outers, bias: torch.Tensor | None, offsets: torch.Tensor | None,
    out: torch.Tensor, tile: Tile,
) -> None:  # fmt: skip
    """Fill out [T, N] (or [splits, T, N]) with x [T, K] times b [E, K, N], by groups of rows unless offsets is None."""
    from microscale.kernels.triton import jit_wgmma

    experts, _, columns = b.qdata.shape
    (rows, size), blocks = x.shape, b.size // b.format.block
    splits, swizzle = out.shape[0] if out.dim() == 3 else 1, b.layout == layout.SWIZZLED
    x, codes, scale = _in_rows(x), _in_rows(b.qdata.mT), _scales(b.scale if swizzle else b.scale.mT)
    scale_row = 128 * (-(-blocks // layout.TILE_COLUMNS) * layout.TILE_COLUMNS) if swizzle else scale.stride(1)
    groups = 1 if offsets is None else experts
    known = constants(
        b.format, tile, lanes_of(groups), splits, offsets is not None, (*outers.which, bias is not None), swizzle
    )
    tiles = (rows + min(rows, groups) * (tile.rows - 1)) // tile.rows if offsets is not None else -(-rows // tile.rows)
    grid = min(tiles * -(-columns // COLUMNS) * splits, tile.resident * properties.multiprocessors(x.device))
    args = (
        *_descriptors(x, codes, b.format, tile), scale, outers.a, outers.b, bias, offsets, out, rows, columns, size,
        groups, blocks, scale.stride(0), scale_row, *outers.strides,
    )  # fmt: skip
    launch(jit_wgmma.multiply_codes, max(1, grid), args, known, WARPS)


def lanes_of(groups: int) -> int:
    """Return the lanes that hold the groups."""
    return max(32, properties.power_of_two_at_least(groups))


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    """The same matrices, for the copy engine: rows from multiples of 16 bytes on, matrices one after the other."""
    stacked = t.dim() == 2 or t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    fits = t.stride(-1) == 1 and t.stride(-2) * t.element_size() % 16 == 0 and t.stride(-2) >= t.shape[-1]
    if stacked and fits and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _scales(t: torch.Tensor) -> torch.Tensor:
    """The same scales, for loads of words: rows from multiples of 4 bytes on."""
    fits = t.stride(-1) == 1 and all(s * t.element_size() % 4 == 0 for s in t.stride()[:-1])
    return t if fits and t.data_ptr() % 4 == 0 else t.clone(memory_format=torch.contiguous_format)


def _descriptors(x: torch.Tensor, codes: torch.Tensor, fmt: FormatSpec, tile: Tile) -> tuple[Any, ...]:
    """What the copy engine takes of x [T, K], and of codes [E, N, bytes] as pairs [E * N, K / 2] or as words."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x_layout, *code_layouts = layouts(fmt, tile)
    experts, columns, _ = codes.shape
    row = codes.stride(1)
    units = codes.as_strided((experts * columns, codes.shape[2]), (row, 1)).view(UNITS[fmt.element.width])
    blocks = (
        block and TensorDescriptor(units, list(units.shape), list(units.stride()), block, its_layout)
        for block, its_layout in zip(boxes(fmt, tile), code_layouts, strict=True)
    )
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.rows, tile.depth], x_layout), *blocks


def boxes(fmt: FormatSpec, tile: Tile) -> tuple[list[int], list[int] | None]:
    """Return the blocks of codes that fill a stage: of pairs; or, of 6 bits, of words, two thirds and the rest."""
    if fmt.element.width == ptx_sixes.WIDTH:
        return [COLUMNS, tile.depth // 8], [COLUMNS, tile.depth // 16]
    return [COLUMNS, tile.depth // 2], None


@functools.lru_cache(maxsize=64)
def layouts(fmt: FormatSpec, tile: Tile) -> tuple[Any, ...]:
    """Return the layouts of x and of the two blocks of codes in shared memory."""
    from triton.experimental.gluon import language as gl

    bits = 8 * UNITS[fmt.element.width].itemsize
    rows = (block and block[1] * bits // 8 for block in boxes(fmt, tile))  # bytes of one
    made = (row and gl.NVMMASharedLayout(min(128, row) if row >= 32 else 0, bits, 2) for row in rows)
    return gl.NVMMASharedLayout(128, 16, 2), *made


# -- tiles and constexpr arguments -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def tile_of(fmt: FormatSpec, rows: int, size: int, out_dtype: torch.dtype) -> Tile:
    """Return the tile for so many rows of x for each matrix, were they spread evenly, K, and the result's dtype."""
    wide = fmt.scale.torch_dtype == "float32"
    most = 128 if wide or out_dtype == torch.float32 else 256  # two sets of sums, or wide ones, fill registers sooner
    across = min(most, max(16, properties.power_of_two_at_least(rows)))
    depth = 64
    holds_scales = fmt.block == 128 if wide else fmt.block >= 32  # one FP32 scale, or a word of four, for a step
    if size % 128 == 0 and holds_scales and (wide or across <= 64):
        depth = 128
    resident = 1 if across > (32 if wide else 128) else 2
    stage = across * depth * 2 + COLUMNS * depth * fmt.element.width // 8
    return Tile(across, depth, max(2, min(6, SHARED // resident // stage, size // depth + 1)), resident)


def splits_of(tile: Tile, rows: int, columns: int, size: int, processors: int) -> int:
    """Return into how many parts of K a dense product is cut, so that there is a tile for every program."""
    tiles, steps = -(-rows // tile.rows) * -(-columns // COLUMNS), size // tile.depth
    wanted = max(1, min(tile.resident * processors // tiles, steps // (2 * tile.stages), 16))
    for splits in range(wanted, 1, -1):
        each = -(-steps // splits)
        if -(-steps // each) == splits and steps - each * (splits - 1) >= tile.stages - 1:
            return splits
    return 1


@functools.lru_cache(maxsize=1024)
def constants(
    fmt: FormatSpec, tile: Tile, lanes: int, splits: int, by_group: bool, epilogue: tuple[bool, bool, bool],
    swizzle: bool,
) -> Mapping[str, Any]:  # fmt: skip
    """Return the constexpr arguments of `multiply_codes`, and options of its compiler.

    `epilogue`: outer scales of a and b, and a bias.
    """
    wide, table = fmt.scale.torch_dtype == "float32", fmt.element.kind == "codebook"
    decode = ptx_pairs.look_up(fmt.element) if table else ptx_pairs.pair(fmt.element, not wide)
    gathered = fmt.element.width == ptx_sixes.WIDTH
    # For gathering ptxas, unless told, takes a few registers more for large tiles than let an SM hold two programs.
    many = gathered and tile.resident > 1 and (wide or tile.rows * tile.depth >= 64 * 128)
    limit = {"maxnreg": REGISTERS // (32 * WARPS * tile.resident)} if many else {}
    taken = ptx_pairs.TWO_PAIRS if table else ptx_pairs.PAIR if wide else ptx_pairs.SCALED_PAIR
    return {
        "BM": tile.rows, "BN": COLUMNS, "BK": tile.depth, "STAGES": tile.stages, "WARPS": WARPS, "BAND": BAND,
        "LANES": lanes, "SPLITS": splits, "GROUPED": by_group, "BLOCK": fmt.block, "SWIZZLE": swizzle, "WIDE": wide,
        "A_OUTER": epilogue[0], "B_OUTER": epilogue[1], "BIAS": epilogue[2], "TABLE": table,
        "DECODE": decode, "DECODE_IN": taken, "SCALE": "" if wide else ptx_pairs.scale(fmt),
        "SCALE_IN": "" if wide else ptx_pairs.ONE_SCALE,
        "GATHER": ptx_sixes.gather(fmt.element) if gathered else "", "GATHER_IN": ptx_sixes.GATHER if gathered else "",
        "BASE": ptx_sixes.base(fmt.element) if gathered else 0, **limit,
    }  # fmt: skip
