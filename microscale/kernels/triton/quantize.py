"""Triton quantize: one kernel for every format, specialised by properties; see `jit_quantize.py`.

Bytes for bf16 in, MX 4-bit out: 2 + 0.5 + 1/32 per element, read and written once. Where the outer scale is dynamic, a
first kernel reads the input for its amax.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout, scaling
from microscale.spec.quantizer import QuantizerSpec

# Lanes of one program: enough independent 16-byte loads in flight, few enough registers to hold the tile.
LANES = 2048
WARPS = 2
PACKING_WARPS = 4  # where neighbouring codes are put together across threads


def _spec(problem: Problem) -> QuantizerSpec:
    assert problem.quantizer is not None
    return problem.quantizer


CHECKS = (
    ("searches no scale candidates", lambda p: not _spec(p).format.scale_rule.candidates),
    ("takes no scale tile of several rows or blocks", lambda p: _spec(p).scale_tile is None),
    ("fuses no Hadamard transform", lambda p: _spec(p).hadamard is None),
    ("rounds codebooks to nearest only", lambda p: not _is_stochastic_codebook(_spec(p))),
    ("needs subnormals in the element", lambda p: _has_zero(_spec(p))),
    ("needs a scale that is E8M0-like, FP32, or of up to 8 bits", lambda p: _scale_fits(_spec(p))),
)


def _is_stochastic_codebook(spec: QuantizerSpec) -> bool:
    return spec.rounding == "stochastic" and spec.format.element.kind == "codebook"


def _has_zero(spec: QuantizerSpec) -> bool:
    element = spec.format.element
    return element.kind != "float" or element.subnormals


def _scale_fits(spec: QuantizerSpec) -> bool:
    scale = spec.format.scale
    return scale.exponent_only or scale.torch_dtype == "float32" or (scale.width <= 8 and scale.subnormals)


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_quantize

    return jit_quantize


REQUIRES = Requires(devices=("cuda",), packages=("triton",), checks=CHECKS)


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
    fmt, columns = spec.format, x.shape[-1]
    shape = x.shape[:-1]
    matrix_rows = x.shape[-2] if x.dim() > 1 else 1
    blocks = -(-columns // fmt.block)
    qdata = torch.empty((*shape, blocks * fmt.block_bytes), dtype=torch.uint8, device=x.device)
    scale = _empty_scale(x, spec, blocks, scale_layout)
    outer = _outer(x, spec, amax, outer_scale)
    total = qdata.numel() // max(1, fmt.block_bytes)
    if total:
        rows = _as_rows(x)
        _launch(rows, qdata, scale, outer, seed, spec, (total, matrix_rows, columns, blocks), scale_layout)
    elif outer is not None and outer.kind == FROM_AMAX:
        outer.decode.fill_(1.0)
    return qdata, scale, None if outer is None else outer.decode


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x as [rows, K] where its leading strides allow it; copy otherwise."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.reshape(-1, x.shape[-1])


def _empty_scale(x: torch.Tensor, spec: QuantizerSpec, blocks: int, scale_layout: str) -> torch.Tensor:
    dtype = torch.float32 if spec.format.scale.width > 8 else torch.uint8
    shape = x.shape[:-1]
    if scale_layout == layout.STRIDED:
        return torch.empty((*shape, blocks), dtype=dtype, device=x.device)
    rows = shape[-1] if shape else 1
    full_rows, full_columns = layout.padded(rows, blocks)
    make = torch.empty if (full_rows, full_columns) == (rows, blocks) else torch.zeros  # padding is zero
    return make((*shape[:-1], full_rows * full_columns), dtype=dtype, device=x.device)


@dataclasses.dataclass(frozen=True)
class _Outer:
    """The outer scale as the kernel takes it. FROM_AMAX: `encode` is the amax, and the kernel writes `decode`."""

    kind: int
    encode: torch.Tensor
    decode: torch.Tensor


NONE, SCALAR, BY_ROW, FROM_AMAX = range(4)


def _outer(
    x: torch.Tensor, spec: QuantizerSpec, amax: torch.Tensor | None, outer_scale: torch.Tensor | None
) -> _Outer | None:
    fmt = spec.format
    if fmt.outer_scale is None:
        return None
    if outer_scale is None and fmt.outer_scale.per == "tensor" and (amax is None or amax.dim() == 0):
        amax = tensor_amax(x) if amax is None else amax
        return _Outer(FROM_AMAX, amax, torch.empty((), dtype=torch.float32, device=x.device))
    if outer_scale is not None:
        made = scaling.outer_from_scale(outer_scale, fmt)
    else:
        made = scaling.outer_from_amax(scaling.finite_amax(x, fmt.outer_scale.per) if amax is None else amax, fmt)
    return _Outer(SCALAR if made.encode.numel() == 1 else BY_ROW, made.encode, made.decode)


def tensor_amax(x: torch.Tensor) -> torch.Tensor:
    """Return the FP32 amax over finite values of a whole tensor, shape ()."""
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        dense = x if x.is_contiguous() else x.contiguous()
        size, iterations = 4096, 8
        grid = -(-x.numel() // (size * iterations))
        constants = {"SIZE": size, "ITERATIONS": iterations}
        launch(_jit().finite_amax, grid, (dense, bits, x.numel()), constants, 8)
    return bits.view(torch.float32)


def _launch(
    rows: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer: _Outer | None,
    seed: torch.Tensor | None,
    spec: QuantizerSpec,
    sizes: tuple[int, int, int, int],
    scale_layout: str,
) -> None:
    fmt = spec.format
    total, _, columns, _ = sizes
    lanes = properties.power_of_two_at_least(fmt.block)
    per_program = max(1, LANES // lanes)
    encode, decode, kind = scale, scale, NONE
    if outer is not None:
        encode, decode, kind = outer.encode, outer.decode, outer.kind
    if kind == BY_ROW:
        encode, decode = (_per_row(t, rows.shape[0]) for t in (encode, decode))
    thresholds, code_of = properties.tables(fmt.element, rows.device)
    flat = columns % fmt.block == 0 and lanes == fmt.block and rows.is_contiguous()
    encoder = choose_encoder(rows, spec, flat)
    if encoder >= PACKED_EXPONENTS:
        rows = rows.view(torch.int32)
    warps = PACKING_WARPS if encoder == PORTABLE and fmt.element.pack_group > 1 else WARPS
    constants = {
        **properties.quantize_constants(fmt), "BLOCKS": per_program, "BLOCK_P2": lanes, "OUTER": kind,
        "STOCHASTIC": spec.rounding == "stochastic", "SWIZZLE": scale_layout == layout.SWIZZLED, "FLAT": flat,
        "WIDE": total * lanes >= 2**31, "ENCODER": encoder,
    }  # fmt: skip
    args = (
        rows, qdata, scale, encode, decode, scale if seed is None else seed, thresholds, code_of,
        *sizes, rows.stride(0), rows.stride(1),
    )  # fmt: skip
    launch(_jit().quantize_rows, -(-total // per_program), args, constants, warps)


PORTABLE, BY_FP8, PACKED_EXPONENTS, PACKED_FACTORS = range(4)
E8M0_BIAS = 127


def choose_encoder(rows: torch.Tensor, spec: QuantizerSpec, flat: bool) -> int:
    """Return which encoder of `jit_quantize.py` serves a call."""
    if properties.interpreted():
        return PORTABLE
    packable = flat and rows.dtype == torch.bfloat16 and rows.data_ptr() % 4 == 0
    return encoder_for(spec, torch.cuda.get_device_capability(rows.device), dense=flat, packable=packable)


def encoder_for(spec: QuantizerSpec, capability: tuple[int, int], *, dense: bool, packable: bool) -> int:
    """Return the encoder for a quantizer on an architecture. `dense`: the input is whole blocks; `packable`: of bf16.

    sm_89 has fp8 conversions too, but Triton 3.6 rounds to f16 on the way there, so they start at sm_90. And they serve
    dense rows in blocks of 32 and its multiples only: on an H200 with Triton 3.6 ragged rows got wrong bytes from them,
    through the cast and through the instruction written by hand. The cause is not known; portable code was right there.
    """
    fmt, element = spec.format, spec.format.element
    if capability < (9, 0) or spec.rounding != "nearest_even" or element.kind != "float":
        return PORTABLE
    if properties.is_fp8(element) and element.max is None and dense and fmt.block % 32 == 0:
        return BY_FP8
    if not packable or not properties.is_e2m1(element) or fmt.block % 8:
        return PORTABLE
    if not fmt.scale.exponent_only:
        return PACKED_FACTORS
    return PACKED_EXPONENTS if fmt.scale.bias == E8M0_BIAS else PORTABLE


def _per_row(t: torch.Tensor, rows: int) -> torch.Tensor:
    """Outer scales [..., R or 1, 1] as one per row of the flattened matrix."""
    if t.numel() == rows:
        return t.reshape(rows)
    per_matrix = rows // (t.numel() or 1)  # one per expert: t is [..., 1, 1]
    return t.reshape(-1, 1).expand(-1, per_matrix).reshape(rows)
