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
from microscale.kernels.triton.fragments import outer_of
from microscale.kernels.triton.grouped import BOUND, Outers, is_decoded, spread, values_of
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.format import FormatSpec

DEEP = 256  # K from which FP32 scales are taken, see above
MOST_ROWS = 1024  # of x up to which a dense product is not decoded beforehand, where that is exact
COLUMNS, WARPS = 128, 8  # of a tile; of a program
SHARED = 200 << 10  # bytes of shared memory for stages, of 227 KiB; the rest is for results on their way out
UNITS = {4: torch.uint8, 6: torch.int32, 8: torch.int16}  # of codes for the copy engine, by their bits
REGISTERS = 65536  # of an SM
NO_OUTERS = Outers(None, None, (0, 0, 0), (False, False))
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
    requires=_requires(
        3, ("needs tokens", lambda p: p.operands[0].shape[0] > 0),
        ("needs tokens whose values, outer scales aside, are bfloat16 numbers", lambda p: is_decoded(p.operands[0])),
    ),
)  # fmt: skip
def grouped_matmul(a: torch.Tensor | Parts, b: Parts, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N]; arguments as `reference.grouped_matmul`."""
    x, a_outer = values_of(a)
    experts, _, columns = b.qdata.shape
    rows = x.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    if rows and columns:
        outers = Outers.of(a_outer, spread(b, (experts, 1, columns)))
        run(x, b, outers, None, offsets.contiguous(), out, tile_of(b.format, -(-rows // experts), b.size, out_dtype))
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
    columns = b.qdata.shape[1]
    x = a if a.dim() == 2 else a.reshape(-1, a.shape[-1])
    rows = x.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    if rows and columns:
        outers = NO_OUTERS
        if b.outer_scale is not None:
            outer, kind = outer_of(b.outer_scale, columns, x)
            outers = Outers(None, outer, (0, 0, kind - 1), (False, True))
        added = None if bias is None else bias.expand(columns).contiguous()
        run(x, b, outers, added, None, out, tile_of(b.format, rows, b.size, out_dtype))
    return out if a.dim() == 2 else out.view(*a.shape[:-1], columns)


# -- launches ----------------------------------------------------------------------------------------------------------


def run(
    x: torch.Tensor, b: Parts, outers: Outers, bias: torch.Tensor | None, offsets: torch.Tensor | None,
    out: torch.Tensor, tile: Tile,
) -> None:  # fmt: skip
    """Fill out [T, N] with x [T, K] times b: its matrix [K, N], or by groups of rows its [E, K, N] if given offsets.

    A dense product has K in parts where there are few tiles; their sums are added up in one order.
    """
    jit_wgmma, jit_splits = _kernels()
    fmt, swizzle, device = b.format, b.layout == layout.SWIZZLED, out.device
    rows, columns = out.shape
    x, codes, scale = _in_rows(x), _units(b.qdata, UNITS[fmt.element.width]), _scales(b.scale, swizzle)
    plan = plan_of(
        fmt, tile, (rows, columns, b.size, 0 if offsets is None else b.qdata.shape[0]),
        (x.stride(), codes.stride(), scale.stride(), outers.strides), swizzle, (*outers.which, bias is not None),
        properties.multiprocessors(device),
    )  # fmt: skip
    operands = _described(x, plan.x), _described(codes, plan.codes), plan.rest and _described(codes, plan.rest), scale
    if plan.adds is None:
        args = (*operands, outers.a, outers.b, bias, offsets, out, *plan.sizes)
        launch(jit_wgmma.multiply_codes, plan.grid, args, plan.constants, WARPS)
        return
    total = rows * columns
    parts = torch.empty(plan.adds["SPLITS"] * total, dtype=torch.float32, device=device)
    args = (*operands, None, None, None, None, parts, *plan.sizes)
    launch(jit_wgmma.multiply_codes, plan.grid, args, plan.constants, WARPS)
    args = (parts, parts if outers.b is None else outers.b, parts if bias is None else bias, out, columns, total)
    launch(jit_splits.add_splits, -(-total // plan.adds["SIZE"]), args, plan.adds, 4)


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The jitted kernels, which cannot be imported where Triton is not installed."""
    from microscale.kernels.triton import jit_splits, jit_wgmma

    return jit_wgmma, jit_splits


def _units(qdata: torch.Tensor, unit: torch.dtype) -> torch.Tensor:
    """Codes [E, bytes, N] or [bytes, N] in rows of units of the copy engine [E * N, units], if they lie so a view."""
    codes = _in_rows(qdata.mT if qdata.dim() == 2 else qdata.mT.flatten(0, 1))
    return codes if codes.dtype == unit else codes.view(unit)


def _in_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The same matrix, for the copy engine: rows from multiples of 16 bytes on."""
    row, one = matrix.stride()
    fits = one == 1 and row * matrix.element_size() % 16 == 0 and row >= matrix.shape[1]
    return matrix if fits and matrix.data_ptr() % 16 == 0 else matrix.clone(memory_format=torch.contiguous_format)


def _scales(scale: torch.Tensor, swizzle: bool) -> torch.Tensor:
    """The same scales, for loads of words: those along K side by side, rows from multiples of 4 bytes on."""
    strides = scale.stride()
    one, row = (strides[-1], 0) if swizzle else strides[-2:]
    step = strides[0] if len(strides) == 3 - swizzle else 0  # of matrices
    if one == 1 and (row | step) * scale.element_size() % 4 == 0 and scale.data_ptr() % 4 == 0:
        return scale
    in_rows = (scale if swizzle else scale.mT).clone(memory_format=torch.contiguous_format)
    return in_rows if swizzle else in_rows.mT


# -- plans -------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Constants, programs and last arguments of `multiply_codes`, and what its descriptors have but for their tensors.

    `adds`: the constants of the second kernel, which adds the parts of K; None where the first gives the result.
    """

    constants: Mapping[str, Any]
    grid: int
    sizes: tuple[int, ...]
    x: Mapping[str, Any]
    codes: Mapping[str, Any]
    rest: Mapping[str, Any] | None
    adds: Mapping[str, Any] | None


@functools.lru_cache(maxsize=1024)
def plan_of(
    fmt: FormatSpec, tile: Tile, shape: tuple[int, int, int, int], strides: tuple[tuple[int, ...], ...], swizzle: bool,
    epilogue: tuple[bool, bool, bool], processors: int,
) -> Plan:  # fmt: skip
    """Return the plan of a product, which depends on how its tensors lie and not on where.

    `shape`: rows, columns, K, and matrices, 0 for a dense product; `strides`: of x, codes (`_units`) and scales, and
    those of `Outers`; `epilogue`: outer scales of a and b, and a bias.
    """
    (rows, columns, size, experts), (x_strides, code_strides, scale_strides, outer_strides) = shape, strides
    groups, blocks = max(1, experts), size // fmt.block
    splits = 1 if experts else splits_of(tile, rows, columns, size, processors)
    adds = None
    if splits > 1:  # what follows the sums is for the second kernel
        adds = _sum_constants(splits, 1 + outer_strides[2] if epilogue[1] else 0, epilogue[2])
        epilogue, outer_strides = (False, False, False), (0, 0, 0)
    # of swizzled scales, what 128 rows take
    scale_row = 128 * layout.TILE_COLUMNS * -(-blocks // layout.TILE_COLUMNS) if swizzle else scale_strides[-1]
    tiles = (rows + min(rows, groups) * (tile.rows - 1)) // tile.rows if experts else -(-rows // tile.rows)
    grid = max(1, min(tiles * -(-columns // COLUMNS) * splits, tile.resident * processors))
    unit = UNITS[fmt.element.width]
    units = [groups * columns, size * fmt.element.width // (8 * unit.itemsize)]
    (block, rest), (x_layout, block_layout, rest_layout) = boxes(fmt, tile), layouts(fmt, tile)
    return Plan(
        constants(fmt, tile, lanes_of(groups), splits, experts > 0, epilogue, swizzle), grid,
        (rows, columns, size, groups, blocks, scale_strides[0] if experts else 0, scale_row, *outer_strides),
        _facts(torch.bfloat16, [rows, size], x_strides, [tile.rows, tile.depth], x_layout),
        _facts(unit, units, code_strides, block, block_layout),
        None if rest is None else _facts(unit, units, code_strides, rest, rest_layout), adds,
    )  # fmt: skip


def lanes_of(groups: int) -> int:
    """Return the lanes that hold the groups."""
    return max(32, properties.power_of_two_at_least(groups))


def _facts(
    dtype: torch.dtype, shape: list[int], strides: tuple[int, ...], block: list[int], its_layout: Any
) -> Mapping[str, Any]:
    """Return what a descriptor has but for its matrix, all of which Triton has checked."""
    made = _descriptor()(torch.empty(0, dtype=dtype, device="cpu"), shape, list(strides), block, its_layout)
    return {name: value for name, value in vars(made).items() if name != "base"}


def _described(matrix: torch.Tensor, facts: Mapping[str, Any]) -> Any:
    """Return the descriptor of a matrix that starts at a multiple of 16 bytes; Triton's checks take some 5 us."""
    made = object.__new__(_descriptor())
    made.__dict__ = {**facts, "base": matrix}
    return made


@functools.cache
def _descriptor() -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor


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


@functools.lru_cache(maxsize=64)
def _sum_constants(splits: int, outer: int, bias: bool) -> Mapping[str, Any]:
    """The constants of `add_splits`. `outer`: 0 none, 1 a number, 2 one per column."""
    return {"SPLITS": splits, "OUTER": outer, "BIAS": bias, "SIZE": 1024 if splits < 8 else 512}
