"""Triton quantize: one kernel for every quantizer, specialised by properties; see `jit_quantize.py`.

Bytes for bf16 in, MX 4-bit out: 2 + 0.5 + 1/32 per element, read and written once. More launches, each of which reads
the input once more: a Hadamard transform (which also writes it), a dynamic outer scale (`amax.py`), scale tiles
(`tiles.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton import constants, long_rows, properties, tiles
from microscale.kernels.triton.hadamard import hadamard
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import Matrices, as_matrices
from microscale.numerics import layout, scaling
from microscale.spec.quantizer import QuantizerSpec

# Lanes of one program: enough independent 16-byte loads in flight, few enough registers to hold the tile.
LANES = 2048
WARPS = 2
PACKING_WARPS = 4  # where neighbouring codes are put together across threads
MOST_WARPS = 32
LANES_OF_WARP = 2048  # lanes that one warp holds, at most: 64 registers a thread
WIDE = 2**31  # elements from which places take 64 bits

REQUIRES = Requires(devices=("cuda",), packages=("triton",))


@kernel("quantize", "triton.quantize", priority=10, requires=REQUIRES)
def quantize(
    x: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize x [..., R, K] along the last axis; arguments and results as `reference.quantize`."""
    if spec.hadamard is not None:
        x = hadamard(x, spec.hadamard)
    facts, shape = _facts(spec), x.shape
    blocks = -(-shape[-1] // facts.block)
    qdata = torch.empty((*shape[:-1], blocks * facts.block_bytes), dtype=torch.uint8, device=x.device)
    scale = _empty_scale(x, facts.scale_dtype, blocks, scale_layout)
    if not x.numel():
        return qdata, scale, _outer_of_nothing(x, spec, amax, outer_scale)
    outer = outer_scales.outer_of(x, spec.format, amax, outer_scale) if facts.has_outer else None
    _launch(as_matrices(x), qdata, scale, outer, seed, spec, blocks, scale_layout)
    return qdata, scale, None if outer is None else outer.result


def _outer_of_nothing(
    x: torch.Tensor, spec: QuantizerSpec, amax: torch.Tensor | None, outer_scale: torch.Tensor | None
) -> torch.Tensor | None:
    """The outer scale of an empty tensor."""
    fmt = spec.format
    if fmt.outer_scale is None:
        return None
    if outer_scale is not None:
        return scaling.outer_from_scale(outer_scale, fmt).decode
    return scaling.outer_from_amax(scaling.finite_amax(x, fmt.outer_scale.per) if amax is None else amax, fmt).decode


def _empty_scale(x: torch.Tensor, dtype: torch.dtype, blocks: int, scale_layout: str) -> torch.Tensor:
    shape = x.shape[:-1]
    if scale_layout == layout.STRIDED:
        return torch.empty((*shape, blocks), dtype=dtype, device=x.device)
    rows = shape[-1] if shape else 1
    full_rows, full_columns = layout.padded(rows, blocks)
    make = torch.empty if (full_rows, full_columns) == (rows, blocks) else torch.zeros  # padding is zero
    return make((*shape[:-1], full_rows * full_columns), dtype=dtype, device=x.device)


def _launch(
    x: Matrices,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer: outer_scales.Outer | None,
    seed: torch.Tensor | None,
    spec: QuantizerSpec,
    blocks: int,
    scale_layout: str,
) -> None:
    facts, total = _facts(spec), x.total_rows * blocks
    if long_rows.takes(spec, x, scale_layout == layout.STRIDED):
        long_rows.quantize(x, qdata, scale, spec, choose_encoder(x.data, spec, True) == BY_FP8)
        return
    if facts.scale_dtype in (torch.float16, torch.bfloat16):
        scale = scale.view(torch.int16)  # the kernel writes codes
    kind, source, count, decode = (outer_scales.NONE, scale, 0, scale) if outer is None else outer[:4]
    tables = constants.codebook(spec.format.element, scale.device) if facts.has_codebook else (scale, scale)
    bits = choice = multipliers = scale
    if facts.has_candidates:
        multipliers = constants.multipliers(spec.format.scale_rule, scale.device)
    tile_rows = tile_columns = 0
    if facts.tile_blocks:
        covered = tiles.tiles_of(x, facts.tile_rows, facts.tile_blocks, facts.block)
        bits, tile_rows, tile_columns = tiles.tile_amax(x, covered), covered.rows, covered.columns
        if facts.has_candidates:
            choice = tiles.tile_choice(x, covered, bits, outer, spec, tables)
    flat = x.dense and x.columns % facts.block == 0 and facts.lanes == facts.block
    encoder, data = choose_encoder(x.data, spec, flat), x.data
    if encoder >= PACKED_EXPONENTS:
        data = data.view(torch.int32)
    plan = plan_of(
        spec, kind, 0 if outer is None else outer.lanes, scale_layout == layout.SWIZZLED, flat, x.down, x.batched,
        total * facts.lanes >= WIDE, encoder,
    )  # fmt: skip
    args = (
        data, qdata, scale, source, decode, scale if seed is None else seed, *tables, bits, choice, multipliers,
        total, x.total_rows, count, x.rows, x.columns, blocks, tile_rows, tile_columns, *x.strides,
    )  # fmt: skip
    launch(_jit().quantize_rows, -(-total // plan.blocks), args, plan.constants, plan.warps)


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_quantize

    return jit_quantize


class _Facts(NamedTuple):
    """What the host code asks of a quantizer at every call."""

    block: int
    block_bytes: int
    lanes: int
    scale_dtype: torch.dtype
    has_outer: bool
    has_candidates: bool
    has_codebook: bool
    tile_rows: int
    tile_blocks: int


@functools.lru_cache(maxsize=1024)
def _facts(spec: QuantizerSpec) -> _Facts:
    fmt = spec.format
    known = constants.quantizer_constants(spec)
    return _Facts(
        fmt.block,
        fmt.block_bytes,
        properties.power_of_two_at_least(fmt.block),
        torch.uint8 if fmt.scale.torch_dtype is None else getattr(torch, fmt.scale.torch_dtype),
        fmt.outer_scale is not None,
        bool(fmt.scale_rule.candidates),
        fmt.element.kind == "codebook",
        known["TILE_ROWS"],
        known["TILE_BLOCKS"],
    )


class Plan(NamedTuple):
    """How `quantize_rows` is launched: its constexpr arguments, blocks of a program, warps."""

    constants: dict[str, Any]
    blocks: int
    warps: int


@functools.lru_cache(maxsize=4096)
def plan_of(
    spec: QuantizerSpec,
    outer: int,
    outer_lanes: int,
    swizzle: bool,
    flat: bool,
    down: bool,
    batched: bool,
    wide: bool,
    encoder: int,
) -> Plan:
    """Return how calls of one kind are launched; the same object for the same kind.

    outer, outer_lanes: of an `amax.Outer` (NONE, 0 without one). flat: x is dense rows of whole blocks of 2**n
    elements; down, batched: of `Matrices`; wide: it has 2**31 elements or more.
    """
    known, lanes = constants.quantizer_constants(spec), properties.power_of_two_at_least(spec.format.block)
    blocks = max(1, LANES // lanes)
    made = {
        **known, "BLOCKS": blocks, "BLOCK_P2": lanes, "OUTER": outer, "OUTER_LANES": outer_lanes,
        "WRITES_OUTER": outer_scales.NONE < outer < outer_scales.BY_ROW,
        "SWIZZLE": swizzle, "FLAT": flat, "DOWN": down, "BATCHED": batched, "WIDE": wide, "ENCODER": encoder,
    }  # fmt: skip
    packs = encoder == PORTABLE and spec.format.element.pack_group > 1
    warps = PACKING_WARPS if packs or known["CANDIDATES"] else WARPS
    warps = min(MOST_WARPS, max(warps, lanes // LANES_OF_WARP))
    return Plan(constants.only(_jit().quantize_rows, made), blocks, warps)


PORTABLE, BY_FP8, PACKED_EXPONENTS, PACKED_FACTORS = range(4)
E8M0_BIAS = 127


def choose_encoder(x: torch.Tensor, spec: QuantizerSpec, flat: bool) -> int:
    """Return which encoder of `jit_quantize.py` serves a call."""
    if not flat or properties.interpreted():
        return PORTABLE
    packable = x.dtype == torch.bfloat16 and x.data_ptr() % 4 == 0
    return encoder_for(spec, _capability(x.device), dense=True, packable=packable)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=4096)
def encoder_for(spec: QuantizerSpec, capability: tuple[int, int], *, dense: bool, packable: bool) -> int:
    """Return the encoder for a quantizer on an architecture. `dense`: the input is whole blocks; `packable`: of bf16.

    sm_89 has fp8 conversions too, but Triton 3.6 rounds to f16 on the way there, so they start at sm_90. And they serve
    dense rows in blocks of 32 and its multiples only: on an H200 with Triton 3.6 ragged rows got wrong bytes from them,
    through the cast and through the instruction written by hand. The cause is not known; portable code was right there.
    """
    fmt, element = spec.format, spec.format.element
    if not dense or capability < (9, 0) or element.kind != "float":
        return PORTABLE
    if spec.rounding != "nearest_even" or fmt.scale_rule.candidates:
        return PORTABLE
    if properties.is_fp8(element) and element.subnormals and element.max is None and fmt.block % 32 == 0:
        return BY_FP8
    if not packable or not properties.is_e2m1(element) or fmt.block % 8:
        return PORTABLE
    if not fmt.scale.exponent_only:
        return PACKED_FACTORS
    return PACKED_EXPONENTS if fmt.scale.bias == E8M0_BIAS else PORTABLE
