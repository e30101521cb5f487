"""`matmul`, `grouped_matmul`, `linear`, `embedding`: block-scaled in, plain out.

The product is what multiplying the dequantized operands in FP32 gives, rounded once to the output dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from microscale.errors import InputError
from microscale.kernels.reference.matmul import Operand, Parts
from microscale.numerics import layout
from microscale.numerics.hadamard import hadamard
from microscale.ops import api, direct, graph, library
from microscale.ops.api import INPUT_DTYPES, dequantize, quantize
from microscale.ops.late import late_parts
from microscale.ops.rows import in_dtype, quantize_as_rows, uses_rows
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor, Meta, bare


def _flat(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str, Any]:
    """The five schema arguments of one operand."""
    if isinstance(t, BlockScaledTensor):
        with bare():
            return t.qdata, t.scale, t.outer_scale, t.meta.pack(), t.shape[t.block_axis]
    return t, None, None, "", 0


def _tensors(t: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (t.qdata, t.scale, t.outer_scale) if isinstance(t, BlockScaledTensor) else (t,)


def _parts(t: torch.Tensor, shape: torch.Size) -> Operand:
    """One operand, of this shape, as kernels get it."""
    if not isinstance(t, BlockScaledTensor):
        return t
    meta = t.meta
    size = shape[meta.axis]
    return Parts(t.qdata, t.scale, t.outer_scale, meta.format, meta.axis, size, meta.layout, meta.exact_rows)


def transposed(q: BlockScaledTensor) -> BlockScaledTensor:
    """Return q.t() of a matrix, which every linear layer asks for: what `structure.transpose` gives, in few steps."""
    meta, (rows, columns) = q.meta, q.shape
    qdata, scale, outer = _turned(q.qdata, q.scale, q.outer_scale, meta)
    turned = api._meta(meta.format, -3 - meta.axis, meta.layout, meta.exact_rows)
    return BlockScaledTensor(qdata, scale, outer, turned, (columns, rows), q.dtype)


def _turned(
    qdata: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor | None, meta: Meta
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The parts of a matrix, transposed."""
    scale = scale if meta.layout == layout.SWIZZLED else scale.t()
    return qdata.t(), scale, outer.t() if outer is not None and outer.dim() else outer


# Views and a description of a weight's parts take a third of the time around a small product, so the weight keeps
# them, beside what they were made of. They are made again unless that is still the same objects in the same memory:
# another part put in the place of one, or given other `.data`, differs; what is written into a part, views show.
_COMPARED = ("cpu", "cuda")  # devices of `Tensor.is_set_to`: the same storage, offset, shape and strides


def _kept(q: BlockScaledTensor, shape: torch.Size) -> tuple[Parts, library.Facts] | None:
    """Return what `_keep_turned` made, if it is of what the matrix is now. Only where torch needs to see nothing."""
    if q._turned is None:
        return None
    qdata, scale, outer, meta, sizes, same_qdata, same_scale, same_outer, parts, facts = q._turned
    if q.qdata is not qdata or q.scale is not scale or q.outer_scale is not outer or q.meta is not meta:
        return None
    if sizes != shape:
        return None
    if not qdata.is_set_to(same_qdata) or not scale.is_set_to(same_scale):
        return None
    return (parts, facts) if outer is None or outer.is_set_to(same_outer) else None


def _keep_turned(q: BlockScaledTensor, shape: torch.Size) -> tuple[Parts, library.Facts]:
    """Return the transposed parts of a matrix as kernels get them, and what selection depends on.

    Only for parts that are plain tensors.
    """
    qdata, scale, outer, meta = q.qdata, q.scale, q.outer_scale, q.meta
    same = qdata.data, scale.data, None if outer is None else outer.data  # no views, which would hold the parts
    size = shape[meta.axis]
    made = Parts(*_turned(*same, meta), meta.format, -3 - meta.axis, size, meta.layout, meta.exact_rows)
    parts = late_parts(made, -2)
    facts = library._facts(parts, -2)
    # What `late` makes while a graph is captured is only there once that is replayed.
    captured = parts is not made and qdata.is_cuda and torch.cuda.is_current_stream_capturing()
    if qdata.device.type in _COMPARED and not captured:
        q._turned = (qdata, scale, outer, meta, shape, *same, parts, facts)
    return parts, facts


def _result_dtype(a: torch.dtype, b: torch.dtype, out_dtype: torch.dtype | None) -> torch.dtype:
    if a is not b:
        raise InputError(
            f"operands of dtype {a} and {b}", "convert the plain one, or use .as_dtype() of the quantized one"
        )
    if not a.is_floating_point or a is torch.float64:
        raise InputError(f"matmul takes float32, bfloat16 or float16, got {a}")
    return a if out_dtype is None else out_dtype


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `a @ b + bias + residual` for a [..., M, K] and b [..., K, N]; either or both block-scaled along any axis.

    FP32 accumulation, outer scales, bias and residual in FP32, one rounding to `out_dtype` (default: the operands'
    dtype). The bias broadcasts to the result's shape; the residual (float32, bfloat16 or float16) has it, and any
    strides. Raises InputError for shapes or dtypes that do not fit.
    """
    graph.arm()
    return _matmul(a, b, bias, out_dtype, residual)


@graph.in_graph
def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return product(a, b, bias, out_dtype, residual, recorded=_records(a, b, bias, residual))


def _records(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would follow an op on these tensors."""
    if torch.is_grad_enabled():
        with bare():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return True
    return False


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
    *,
    recorded: bool,
) -> torch.Tensor:
    """Return what `matmul` returns. `recorded`: autograd follows it, so it goes through torch; below, it need not."""
    with bare():
        shape_a, shape_b, dtypes = a.shape, b.shape, (a.dtype, b.dtype)
    rank_a, rank_b = len(shape_a), len(shape_b)
    if rank_a == 0 or rank_b == 0 or shape_a[-1] != shape_b[-2 if rank_b > 1 else -1]:
        raise InputError(f"cannot multiply {list(shape_a)} by {list(shape_b)}", "the inner sizes must agree")
    dtype = _result_dtype(*dtypes, out_dtype)
    if not (isinstance(b, BlockScaledTensor) or isinstance(a, BlockScaledTensor)):
        raise InputError("matmul of two plain tensors", "use torch.matmul")
    if rank_a == 1 or rank_b == 1:  # as torch.matmul: a vector is a row on the left, a column on the right
        left, right = (a.unsqueeze(0) if rank_a == 1 else a), (b.unsqueeze(-1) if rank_b == 1 else b)
        plain = bias is None and residual is None
        out = product(left, right, None, dtype if plain else torch.float32, recorded=recorded)
        out = out.squeeze(-1) if rank_b == 1 else out
        out = out.squeeze(-1 if rank_b == 1 else -2) if rank_a == 1 else out
        for added in (bias, residual):
            out = out if added is None else out + added.to(torch.float32)
        return out if plain else out.to(dtype)
    if residual is not None:
        _check_residual(shape_a, shape_b, residual)
    if not recorded and direct.is_direct(bias, residual, *_tensors(a), *_tensors(b)):
        return library.matmul(_parts(a, shape_a), _parts(b, shape_b), bias, dtype, residual)
    return torch.ops.microscale.matmul(*_flat(a), *_flat(b), bias, dtype, residual)


def _check_residual(a: torch.Size, b: torch.Size, residual: torch.Tensor) -> None:
    shape = (*torch.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
    if residual.shape != shape or type(residual) is BlockScaledTensor or residual.dtype not in INPUT_DTYPES:
        raise InputError(
            f"residual {residual.dtype} {list(residual.shape)} for a product of shape {list(shape)}",
            "it is a plain float32, bfloat16 or float16 tensor of just that shape",
        )


def times_transpose(x: torch.Tensor, weight: BlockScaledTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `product(x, weight.t(), bias)` of a matrix `weight`, below autograd."""
    made = _times_transpose(x, weight, bias)
    return product(x, transposed(weight), bias, None, recorded=False) if made is None else made


def _times_transpose(x: torch.Tensor, weight: BlockScaledTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The same of an x of two dimensions or more; None for another, and where torch must see the product."""
    shape, sizes = x.shape, weight.shape
    if len(shape) < 2 or len(sizes) != 2 or not direct.is_direct(bias, *_tensors(x)):
        return None
    kept = _kept(weight, sizes)
    if kept is None and not direct.is_direct(*_tensors(weight)):
        return None
    if shape[-1] != sizes[1]:
        raise InputError(f"cannot multiply {list(shape)} by {list(sizes[::-1])}", "the inner sizes must agree")
    dtype = _result_dtype(x.dtype, weight.dtype, None)
    parts, facts = _keep_turned(weight, sizes) if kept is None else kept
    return library.matmul(_parts(x, shape), parts, bias, dtype, None, facts)


def short_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **others: object
) -> torch.Tensor | None:
    """Return what `torch.nn.functional.linear` does; None where something follows or changes it on its way."""
    if type(weight) is not BlockScaledTensor or type(input) not in direct.PLAIN or others or direct.is_followed():
        return None
    if input.layout is not torch.strided:
        return None
    if bias is not None and type(bias) not in direct.PLAIN:
        return None
    with bare():
        return None if _records(input, weight, bias) else _times_transpose(input, weight, bias)


def grouped_matmul(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return each row of a [T, K] times its group's matrix of b [E, K, N]: [T, N].

    `offsets` int32 [E] holds the end of each group's rows (`torch.nn.functional.grouped_mm`'s `offs`); groups may be
    empty; rows after the last end are zero. Raises InputError for shapes or dtypes that do not fit.
    """
    graph.arm()
    return _grouped_matmul(a, b, offsets, out_dtype)


@graph.in_graph
def _grouped_matmul(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype | None
) -> torch.Tensor:
    with bare():
        shape_a, shape_b, dtypes = a.shape, b.shape, (a.dtype, b.dtype)
    if len(shape_a) != 2 or len(shape_b) != 3 or shape_a[1] != shape_b[1]:
        raise InputError(f"grouped_matmul of {list(shape_a)} and {list(shape_b)}", "takes [T, K] and [E, K, N]")
    if offsets.dtype != torch.int32 or offsets.shape != shape_b[:1]:
        raise InputError(f"offsets must be int32 [{shape_b[0]}], got {offsets.dtype} {list(offsets.shape)}")
    dtype = _result_dtype(*dtypes, out_dtype)
    if not _records(a, b) and direct.is_direct(offsets, *_tensors(a), *_tensors(b)):
        return library.grouped_matmul(_parts(a, shape_a), _parts(b, shape_b), offsets, dtype)
    return torch.ops.microscale.grouped_matmul(*_flat(a), *_flat(b), offsets, dtype)


class _StraightThrough(torch.autograd.Function):
    """y = Q(x) @ w.T + b forward; backward as if Q only rotated (by its Hadamard): dx = dy @ w, rotated back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        quantized: BlockScaledTensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        spec: QuantizerSpec,
        rows: BlockScaledTensor | None,
    ) -> torch.Tensor:
        """Multiply the quantized input; the bias joins before the one rounding."""
        ctx.save_for_backward(weight)
        ctx.hadamard = spec.hadamard
        factor = weight if rows is None else rows
        return matmul(quantized, factor.transpose(-1, -2), bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Multiply by the weight as stored; the bias gradient sums in FP32."""
        (weight,) = ctx.saved_tensors
        dx = torch.matmul(grad, weight) if ctx.needs_input_grad[0] else None
        if dx is not None and ctx.hadamard is not None:
            dx = hadamard(dx, ctx.hadamard.size, ctx.hadamard.sign, inverse=True)
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(grad.dtype)
        return dx, None, None, dbias, None, None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    input_quantizer: QuantizerSpec | None = None,
    amax: torch.Tensor | None = None,
    rows: BlockScaledTensor | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias` for x [..., K], block-scaled weight [N, K]; the result has x's dtype.

    With `input_quantizer`, x is quantized first (`amax`: the calibrated magnitude of a static one); its gradient is
    straight-through. Without, the gradient to x is exact. The weight gets no gradient.

    `rows`: the weight as `align_rows` made it, which x of 128 rows or more is multiplied by if it is quantized: FP8
    tensor cores then take both operands as they lie. Only in bfloat16, for quantizers without an outer scale, and not
    within `exact_products()` (under torch.compile: as it was when traced). The gradient is the weight's. Raises
    InputError if their shape is not the weight's.
    """
    if input_quantizer is None:
        short = None if torch.compiler.is_compiling() else short_linear(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias) if short is None else short
    if rows is not None:
        if rows.shape != weight.shape:
            raise InputError(f"rows {list(rows.shape)} of a weight {list(weight.shape)}", "make them of it: align_rows")
        rows = in_dtype(rows, x.dtype) if uses_rows(x, input_quantizer) else None
    quantized = quantize(x, input_quantizer, amax=amax) if rows is None else quantize_as_rows(x, input_quantizer)
    recorded = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not recorded:
        factor = weight if rows is None else rows
        if not torch.compiler.is_compiling() and type(factor) is BlockScaledTensor:
            with bare():
                made = _times_transpose(quantized, factor, bias)
            if made is not None:
                return made
        return matmul(quantized, factor.transpose(-1, -2), bias, x.dtype)
    return _StraightThrough.apply(x, quantized, weight, bias, input_quantizer, rows)  # type: ignore[no-untyped-call]


def embedding(indices: torch.Tensor, weight: BlockScaledTensor) -> torch.Tensor:
    """Return the dequantized rows of weight [V, K] for integer `indices` of any shape: [..., K] of weight's dtype."""
    rows = weight.index_select(0, indices.reshape(-1))
    return dequantize(rows).reshape(*indices.shape, weight.shape[1])
