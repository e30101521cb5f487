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
from microscale.ops import api, graph, library
from microscale.ops.api import INPUT_DTYPES, dequantize, quantize
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor


def _flat(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str, Any]:
    """The five schema arguments of one operand."""
    if isinstance(t, BlockScaledTensor):
        return t.qdata, t.scale, t.outer_scale, t.meta.pack(), t.shape[t.block_axis]
    return t, None, None, "", 0


def _tensors(t: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (t.qdata, t.scale, t.outer_scale) if isinstance(t, BlockScaledTensor) else (t,)


def _parts(t: torch.Tensor) -> Operand:
    """One operand as kernels get it."""
    if not isinstance(t, BlockScaledTensor):
        return t
    meta = t.meta
    size = t.shape[meta.axis]
    return Parts(t.qdata, t.scale, t.outer_scale, meta.format, meta.axis, size, meta.layout, meta.exact_rows)


def transposed(q: BlockScaledTensor) -> BlockScaledTensor:
    """Return q.t() of a matrix, which every linear layer asks for: what `structure.transpose` gives, in few steps."""
    (rows, columns), parts = q.shape, _transposed_parts(q)
    meta = api._meta(parts.format, parts.axis, parts.layout, parts.exact_rows)
    return BlockScaledTensor(parts.qdata, parts.scale, parts.outer_scale, meta, (columns, rows), q.dtype)


def _transposed_parts(q: BlockScaledTensor) -> Parts:
    meta, outer = q.meta, q.outer_scale
    scale = q.scale if meta.layout == layout.SWIZZLED else q.scale.t()
    outer = outer.t() if outer is not None and outer.dim() else outer
    size = q.shape[meta.axis]
    return Parts(q.qdata.t(), scale, outer, meta.format, -3 - meta.axis, size, meta.layout, meta.exact_rows)


def _result_dtype(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if a.dtype != b.dtype:
        raise InputError(
            f"operands of dtype {a.dtype} and {b.dtype}",
            "convert the plain one, or use .as_dtype() of the quantized one",
        )
    if not a.dtype.is_floating_point or a.dtype == torch.float64:
        raise InputError(f"matmul takes float32, bfloat16 or float16, got {a.dtype}")
    return a.dtype if out_dtype is None else out_dtype


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
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    rank_a, rank_b = a.dim(), b.dim()
    if rank_a == 0 or rank_b == 0 or a.shape[-1] != b.shape[-2 if rank_b > 1 else -1]:
        raise InputError(f"cannot multiply {list(a.shape)} by {list(b.shape)}", "the inner sizes must agree")
    dtype = _result_dtype(a, b, out_dtype)
    if not isinstance(a, BlockScaledTensor) and not isinstance(b, BlockScaledTensor):
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
        _check_residual(a, b, residual)
    if not recorded and library.is_direct(bias, residual, *_tensors(a), *_tensors(b)):
        return library.matmul(_parts(a), _parts(b), bias, dtype, residual)
    return torch.ops.microscale.matmul(*_flat(a), *_flat(b), bias, dtype, residual)


def _check_residual(a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor) -> None:
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    if residual.shape != shape or type(residual) is BlockScaledTensor or residual.dtype not in INPUT_DTYPES:
        raise InputError(
            f"residual {residual.dtype} {list(residual.shape)} for a product of shape {list(shape)}",
            "it is a plain float32, bfloat16 or float16 tensor of just that shape",
        )


def times_transpose(x: torch.Tensor, weight: BlockScaledTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `product(x, weight.t(), bias)` of a matrix `weight`, below autograd."""
    if type(x) is BlockScaledTensor or x.dim() < 2 or not library.is_direct(x, bias, *_tensors(weight)):
        return product(x, transposed(weight), bias, None, recorded=False)
    if x.shape[-1] != weight.shape[1]:
        raise InputError(f"cannot multiply {list(x.shape)} by {list(weight.shape[::-1])}", "the inner sizes must agree")
    return library.matmul(x, _transposed_parts(weight), bias, _result_dtype(x, weight, None))


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
    if a.dim() != 2 or b.dim() != 3 or a.shape[1] != b.shape[1]:
        raise InputError(f"grouped_matmul of {list(a.shape)} and {list(b.shape)}", "takes [T, K] and [E, K, N]")
    if offsets.dtype != torch.int32 or offsets.shape != (b.shape[0],):
        raise InputError(f"offsets must be int32 [{b.shape[0]}], got {offsets.dtype} {list(offsets.shape)}")
    dtype = _result_dtype(a, b, out_dtype)
    if not _records(a, b) and library.is_direct(offsets, *_tensors(a), *_tensors(b)):
        return library.grouped_matmul(_parts(a), _parts(b), offsets, dtype)
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
    ) -> torch.Tensor:
        """Multiply the quantized input; the bias joins before the one rounding."""
        ctx.save_for_backward(weight)
        ctx.hadamard = spec.hadamard
        return matmul(quantized, weight.transpose(-1, -2), bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        """Multiply by the weight as stored; the bias gradient sums in FP32."""
        (weight,) = ctx.saved_tensors
        dx = torch.matmul(grad, weight) if ctx.needs_input_grad[0] else None
        if dx is not None and ctx.hadamard is not None:
            dx = hadamard(dx, ctx.hadamard.size, ctx.hadamard.sign, inverse=True)
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(grad.dtype)
        return dx, None, None, dbias, None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    input_quantizer: QuantizerSpec | None = None,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias` for x [..., K], block-scaled weight [N, K]; the result has x's dtype.

    With `input_quantizer`, x is quantized first (`amax`: the calibrated magnitude of a static one); its gradient is
    straight-through. Without, the gradient to x is exact. The weight gets no gradient.
    """
    if input_quantizer is None:
        if _is_short(x, weight, bias):
            return times_transpose(x, weight, bias)  # type: ignore[arg-type]
        return torch.nn.functional.linear(x, weight, bias)
    quantized = quantize(x, input_quantizer, amax=amax)
    recorded = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not recorded:
        return matmul(quantized, weight.transpose(-1, -2), bias, x.dtype)
    return _StraightThrough.apply(x, quantized, weight, bias, input_quantizer)  # type: ignore[no-untyped-call]


def _is_short(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a linear layer need not go through torch's: nothing follows or changes what it does on the way."""
    return (
        not torch.compiler.is_compiling()
        and type(weight) is BlockScaledTensor
        and weight.dim() == 2
        and library.is_direct(x, bias)
        and not _records(x, bias)
        and not torch.is_autocast_enabled(x.device.type)
    )


def embedding(indices: torch.Tensor, weight: BlockScaledTensor) -> torch.Tensor:
    """Return the dequantized rows of weight [V, K] for integer `indices` of any shape: [..., K] of weight's dtype."""
    rows = weight.index_select(0, indices.reshape(-1))
    return dequantize(rows).reshape(*indices.shape, weight.shape[1])
