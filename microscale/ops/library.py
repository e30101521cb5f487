"""The torch.library definitions: schema, fake, and an implementation that asks the dispatcher.

`quantize`, `dequantize`, `matmul` and `grouped_matmul` are what the ops of these names run; eager calls on plain
tensors go to them directly. Specs cross the boundary as their canonical text; an absent outer scale comes back as an
empty tensor, because a schema has no optional returns. All ops are functional and their outputs own their memory.
"""

from __future__ import annotations

import functools

import torch

from microscale import dispatch
from microscale.kernels.reference.matmul import Operand as KernelOperand
from microscale.kernels.reference.matmul import Parts
from microscale.numerics import layout
from microscale.ops.late import late
from microscale.spec.format import FormatSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import Meta

LIBRARY = torch.library.Library("microscale", "FRAGMENT")
_OPERAND = "Tensor {0}, Tensor? {0}_scale, Tensor? {0}_outer, str {0}_meta, SymInt {0}_size"

LIBRARY.define(
    "quantize(Tensor x, str spec, Tensor? amax, Tensor? outer_scale, Tensor? seed, str layout) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "dequantize(Tensor qdata, Tensor scale, Tensor? outer_scale, str format, SymInt columns, str layout, "
    "ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    f"matmul({_OPERAND.format('a')}, {_OPERAND.format('b')}, Tensor? bias, ScalarType out_dtype, "
    "Tensor? residual=None) -> Tensor"
)
LIBRARY.define(
    f"grouped_matmul({_OPERAND.format('a')}, {_OPERAND.format('b')}, Tensor offsets, ScalarType out_dtype) -> Tensor"
)


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device, else None."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# -- quantize ----------------------------------------------------------------------------------------------------------


def quantize_problem(x: torch.Tensor, spec: QuantizerSpec, given: bool, scale_layout: str) -> dispatch.Problem:
    """Describe a quantize call. `given`: the outer scale or its amax comes with the call."""
    outer, device = "given" if given else None, x.device
    operand = dispatch.Operand(tuple(x.shape), dtype_name(x.dtype), outer=outer, order=_order(x))
    return dispatch.Problem("quantize", (operand,), device.type, capability(device), spec, None, scale_layout)


def _order(x: torch.Tensor) -> str:
    """How x lies in memory, as `dispatch.Operand.order`."""
    if x.storage_offset() * x.element_size() % 16:
        return "strided"
    if x.is_contiguous():
        return "rows"
    return "columns" if x.dim() > 1 and x.transpose(-1, -2).is_contiguous() else "strided"


def quantize(
    x: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the kernel that the dispatcher selects; arguments and results as `reference.quantize`."""
    given = amax is not None or outer_scale is not None
    order = "rows" if x.is_contiguous() and not x.storage_offset() else _order(x)
    facts = (x.shape, x.dtype, x.device, order, spec.key, given, scale_layout)
    entry = dispatch.select_by("quantize", facts, quantize_problem, x, spec, given, scale_layout)
    return entry.run(x, spec, amax, outer_scale, seed, scale_layout)


@torch.library.impl(LIBRARY, "quantize", "CompositeExplicitAutograd")
def _quantize(
    x: torch.Tensor,
    spec: str,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qdata, scale, outer = quantize(x, QuantizerSpec.from_key(spec), amax, outer_scale, seed, scale_layout)
    return qdata, scale, x.new_empty(0, dtype=torch.float32) if outer is None else outer


@torch.library.register_fake("microscale::quantize", lib=LIBRARY)
def _quantize_fake(
    x: torch.Tensor,
    spec: str,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fmt = QuantizerSpec.from_key(spec).format
    blocks, rows = -(-x.shape[-1] // fmt.block), x.shape[:-1]
    qdata = x.new_empty((*rows, blocks * fmt.block_bytes), dtype=torch.uint8)
    dtype = torch.uint8 if fmt.scale.torch_dtype is None else getattr(torch, fmt.scale.torch_dtype)
    shape: tuple[int, ...] = (*rows, blocks)
    if scale_layout == layout.SWIZZLED:
        full_rows, full_columns = layout.padded(rows[-1] if rows else 1, blocks)
        shape = (*rows[:-1], full_rows * full_columns)
    return (
        qdata,
        x.new_empty(shape, dtype=dtype),
        x.new_empty(_outer_shape(x, fmt, outer_scale, amax), dtype=torch.float32),
    )


def _outer_shape(
    x: torch.Tensor, fmt: FormatSpec, outer_scale: torch.Tensor | None, amax: torch.Tensor | None
) -> tuple[int, ...]:
    if fmt.outer_scale is None:
        return (0,)
    given = outer_scale if outer_scale is not None else amax
    if given is not None:
        return tuple(given.shape)
    shapes = {"tensor": (), "row": (*x.shape[:-1], 1), "expert": (*x.shape[:-2], *(1,) * min(2, x.dim()))}
    return shapes[fmt.outer_scale.per]


# -- dequantize --------------------------------------------------------------------------------------------------------


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    fmt: FormatSpec,
    columns: int,
    scale_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Run the kernel that the dispatcher selects; arguments and result as `reference.dequantize`."""
    facts = (qdata.shape, qdata.device, fmt.key, columns, scale_layout, dtype)
    entry = dispatch.select_by("dequantize", facts, dequantize_problem, qdata, fmt, columns, scale_layout, dtype)
    return entry.run(qdata, scale, outer_scale, fmt, columns, scale_layout, dtype)


@torch.library.impl(LIBRARY, "dequantize", "CompositeExplicitAutograd")
def _dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    fmt: str,
    columns: int,
    scale_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return dequantize(qdata, scale, outer_scale, FormatSpec.from_key(fmt), columns, scale_layout, dtype)


def dequantize_problem(
    qdata: torch.Tensor, fmt: FormatSpec, columns: int, scale_layout: str, dtype: torch.dtype
) -> dispatch.Problem:
    """Describe a dequantize call."""
    operand = dispatch.Operand((*qdata.shape[:-1], columns), "uint8", fmt, -1, scale_layout)
    device = qdata.device
    return dispatch.Problem(
        "dequantize", (operand,), device.type, capability(device), None, dtype_name(dtype), scale_layout
    )


@torch.library.register_fake("microscale::dequantize", lib=LIBRARY)
def _dequantize_fake(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    fmt: str,
    columns: int,
    scale_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return qdata.new_empty((*qdata.shape[:-1], columns), dtype=dtype)


# -- matmul ------------------------------------------------------------------------------------------------------------


def outer_kind(outer: torch.Tensor | None, axis: int, contraction: int) -> str | None:
    """Return what `dispatch.Operand.outer` says of an operand blocked along `axis` and contracted along another.

    None without an outer scale, "scalar" for one number, "vector" for several that are constant along the contraction,
    so that they may multiply the sum, "mixed" for others.
    """
    if outer is None:
        return None
    if outer.numel() == 1:
        return "scalar"
    late = outer.shape[contraction] == 1 and (axis == contraction or outer.shape[axis] == 1)
    return "vector" if late else "mixed"


Facts = tuple[object, ...]


def _facts(x: KernelOperand, contraction: int) -> Facts:
    """What a selection depends on, as it is at hand."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    kind = None if x.outer_scale is None else outer_kind(x.outer_scale, x.axis, contraction)
    return x.qdata.shape, x.size, x.format.key, x.axis, x.layout, kind, x.exact_rows


def product_operand(x: KernelOperand, contraction: int) -> dispatch.Operand:
    """Describe an operand of a product that is contracted along a dimension, -1 or -2."""
    if isinstance(x, torch.Tensor):
        return dispatch.Operand(tuple(x.shape), dtype_name(x.dtype))
    shape = list(x.qdata.shape)
    shape[x.axis] = x.size
    kind, one = outer_kind(x.outer_scale, x.axis, contraction), 0 < x.size <= x.format.block
    return dispatch.Operand(
        tuple(shape), "uint8", x.format, x.axis, x.layout, kind, one_block=one, exact_rows=x.exact_rows
    )


def _device(x: KernelOperand) -> torch.device:
    return x.device if isinstance(x, torch.Tensor) else x.qdata.device


def product_problem(
    op: str,
    a: KernelOperand,
    b: KernelOperand,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    rounded: torch.dtype | None = None,
) -> dispatch.Problem:
    """Describe a matmul or grouped matmul; `bias` and `rounded` (see `dispatch.Problem`) are None for the latter."""
    operands, device = (product_operand(a, -1), product_operand(b, -2)), _device(a)
    row = None if bias is None else dispatch.Operand(tuple(bias.shape), dtype_name(bias.dtype))
    where = (device.type, capability(device))
    then = None if rounded is None else dtype_name(rounded)
    return dispatch.Problem(op, operands, *where, None, dtype_name(out_dtype), bias=row, rounded=then)


def matmul(
    a: KernelOperand,
    b: KernelOperand,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    facts_b: Facts | None = None,
) -> torch.Tensor:
    """Run the kernel that the dispatcher selects; arguments and result as `reference.matmul`.

    With a residual, whose shape is the result's, the kernel gives FP32, and one pass adds and rounds. `facts_b`: what
    `_facts(b, -2)` gives, of who has it at hand, and b as `late` makes it.
    """
    if type(a) is Parts and a.size <= a.format.block:
        a = late(a, -1)
    if facts_b is None and type(b) is Parts:
        b = late(b, -2)
    added = None if bias is None else (bias.shape, bias.dtype)
    asked, rounded = (out_dtype, None) if residual is None else (torch.float32, out_dtype)
    facts_b = _facts(b, -2) if facts_b is None else facts_b
    facts = (_facts(a, -1), facts_b, _device(a), added, asked, rounded)
    entry = dispatch.select_by("matmul", facts, product_problem, "matmul", a, b, bias, asked, rounded)
    made = entry.run(a, b, bias, asked)
    return made if residual is None else add_residual(made, residual, out_dtype)


def add_residual(sums: torch.Tensor, residual: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return FP32 `sums` + residual, of one shape, added in FP32 and rounded once. May overwrite the sums."""
    if not sums.is_cuda or not sums.numel() or not dispatch.installed("triton"):
        return (sums + residual.to(torch.float32)).to(out_dtype)
    from microscale.kernels.triton import epilogue

    out = sums if out_dtype == torch.float32 else torch.empty_like(sums, dtype=out_dtype)
    rows, columns = sums.shape[-2:]
    three = (-1, rows, columns)
    epilogue.finish(sums.view(three), None, None, residual.reshape(three), out.view(three))
    return out


def grouped_matmul(a: KernelOperand, b: KernelOperand, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Run the kernel that the dispatcher selects; arguments and result as `reference.grouped_matmul`."""
    a, b = late(a, -1), late(b, -2)
    facts = (_facts(a, -1), _facts(b, -2), _device(a), out_dtype)
    entry = dispatch.select_by("grouped_matmul", facts, product_problem, "grouped_matmul", a, b, None, out_dtype)
    return entry.run(a, b, offsets, out_dtype)


def _operand(
    data: torch.Tensor, scale: torch.Tensor | None, outer: torch.Tensor | None, meta: str, size: int
) -> KernelOperand:
    """An operand from its five schema arguments."""
    if scale is None:
        return data
    parsed = Meta.unpack(meta)
    return Parts(data, scale, outer, parsed.format, parsed.axis, size, parsed.layout, parsed.exact_rows)


@torch.library.impl(LIBRARY, "matmul", "CompositeExplicitAutograd")
def _matmul(
    a: torch.Tensor, a_scale: torch.Tensor | None, a_outer: torch.Tensor | None, a_meta: str, a_size: int,
    b: torch.Tensor, b_scale: torch.Tensor | None, b_outer: torch.Tensor | None, b_meta: str, b_size: int,
    bias: torch.Tensor | None, out_dtype: torch.dtype, residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    first, second = _operand(a, a_scale, a_outer, a_meta, a_size), _operand(b, b_scale, b_outer, b_meta, b_size)
    return matmul(first, second, bias, out_dtype, residual)


@torch.library.impl(LIBRARY, "grouped_matmul", "CompositeExplicitAutograd")
def _grouped_matmul(
    a: torch.Tensor, a_scale: torch.Tensor | None, a_outer: torch.Tensor | None, a_meta: str, a_size: int,
    b: torch.Tensor, b_scale: torch.Tensor | None, b_outer: torch.Tensor | None, b_meta: str, b_size: int,
    offsets: torch.Tensor, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    first, second = _operand(a, a_scale, a_outer, a_meta, a_size), _operand(b, b_scale, b_outer, b_meta, b_size)
    return grouped_matmul(first, second, offsets, out_dtype)


def _logical(data: torch.Tensor, scale: torch.Tensor | None, meta: str, size: int) -> list[int]:
    shape = list(data.shape)
    if scale is not None:
        shape[Meta.unpack(meta).axis] = size
    return shape


@torch.library.register_fake("microscale::matmul", lib=LIBRARY)
def _matmul_fake(
    a: torch.Tensor, a_scale: torch.Tensor | None, a_outer: torch.Tensor | None, a_meta: str, a_size: int,
    b: torch.Tensor, b_scale: torch.Tensor | None, b_outer: torch.Tensor | None, b_meta: str, b_size: int,
    bias: torch.Tensor | None, out_dtype: torch.dtype, residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    left, right = _logical(a, a_scale, a_meta, a_size), _logical(b, b_scale, b_meta, b_size)
    lead = torch.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2])) if len(left) > 2 or len(right) > 2 else ()
    rows = (left[-2],) if len(left) > 1 else ()
    columns = (right[-1],) if len(right) > 1 else ()
    return a.new_empty((*lead, *rows, *columns), dtype=out_dtype)


@torch.library.register_fake("microscale::grouped_matmul", lib=LIBRARY)
def _grouped_matmul_fake(
    a: torch.Tensor, a_scale: torch.Tensor | None, a_outer: torch.Tensor | None, a_meta: str, a_size: int,
    b: torch.Tensor, b_scale: torch.Tensor | None, b_outer: torch.Tensor | None, b_meta: str, b_size: int,
    offsets: torch.Tensor, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    left, right = _logical(a, a_scale, a_meta, a_size), _logical(b, b_scale, b_meta, b_size)
    return a.new_empty((left[0], right[-1]), dtype=out_dtype)
