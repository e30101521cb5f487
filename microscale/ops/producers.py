"""`silu_mul_quantize` and `rms_norm_quantize`: what stands before a linear layer, quantized without a pass of its own.

Both give what `quantize` gives for the unfused tensor, bit for bit. The ops follow `microscale.ops.library`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch

from microscale import dispatch
from microscale.errors import InputError, unknown_name
from microscale.numerics import layout, rounding
from microscale.ops import api, direct, graph, library
from microscale.ops.api import INPUT_DTYPES, Generator, QuantizerChanges
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_quantizer
from microscale.tensor import BlockScaledTensor, Meta

Given = torch.Tensor | float | None

_TAIL = "str spec, Tensor? amax, Tensor? outer_scale, Tensor? seed, str layout) -> (Tensor, Tensor, Tensor)"
library.LIBRARY.define(f"silu_mul_quantize(Tensor gate, Tensor up, {_TAIL}")
library.LIBRARY.define(f"rms_norm_quantize(Tensor x, Tensor? weight, float eps, {_TAIL}")


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    format: QuantizerLike,
    scale_rule: str | Mapping[str, Any] | None = None,
    block: int | None = None,
    scale_tile: int | tuple[int, int] | None = None,
    *,
    axis: int = -1,
    layout: str = layout.STRIDED,
    amax: Given = None,
    outer_scale: Given = None,
    generator: Generator | None = None,
    **changes: Unpack[QuantizerChanges],
) -> BlockScaledTensor:
    """Quantize silu(gate) * up, the activation of a gated MLP: `quantize(y, format, ...)` without storing y.

    y is silu(gate) * up in FP32, rounded once to the input dtype, where silu(x) = x * (1 / (1 + exp(-x))) within 3 ulp
    and with the same bits on every device (see `microscale.numerics.activations`).

    Args:
        gate, up: two tensors of one shape and dtype (float32, bfloat16, float16), any strides: the halves of one
            projection need no copy.
        format, scale_rule, block, scale_tile, axis, layout, amax, outer_scale, generator, **changes: as of `quantize`;
            amax is that of y.

    Returns:
        A BlockScaledTensor with the shape, dtype and device of gate. It does not carry gradients.

    Raises:
        InputError: shapes, dtypes or devices that differ, and whatever `quantize` refuses.
        SpecError: unknown format or impossible variant.
    """
    key = _key(format, {"scale_rule": scale_rule, "block": block, "scale_tile": scale_tile, **changes})
    graph.arm()
    return _silu_mul_quantize(gate, up, key, axis, layout, amax, outer_scale, generator)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    format: QuantizerLike,
    scale_rule: str | Mapping[str, Any] | None = None,
    block: int | None = None,
    scale_tile: int | tuple[int, int] | None = None,
    *,
    layout: str = layout.STRIDED,
    amax: Given = None,
    outer_scale: Given = None,
    generator: Generator | None = None,
    **changes: Unpack[QuantizerChanges],
) -> BlockScaledTensor:
    """Quantize the RMSNorm of x over its last axis: `quantize(y, format, ...)` without storing y.

    y = (x * (1 / sqrt(mean(x**2) + eps))) * weight in FP32, rounded once to x's dtype, with the same bits on every
    device (see `microscale.numerics.activations`). The weight is used as it stands; where a checkpoint stores it less
    1, pass `1 + weight`.

    Args:
        x: float32, bfloat16 or float16, shape [..., K], any strides.
        weight: shape [K], any of the three dtypes; None for no weight.
        eps: added to the mean of the squares, >= 0.
        format, scale_rule, block, scale_tile, layout, amax, outer_scale, generator, **changes: as of `quantize`; the
            blocks run along the last axis, and amax is that of y.

    Returns:
        A BlockScaledTensor with x's shape, dtype and device. It does not carry gradients.

    Raises:
        InputError: a weight that does not fit, a negative eps, and whatever `quantize` refuses.
        SpecError: unknown format or impossible variant.
    """
    key = _key(format, {"scale_rule": scale_rule, "block": block, "scale_tile": scale_tile, **changes})
    graph.arm()
    return _rms_norm_quantize(x, weight, float(eps), key, layout, amax, outer_scale, generator)


def _key(format: QuantizerLike, changes: dict[str, Any]) -> str:
    if isinstance(format, QuantizerSpec) and all(v is None for v in changes.values()):
        return format.key
    return api._spec_key(format, **changes)


@graph.in_graph
def _silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    key: str,
    axis: int,
    scale_layout: str,
    amax: Given,
    outer_scale: Given,
    generator: Generator | None,
) -> BlockScaledTensor:
    _check("silu_mul_quantize", gate, scale_layout)
    _check("silu_mul_quantize", up, scale_layout)
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise InputError(
            f"gate is {gate.dtype} {list(gate.shape)} on {gate.device}, up {up.dtype} {list(up.shape)} on {up.device}",
            "both have one shape, dtype and device",
        )
    if not -gate.dim() <= axis < gate.dim():
        raise InputError(f"axis {axis} of a tensor of rank {gate.dim()}")
    operands = tuple(t.detach().movedim(axis, -1) for t in (gate, up))
    return _quantized("silu_mul_quantize", operands, operands, key, axis, scale_layout, (amax, outer_scale), generator)


@graph.in_graph
def _rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    key: str,
    scale_layout: str,
    amax: Given,
    outer_scale: Given,
    generator: Generator | None,
) -> BlockScaledTensor:
    _check("rms_norm_quantize", x, scale_layout)
    if weight is not None:
        _check("rms_norm_quantize", weight, scale_layout)
        if weight.shape != x.shape[-1:] or weight.device != x.device:
            raise InputError(
                f"weight {list(weight.shape)} on {weight.device} for x {list(x.shape)} on {x.device}",
                f"it has one number for each of the {x.shape[-1]} columns",
            )
        weight = weight.detach()
    if not 0 <= eps < math.inf:
        raise InputError(f"eps {eps}", "it is a finite number >= 0, such as 1e-5")
    operands = (x.detach(),) if weight is None else (x.detach(), weight)
    args = (operands[0], weight, eps)
    return _quantized("rms_norm_quantize", operands, args, key, -1, scale_layout, (amax, outer_scale), generator)


def _check(op: str, x: torch.Tensor, scale_layout: str) -> None:
    if isinstance(x, BlockScaledTensor):
        raise InputError(f"{op} of a tensor that is quantized already: {x.format.name}", "dequantize() it first")
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{op} takes a torch.Tensor, got {type(x).__name__}", "use torch.as_tensor(x)")
    if x.dtype not in INPUT_DTYPES:
        raise InputError(f"{op} takes float32, bfloat16 or float16, got {x.dtype}", "convert with x.float()")
    if x.dim() == 0:
        raise InputError("a tensor of rank 0 has no axis to put blocks along", "use x.reshape(1)")
    if scale_layout not in layout.LAYOUTS:
        raise unknown_name("scale layout", scale_layout, layout.LAYOUTS)


def _quantized(
    op: str,
    operands: tuple[torch.Tensor, ...],
    args: tuple[Any, ...],
    key: str,
    axis: int,
    scale_layout: str,
    given: tuple[Given, Given],
    generator: Generator | None,
) -> BlockScaledTensor:
    """Run an op on its own arguments, blocked axis last, and on those that all producers share; wrap the parts."""
    rows = operands[0]
    spec = QuantizerSpec.from_key(key).for_row(rows.shape[-1])
    api._check_outer(spec, *given)
    if spec.hadamard is not None and rows.shape[-1] % spec.hadamard.size:
        raise InputError(
            f"Hadamard size {spec.hadamard.size} needs a multiple of it along the blocked axis, got {rows.shape[-1]}",
            "pad with torch.nn.functional.pad",
        )
    seed = rounding.seed_from(generator, rows.device) if spec.rounding == "stochastic" else None
    amax, outer_scale = (api._outer_operand(t, rows, axis) for t in given)
    tail = (spec.key, amax, outer_scale, seed, scale_layout)
    if direct.is_direct(*operands, amax, outer_scale, seed):
        qdata, scale, made = _run(op, operands, args, tail)
    else:
        qdata, scale, made = getattr(torch.ops.microscale, op)(*args, *tail)
    outer = None if spec.format.outer_scale is None else made
    shape, negative = rows.shape, axis if axis < 0 else axis - rows.dim()
    if negative != -1:
        shape = rows.movedim(-1, axis).shape
        qdata = qdata.movedim(-1, axis)
        scale = scale.movedim(-1, axis) if scale_layout == layout.STRIDED else scale
        outer = outer.movedim(-1, axis) if outer is not None and outer.dim() else outer
    return BlockScaledTensor(qdata, scale, outer, Meta(spec.format, negative, scale_layout), shape, rows.dtype)


# -- the ops -----------------------------------------------------------------------------------------------------------


def problem(
    op: str, operands: tuple[torch.Tensor, ...], spec: QuantizerSpec, given: bool, scale_layout: str
) -> dispatch.Problem:
    """Describe a call: op "silu_mul_quantize" of (gate, up), or "rms_norm_quantize" of (x,) or (x, weight).

    The blocked axis is last; `given`: the outer scale or its amax comes with the call.
    """
    like = [library.quantize_problem(t, spec, given, scale_layout) for t in operands]
    rows = tuple(p.operands[0] for p in like)
    return dispatch.Problem(op, rows, like[0].device, like[0].capability, spec, None, scale_layout)


def _explained(op: str, operands: tuple[torch.Tensor, ...], format: QuantizerLike, **changes: Any) -> dispatch.Problem:
    scale_layout, axis = changes.pop("layout", layout.STRIDED), changes.pop("axis", -1)
    given = changes.pop("amax", None) is not None or changes.pop("outer_scale", None) is not None
    rows = tuple(t.movedim(axis, -1) if t.dim() > 1 else t for t in operands)
    spec = find_quantizer(format, **changes).for_row(rows[0].shape[-1])
    return problem(op, rows, spec, given, scale_layout)


api.PROBLEMS["silu_mul_quantize"] = lambda gate, up, format, **changes: _explained(
    "silu_mul_quantize", (gate, up), format, **changes
)
api.PROBLEMS["rms_norm_quantize"] = lambda x, weight, eps, format, **changes: _explained(
    "rms_norm_quantize", (x,) if weight is None else (x, weight), format, **changes
)


def _run(op: str, operands: tuple[torch.Tensor, ...], args: tuple[Any, ...], tail: tuple[Any, ...]) -> tuple[Any, ...]:
    key, amax, outer_scale, seed, scale_layout = tail
    spec = QuantizerSpec.from_key(key)
    given = amax is not None or outer_scale is not None
    seen = tuple((t.shape, t.dtype, library._order(t)) for t in operands)
    facts = (seen, operands[0].device, key, given, scale_layout)
    entry = dispatch.select_by(op, facts, problem, op, operands, spec, given, scale_layout)
    qdata, scale, outer = entry.run(*args, spec, amax, outer_scale, seed, scale_layout)
    return qdata, scale, args[0].new_empty(0, dtype=torch.float32) if outer is None else outer


@torch.library.impl(library.LIBRARY, "silu_mul_quantize", "CompositeExplicitAutograd")
def _silu_mul_op(gate: torch.Tensor, up: torch.Tensor, *tail: Any) -> tuple[Any, ...]:
    return _run("silu_mul_quantize", (gate, up), (gate, up), tail)


@torch.library.impl(library.LIBRARY, "rms_norm_quantize", "CompositeExplicitAutograd")
def _rms_norm_op(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *tail: Any) -> tuple[Any, ...]:
    operands = (x,) if weight is None else (x, weight)
    return _run("rms_norm_quantize", operands, (x, weight, eps), tail)


@torch.library.register_fake("microscale::silu_mul_quantize", lib=library.LIBRARY)
def _silu_mul_fake(gate: torch.Tensor, up: torch.Tensor, *tail: Any) -> tuple[Any, ...]:
    return library._quantize_fake(gate, *tail)


@torch.library.register_fake("microscale::rms_norm_quantize", lib=library.LIBRARY)
def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *tail: Any) -> tuple[Any, ...]:
    return library._quantize_fake(x, *tail)
