"""`quantize_both`: one tensor along its rows and along its columns, as the two GEMMs of a training step read it."""

from __future__ import annotations

import torch

from microscale import dispatch
from microscale.errors import InputError
from microscale.numerics import layout, rounding
from microscale.ops import api, graph, library
from microscale.ops.api import Generator
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_quantizer
from microscale.tensor import BlockScaledTensor, Meta

library.LIBRARY.define(
    "quantize_both(Tensor x, str spec, str column_spec, Tensor? amax, Tensor? column_amax, Tensor? seed, "
    "Tensor? column_seed, str layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def quantize_both(
    x: torch.Tensor,
    rows: QuantizerLike,
    columns: QuantizerLike | None = None,
    *,
    layout: str = layout.STRIDED,
    amax: torch.Tensor | float | None = None,
    column_amax: torch.Tensor | float | None = None,
    generator: Generator | None = None,
) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    """Quantize x along its last axis and along the one before, reading it once where a kernel can.

    Args:
        x: float32, bfloat16 or float16 [..., R, K].
        rows: format or quantizer of the blocks along K, as `quantize` takes it.
        columns: of the blocks along R; default the same.
        layout: of the scales of both: "strided" or "swizzle_32_4_4".
        amax, column_amax: for formats with an outer scale, as `quantize` takes it for each axis.
        generator: for stochastic rounding; the columns draw with the next offset.

    Returns:
        `quantize(x, rows)` and `quantize(x, columns, axis=-2)`, bit for bit. They carry no gradients.

    Raises:
        InputError: a tensor of rank below 2, and whatever `quantize` refuses.
        SpecError: unknown format.
    """
    key = api._spec_key(rows)
    column_key = key if columns is None else api._spec_key(columns)
    graph.arm()
    return _quantize_both(x, key, column_key, layout, amax, column_amax, generator)


@graph.in_graph
def _quantize_both(
    x: torch.Tensor,
    key: str,
    column_key: str,
    scale_layout: str,
    amax: torch.Tensor | float | None,
    column_amax: torch.Tensor | float | None,
    generator: Generator | None,
) -> tuple[BlockScaledTensor, BlockScaledTensor]:
    api._check_input(x, -1, scale_layout)
    if x.dim() < 2:
        raise InputError(f"quantize_both of a tensor of rank {x.dim()}", "it has rows and columns: use quantize")
    specs = tuple(QuantizerSpec.from_key(text).for_row(x.shape[axis]) for text, axis in ((key, -1), (column_key, -2)))
    amaxes = []
    for spec, axis, given in zip(specs, (-1, -2), (amax, column_amax), strict=True):
        api._check_outer(spec, given, None)
        if spec.hadamard is not None and x.shape[axis] % spec.hadamard.size:
            raise InputError(
                f"Hadamard size {spec.hadamard.size} needs a multiple of it along axis {axis}, got {x.shape[axis]}",
                "pad with torch.nn.functional.pad",
            )
        amaxes.append(api._outer_operand(given, x.movedim(axis, -1), axis))
    stochastic = [spec.rounding == "stochastic" for spec in specs]
    seed = rounding.seed_from(generator, x.device) if any(stochastic) else None
    second = None if seed is None else torch.stack([seed[0], seed[1] + 1])
    seeds = [s if needed else None for s, needed in zip((seed, second), stochastic, strict=True)]
    parts = torch.ops.microscale.quantize_both(x.detach(), *(s.key for s in specs), *amaxes, *seeds, scale_layout)
    made = []
    for (qdata, scale, outer), spec, axis in zip((parts[:3], parts[3:]), specs, (-1, -2), strict=True):
        has_outer = spec.format.outer_scale is not None
        if axis == -2:
            qdata = qdata.mT
            scale = scale.mT if scale_layout == layout.STRIDED else scale
            outer = outer.mT if outer.dim() > 1 else outer
        meta = Meta(spec.format, axis, scale_layout)
        made.append(BlockScaledTensor(qdata, scale, outer if has_outer else None, meta, x.shape, x.dtype))
    return made[0], made[1]


def both_problem(
    x: torch.Tensor, spec: QuantizerSpec, column_spec: QuantizerSpec, scale_layout: str
) -> dispatch.Problem:
    """Describe a quantize_both call."""
    one = library.quantize_problem(x, spec, False, scale_layout)
    return dispatch.Problem(
        "quantize_both", one.operands, one.device, one.capability, spec, None, scale_layout, column_spec
    )


def _explained(
    x: torch.Tensor, rows: QuantizerLike, columns: QuantizerLike | None = None, *, layout: str = layout.STRIDED
) -> dispatch.Problem:
    specs = find_quantizer(rows), find_quantizer(rows if columns is None else columns)
    return both_problem(x, specs[0].for_row(x.shape[-1]), specs[1].for_row(x.shape[-2]), layout)


api.PROBLEMS["quantize_both"] = _explained


@torch.library.impl(library.LIBRARY, "quantize_both", "CompositeExplicitAutograd")
def _run(
    x: torch.Tensor,
    spec: str,
    column_spec: str,
    amax: torch.Tensor | None,
    column_amax: torch.Tensor | None,
    seed: torch.Tensor | None,
    column_seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, ...]:
    specs = QuantizerSpec.from_key(spec), QuantizerSpec.from_key(column_spec)
    entry = dispatch.select(both_problem(x, *specs, scale_layout))
    made = entry.run(x, *specs, (amax, column_amax), (seed, column_seed), scale_layout)
    return tuple(x.new_empty(0, dtype=torch.float32) if t is None else t for t in made)


@torch.library.register_fake("microscale::quantize_both", lib=library.LIBRARY)
def _fake(
    x: torch.Tensor,
    spec: str,
    column_spec: str,
    amax: torch.Tensor | None,
    column_amax: torch.Tensor | None,
    seed: torch.Tensor | None,
    column_seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, ...]:
    rows = library._quantize_fake(x, spec, amax, None, seed, scale_layout)
    return (*rows, *library._quantize_fake(x.mT, column_spec, column_amax, None, column_seed, scale_layout))
