"""`quantize`, `dequantize`, `encode`, `decode_table`, `explain`: the functions behind the public names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import torch

from microscale import dispatch
from microscale.errors import InputError, unknown_name
from microscale.numerics import codec, layout, rounding
from microscale.ops import direct, graph, late, library
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, bound_format, find_element, find_quantizer
from microscale.tensor import BlockScaledTensor, Meta, bare

Generator = torch.Generator | int | tuple[int, int] | torch.Tensor
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizerChanges(TypedDict, total=False):
    """What else may be changed in a named format or quantizer, as in a recipe's YAML; None means unchanged."""

    element: str | Mapping[str, Any] | ElementSpec | None
    scale: str | Mapping[str, Any] | ElementSpec | None
    rounding: str | None
    hadamard: int | Mapping[str, Any] | None
    outer_scale_mode: str | None


def quantize(
    x: torch.Tensor,
    format: QuantizerLike,
    scale_rule: str | Mapping[str, Any] | None = None,
    block: int | None = None,
    scale_tile: int | tuple[int, int] | None = None,
    *,
    axis: int = -1,
    layout: str = layout.STRIDED,
    amax: torch.Tensor | float | None = None,
    outer_scale: torch.Tensor | float | None = None,
    generator: Generator | None = None,
    **changes: Unpack[QuantizerChanges],
) -> BlockScaledTensor:
    """Quantize a tensor to a format.

    Args:
        x: float32, bfloat16 or float16 of any rank >= 1, any strides, empty included; the blocks run along `axis`,
            which need not be a multiple of the block (padded inside).
        format: a name, a YAML path, a mapping, a FormatSpec or a QuantizerSpec.
        scale_rule, block: a variant of the format: a rule's name or its candidates, elements per scale.
        scale_tile: rows and columns that share one amax (one number: square); storage stays one scale per 1 x block.
        axis: the blocked dimension.
        layout: of the scales: "strided" or "swizzle_32_4_4".
        amax: FP32, for formats with an outer scale: the magnitude it is computed from, in place of x's own. Shape ()
            for one per tensor, [..., R, 1] per row, [..., 1, 1] per expert; of tokens sorted by expert, `group_amax`.
        outer_scale: FP32 decode scale to use as it is, same shapes. Not together with `amax`.
        generator: for stochastic rounding: a torch.Generator, an int seed, or a (seed, offset) pair.
        **changes: rounding, hadamard, element, scale, outer_scale_mode: as in a recipe.

    Returns:
        A BlockScaledTensor with x's shape, dtype and device. It does not carry gradients.

    Raises:
        InputError: wrong dtype or rank, amax or outer_scale for a format without an outer scale, a missing seed.
        SpecError: unknown format or impossible variant.

    With a Hadamard transform, `dequantize()` gives the transformed values; `microscale.hadamard` undoes it.
    """
    unchanged = not changes and scale_rule is None and block is None and scale_tile is None
    if torch.compiler.is_dynamo_compiling():
        key = (
            format.key
            if unchanged and isinstance(format, QuantizerSpec)
            else _spec_key(format, scale_rule=scale_rule, block=block, scale_tile=scale_tile, **changes)
        )
        graph.arm()
        return _quantize(x, key, axis, layout, amax, outer_scale, generator)
    if unchanged:
        spec = format if type(format) is QuantizerSpec else cached_quantizer(format, {})
    else:
        spec = cached_quantizer(format, {"scale_rule": scale_rule, "block": block, "scale_tile": scale_tile, **changes})
    return _run_quantize(x, spec, axis, layout, amax, outer_scale, generator)


# torch.compile sees three kinds of function here: specs are looked up while tracing (their text is a constant of the
# graph), and the functions that take tensors are calls in the graph, whose Python runs when the graph is traced.


@graph.constant
def _spec_key(format: QuantizerLike, **changes: Any) -> str:
    return find_quantizer(format, **changes).key


@graph.in_graph
def _quantize(
    x: torch.Tensor,
    key: str,
    axis: int,
    scale_layout: str,
    amax: torch.Tensor | float | None,
    outer_scale: torch.Tensor | float | None,
    generator: Generator | None,
) -> BlockScaledTensor:
    return _run_quantize(x, QuantizerSpec.from_key(key), axis, scale_layout, amax, outer_scale, generator)


# Eager calls find their spec in a few look-ups: validating a variant takes longer than quantizing a small tensor.
_LIMIT = 4096  # entries of either memory; past it all are forgotten
_found: dict[Any, tuple[object, QuantizerSpec]] = {}  # with the spec that the name stood for
_metas: dict[tuple[int, int, str, bool | None], Meta] = {}


def cached_quantizer(format: QuantizerLike, changes: Mapping[str, Any]) -> QuantizerSpec:
    """Return `find_quantizer(format, **changes)`, remembered as long as a name stands for the same format.

    Paths, mappings, and changes that are more than text and whole numbers are looked up each time.
    """
    source = bound_format(format) if type(format) is str else format
    if type(source) not in (FormatSpec, QuantizerSpec) or (changes and not all(map(_is_exact, changes.values()))):
        return find_quantizer(format, **changes)
    key = (id(source), *changes.items()) if changes else id(source)
    found = _found.get(key)
    if found is not None and found[0] is source:
        return found[1]
    spec = QuantizerSpec.from_key(find_quantizer(format, **changes).key)
    _keep(_found, key, (source, spec))
    return spec


def _is_exact(value: object) -> bool:
    """Whether equal values are the same: 1, True and 1.0 are not."""
    if type(value) is tuple:
        return all(type(v) is int for v in value)
    return value is None or type(value) in (int, str)


def _meta(fmt: FormatSpec, axis: int, scale_layout: str, exact_rows: bool | None = None) -> Meta:
    key = (id(fmt), axis, scale_layout, exact_rows)
    found = _metas.get(key)
    if found is None or found.format is not fmt:
        found = Meta(fmt, axis, scale_layout, exact_rows)
        _keep(_metas, key, found)
    return found


def _keep(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= _LIMIT:
        memory.clear()
    memory[key] = value


def _run_quantize(
    x: torch.Tensor,
    spec: QuantizerSpec,
    axis: int,
    scale_layout: str,
    amax: torch.Tensor | float | None,
    outer_scale: torch.Tensor | float | None,
    generator: Generator | None,
) -> BlockScaledTensor:
    _check_input(x, axis, scale_layout)
    _check_outer(spec, amax, outer_scale)
    spec = spec.for_row(x.shape[axis])
    last = axis == -1 or axis == x.dim() - 1
    rows = x.detach() if last else x.detach().movedim(axis, -1)
    if spec.hadamard is not None and x.shape[axis] % spec.hadamard.size:
        raise InputError(
            f"Hadamard size {spec.hadamard.size} needs a multiple of it along the blocked axis, got {x.shape[axis]}",
            "pad with torch.nn.functional.pad",
        )
    seed = rounding.seed_from(generator, x.device) if spec.rounding == "stochastic" else None
    amax, outer = _outer_operand(amax, rows, axis), _outer_operand(outer_scale, rows, axis)
    if direct.is_direct(rows, amax, outer, seed):
        qdata, scale, outer = library.quantize(rows, spec, amax, outer, seed, scale_layout)
    else:
        qdata, scale, outer = torch.ops.microscale.quantize(rows, spec.key, amax, outer, seed, scale_layout)
        outer = None if spec.format.outer_scale is None else outer
    if not last:
        qdata = qdata.movedim(-1, axis)
        scale = scale.movedim(-1, axis) if scale_layout == layout.STRIDED else scale
        outer = outer.movedim(-1, axis) if outer is not None and outer.dim() else outer
    meta = _meta(spec.format, axis if axis < 0 else axis - x.dim(), scale_layout)
    return BlockScaledTensor(qdata, scale, outer, meta, x.shape, x.dtype)


def _check_input(x: torch.Tensor, axis: int, scale_layout: str) -> None:
    if isinstance(x, BlockScaledTensor):
        raise InputError(f"already quantized: {x.format.name}", "quantize the original, or dequantize() first")
    if not isinstance(x, torch.Tensor):
        raise InputError(f"quantize takes a torch.Tensor, got {type(x).__name__}", "use torch.as_tensor(x)")
    if x.dtype not in INPUT_DTYPES:
        raise InputError(f"quantize takes float32, bfloat16 or float16, got {x.dtype}", "convert with x.float()")
    rank = x.dim()
    if rank == 0:
        raise InputError("a tensor of rank 0 has no axis to put blocks along", "use x.reshape(1)")
    if not -rank <= axis < rank:
        raise InputError(f"axis {axis} of a tensor of rank {rank}")
    if scale_layout not in layout.LAYOUTS:
        raise unknown_name("scale layout", scale_layout, layout.LAYOUTS)


def _check_outer(spec: QuantizerSpec, amax: object, outer_scale: object) -> None:
    if spec.format.outer_scale is None and (amax is not None or outer_scale is not None):
        raise InputError(f"{spec.format.name} has no outer scale to set", "leave out amax and outer_scale")
    if amax is not None and outer_scale is not None:
        raise InputError("amax and outer_scale both given", "give one: the outer scale follows from amax")
    if spec.outer_scale_mode == "static" and amax is None and outer_scale is None:
        raise InputError(
            f"{spec.name} has a static outer scale and none was given",
            "pass amax=... from calibration, or use outer_scale_mode='dynamic'",
        )


def _outer_operand(value: torch.Tensor | float | None, rows: torch.Tensor, axis: int) -> torch.Tensor | None:
    """An amax or outer scale as FP32 on x's device, in the orientation that has the blocked axis last."""
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=torch.float32, device=rows.device).detach()
    if tensor.numel() == 1 and tensor.dim() != rows.dim():
        return tensor.reshape(())
    if tensor.dim() not in (0, rows.dim()):
        raise InputError(
            f"amax or outer_scale of shape {list(tensor.shape)} for a tensor of rank {rows.dim()}",
            "use shape () or one dimension per dimension",
        )
    tensor = tensor.movedim(axis, -1) if tensor.dim() else tensor
    if any(n not in (1, size) for n, size in zip(tensor.shape, (*rows.shape[:-1], 1), strict=tensor.dim() > 0)):
        raise InputError(
            f"amax or outer_scale of shape {list(tensor.shape)} does not fit {list(rows.shape)}",
            "it has size 1 along the blocked axis",
        )
    return tensor


def dequantize(q: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the values of a BlockScaledTensor as a plain tensor, same shape.

    Computed in FP32 as (code * scale) * outer_scale and rounded once to `dtype` (default: q.dtype), one of float32,
    bfloat16, float16. Raises InputError for a plain tensor or another dtype.
    """
    if torch.compiler.is_dynamo_compiling():
        graph.arm()
    return _dequantize(q, dtype)


@graph.in_graph
def _dequantize(q: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not isinstance(q, BlockScaledTensor):
        raise InputError(f"dequantize takes a BlockScaledTensor, got {type(q).__name__}", "quantize it first")
    with bare():
        shape, dtype = q.shape, q.dtype if dtype is None else dtype
    if dtype not in INPUT_DTYPES:
        raise InputError(f"dequantize gives float32, bfloat16 or float16, not {dtype}", "convert the result")
    fmt, axis, scale_layout = q.meta.format, q.meta.axis, q.meta.layout
    qdata, scale, outer = q.qdata, q.scale, q.outer_scale
    if axis != -1:
        qdata = qdata.movedim(axis, -1)
        scale = scale.movedim(axis, -1) if scale_layout != layout.SWIZZLED else scale
        outer = outer.movedim(axis, -1) if outer is not None and outer.dim() else outer
    columns = shape[axis]
    if direct.is_direct(qdata, scale, outer):
        values = library.dequantize(qdata, scale, outer, fmt, columns, scale_layout, dtype)
    else:
        values = torch.ops.microscale.dequantize(qdata, scale, outer, fmt.key, columns, scale_layout, dtype)
    return values if axis == -1 else values.movedim(-1, axis)


def encode(x: torch.Tensor, element: str | Mapping[str, Any] | ElementSpec) -> torch.Tensor:
    """Return the codes of x (float32, bfloat16, float16), rounded to nearest even and saturated: uint8, shape of x.

    +-Inf saturates; NaN gives the element's NaN code, or +max where it has none. Raises InputError for other dtypes.
    """
    if x.dtype not in INPUT_DTYPES:
        raise InputError(f"encode takes float32, bfloat16 or float16, got {x.dtype}", "convert with x.float()")
    return codec.encode(x.to(torch.float32), find_element(element))


def decode_table(element: str | Mapping[str, Any] | ElementSpec) -> torch.Tensor:
    """Return the value of every code: float32 [2**bits]. Raises InputError for 16- and 32-bit elements."""
    return codec.decode_table(find_element(element)).clone()


def explain(op: str, *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """Say which kernel would run an op, and why each other one would not. Touches no data.

    Forms: ("quantize", x, format, **changes), ("quantize_both", x, rows, columns=None), ("quantize_rows", x, format,
    **changes), ("silu_mul_quantize", gate, up, format, **changes), ("rms_norm_quantize", x, weight, eps, format,
    **changes), ("dequantize", q, dtype=None), ("matmul", x, w) for `x @ w.T` as a linear layer computes it,
    ("grouped_matmul", x, w); or ("matmul", problem) with a `dispatch.Problem`. Raises UnknownNameError for another op,
    InputError for an x and a w that do not fit.
    """
    if args and isinstance(args[0], dispatch.Problem):
        return dispatch.explain_problem(args[0])
    if op not in PROBLEMS:
        raise unknown_name("op", op, PROBLEMS)
    return dispatch.explain_problem(PROBLEMS[op](*args, **kwargs))


def _quantize_problem(x: torch.Tensor, format: QuantizerLike, **changes: Any) -> dispatch.Problem:
    scale_layout = changes.pop("layout", layout.STRIDED)
    axis = changes.pop("axis", -1)
    given = changes.pop("amax", None) is not None or changes.pop("outer_scale", None) is not None
    spec = find_quantizer(format, **changes).for_row(x.shape[axis])
    return library.quantize_problem(x.movedim(axis, -1), spec, given, scale_layout)


def _dequantize_problem(q: BlockScaledTensor, dtype: torch.dtype | None = None) -> dispatch.Problem:
    rows, axis = q.qdata.movedim(q.block_axis, -1), q.block_axis
    return library.dequantize_problem(
        rows, q.format, q.shape[axis], q.scale_layout, q.dtype if dtype is None else dtype
    )


def _matmul_problem(
    op: str, x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype | None = None
) -> dispatch.Problem:
    if x.shape[-1] != w.shape[-1]:
        hint = "explain takes the weight as a linear layer has it, [N, K]: w, not w.t()"
        raise InputError(f"{op} of {list(x.shape)} and a weight {list(w.shape)}", hint)
    rows = tuple(_dispatch_operand(t, k) for t, k in ((x, -1), (w.transpose(-1, -2), -2)))
    dtype = library.dtype_name(x.dtype if out_dtype is None else out_dtype)
    return dispatch.Problem(op, rows, x.device.type, library.capability(x.device), None, dtype)


def _dispatch_operand(t: torch.Tensor, contraction: int) -> dispatch.Operand:
    if not isinstance(t, BlockScaledTensor):
        return dispatch.Operand(tuple(t.shape), library.dtype_name(t.dtype))
    outer, axis = library.outer_kind(t.outer_scale, t.block_axis, contraction), t.block_axis
    made = late.describe(tuple(t.shape), t.format, axis, contraction, t.scale_layout, outer)
    return dataclasses.replace(made, exact_rows=t.meta.exact_rows)


PROBLEMS: dict[str, Callable[..., dispatch.Problem]] = {  # how `explain` describes a call; other files add their ops
    "quantize": _quantize_problem,
    "dequantize": _dequantize_problem,
    "matmul": functools.partial(_matmul_problem, "matmul"),
    "grouped_matmul": functools.partial(_matmul_problem, "grouped_matmul"),
}
