"""Triton quantize for dense bf16: threads own whole blocks; see `jit_blocks.py`. Along rows, along columns, or both.

Bytes for an element of w bits in blocks of n: 2 + w/8 + (scale bytes)/n, read and written once; both axes from one
read: 2 + 2 (w/8 + ...). A dynamic outer scale reads the input once more before (`amax.py`).
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any, NamedTuple

import torch

from microscale.dispatch import kernel
from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton import constants, properties, ptx
from microscale.kernels.triton.blocks_fit import COLUMNS, ROWS, TURNED, run_of
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.element import ElementSpec
from microscale.spec.quantizer import HadamardSpec, QuantizerSpec

LARGE = 2**25  # elements from which on a program takes several runs for each thread
THREADS = 128


# -- what kernels are specialised by -----------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """Which operands the PTX takes (`jit_words.encode_sixteen`), its text and its constraints."""

    kind: int
    text: str
    constraints: str


PORTABLE = Encoder(0, "", "")
SORTED = Encoder(5, "", "")


@functools.lru_cache(maxsize=1024)
def encoder_of(spec: QuantizerSpec, capability: tuple[int, int] | None) -> Encoder:
    """Return the encoder for an architecture; None: the interpreter, which takes no PTX."""
    element, scale = spec.format.element, spec.format.scale
    e2m1 = properties.is_e2m1(element)
    if _is_sorted(element) and spec.rounding == "nearest_even":
        return SORTED
    if capability is None:
        return PORTABLE
    if spec.rounding == "stochastic":
        return Encoder(4, *ptx.stochastic_factors()) if e2m1 else PORTABLE
    if properties.is_fp8(element) and element.max is None and capability >= (8, 9):
        return Encoder(1, *ptx.native_fp8(element.mantissa or 0))
    if e2m1 and capability >= (10, 0):
        return Encoder(1, *ptx.native_e2m1())
    if scale.exponent_only and ptx.has_lines(element):
        return Encoder(2, *ptx.lines(element, capability >= (9, 0)))
    if e2m1:
        return Encoder(3, *ptx.factors())
    if element.kind == "int" and element.width in (4, 8):
        return Encoder(1, *ptx.integers(element))
    return PORTABLE


def _is_sorted(element: ElementSpec) -> bool:
    """Return True for a codebook of 16 values in rising order, whose codes are places."""
    values = element.table
    return element.kind == "codebook" and len(values) == 16 and list(values) == sorted(set(values))


def carry_of(spec: QuantizerSpec) -> int:
    """What the rule of a power-of-two scale adds to the mantissa of a bf16 amax before taking its exponent."""
    fmt = spec.format
    (bits,) = struct.unpack("I", struct.pack("f", fmt.element.max_value))
    half_unit = 1 << (22 - (fmt.element.precision or 0))
    carries = {"floor": 0, "ceil": 0x7FFFFF, "rceil": 0x7FFFFF - (bits & 0x7FFFFF), "even": half_unit}
    return carries.get(fmt.scale_rule.base or "", 0)


class Kind(NamedTuple):
    """What of an outer scale kernels are specialised by: see `amax.Outer`."""

    kind: int
    lanes: int


def kind_of(outer: outer_scales.Outer | None) -> Kind:
    """Return what of an outer scale a plan depends on."""
    return Kind(outer_scales.NONE, 0) if outer is None else Kind(outer.kind, outer.lanes)


def axis_constants(spec: QuantizerSpec, outer: Kind, capability: tuple[int, int] | None, run: int) -> dict[str, Any]:
    """Return the constants that the two axes of a pair have each for themselves."""
    encoder, hadamard = encoder_of(spec, capability), spec.hadamard
    return {
        "RUN": run,
        "OUTER": outer.kind,
        "OUTER_LANES": outer.lanes,
        "WRITES_OUTER": outer_scales.NONE < outer.kind < outer_scales.BY_ROW,
        "STOCHASTIC": spec.rounding == "stochastic",
        "HADAMARD": 0 if hadamard is None else hadamard.size,
        "SIGNS": 0 if hadamard is None else _negative(hadamard),
        "HADAMARD_FACTOR": 1.0 if hadamard is None else properties.fp32(1.0 / math.sqrt(hadamard.size)),
        "ENCODER": encoder.kind,
        "PTX": encoder.text,
        "CONSTRAINTS": encoder.constraints,
    }


def _negative(hadamard: HadamardSpec) -> int:
    """Bit i is set where the sign vector's entry i is -1."""
    return sum(1 << i for i, s in enumerate(hadamard.sign or ()) if s < 0)


def pieces_of(spec: QuantizerSpec) -> int:
    """How many threads share a block: for 8-bit codes as many as let each store 16 neighbouring bytes."""
    whole = spec.hadamard is not None or spec.scale_tile is not None
    return 1 if whole or spec.format.element.width < 8 else spec.format.block // 16


def is_portable(capability: tuple[int, int] | None) -> bool:
    """Return True where only the encoder may be PTX: in the interpreter, and below sm_90.

    `max.u16x2` starts there; and Triton 3.6 rounds FP32 to E4M3 twice on sm_89.
    """
    return capability is None or capability < (9, 0)


class Plan(NamedTuple):
    """How a kernel is launched: its constexpr arguments, warps, and what the grid follows from."""

    constants: dict[str, Any]
    warps: int
    run: int
    threads: int
    scale_dtype: torch.dtype


@functools.cache
def jit() -> Any:
    """Return the jitted code; importing it loads Triton."""
    from microscale.kernels.triton import jit_blocks

    return jit_blocks


def scale_dtype_of(spec: QuantizerSpec) -> torch.dtype:
    """Return the dtype of stored scales."""
    return torch.float32 if spec.format.scale.width > 8 else torch.uint8


@functools.lru_cache(maxsize=4096)
def rows_plan(spec: QuantizerSpec, outer: Kind, swizzle: bool, large: bool, capability: tuple[int, int] | None) -> Plan:
    """Return how `quantize_runs` is launched for calls of one kind; the same object for the same kind."""
    run, pieces, tile = run_of(spec), pieces_of(spec), (spec.scale_tile or (1, 1))[0]
    packs_many = run == 16 and tile == 1
    wide = 4 if packs_many and (large or outer.kind == outer_scales.FROM_PARTS) else 2 if pieces > 1 else 1
    wide = min(wide, 2) if spec.format.scale_rule.candidates else wide  # registers
    threads = THREADS * wide
    tiled = swizzle and tile == 1
    tiles = 2 if tiled and packs_many and wide > 1 else 1
    made = {
        **constants.quantizer_constants(spec), **axis_constants(spec, outer, capability, run), "CARRY": carry_of(spec),
        "T": threads, "TILE_ROWS": min(4, tile), "PARTS": max(1, tile // 4), "PIECES": pieces,
        "SWIZZLE": swizzle, "TILED": tiled, "TILES": tiles, "PORTABLE": is_portable(capability),
    }  # fmt: skip
    picked = constants.only(jit().quantize_runs, made)
    return Plan(picked, THREADS // 32, run, threads, scale_dtype_of(spec))


@functools.lru_cache(maxsize=4096)
def columns_plan(spec: QuantizerSpec, outer: Kind, swizzle: bool, capability: tuple[int, int] | None) -> Plan:
    """Return how `quantize_columns` is launched."""
    run, width = run_of(spec, 32), spec.format.element.width
    groups = 8 if width == 8 and run == 32 else 4
    words, shared = (64, 2) if spec.format.block == 16 else (32, 1)  # shared: words of a thread
    made = {
        **constants.quantizer_constants(spec), **axis_constants(spec, outer, capability, run), "CARRY": carry_of(spec),
        "WORDS": words, "GROUPS": groups, "SWIZZLE": swizzle, "PORTABLE": is_portable(capability),
    }  # fmt: skip
    picked = constants.only(jit().quantize_columns, made)
    return Plan(picked, words * groups // 32 // shared, run, words * groups, scale_dtype_of(spec))


# -- kernels -----------------------------------------------------------------------------------------------------------


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability to specialise for; None in the interpreter."""
    return None if properties.interpreted() else torch.cuda.get_device_capability(device)


def quotient(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `torch.empty(shape)`, which takes two thirds more host time than this."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return torch.empty_strided(shape, strides[::-1], dtype=dtype, device=device)


def empty_scale(
    lead: tuple[int, ...], rows: int, blocks: int, dtype: torch.dtype, swizzle: bool, written: bool, x: torch.Tensor
) -> torch.Tensor:
    """Return room for scales; `written`: the kernel writes the padding of swizzled ones too."""
    if not swizzle:
        return empty((*lead, rows, blocks) if x.dim() > 1 else (blocks,), dtype, x.device)
    full_rows, full_columns = layout.padded(rows, blocks)
    make = torch.empty if written or (full_rows, full_columns) == (rows, blocks) else torch.zeros
    return make((*lead, full_rows * full_columns), dtype=dtype, device=x.device)


def tables_of(spec: QuantizerSpec, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a codebook's tables and the candidates' multipliers; `other` for what is not used."""
    fmt, thresholds, code_of, multipliers = spec.format, other, other, other
    if fmt.element.kind == "codebook":
        thresholds, code_of = constants.codebook(fmt.element, other.device)
    if fmt.scale_rule.candidates:
        multipliers = constants.multipliers(fmt.scale_rule, other.device)
    return thresholds, code_of, multipliers


@kernel("quantize", "triton.quantize_blocks", priority=30, requires=ROWS)
def quantize(
    x: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize dense bf16 x [..., R, K] along its rows; arguments and results as `reference.quantize`."""
    x = aligned(x)
    fmt, shape, swizzle = spec.format, x.shape, scale_layout == layout.SWIZZLED
    columns, rows = shape[-1], shape[-2] if len(shape) > 1 else 1
    count, capability = x.numel(), capability_of(x.device)
    outer = None
    if fmt.outer_scale is not None:
        outer = outer_scales.outer_of(transformed(x, spec, amax, outer_scale), fmt, amax, outer_scale)
    _, source, numbers, decode = (0, x, 0, x) if outer is None else outer[:4]
    plan = rows_plan(spec, kind_of(outer), swizzle, count >= LARGE, capability)
    known = plan.constants
    qdata = empty((*shape[:-1], columns // fmt.block * fmt.block_bytes), torch.uint8, x.device)
    lead = tuple(shape[:-2])
    scale = empty_scale(lead, rows, columns // fmt.block, plan.scale_dtype, swizzle, known["TILED"], x)
    row_runs, tile_height = columns // plan.run, known["TILE_ROWS"] * known["PARTS"]
    total = count // plan.run // tile_height
    lanes = plan.threads // known["PIECES"]
    if known["TILED"]:
        blocks = plan.run // fmt.block
        across = quotient(quotient(row_runs * blocks, 4), known["TILES"])
        parts = 32 * 4 * (4 // blocks) * known["TILES"] // lanes
        grid = count // (rows * columns) * quotient(rows, 128) * across * parts
    else:
        grid = quotient(total * known["PARTS"], lanes)
    args = (
        x, qdata, scale, source, decode, scale if seed is None else seed,
        *tables_of(spec, scale), total, numbers, rows, row_runs,
    )  # fmt: skip
    launch(jit().quantize_runs, grid, args, known, plan.warps)
    return qdata, scale, None if outer is None else outer.result


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy where it does not start on a word: memory from elsewhere may lie anywhere."""
    return x if x.data_ptr() % 4 == 0 else x.clone()


def transformed(
    x: torch.Tensor, spec: QuantizerSpec, amax: torch.Tensor | None, outer_scale: torch.Tensor | None
) -> torch.Tensor:
    """Return what a dynamic outer scale is taken over: x after its Hadamard transform."""
    if spec.hadamard is None or spec.format.outer_scale is None or amax is not None or outer_scale is not None:
        return x
    from microscale.kernels.triton.hadamard import hadamard

    return hadamard(x, spec.hadamard)


@kernel("quantize", "triton.quantize_columns", priority=30, requires=COLUMNS)
def quantize_columns(
    x: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize x [..., R, K] whose transpose is dense bf16; arguments and results as `reference.quantize`."""
    fmt, swizzle, stored = spec.format, scale_layout == layout.SWIZZLED, aligned(x.mT)
    rows, columns = stored.shape[-2:]  # of what lies in memory: blocks run down its rows
    outer = outer_scales.outer_of(transformed(x, spec, amax, outer_scale), fmt, amax, outer_scale)
    _, source, numbers, decode = (0, x, 0, x) if outer is None else outer[:4]
    plan = columns_plan(spec, kind_of(outer), swizzle, capability_of(x.device))
    known, lead = plan.constants, tuple(x.shape[:-2])
    qdata = empty((*lead, columns, rows // fmt.block * fmt.block_bytes), torch.uint8, x.device)
    scale = empty_scale(lead, columns, rows // fmt.block, plan.scale_dtype, swizzle, False, x)
    args = (
        stored, qdata, scale, source, decode, scale if seed is None else seed,
        *tables_of(spec, scale), numbers, rows, columns // 2,
    )  # fmt: skip
    across, down = quotient(columns // 2, known["WORDS"]), quotient(rows // plan.run, known["GROUPS"])
    launch(jit().quantize_columns, x.numel() // (rows * columns) * across * down, args, known, plan.warps)
    return qdata, scale, None if outer is None else outer.result


@kernel("quantize", "triton.quantize_turned", priority=20, requires=TURNED, bound="bit-equal; copies x")
def quantize_turned(
    x: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize x [..., R, K] whose transpose is dense, by way of a dense copy; as `reference.quantize`."""
    return quantize(x.contiguous(), spec, amax, outer_scale, seed, scale_layout)
