"""Grouped GEMM, rows of bfloat16 sorted by expert times prepared experts, on Hopper (sm_90).

Experts [E, N, K] in layout `fragments` are the matrix [E * N, K] in that layout, so a tile of an expert's columns is
what it is in `fragments_wide.py`: decoded in the registers that hold it, in some three fifths of the instructions that
`wgmma.py` takes for codes as they are quantized. Here programs take whole tiles, by the same schedule as there, which
they make from the ends of the groups on the device. Tiles of rows begin where groups do; what a tile has of rows of the
next group is computed and not stored.

Error: decoded operands are exact; FP32 accumulation, outer scales in FP32, one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import fragments_wide, properties
from microscale.kernels.triton.fragments_wide import CHAINED, SIX_TILES, TILES, Tile, held_by
from microscale.kernels.triton.grouped import BAND, is_decoded, spread, values_of
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.wgmma import REGISTERS, lanes_of
from microscale.numerics import layout
from microscale.numerics.fragments import DEPTH
from microscale.spec.format import FormatSpec

MOST_EXPERTS = 1024  # whose tiles a program sums up at once
MANY_EXPERTS = {2: 256, 4: 128}  # above which fewer programs fit an SM, by `held_by`
MOST_BITS = 31  # of a number of elements of x: their pairs are counted in 32 bits with a sign


# -- what is taken -----------------------------------------------------------------------------------------------------


def _is_prepared(problem: Problem) -> bool:
    experts = problem.operands[1]
    return experts.layout == layout.FRAGMENTS and experts.axis == -2 and len(experts.shape) == 3


def _has_blocks(problem: Problem) -> bool:
    fmt = problem.operands[1].format
    return fmt is not None and fmt.block in (16, 32) and fmt.scale.width == 8


def _has_values(problem: Problem) -> bool:
    """Whether tokens are plain, or quantized along K, and bfloat16 numbers once decoded."""
    tokens = problem.operands[0]
    blocked = tokens.axis == -1 and tokens.layout in layout.LAYOUTS
    return is_decoded(tokens) and (tokens.format is None or blocked)


def _has_tokens(problem: Problem) -> bool:
    shape = problem.operands[0].shape
    return all(shape) and sum((n - 1).bit_length() for n in shape) <= MOST_BITS


CHECKS = (
    ("needs experts that microscale.prepare made", _is_prepared),
    ("needs experts in blocks of 16 or 32 with 8-bit scales", _has_blocks),
    ("needs plain tokens, or block-scaled ones along K whose values, outer scales aside, are bfloat16 numbers",
     _has_values),
    ("needs outer scales that are the same all along K", lambda p: all(o.outer != "mixed" for o in p.operands)),
    (f"is for at most {MOST_EXPERTS} experts", lambda p: p.operands[1].shape[0] <= MOST_EXPERTS),
    (f"needs tokens, and at most 2**{MOST_BITS} elements of them, both sizes rounded up to powers of two", _has_tokens),
)  # fmt: skip


@kernel(
    "grouped_matmul", "triton.grouped_fragments_wide", priority=35, bound=fragments_wide.BOUND,
    requires=Requires(
        devices=("cuda",), min_capability=(9, 0), max_capability=(9, 0), dtypes=("bfloat16",), packages=("triton",),
        checks=CHECKS,
    ),
)  # fmt: skip
def grouped_matmul(a: torch.Tensor | Parts, b: Parts, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a [T, K] times their expert's matrix of b [E, K, N]; arguments as `reference.grouped_matmul`."""
    tokens = a.shape[0] if isinstance(a, torch.Tensor) else a.qdata.shape[0]
    return run(a, b, offsets, out_dtype, tile_of(b.format, tokens, b.qdata.shape[0]))


# -- plans and launches ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def tile_of(fmt: FormatSpec, tokens: int, experts: int) -> Tile:
    """Return the tile for so many rows of x in all, were they spread evenly."""
    rows = -(-tokens // experts)
    size = next((n for n in (32, 64, 128) if rows <= n), 256)
    tile = SIX_TILES.get(size, TILES[size]) if held_by(fmt) == 4 else TILES[size]
    # What a thread has to remember of more groups takes the registers of one program.
    many = experts > MANY_EXPERTS[held_by(fmt)] and tile.resident > 2
    return tile._replace(resident=tile.resident - 1) if many else tile


class Plan(NamedTuple):
    """Constants of `multiply_groups`, its programs, tokens that x has room for, and arguments that are sizes."""

    constants: Mapping[str, Any]
    programs: int
    room: int
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def plan_of(
    fmt: FormatSpec, tile: Tile, shape: tuple[int, int, int, int], strides: tuple[int, int], outers: tuple[bool, int],
    sms: int,
) -> Plan:  # fmt: skip
    """Return the plan for `shape`: rows of x, N, K, experts; on so many SMs.

    `strides`: of factors of rows, and of factors of b from expert to expert; `outers`: whether there are any of rows,
    and 0 none, 1 a number, 2 one per column for each expert.
    """
    rows, columns, depth, experts = shape
    room = rows + tile.rows
    tiles = (rows + min(rows, experts) * (tile.rows - 1)) // tile.rows * -(-columns // tile.columns)
    programs = max(1, min(tiles, tile.resident * sms))
    sizes = (rows, columns, depth // DEPTH, experts, room, *strides)
    return Plan(constants_of(fmt, tile, lanes_of(experts), outers), programs, room, sizes)


@functools.lru_cache(maxsize=1024)
def constants_of(fmt: FormatSpec, tile: Tile, lanes: int, outers: tuple[bool, int]) -> Mapping[str, Any]:
    """Return the constants of `multiply_groups`, and options of its compiler; `outers` as for `plan_of`."""
    known = fragments_wide.constants_of(fmt, tile, outers[1], False)
    known = {name: value for name, value in known.items() if name != "BIAS"}
    # Unless told, ptxas takes a few registers more with outer scales than let an SM hold so many programs.
    limit = {"maxnreg": REGISTERS // (32 * tile.warps * tile.resident) // 8 * 8} if tile.resident > 2 else {}
    return {**known, "BAND": BAND, "LANES": lanes, "A_OUTER": outers[0], **CHAINED, **limit}


def run(
    a: torch.Tensor | Parts, b: Parts, offsets: torch.Tensor, out_dtype: torch.dtype, tile: Tile
) -> torch.Tensor:  # fmt: skip
    """Return the grouped product as `grouped_matmul`, in tiles of a given kind."""
    from microscale.kernels.triton import jit_grouped_fragments_wide

    values, a_outer = values_of(a)
    x = values.contiguous()
    experts, _, columns = b.qdata.shape
    rows, depth = x.shape
    codes, scale, offsets = b.qdata.mT.contiguous(), b.scale.mT.contiguous(), offsets.contiguous()
    b_outer, kind = _outer_of(b, experts, columns)
    strides = 0 if a_outer is None else a_outer.stride(0), (0, 1, columns)[kind]
    sms = properties.multiprocessors(x.device)
    plan = plan_of(b.format, tile, (rows, columns, depth, experts), strides, (a_outer is not None, kind), sms)
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    x_tiles = fragments_wide.ordered(x, tile.rows, plan.room)
    factors = x if a_outer is None else a_outer, x if b_outer is None else b_outer
    args = (x_tiles, codes, scale, *factors, offsets, out, *plan.sizes)
    launch(jit_grouped_fragments_wide.multiply_groups, plan.programs, args, plan.constants, tile.warps)
    return out


def _outer_of(b: Parts, experts: int, columns: int) -> tuple[torch.Tensor | None, int]:
    """Return the experts' outer scales, dense, and whether they are none (0), a number for each or one per column."""
    outer = spread(b, (experts, 1, columns))
    if outer is None:
        return None, 0
    if b.outer_scale is not None and (b.outer_scale.dim() == 0 or b.outer_scale.shape[-1] == 1):
        return outer[:, :, 0].contiguous(), 1
    return outer.contiguous(), 2
