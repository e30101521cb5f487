"""GEMM of some tens to hundreds of rows of bfloat16 with a weight in layout `fragments`, on Hopper (sm_90).

The weight is the A operand of `wgmma`, decoded in the registers that hold it, so that nothing of it crosses shared
memory decoded; x is the B operand, which the copy engine brings to shared memory and tensor cores read there. Programs
are one or two warpgroups, as many to an SM as fit it, so that one decodes while another multiplies; and each has a
product in flight, or two, while it decodes: of a step of 64 of K, 128 columns by 128 rows take the tensor cores 512
cycles, and decoding 128 columns of 4 bits some 220 instructions of each of four warps. Tiles seldom fill the last wave
of SMs, so steps are dealt out evenly to as many programs as run at once, to whatever tiles they belong (stream-K), to
neighbours with other rows of x the same ones; a second kernel adds the FP32 sums of tiles that programs share, in one
order, so that results repeat bit for bit.

Error: decoded operands are exact; FP32 accumulation, outer scale and bias in FP32, one rounding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference.matmul import Operand as KernelOperand
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import fragments, properties, ptx_decode
from microscale.kernels.triton.launch import launch
from microscale.numerics.fragments import DEPTH
from microscale.spec.format import FormatSpec

LEAST_ROWS, MOST_ROWS = 17, 2048  # of x; above, decoding beforehand costs less than decoding for each tile of x
MOST_ROWS_OF_SIX = 1024  # bits
MOST_ROWS_SCALED = 4096  # with a scale for each column, which cuBLAS does not apply: another pass over the result
SHARED = 227 << 10  # bytes of shared memory of an SM that programs can have, 1 KiB of each for the system
FULL = 0.8  # of the programs that run at once: from this on tiles are cut into equal parts
WHOLE = 0.9  # of the steps that a program would have with whole tiles: from this on it gets those
FEW = 100  # steps of tiles of 128 columns for each SM: up to this each program has so few that they are cut otherwise
BOUND = "FP32 accumulation over exact operands, one rounding; repeats bit for bit"


class Tile(NamedTuple):
    """Rows of x; warps of a program and units of 16 columns of each; programs that fit an SM, and steps in flight."""

    rows: int
    warps: int
    units: int
    resident: int
    stages: int

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return 16 * self.warps * self.units


# As measured on an H200. Decoding is a chain of instructions that takes as long as what it feeds takes to multiply, so
# more warps, or more rows for what is decoded, go before traffic: with 256 rows a warp decodes half as much for each
# product as with 128. Six bits decode two units at once.
TILES = {32: Tile(32, 4, 2, 4, 4), 64: Tile(64, 4, 2, 3, 4), 128: Tile(128, 4, 2, 2, 4), 256: Tile(256, 8, 1, 1, 4)}
SHORT_TILES = {64: Tile(64, 8, 1, 2, 5), 128: Tile(128, 8, 1, 1, 6)}  # for few steps
SIX_TILES = {32: Tile(32, 4, 4, 3, 4), 256: Tile(128, 4, 2, 2, 4)}


class Cut(NamedTuple):
    """`programs` share the steps of all tiles."""

    tile: Tile
    programs: int


@functools.lru_cache(maxsize=4096)
def cut_of(fmt: FormatSpec, rows: int, shape: tuple[int, int], sms: int) -> Cut:
    """Return the cut for x [rows, K], a weight of this shape, [N, K], and a number of SMs.

    Where so many parts of tiles, each tile in equal ones, nearly fill the GPU, those are taken; else every program has
    an equal share of the steps.
    """
    columns, depth = shape
    size = 32 if rows <= 32 else 64 if rows <= 64 else 128 if -(-rows // 128) % 2 else 256
    tile = TILES[size]
    if held_by(fmt) == 4:
        tile = SIX_TILES.get(size, tile)
    elif -(-rows // tile.rows) * -(-columns // 128) * (depth // DEPTH) <= FEW * sms:
        tile = SHORT_TILES.get(size, tile)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    places = tile.resident * sms
    parts = tiles * (places // tiles)
    return Cut(tile, parts if parts >= FULL * places else places)


def share_of(total: int, steps: int, programs: int) -> int:
    """Return how many of `total` steps each of so many programs has, for each tile of x.

    Those of whole tiles, where that is few more: then no parts are added, and all programs read the same part of x at
    the same time, which is what matters where x is larger than the cache.
    """
    each = -(-total // max(1, min(programs, total)))
    whole = -(-each // steps) * steps
    return whole if each >= WHOLE * whole else each


def held_by(fmt: FormatSpec) -> int:
    """Return the rows of 8 that a lane's vectors hold: a unit has 2, and 6 bits need 4 to fill whole vectors."""
    return 4 if fmt.element.width == 6 else 2


def stages_of(fmt: FormatSpec, tile: Tile) -> int:
    """Return the steps that shared memory holds, where else fewer programs fit an SM; at least three."""
    scales = (tile.units + 1) // 2 * 128 * tile.warps
    step = tile.rows * DEPTH * 2 + tile.columns * DEPTH * fmt.element.width // 8 + scales
    return max(3, min(tile.stages, (SHARED // tile.resident - 2048) // step))


@functools.lru_cache(maxsize=1024)
def constants_of(fmt: FormatSpec, tile: Tile, outer: int, bias: bool) -> dict[str, Any]:
    """Return the constants of `matmul_wide`; `outer`: 0 none, 1 a number, 2 one per column of the result."""
    held = held_by(fmt)
    low, high = ptx_decode.decoder(fmt, 0), ptx_decode.decoder(fmt, 2 if held == 2 else 0)
    return {
        "WARPS": tile.warps, "UNITS": tile.units, "HELD": held, "WIDTH": fmt.element.width,
        "BLOCK": min(fmt.block, DEPTH), "N": tile.rows, "STAGES": stages_of(fmt, tile), "OUTER": outer, "BIAS": bias,
        "DROP": float(2**low.drop), "DECODE": low.assembly, "DECODE_NEXT": high.assembly, "DECODE_IN": low.constraints,
    } | CHAINED  # fmt: skip


@functools.lru_cache(maxsize=256)
def _sum_constants(tile: Tile, outer: int, bias: bool, drop: float) -> dict[str, Any]:
    made = {"N": tile.rows, "WARPS": tile.warps, "UNITS": tile.units, "OUTER": outer, "BIAS": bias, "DROP": drop}
    return made | {"CHAIN": True} | CHAINED


# Programmatic dependent launch: a kernel begins while the one before it ends, and waits for that where it needs it.
CHAINED = {"launch_pdl": True}  # an option of the compiler
_ORDER = {"SIZE": 1024, "CHAIN": True}


def has_rows(problem: Problem, least: int = LEAST_ROWS) -> bool:
    """Return True for so many rows of x, rounded up to a power of two, that this kernel is for."""
    weight = problem.operands[1]
    most = MOST_ROWS_SCALED if weight.outer == "vector" else MOST_ROWS
    most = MOST_ROWS_OF_SIX if weight.format is not None and held_by(weight.format) == 4 else most
    return least <= fragments.rows_of(problem.operands[0]) <= most


@kernel(
    "matmul",
    "triton.matmul_fragments_wide",
    priority=55,
    requires=Requires(
        devices=("cuda",), min_capability=(9, 0), max_capability=(9, 0), packages=("triton",), dtypes=("bfloat16",),
        checks=(
            *fragments.CHECKS,
            (f"is for {LEAST_ROWS} to {MOST_ROWS} rows of activations, of 6 bits to {MOST_ROWS_OF_SIX}, with scales of "
             f"columns to {MOST_ROWS_SCALED}", has_rows),
        ),
    ),
    bound=BOUND,
)  # fmt: skip
def matmul(a: KernelOperand, b: KernelOperand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias; arguments and result as `reference.matmul`."""
    assert isinstance(a, torch.Tensor) and isinstance(b, Parts)
    x, columns = (a if a.dim() == 2 else a.reshape(-1, a.shape[-1])).contiguous(), b.qdata.shape[-1]
    cut = cut_of(b.format, x.shape[0], (columns, x.shape[1]), properties.multiprocessors(x.device))
    out = run(x, b, bias, out_dtype, cut)
    return out if a.dim() == 2 else out.view(*a.shape[:-1], columns)


def run(x: torch.Tensor, b: Parts, bias: torch.Tensor | None, out_dtype: torch.dtype, cut: Cut) -> torch.Tensor:
    """Return x [M, K] @ b [K, N] + bias for dense x, cut as `cut` says."""
    from microscale.kernels.triton import jit_fragments_wide, jit_wide_steps

    tile, (rows, depth), columns = cut.tile, x.shape, b.qdata.shape[-1]
    outer, outer_kind = fragments.outer_of(b.outer_scale, columns, x)
    bias = None if bias is None else bias.expand(columns).contiguous()
    added = x if bias is None else bias
    # Whole tiles: the copy engine takes longer where it has to fill up. What rows that are too many give is not stored.
    steps, tiles_x = depth // DEPTH, -(-rows // tile.rows)
    x_tiles = ordered(x, tile.rows, tiles_x * tile.rows)
    tiles_w = -(-columns // tile.columns)
    total = tiles_w * steps
    each = share_of(total, steps, cut.programs // tiles_x)
    programs = tiles_x * -(-total // each)
    shared = each % steps != 0
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    parts = x
    if shared:
        parts = torch.empty(programs * 2 * tile.columns * tile.rows, dtype=torch.float32, device=x.device)
    constants = constants_of(b.format, tile, outer_kind, bias is not None)
    args: tuple[Any, ...] = (
        x_tiles,
        b.qdata,
        b.scale,
        outer,
        added,
        out,
        parts,
        rows,
        columns,
        steps,
        tiles_x,
        total,
        each,
    )
    launch(jit_fragments_wide.matmul_wide, programs, args, constants, tile.warps)
    if shared:
        last = _sum_constants(tile, outer_kind, bias is not None, constants["DROP"])
        args = (parts, outer, added, out, rows, columns, steps, tiles_x, each)
        launch(jit_wide_steps.add_tiles, tiles_x * tiles_w * tile.columns // 16, args, last, 4)
    return out


def ordered(x: torch.Tensor, rows: int, room: int) -> Any:
    """Return a descriptor, of blocks of so many rows, of dense x [M, K] in the order of fragments, in `room` rows.

    What rows past M hold is not said. The kernel that is launched next may begin before x is in order, see `CHAINED`.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from microscale.kernels.triton import jit_fragments_wide, jit_wide_steps

    depth, pairs = x.shape[1], x.numel() // 2
    x = x.clone() if x.data_ptr() % 16 else x
    made = torch.empty(room, depth, dtype=x.dtype, device=x.device)
    launch(jit_wide_steps.order_pairs, -(-pairs // _ORDER["SIZE"]), (x, made, pairs), _ORDER, 4)
    return TensorDescriptor(made, [room, depth], [depth, 1], [rows, DEPTH], jit_fragments_wide.X_LAYOUT)
