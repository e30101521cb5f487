"""Triton producers: SiLU(gate) * up and RMSNorm, quantized in registers; see `jit_producers.py`.

Bytes of bf16 to an 8-bit MX format, read and written once: silu-mul 2 + 2 + 1 + 1/32 an element, RMSNorm 2 + 1 + 1/32.

What no fused kernel takes goes the long way, still on the device: a kernel of `jit_activations.py` writes y, and the
dispatcher's quantize reads it. So does silu-mul where the outer scale is dynamic: to read gate and up twice is as many
bytes as to write y and read it back (4 per element of bf16 more than once), and all would be computed twice; y's amax
comes with writing it. RMSNorm reads x twice then, 2 bytes more: half of what writing y would cost.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from microscale import dispatch
from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton import blocks_fit, constants
from microscale.kernels.triton import quantize_blocks as blocks
from microscale.kernels.triton.activations import WARPS, bits_of, lanes_of, rms_norm, silu_mul
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import Matrices, as_matrices
from microscale.numerics import layout
from microscale.numerics.activations import LANES, RUN
from microscale.spec.quantizer import QuantizerSpec

CHUNK = LANES * RUN  # elements of a program at a time
RUNS_UNDER_OUTER = 2  # of a thread of silu-mul, where each thread computes the outer scale from its amax
HELD = 4  # chunks that stay in registers: 64 of them a thread
MOST_CHUNKS = 16  # all are unrolled
PROGRAMS = 1024  # that share a tensor for its amax

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _spec(problem: Problem) -> QuantizerSpec:
    assert problem.quantizer is not None
    return problem.quantizer


def _whole_runs(problem: Problem) -> bool:
    return problem.operands[0].shape[-1] % max(2 * RUN, _spec(problem).format.block) == 0


def _outer_is_given(problem: Problem) -> bool:
    return _spec(problem).format.outer_scale is None or problem.operands[0].outer == "given"


def _outer_is_one_launch_away(problem: Problem) -> bool:
    outer = _spec(problem).format.outer_scale
    return _outer_is_given(problem) or (outer is not None and outer.per == "tensor")


_CHECKS = (
    ("takes bf16", lambda p: p.operands[0].dtype == "bfloat16"),
    ("takes rows, not columns", lambda p: p.operands[0].order != "columns"),
    ("needs blocks of 16 to 128 elements of 4, 6 or 8 bits", lambda p: blocks_fit.fits(_spec(p))),
    ("takes candidates by squared error for E2M1 only", lambda p: blocks_fit.search_fits(_spec(p))),
    ("needs rows of whole blocks and of 32 elements", _whole_runs),
    ("takes no scale tile", lambda p: _spec(p).scale_tile is None),
    ("fuses no Hadamard transform", lambda p: _spec(p).hadamard is None),
)
_HERE = Requires(devices=("cuda",), packages=("triton",))
FUSED_SILU_MUL = Requires(
    devices=("cuda",), packages=("triton",), min_capability=(8, 0),
    checks=(*_CHECKS, ("needs the outer scale or its amax, given", _outer_is_given)),
)  # fmt: skip
FUSED_RMS_NORM = Requires(
    devices=("cuda",), packages=("triton",), min_capability=(8, 0),
    checks=(
        *_CHECKS,
        ("computes no outer scales of rows or experts", _outer_is_one_launch_away),
        ("takes rows of up to 65536 elements", lambda p: p.operands[0].shape[-1] <= MOST_CHUNKS * CHUNK),
    ),
)  # fmt: skip


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_producers

    return jit_producers


# -- fused -------------------------------------------------------------------------------------------------------------


@kernel("silu_mul_quantize", "triton.silu_mul_quantize", priority=20, requires=FUSED_SILU_MUL)
def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Quantize silu(gate) * up [..., R, K] along the last axis; arguments and results as the reference."""
    if not gate.numel():
        return _quantize(torch.empty_like(gate), spec, amax, outer_scale, seed, scale_layout)
    qdata, scale = _empty_parts(gate, spec, scale_layout == layout.SWIZZLED)
    outer = outer_scales.outer_of(gate, spec.format, amax, outer_scale)
    left, right = _words(gate), _words(up)
    plan = _silu_mul_constants(
        spec, blocks.kind_of(outer), scale_layout == layout.SWIZZLED, left.dense and right.dense,
        max(_extent(left), _extent(right)) >= 2**31, blocks.capability_of(gate.device),
    )  # fmt: skip
    run = plan["RUN"]
    total, row_runs = gate.numel() // run, gate.shape[-1] // run
    args = (
        left.data, right.data, qdata.view(torch.int32), scale, *_outer_args(outer, scale),
        scale if seed is None else seed, *blocks.tables_of(spec, scale), total, _count(outer), left.rows, row_runs,
        left.strides[1], right.strides[1],
    )  # fmt: skip
    launch(_jit().silu_mul_quantize_runs, -(-total // plan["T"]), args, plan, WARPS)
    return qdata, scale, None if outer is None else outer.result


@kernel("rms_norm_quantize", "triton.rms_norm_quantize", priority=20, requires=FUSED_RMS_NORM)
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Quantize x / rms(x) * weight, x [..., R, K], weight [K]; arguments and results as the reference."""
    if not x.numel():
        return _quantize(torch.empty_like(x), spec, amax, outer_scale, seed, scale_layout)
    qdata, scale = _empty_parts(x, spec, scale_layout == layout.SWIZZLED)
    seen, target = _words(x), blocks.capability_of(x.device)
    kind, factors = _weight(weight, scale)
    rows, columns = seen.total_rows, seen.columns
    lanes = lanes_of(columns)
    shape = (lanes, -(-columns // CHUNK), kind)
    programs, step, eps_bits = -(-rows * lanes // LANES), seen.strides[1], bits_of(eps)
    if spec.format.outer_scale is not None and amax is None and outer_scale is None:
        count = min(PROGRAMS, programs)
        parts = torch.empty(count, dtype=torch.float32, device=x.device)
        known = _amax_constants(shape, count, target)
        amax_args = (seen.data, factors, parts, rows, columns, columns // known["RUN"], step, eps_bits)
        launch(_jit().rms_norm_amax_runs, count, amax_args, known, WARPS)
        decode = torch.empty((), dtype=torch.float32, device=x.device)
        outer: outer_scales.Outer | None = outer_scales.Outer(outer_scales.FROM_VALUES, parts, count, decode, decode)
    else:
        outer = outer_scales.outer_of(x, spec.format, amax, outer_scale)
    wide = _extent(seen) >= 2**31
    plan = _rms_norm_constants(spec, blocks.kind_of(outer), scale_layout == layout.SWIZZLED, wide, shape, target)
    args = (
        seen.data, factors, qdata.view(torch.int32), scale, *_outer_args(outer, scale), scale if seed is None else seed,
        *blocks.tables_of(spec, scale), rows, _count(outer), seen.rows, columns, columns // plan["RUN"], step, eps_bits,
    )  # fmt: skip
    launch(_jit().rms_norm_quantize_runs, programs, args, plan, WARPS)
    return qdata, scale, None if outer is None else outer.result


def _words(x: torch.Tensor) -> Matrices:
    """Rows of words, two bf16 to a word, each on 16 bytes; strides count words. Copies x where it is not so."""
    seen = as_matrices(x)
    _, step, unit = seen.strides
    if seen.batched or unit != 1 or step % 8 or seen.data.data_ptr() % 16:
        seen = as_matrices(x.clone(memory_format=torch.contiguous_format))
        step = seen.columns
    rows = seen.data.as_strided((seen.total_rows, seen.columns), (step, 1))
    return seen._replace(data=rows.view(torch.int32), strides=(0, step // 2, 1))


def _extent(words: Matrices) -> int:
    """Elements from the first row to the last, at least as many as there are."""
    return 2 * words.total_rows * max(words.strides[1], words.columns // 2)


def _weight(weight: torch.Tensor | None, other: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(0 for none, 1 for words of bf16, 2 for FP32; the weight as words)."""
    if weight is None:
        return 0, other
    dense = weight.contiguous()
    if dense.dtype == torch.bfloat16 and dense.data_ptr() % 16 == 0:
        return 1, dense.view(torch.int32)
    return 2, dense.to(torch.float32).view(torch.int32)


def _empty_parts(x: torch.Tensor, spec: QuantizerSpec, swizzle: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales to be written, for x [..., K] of whole blocks."""
    fmt, shape = spec.format, x.shape
    count = shape[-1] // fmt.block
    qdata = torch.empty((*shape[:-1], count * fmt.block_bytes), dtype=torch.uint8, device=x.device)
    rows = shape[-2] if len(shape) > 1 else 1
    return qdata, blocks.empty_scale(tuple(shape[:-2]), rows, count, blocks.scale_dtype_of(spec), swizzle, False, x)


def _outer_args(outer: outer_scales.Outer | None, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (other, other) if outer is None else (outer.source, outer.decode)


def _count(outer: outer_scales.Outer | None) -> int:
    return 0 if outer is None else outer.count


# -- constants: one object for each kind of call -----------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _silu_mul_constants(
    spec: QuantizerSpec,
    outer: blocks.Kind,
    swizzle: bool,
    flat: bool,
    wide: bool,
    target: tuple[int, int] | None,
) -> dict[str, Any]:
    made = _common_constants(spec, outer, swizzle, wide, target)
    runs = RUNS_UNDER_OUTER if outer.kind != outer_scales.NONE else 1
    return constants.only(_jit().silu_mul_quantize_runs, {**made, "T": made["T"] * runs, "FLAT": flat})


@functools.lru_cache(maxsize=4096)
def _rms_norm_constants(
    spec: QuantizerSpec,
    outer: blocks.Kind,
    swizzle: bool,
    wide: bool,
    shape: tuple[int, int, int],
    target: tuple[int, int] | None,
) -> dict[str, Any]:
    common = _common_constants(spec, outer, swizzle, wide, target)
    return constants.only(_jit().rms_norm_quantize_runs, {**common, **_row_constants(shape, common["RUN"], target)})


@functools.lru_cache(maxsize=1024)
def _amax_constants(shape: tuple[int, int, int], programs: int, target: tuple[int, int] | None) -> dict[str, Any]:
    run = 2 * RUN
    made = {**_row_constants(shape, run, target), "T": CHUNK // run, "RUN": run, "PROGRAMS": programs}
    return {**made, "INTERPRETED": target is None, "PORTABLE": _is_portable(target)}


def _is_portable(target: tuple[int, int] | None) -> bool:
    """Whether the packed 16-bit maxima of sm_90, and its fp8 conversions, are not there."""
    return target is None or target < (9, 0)


def _row_constants(shape: tuple[int, int, int], run: int, target: tuple[int, int] | None) -> dict[str, Any]:
    """`shape`: lanes that share a row, chunks of a row, kind of weight."""
    lanes, chunks, weight = shape
    threads = lanes * RUN // run
    held = chunks <= HELD and (target is None or target >= (9, 0))  # below, ptxas spills a word or two of them
    return {
        "ROWS": LANES // lanes, "LEVELS": threads.bit_length() - 1, "CHUNKS": chunks, "HELD": held, "WEIGHT": weight,
    }  # fmt: skip


def _common_constants(
    spec: QuantizerSpec, outer: blocks.Kind, swizzle: bool, wide: bool, target: tuple[int, int] | None
) -> dict[str, Any]:
    run = RUN if spec.format.element.width == 8 else 2 * RUN  # 16 bytes to store, or 24
    return {
        **constants.quantizer_constants(spec), **blocks.axis_constants(spec, outer, target, run),
        "CARRY": blocks.carry_of(spec), "T": CHUNK // run, "SWIZZLE": swizzle, "WIDE": wide,
        "INTERPRETED": target is None, "PORTABLE": _is_portable(target),
    }  # fmt: skip


# -- y written, then quantized -----------------------------------------------------------------------------------------


@kernel("silu_mul_quantize", "triton.silu_mul_then_quantize", priority=10, requires=_HERE)
def silu_mul_then_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Write silu(gate) * up [..., R, K] and quantize it; arguments and results as the reference."""
    y, found = silu_mul(gate, up, _wants_amax(spec, amax, outer_scale))
    return _quantize(y, spec, amax if found is None else found, outer_scale, seed, scale_layout)


@kernel("rms_norm_quantize", "triton.rms_norm_then_quantize", priority=10, requires=_HERE)
def rms_norm_then_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Write x / rms(x) * weight, x [..., R, K], and quantize it; arguments and results as the reference."""
    y, found = rms_norm(x, weight, eps, _wants_amax(spec, amax, outer_scale))
    return _quantize(y, spec, amax if found is None else found, outer_scale, seed, scale_layout)


def _wants_amax(spec: QuantizerSpec, amax: torch.Tensor | None, outer_scale: torch.Tensor | None) -> bool:
    """Whether y's amax saves the quantize kernel a read of y."""
    outer = spec.format.outer_scale
    dynamic = outer is not None and outer.per == "tensor" and amax is None and outer_scale is None
    return dynamic and spec.hadamard is None


def _quantize(
    y: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> Quantized:
    """Quantize y by the kernel that the dispatcher selects for it."""
    given = "given" if amax is not None or outer_scale is not None else None
    order = "rows" if y.is_contiguous() else "columns"
    operand = dispatch.Operand(tuple(y.shape), str(y.dtype).removeprefix("torch."), outer=given, order=order)
    capability = blocks.capability_of(y.device) if y.is_cuda else None
    problem = Problem("quantize", (operand,), y.device.type, capability, spec, None, scale_layout)
    return dispatch.select(problem).run(y, spec, amax, outer_scale, seed, scale_layout)
