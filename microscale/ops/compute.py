"""`matmul`, `grouped_matmul`, `linear`, `embedding`: block-scaled in, plain out.

The product is what multiplying the dequantized operands in FP32 gives, rounded once to the output dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from microscale.errors import InputError
from microscale.numerics.hadamard import hadamard
from microscale.ops import graph, library  # noqa: F401  (defines torch.ops.microscale)
from microscale.ops.api import dequantize, quantize
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor


def _flat(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str, Any]:
    """The five schema arguments of one operand."""
    if isinstance(t, BlockScaledTensor):
        return t.qdata, t.scale, t.outer_scale, t.meta.pack(), t.shape[t.block_axis]
    return t, None, None, "", 0


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
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `a @ b + bias` for a [..., M, K] and b [..., K, N]; either or both block-scaled along any axis.

    FP32 accumulation, outer scales and bias in FP32, one rounding to `out_dtype` (default: the operands' dtype).
    Raises InputError for shapes or dtypes that do not fit.
    """
    graph.arm()
    return _matmul(a, b, bias, out_dtype)


@graph.in_graph
def _matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
    if a.dim() == 0 or b.dim() == 0 or a.shape[-1] != b.shape[-2 if b.dim() > 1 else -1]:
        raise InputError(f"cannot multiply {list(a.shape)} by {list(b.shape)}", "the inner sizes must agree")
    dtype = _result_dtype(a, b, out_dtype)
    if not isinstance(a, BlockScaledTensor) and not isinstance(b, BlockScaledTensor):
        raise InputError("matmul of two plain tensors", "use torch.matmul")
    if a.dim() == 1 or b.dim() == 1:  # as torch.matmul: a vector is a row on the left, a column on the right
        left, right = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(-1) if b.dim() == 1 else b)
        out = _matmul(left, right, None, dtype)
        out = out.squeeze(-1) if b.dim() == 1 else out
        out = out.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else out
        return out if bias is None else out + bias
    return torch.ops.microscale.matmul(*_flat(a), *_flat(b), bias, dtype)


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
        return torch.nn.functional.linear(x, weight, bias)
    quantized = quantize(x, input_quantizer, amax=amax)
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return matmul(quantized, weight.transpose(-1, -2), bias, x.dtype)
    return _StraightThrough.apply(x, quantized, weight, bias, input_quantizer)  # type: ignore[no-untyped-call]


def embedding(indices: torch.Tensor, weight: BlockScaledTensor) -> torch.Tensor:
    """Return the dequantized rows of weight [V, K] for integer `indices` of any shape: [..., K] of weight's dtype."""
    rows = weight.index_select(0, indices.reshape(-1))
    return dequantize(rows).reshape(*indices.shape, weight.shape[1])
