"""Scale tiles of several rows or blocks: their amax, and the choice of a candidate for each.

Two launches for a quantizer with tiles (the amaxes, then the quantize kernel); two more between them where the scale
rule has candidates: the errors of every block, 4 bytes for each block and candidate, and the choice of every tile.
Without tiles the search is part of the quantize kernel.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from microscale.kernels.triton import constants, properties
from microscale.kernels.triton.amax import NONE, Outer
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import Matrices
from microscale.spec.quantizer import QuantizerSpec

LANES = 2048  # elements (blocks x candidates in the search) of a program
SHARED = 2**16  # a tile of more elements is shared by programs
WARPS = 4


class Tiles(NamedTuple):
    """How the scale tiles of a quantizer cover matrices: `rows` x `columns` tiles on each; the last may be ragged."""

    height: int
    blocks: int
    block: int
    rows: int
    columns: int


def tiles_of(x: Matrices, height: int, blocks: int, block: int) -> Tiles:
    """Return the tiles of `height` rows and `blocks` blocks of `block` elements on x."""
    return Tiles(height, blocks, block, -(-x.rows // height), -(-x.columns // (blocks * block)))


def tile_amax(x: Matrices, tiles: Tiles) -> torch.Tensor:
    """Return the bits of max |x| over every tile: int32 [matrices * rows * columns]; NaN stands above all."""
    plan = plan_of_amax(tiles.height, tiles.blocks * tiles.block)
    groups = -(-tiles.columns // plan["TILES"])
    make = torch.empty if plan["SPLIT"] == 1 else torch.zeros
    out = make(x.matrices * tiles.rows * tiles.columns, dtype=torch.int32, device=x.data.device)
    args = (x.data, out, x.rows, x.columns, tiles.rows, tiles.columns, groups, *x.strides)
    launch(_jit()[0].tile_amax, x.matrices * tiles.rows * groups * plan["SPLIT"], args, plan, WARPS)
    return out


def tile_choice(
    x: Matrices, tiles: Tiles, bits: torch.Tensor, outer: Outer | None, spec: QuantizerSpec,
    tables: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return which candidate each tile takes, int32, shape of `bits`, the tiles' amaxes; `tables` of the codebook."""
    factors = constants.multipliers(spec.format.scale_rule, bits.device)
    blocks = bits.numel() * tiles.height * tiles.blocks
    errors = torch.empty((blocks, factors.numel()), dtype=torch.float32, device=bits.device)
    kind, source, count, decode = (NONE, errors, 0, errors) if outer is None else outer[:4]
    args = (
        x.data, errors, bits, factors, source, decode, *tables, blocks, count, x.rows, x.columns, tiles.rows,
        tiles.columns, *x.strides,
    )  # fmt: skip
    plan = _errors_plan(spec, kind, 0 if outer is None else outer.lanes)
    launch(_jit()[1].tile_errors, -(-blocks // plan["BLOCKS"]), args, plan, WARPS)
    choice = torch.empty_like(bits)
    plan = _choice_plan(spec)
    programs = -(-bits.numel() // plan["TILES"])
    launch(_jit()[1].tile_choice, programs, (errors, choice, bits.numel(), tiles.columns), plan, WARPS)
    return choice


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_amax, jit_search

    return jit_amax, jit_search


@functools.lru_cache(maxsize=256)
def plan_of_amax(height: int, width: int) -> dict[str, Any]:
    """Return how tiles of height x width are reduced: lanes along a row first, then down, then over more tiles."""
    lanes = min(properties.power_of_two_at_least(width), 512)
    rows = min(properties.power_of_two_at_least(height), LANES // lanes, 16)
    beside = LANES // (lanes * rows) if lanes >= width else 1
    split = min(height, -(-height * width // SHARED))
    return {"HEIGHT": height, "WIDTH": width, "TILES": beside, "ROWS": rows, "LANES": lanes, "SPLIT": split}


@functools.lru_cache(maxsize=1024)
def _errors_plan(spec: QuantizerSpec, kind: int, lanes: int) -> dict[str, Any]:
    facts = constants.quantizer_constants(spec)
    blocks = max(1, LANES // facts["CANDIDATES"] // 4)
    return constants.only(_jit()[1].tile_errors, {**facts, "BLOCKS": blocks, "OUTER": kind, "OUTER_LANES": lanes})


@functools.lru_cache(maxsize=1024)
def _choice_plan(spec: QuantizerSpec) -> dict[str, Any]:
    facts = constants.quantizer_constants(spec)
    height, blocks, candidates = facts["TILE_ROWS"], facts["TILE_BLOCKS"], facts["CANDIDATES"]
    lanes = max(1, LANES // candidates)
    entries = min(properties.power_of_two_at_least(max(1, height // 2 * blocks)), lanes)
    more = {"LEVELS": (height - 1).bit_length(), "ENTRIES": entries, "TILES": min(64, lanes // entries)}
    return constants.only(_jit()[1].tile_choice, {**facts, **more})
