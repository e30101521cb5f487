"""The three GEMMs of a training linear layer, each operand quantized by its own quantizer.

    fprop   y_TN  = q(x_TK) @ q(w_NK).T      blocks along K
    dgrad   dx_TK = q(dy_TN) @ q(w_NK)       blocks along N
    wgrad   dw_NK = q(dy_TN).T @ q(x_TK)     blocks along T, the tokens

`three_gemm` is a function of plain tensors and a `LayerGemms`; the modules of `microscale.nn.training` call it, and so
can any layer of one's own. Random numbers are drawn in the backward alone, from a counter on the device that the
backward advances: nothing waits for the host, and recomputing a forward (activation checkpointing) draws nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from microscale import ops
from microscale.errors import InputError
from microscale.nn.weight_cache import WeightCache
from microscale.ops import graph
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor, Meta

Observer = Callable[[str, str, str, torch.Tensor, QuantizerSpec], None]
_DRAWS = 2  # offsets that one backward uses: of dgrad's and of wgrad's gradient


@dataclasses.dataclass
class GemmState:
    """What a layer keeps between calls of `three_gemm`; every part may be left out.

    `rounding`: int64 [2] on the device, seed and offset of stochastic rounding; each backward adds 2 to the offset.
    `main_grad`: FP32 [N, K]; the weight gradient is added to it, and autograd gets none. `cache` keeps the quantized
    weight until the weight changes. `name` is what observers are told.
    """

    rounding: torch.Tensor | None = None
    main_grad: torch.Tensor | None = None
    cache: WeightCache | None = None
    name: str = ""


def three_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gemms: LayerGemms,
    state: GemmState | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias` for x [..., K], weight [N, K], bias [N]: [..., N] of x's dtype, with gradients.

    Operands are quantized as `gemms` says, along the axis that their GEMM contracts; the others stay as they are. A
    Hadamard axis is padded with zeros to whole groups. Under autocast x takes the autocast dtype; the weight is
    quantized from its own dtype, as inference quantizes it. Products accumulate in FP32 and are rounded once; the
    gradients of weight and bias have the dtype of weight and bias. No double backward.

    Raises InputError for shapes or dtypes that do not fit, and for stochastic rounding without `state.rounding`.
    """
    state = GemmState() if state is None else state
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise InputError(f"input of {x.dtype}, weight of {weight.dtype}", "convert one of them, or use torch.autocast")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"cannot multiply {list(x.shape)} by the transpose of {list(weight.shape)}")
    if gemms.is_stochastic and state.rounding is None:
        raise InputError("stochastic rounding needs a seed", "GemmState(rounding=torch.tensor([seed, 0]))")
    x_TK = x if x.dim() == 2 else x.reshape(1, -1) if x.dim() == 1 else x.flatten(0, -2)
    if torch.compiler.is_dynamo_compiling():
        graph.arm()
        y_TN = _traced(x_TK, weight, bias, state.rounding, state.main_grad, gemms.key)
    else:
        y_TN = _apply(x_TK, weight, bias, gemms, state)
    return y_TN if x.dim() == 2 else y_TN.reshape(*x.shape[:-1], weight.shape[0])


@graph.in_graph
def _traced(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rounding: torch.Tensor | None,
    main_grad: torch.Tensor | None,
    key: str,
) -> torch.Tensor:
    return _apply(x_TK, weight, bias, LayerGemms.from_key(key), GemmState(rounding, main_grad))


def _apply(
    x_TK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gemms: LayerGemms, state: GemmState
) -> torch.Tensor:
    call = GemmCall(gemms, state, x_TK.dtype, torch.is_grad_enabled())
    return _ThreeGemm.apply(x_TK, weight, bias, call)  # type: ignore[no-untyped-call]


class _ThreeGemm(torch.autograd.Function):
    """y = q(x) @ q(w).T + b and its gradients, for x [T, K]. Autocast ends here: what is computed in FP32 stays so."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None, call: GemmCall
    ) -> torch.Tensor:
        """Multiply, and save what the gradients that are asked for need."""
        needs_x, needs_w = (call.has_backward and needed for needed in ctx.needs_input_grad[:2])
        keeps = call.gemms.save == "quantized"
        ctx.call, ctx.shape, ctx.weight_dtype = call, weight_NK.shape, weight_NK.dtype
        ctx.context = contextvars.copy_context()
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.is_empty = call.is_empty(x_TK, weight_NK)
        if ctx.is_empty:
            return x_TK.new_zeros(x_TK.shape[0], weight_NK.shape[-2])
        with _without_autocast(x_TK.device.type):
            x_fprop, x_wgrad = call.inputs(x_TK, True, needs_w and keeps)
            w_fprop, w_dgrad = call.weights(weight_NK, True, needs_x and keeps)
            y_TN = call.fprop(x_fprop, w_fprop, bias)
        saved_weight = (w_dgrad if keeps else weight_NK) if needs_x else None
        saved_input = (x_wgrad if keeps else x_TK) if needs_w else None
        tensors, ctx.layouts = _pack((saved_weight, saved_input))
        ctx.save_for_backward(*tensors)
        return y_TN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Quantize the gradient for both GEMMs from one read; the bias gradient sums it unquantized, in FP32.

        In the context of the forward (`strict`, `exact_products`, `use_backend`): autograd's threads have their own.
        """
        made: tuple[torch.Tensor | None, ...] = ctx.context.run(_backward, ctx, dy_TN)
        return made


def _backward(ctx: Any, dy_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    main = ctx.call.state.main_grad
    dw_dtype = ctx.weight_dtype if main is None else main.dtype
    with _without_autocast(dy_TN.device.type):
        dbias = dy_TN.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        dx_TK, dw_NK = _gradients(ctx, dy_TN, dw_dtype)
        if main is not None and dw_NK is not None:
            main.add_(dw_NK)
            dw_NK = None
    return dx_TK, dw_NK, dbias, None


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _gradients(ctx: Any, dy_TN: torch.Tensor, dw_dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return dx and dw, each None unless needed."""
    call, (needs_x, needs_w) = ctx.call, ctx.needs_input_grad[:2]
    dx_TK = dw_NK = None
    if ctx.is_empty:
        dx_TK = dy_TN.new_zeros(dy_TN.shape[0], ctx.shape[-1]) if needs_x else None
        dw_NK = dy_TN.new_zeros(ctx.shape, dtype=dw_dtype) if needs_w else None
        return dx_TK, dw_NK
    weight, x = _unpack(ctx.saved_tensors, ctx.layouts)
    keeps = call.gemms.save == "quantized"
    dy_dgrad, dy_wgrad = call.gradients(dy_TN, needs_x, needs_w)
    if needs_x:
        w_dgrad = weight if keeps else call.weights(weight, False, True)[1]
        dx_TK = call.dgrad(dy_dgrad, w_dgrad)
    if needs_w:
        x_wgrad = x if keeps else call.inputs(x, False, True)[1]
        dw_NK = call.wgrad(dy_wgrad, x_wgrad, dw_dtype)
    return dx_TK, dw_NK


# -- operands ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GemmCall:
    """One call of a layer: who quantizes what, and who multiplies. `dtype` is what the operands decode to; the methods
    that make operands give None for one that is not asked for. `GroupedCall` overrides the others.
    """

    gemms: LayerGemms
    state: GemmState
    dtype: torch.dtype
    has_backward: bool

    def inputs(self, x_TK: torch.Tensor, fprop: bool, wgrad: bool) -> tuple[Any, Any]:
        """Return x as fprop multiplies it (blocks along K) and as wgrad does (blocks along T)."""
        g = self.gemms
        reused = wgrad and g.wgrad_input_is_fprops
        specs = (g.fprop_input if fprop or reused else None), (g.wgrad_input if wgrad else None)
        _report(self.state.name, ("fprop", "wgrad"), "input", x_TK, specs)
        rows, columns = self.of_tokens(x_TK, *specs)
        return rows if fprop else None, (rows if reused else columns) if wgrad else None

    def weights(self, weight_NK: torch.Tensor, fprop: bool, dgrad: bool) -> tuple[Any, Any]:
        """Return w as fprop multiplies it (blocks along K) and as dgrad does (blocks along N)."""
        g, cache = self.gemms, self.state.cache
        reused = dgrad and g.dgrad_weight_is_fprops
        specs = (g.fprop_weight if fprop or reused else None), (g.dgrad_weight if dgrad else None)
        _report(self.state.name, ("fprop", "dgrad"), "weight", weight_NK, specs)
        made = self.of_weight(weight_NK, *specs) if cache is None else cache.get(weight_NK, specs, self.of_weight)
        rows, columns = (_in_dtype(t, self.dtype) for t in made)
        return rows if fprop else None, (rows if reused else columns) if dgrad else None

    def gradients(self, dy_TN: torch.Tensor, dgrad: bool, wgrad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dy as dgrad multiplies it (blocks along N) and as wgrad does (along T); advances the counter."""
        specs = (self.gemms.dgrad_grad_output if dgrad else None), (self.gemms.wgrad_grad_output if wgrad else None)
        _report(self.state.name, ("dgrad", "wgrad"), "grad_output", dy_TN, specs)
        counter, seed = self.state.rounding, None
        if self.gemms.is_stochastic and counter is not None:
            seed = counter.clone()
            counter[1].add_(_DRAWS)
        return self.of_tokens(dy_TN, *specs, seed)

    def is_empty(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether nothing is multiplied: results are zeros."""
        return x_TK.shape[0] == 0

    def of_tokens(
        self,
        t: torch.Tensor,
        rows: QuantizerSpec | None,
        columns: QuantizerSpec | None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize x or dy for both GEMMs that contract it."""
        return _quantize_both(t, rows, columns, seed)

    def of_weight(
        self, weight: torch.Tensor, rows: QuantizerSpec | None, columns: QuantizerSpec | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize w for both GEMMs that contract it."""
        return _quantize_both(weight, rows, columns)

    def fprop(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x w.T + bias."""
        return _product(x, weight.transpose(0, 1), bias, self.dtype)

    def dgrad(self, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return dy w."""
        return _product(dy, weight, None, self.dtype)

    def wgrad(self, dy: torch.Tensor, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """Return dy.T x, rounded once to `out_dtype`."""
        return _product(dy.transpose(0, 1), x, None, out_dtype)


def _quantize_both(
    t: torch.Tensor, rows: QuantizerSpec | None, columns: QuantizerSpec | None, seed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return t [R, C] with blocks along C and with blocks along R, from one read if both are wanted.

    None leaves an operand as it is. The columns draw with the offset after the rows', whoever else draws.
    """
    if rows is not None and columns is not None and _groups(t, rows, -1) and _groups(t, columns, -2):
        return ops.quantize_both(t, rows, columns, generator=seed)
    second = None if seed is None else torch.stack([seed[0], seed[1] + 1])
    return _quantize(t, rows, -1, seed), _quantize(t, columns, -2, second)


def _quantize(
    t: torch.Tensor,
    spec: QuantizerSpec | None,
    axis: int,
    seed: torch.Tensor | None,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize along axis -1 or -2, as it is without a spec; `amax` as `ops.quantize` takes it."""
    if spec is None:
        return t
    whole = _whole_groups(t, spec, axis)
    if amax is None:
        return ops.quantize(whole, spec, axis=axis, generator=seed)
    return ops.quantize(whole, spec, axis=axis, generator=seed, amax=amax)


def _whole_groups(t: torch.Tensor, spec: QuantizerSpec, axis: int) -> torch.Tensor:
    """Pad an axis with zeros to whole Hadamard groups."""
    if spec.hadamard is None or _groups(t, spec, axis):
        return t
    missing = -t.shape[axis] % spec.hadamard.size
    return torch.nn.functional.pad(t, (0, missing) if axis == -1 else (0, 0, 0, missing))


def _groups(t: torch.Tensor, spec: QuantizerSpec, axis: int) -> bool:
    """Whether an axis holds whole Hadamard groups."""
    return spec.hadamard is None or t.shape[axis] % spec.hadamard.size == 0


def _in_dtype(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes, or the plain values, as an operand of `dtype`."""
    if isinstance(t, BlockScaledTensor):
        return t if t.dtype == dtype else t.as_dtype(dtype)
    return t.to(dtype)


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """a [M, K] @ b [K, N] + bias, accumulated in FP32, rounded once to `out_dtype`."""
    if isinstance(a, BlockScaledTensor) or isinstance(b, BlockScaledTensor):
        return ops.matmul(a, b, bias, out_dtype)
    if out_dtype == a.dtype:
        return torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)
    if a.is_cuda and out_dtype == torch.float32 and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=out_dtype)
    return torch.mm(a.to(torch.float32), b.to(torch.float32)).to(out_dtype)


# -- saved for the backward --------------------------------------------------------------------------------------------

_Layout = tuple[Meta, tuple[int, ...], torch.dtype] | None


def _pack(operands: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], list[_Layout]]:
    """Three plain tensors per operand, so that hooks on saved tensors (offloading, checkpointing) need no subclass."""
    tensors: list[torch.Tensor | None] = []
    layouts: list[_Layout] = []
    for t in operands:
        if isinstance(t, BlockScaledTensor):
            tensors += [t.qdata, t.scale, t.outer_scale]
            layouts.append((t.meta, tuple(t.shape), t.dtype))
        else:
            tensors += [t, None, None]
            layouts.append(None)
    return tensors, layouts


def _unpack(tensors: Sequence[torch.Tensor | None], layouts: Sequence[_Layout]) -> list[Any]:
    operands: list[Any] = []
    for i, layout in enumerate(layouts):
        first, scale, outer = tensors[3 * i : 3 * i + 3]
        if layout is None:
            operands.append(first)
        else:
            operands.append(BlockScaledTensor(first, scale, outer, *layout))  # type: ignore[arg-type]
    return operands


# -- observation -------------------------------------------------------------------------------------------------------

_observers: list[Observer] = []  # of the process, not of a thread: autograd runs backwards on threads of its own


@contextlib.contextmanager
def observe(callback: Observer) -> Iterator[None]:
    """Within the block, call `callback(layer, gemm, operand, tensor, spec)` before each operand is quantized.

    `layer` is the layer's full name, `gemm` fprop, dgrad or wgrad, `operand` input, weight or grad_output. `tensor` is
    detached, in high precision, and has the contracted axis last: `quantize(tensor, spec)` gives the operand's values
    (a Hadamard axis is padded to whole groups first). A cached weight is reported at each use. Layers inside
    torch.compile and CUDA graphs are not observed.
    """
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def _report(
    layer: str, gemms: tuple[str, str], operand: str, t: torch.Tensor, specs: tuple[QuantizerSpec | None, ...]
) -> None:
    if not _observers or type(t) not in (torch.Tensor, torch.nn.Parameter):
        return
    for gemm, spec, view in zip(gemms, specs, (t, t.mT), strict=True):
        if spec is not None:
            for callback in tuple(_observers):
                with torch.no_grad():
                    callback(layer, gemm, operand, view.detach(), spec)
