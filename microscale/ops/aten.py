"""The closed list of torch ops that BlockScaledTensor takes. Everything else raises and names the way out.

Each entry obeys the subclass law: the op on the quantized tensor gives the values that the op on the dequantized tensor
would give, and stays quantized; `mm` and its kin give plain results, `equal` a bool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from microscale.errors import InputError, UnsupportedOpError
from microscale.ops import compute, structure
from microscale.ops.api import dequantize
from microscale.tensor import FUNCTIONS, BlockScaledTensor

aten = torch.ops.aten
Handler = Callable[..., Any]
TABLE: dict[Any, Handler] = {}


def implements(*ops: Any) -> Callable[[Handler], Handler]:
    """Register the decorated function for some aten ops; it gets their arguments as torch passes them."""

    def register(handler: Handler) -> Handler:
        TABLE.update(dict.fromkeys(ops, handler))
        return handler

    return register


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op from the list, or raise UnsupportedOpError."""
    handler = TABLE.get(func)
    if handler is None:
        raise UnsupportedOpError(
            f"{func} has no meaning on block-scaled data that microscale knows",
            "call .dequantize() first; supported ops: docs/api.md",
        )
    return handler(*args, **kwargs)


# -- the same values ---------------------------------------------------------------------------------------------------


@implements(aten.detach.default, aten.alias.default)
def _detach(q: BlockScaledTensor) -> BlockScaledTensor:
    return structure.every_part(q, torch.Tensor.detach)


@implements(aten.clone.default)
def _clone(q: BlockScaledTensor, *, memory_format: torch.memory_format | None = None) -> BlockScaledTensor:
    dense = torch.contiguous_format if memory_format == torch.contiguous_format else torch.preserve_format
    return structure.every_part(q, lambda t: t.clone(memory_format=dense))


# value(narrow) must equal value(wide) rounded: true from FP32 to a narrower dtype, and for no other change
_NARROWER = {torch.float32: (torch.bfloat16, torch.float16)}


@implements(aten._to_copy.default)
def _to_copy(q: BlockScaledTensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> BlockScaledTensor:
    dtype = q.dtype if dtype is None else dtype
    if dtype != q.dtype and dtype not in _NARROWER.get(q.dtype, ()):
        raise UnsupportedOpError(
            f"conversion of a quantized tensor from {q.dtype} to {dtype} would not equal converting its values",
            f"use .as_dtype({dtype}) to have dequantize() round to it instead, or dequantize() first",
        )
    keep = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking", "memory_format") and v is not None}
    if kwargs.get("layout") not in (None, torch.strided):
        raise UnsupportedOpError(f"conversion to layout {kwargs['layout']}", "dequantize() first")
    return structure.every_part(q, lambda t: t.to(**keep, copy=True)).replace(dtype=dtype)


@implements(aten.empty_like.default)
def _empty_like(q: BlockScaledTensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> BlockScaledTensor:
    device = kwargs.get("device")
    made = structure.every_part(q, lambda t: torch.empty_like(t, device=device))
    return made.replace(dtype=q.dtype if dtype is None else dtype)


@implements(aten.copy_.default)
def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, BlockScaledTensor):
        raise UnsupportedOpError("copy_ of a quantized tensor into a plain one", "copy source.dequantize()")
    return structure.copy_(target, source)


@implements(aten.is_pinned.default)
def _is_pinned(q: BlockScaledTensor, device: Any = None) -> bool:
    return q.qdata.is_pinned() and q.scale.is_pinned()


@implements(aten._pin_memory.default)
def _pin_memory(q: BlockScaledTensor, device: Any = None) -> BlockScaledTensor:
    return structure.every_part(q, torch.Tensor.pin_memory)


@implements(aten.record_stream.default)
def _record_stream(q: BlockScaledTensor, stream: Any) -> None:
    for part in (q.qdata, q.scale, q.outer_scale):
        if part is not None:
            part.record_stream(stream)


@implements(aten.equal.default)
def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    plain = [dequantize(t) if isinstance(t, BlockScaledTensor) else t for t in (a, b)]
    return torch.equal(*plain)


# -- structure ---------------------------------------------------------------------------------------------------------


@implements(aten.t.default)
def _t(q: BlockScaledTensor) -> BlockScaledTensor:
    if q.dim() > 2:
        raise InputError(f"t() of a tensor of rank {q.dim()}", "use .mT or .transpose(first, second)")
    return compute.transposed(q) if q.dim() == 2 else _detach(q)


implements(aten.transpose.int)(structure.transpose)
implements(aten.permute.default)(structure.permute)
implements(aten.slice.Tensor)(structure.slice_)
implements(aten.select.int)(structure.select)
implements(aten.unsqueeze.default)(structure.unsqueeze)
implements(aten.index.Tensor)(structure.index)
implements(aten.cat.default)(structure.cat)
implements(aten.view.default, aten._unsafe_view.default, aten.reshape.default)(structure.reshape)


@implements(aten._reshape_alias.default)
def _reshape_alias(q: BlockScaledTensor, size: Sequence[int], stride: Sequence[int]) -> BlockScaledTensor:
    return structure.reshape(q, size)


@implements(aten.squeeze.default)
def _squeeze(q: BlockScaledTensor) -> BlockScaledTensor:
    return structure.squeeze(q)


@implements(aten.squeeze.dim)
def _squeeze_dim(q: BlockScaledTensor, dim: int) -> BlockScaledTensor:
    return structure.squeeze(q, [dim])


@implements(aten.squeeze.dims)
def _squeeze_dims(q: BlockScaledTensor, dims: Sequence[int]) -> BlockScaledTensor:
    return structure.squeeze(q, dims)


@implements(aten.expand.default)
def _expand(q: BlockScaledTensor, size: Sequence[int], *, implicit: bool = False) -> BlockScaledTensor:
    return structure.expand(q, size)


@implements(aten.index_select.default)
def _index_select(q: BlockScaledTensor, dim: int, index: torch.Tensor) -> BlockScaledTensor:
    return structure.index(q, [None] * structure.dimension(q, dim) + [index.reshape(-1)])


@implements(aten.stack.default)
def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> BlockScaledTensor:
    if not all(isinstance(t, BlockScaledTensor) for t in tensors):
        raise UnsupportedOpError("stack of quantized and plain tensors", "quantize all of them, or dequantize() all")
    return structure.cat([structure.unsqueeze(t, dim) for t in tensors], structure.dimension(tensors[0], dim, extra=1))  # type: ignore[arg-type]


@implements(aten.split.Tensor)
def _split(q: BlockScaledTensor, size: int, dim: int = 0) -> list[BlockScaledTensor]:
    length = q.shape[structure.dimension(q, dim)]
    if size <= 0 and length:
        raise InputError(f"split into pieces of {size}")
    return [structure.slice_(q, dim, start, start + size) for start in range(0, length, size or 1)] or [_detach(q)]


@implements(aten.split_with_sizes.default)
def _split_with_sizes(q: BlockScaledTensor, sizes: Sequence[int], dim: int = 0) -> list[BlockScaledTensor]:
    length = q.shape[structure.dimension(q, dim)]
    if sum(sizes) != length or min(sizes, default=0) < 0:
        raise InputError(f"split sizes {list(sizes)} do not add up to {length}", "give sizes >= 0 that do")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [structure.slice_(q, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@implements(aten.unbind.int)
def _unbind(q: BlockScaledTensor, dim: int = 0) -> list[BlockScaledTensor]:
    return [structure.select(q, dim, i) for i in range(q.shape[structure.dimension(q, dim)])]


# -- products ----------------------------------------------------------------------------------------------------------


@implements(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default)
def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return compute.product(a, b, None, None, recorded=False)


@implements(aten.addmm.default, aten.baddbmm.default)
def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if isinstance(bias, BlockScaledTensor):
        raise UnsupportedOpError("addmm with a quantized bias", "dequantize() the bias")
    if beta == 1 and alpha == 1:
        return compute.product(a, b, bias, None, recorded=False)
    summed = compute.product(a, b, None, torch.float32, recorded=False) * alpha
    scaled = 0 if beta == 0 else bias.to(torch.float32) * beta
    return (summed + scaled).to(a.dtype)


@implements(aten.linear.default)
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.dim() == 2 and isinstance(weight, BlockScaledTensor):
        return compute.times_transpose(x, weight, bias)
    weight = weight.transpose(-1, -2) if weight.dim() > 1 else weight
    return compute.product(x, weight, bias, None, recorded=False)


FUNCTIONS[torch.nn.functional.linear] = compute.short_linear


@implements(aten._grouped_mm.default)
def _grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if offs is None or bias is not None or a.dim() != 2 or b.dim() != 3:
        raise UnsupportedOpError(
            f"grouped_mm of {list(a.shape)} and {list(b.shape)}", "takes [T, K], [E, K, N] and offs, without a bias"
        )
    return compute.grouped_matmul(a, b, offs, out_dtype)


@implements(aten.embedding.default)
def _embedding(weight: BlockScaledTensor, indices: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return compute.embedding(indices, weight)
