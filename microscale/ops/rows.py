"""Rows of E4M3 with one power of two each: what FP8 tensor cores without block scales multiply.

`cublas.rows_e4m3` makes such rows of every MX operand, at every call. Of a weight they can be made once and kept
beside it, for one more byte per element: `align_rows` makes them, `linear(..., rows=)` uses them. Activations that meet
such a weight become rows straight from their numbers (`quantize_rows`), the same codes as by way of blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from microscale import dispatch
from microscale.errors import InputError
from microscale.kernels.cublas import grouped_rows_e4m3, rows_e4m3
from microscale.kernels.reference import align_rows as reference
from microscale.numerics import layout
from microscale.ops import api, direct, graph, library
from microscale.spec.format import ROW, FormatSpec, ScaleRuleSpec
from microscale.spec.powers import with_powers
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_element, find_quantizer
from microscale.tensor import BlockScaledTensor, Meta

library.LIBRARY.define("quantize_rows(Tensor x, str spec) -> (Tensor, Tensor)")

MANY = 128  # rows of activations from which rows of E4M3 beat a prepared weight, measured on an H200


@functools.lru_cache(maxsize=1024)
def rows_format(columns: int) -> FormatSpec:
    """Return the format of rows of so many E4M3 elements with one FP32 scale each."""
    scale, rule = find_element("fp32"), ScaleRuleSpec(base="nearest")
    spec = FormatSpec(name="e4m3_rows", element=reference.TARGET, block=ROW, scale=scale, scale_rule=rule)
    return spec.for_row(columns)


def align_rows(weight: BlockScaledTensor) -> BlockScaledTensor:
    """Return a weight [N, K] or experts [E, N, K] as E4M3 codes with one power of two (FP32) for each row.

    A tensor of its own, one byte per element, for products with quantized activations on sm_89 and sm_90, where it is
    multiplied as it lies. Weights of 4 and 6 bits keep every value; an element of 8 bits loses what is below 2**-10 of
    its row's power of two, as it does in `cublas.rows_e4m3`, which else does this at every call. NaN stays NaN. Save
    the weight, not its rows.

    Raises InputError for blocks that are not along K, formats that E4M3 cannot hold, and rows of 4 or 6 bits whose
    exponents are too far apart.
    """
    if not isinstance(weight, BlockScaledTensor) or weight.dim() < 2 or weight.block_axis != -1:
        got = repr(weight) if isinstance(weight, BlockScaledTensor) else type(weight).__name__
        raise InputError(f"align_rows takes a weight [N, K] or [E, N, K] with its blocks along K, got {got}")
    fmt, columns = weight.format, weight.shape[-1]
    if not reference.fits(fmt):
        raise InputError(
            f"{fmt.name} does not fit rows of E4M3 with a power of two each",
            "they take float elements of 4, 6 or 8 bits whose scales are powers of two, such as mxfp8 and mxfp4",
        )
    if _is_exact(weight) is False:
        raise InputError(
            f"some rows of this {fmt.name} weight have exponents too far apart for E4M3",
            "multiply it as it is: other kernels take it",
        )
    device, parts = weight.device, (weight.qdata, weight.scale, fmt, columns, weight.scale_layout)
    found = library.capability(device)
    if found is not None and found >= rows_e4m3.ADA and dispatch.installed("triton"):
        from microscale.kernels.triton.align_rows import align_rows as run

        codes, powers = run(*parts)
    else:
        codes, powers = reference.align_rows(*parts)
    return of_codes(codes, powers, columns, weight.dtype)


def noted(weight: BlockScaledTensor) -> BlockScaledTensor:
    """Return a weight whose `meta.exact_rows` says whether FP8 tensor cores get every value of its rows.

    Rows are those along the blocked dimension. They are exact while the exponents of a row's blocks span at most 14
    for E2M1 elements (11 for E2M3, 9 for E3M2), blocks of zeros apart. A weight that is not exact is then left to
    kernels that decode it to bfloat16. Formats for which there is no such question, elements of 8 bits and mantissa
    scales among them, are returned as they are. Reads the scales once.

    The note is of these bytes: it stays with views, copies, pickles and native checkpoints, is dropped where blocks of
    different rows join, and follows the source of `copy_`.
    """
    fmt = weight.format
    if not reference.fits(fmt) or reference.span(fmt.element) <= 0 or weight.outer_scale is not None:
        return weight
    axis = weight.block_axis
    scale, qdata = weight.strided_scale().movedim(axis, -1), weight.qdata.movedim(axis, -1)
    found = reference.is_exact(qdata, scale, fmt, weight.shape[axis])
    return weight.replace(meta=dataclasses.replace(weight.meta, exact_rows=found))


def of_codes(codes: torch.Tensor, powers: torch.Tensor, columns: int, dtype: torch.dtype) -> BlockScaledTensor:
    """Return rows from their E4M3 codes [..., R, columns or more] and FP32 powers of two [..., R, 1]."""
    columns, qdata = int(columns), codes.view(torch.uint8)  # a traced size would be symbolic
    qdata = qdata if qdata.shape[-1] == columns else qdata[..., :columns].contiguous()
    return BlockScaledTensor(qdata, powers, None, Meta(rows_format(columns)), (*codes.shape[:-1], columns), dtype)


def _is_exact(weight: BlockScaledTensor) -> bool | None:
    """Whether E4M3 holds every value of the rows, None where there is no such question; as `prepare` notes it."""
    if weight.meta.exact_rows is not None:
        return weight.meta.exact_rows
    plain = weight.to_layout(layout.STRIDED) if weight.scale_layout == layout.FRAGMENTS else weight
    return noted(plain).meta.exact_rows


def why_not(weight: torch.Tensor, quantizer: QuantizerSpec | None) -> str | None:
    """Return why rows of a weight are of no use for activations of a quantizer; None if they are."""
    if quantizer is None:
        return "its activations are not quantized"
    found, experts = library.capability(weight.device), weight.dim() > 2
    if found not in ((rows_e4m3.HOPPER,) if experts else (rows_e4m3.ADA, rows_e4m3.HOPPER)):
        return f"only {'sm_90' if experts else 'sm_89 and sm_90'} multiply them"
    if weight.dtype != torch.bfloat16 or weight.shape[-2] % rows_e4m3.MULTIPLE:
        return f"they are for layers in bfloat16 with a multiple of {rows_e4m3.MULTIPLE} outputs"
    if quantizer.rounding != "nearest_even":
        return "its activations are not rounded to nearest"
    fmt = quantizer.format
    if not reference.fits(fmt) and not (fmt.block == ROW and rows_e4m3.is_aligned(with_powers(fmt), True)):
        return f"activations in {fmt.name} do not become rows of E4M3"
    small = any(n <= grouped_rows_e4m3.LARGE // 2 for n in weight.shape[-2:])
    if experts and (small or weight.shape[0] > grouped_rows_e4m3.MOST_EXPERTS):
        return "experts of that size or number are multiplied faster as they are"
    return None


@graph.constant
def _wants_exact() -> bool:
    return dispatch.wants_exact()


def uses_rows(x: torch.Tensor, quantizer: QuantizerSpec | None, experts: int = 1) -> bool:
    """Return True for activations x [..., K] that rows of E4M3 serve best, MANY for each expert, if they may.

    In bfloat16, as the kernels for them, and without an outer scale, which such rows have no place for.
    """
    if quantizer is None or quantizer.format.outer_scale is not None or x.dtype != torch.bfloat16 or x.dim() < 2:
        return False
    return x.numel() >= MANY * experts * x.shape[-1] > 0 and not _wants_exact()


def in_dtype(rows: BlockScaledTensor, dtype: torch.dtype) -> BlockScaledTensor:
    """Return the same rows for products of a dtype."""
    return rows if rows.dtype == dtype else rows.as_dtype(dtype)


# -- activations -------------------------------------------------------------------------------------------------------


def quantize_as_rows(x: torch.Tensor, spec: QuantizerSpec) -> BlockScaledTensor:
    """Return `quantize(x, spec)` as `align_rows` would make it, from one read of x [..., R, K] if a kernel can.

    For specs with an MX format that fits such rows, rounding to nearest; others are quantized and stay what they are.
    """
    if not reference.fits(spec.format) or spec.rounding != "nearest_even":
        return api.quantize(x, spec)
    if torch.compiler.is_dynamo_compiling():
        graph.arm()
        return _traced(x, spec.key)
    return _as_rows(x, spec)


@graph.in_graph
def _traced(x: torch.Tensor, key: str) -> BlockScaledTensor:
    return _as_rows(x, QuantizerSpec.from_key(key))


def _as_rows(x: torch.Tensor, spec: QuantizerSpec) -> BlockScaledTensor:
    api._check_input(x, -1, layout.STRIDED)
    plain = x.detach()
    if direct.is_direct(plain):
        codes, powers = _run(plain, spec)
    else:
        codes, powers = torch.ops.microscale.quantize_rows(plain, spec.key)
    return of_codes(codes, powers, x.shape[-1], x.dtype)


def _run(x: torch.Tensor, spec: QuantizerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    facts = (x.shape, x.dtype, x.device, library._order(x), spec.key)
    made: tuple[torch.Tensor, torch.Tensor] = dispatch.select_by("quantize_rows", facts, _problem, x, spec).run(x, spec)
    return made


def _problem(x: torch.Tensor, format: QuantizerLike, **changes: Any) -> dispatch.Problem:
    spec = find_quantizer(format, **changes)
    operand = dispatch.Operand(tuple(x.shape), library.dtype_name(x.dtype), order=library._order(x))
    return dispatch.Problem("quantize_rows", (operand,), x.device.type, library.capability(x.device), spec)


@torch.library.impl(library.LIBRARY, "quantize_rows", "CompositeExplicitAutograd")
def _quantize_rows(x: torch.Tensor, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(x, QuantizerSpec.from_key(spec))


@torch.library.register_fake("microscale::quantize_rows", lib=library.LIBRARY)
def _fake(x: torch.Tensor, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = -(-x.shape[-1] // reference.ALIGN) * reference.ALIGN
    codes = x.new_empty((*x.shape[:-1], width), dtype=torch.float8_e4m3fn)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


api.PROBLEMS["quantize_rows"] = _problem
