"""The parts of a training step: casts and products of linear layers, each timed alone at the shapes of a block."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from microscale.bench.blocks import BlockSize, Layer, OneBlock, linears, torch_grouped
from microscale.bench.product import normal
from microscale.bench.timing import Timer, Timing
from microscale.nn.grouped_gemm import GroupedCall, alignment_of, grouped_call
from microscale.nn.three_gemm import GemmCall, GemmState
from microscale.nn.token_groups import TokenGroups
from microscale.nn.training_experts import GroupedLinear
from microscale.ops import explain
from microscale.spec.recipe import RecipeSpec
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor

Call = Callable[[], object]
TORCH = "torch"


class _Shape(NamedTuple):
    """A kind of layers: `experts` (0: one matrix) matrices [n, k] on so many rows, spread by a router with `top`."""

    rows: int
    n: int
    k: int
    experts: int
    top: int
    gemms: LayerGemms


class Part(NamedTuple):
    """A cast or a product of one layer, ready to be called; products know what computes them."""

    name: str
    call: Call
    kernel: Callable[[], str] | None = None


def breakdown(
    size: BlockSize, block: OneBlock, recipe: RecipeSpec | None, timer: Timer
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the time of each part, all linear layers together, and the kernels of the products of the largest.

    Layers of one shape and rule are timed once.
    """
    layers = linears(block)
    spec = None if recipe is None else recipe.resolved(layers)
    alike = Counter(_shape(size, layer, _gemms(spec, name)) for name, layer in layers.items())
    total: dict[str, float] = {}
    kernels: dict[str, str] = {}
    for shape in sorted(alike, key=lambda s: s.rows * s.n * s.k):
        for part in parts(shape, timer.device):
            total[part.name] = total.get(part.name, 0.0) + alike[shape] * time_step(timer, part.call)[0].us
            if part.kernel is not None:
                kernels[part.name] = part.kernel()
    return total, kernels


def _shape(size: BlockSize, layer: Layer, gemms: LayerGemms) -> _Shape:
    experts = layer.experts if isinstance(layer, GroupedLinear) else 0
    rows = size.tokens * size.top if experts else size.tokens
    return _Shape(rows, layer.out_features, layer.in_features, experts, size.top if experts else 0, gemms)


def _gemms(recipe: RecipeSpec | None, name: str) -> LayerGemms:
    rule = None if recipe is None else recipe.rule_for(name, "linear")
    return LayerGemms() if recipe is None or rule is None else recipe.gemms_of(rule)


def parts(shape: _Shape, device: torch.device) -> Iterator[Part]:
    """Yield the casts and products of one layer."""
    gemms, call, rows = shape.gemms, *_call(shape, device)
    lead = (shape.experts,) if shape.experts else ()
    x, dy = normal((rows, shape.k), device, 1), normal((rows, shape.n), device, 3)
    w = normal((*lead, shape.n, shape.k), device, 2) * shape.k**-0.5
    casts: dict[str, tuple[Any, ...]] = {
        "cast input": (call.of_tokens, x, gemms.fprop_input, gemms.wgrad_input),
        "cast weight": (call.of_weight, w, gemms.fprop_weight, gemms.dgrad_weight),
        "cast gradient": (
            call.of_tokens, dy, gemms.dgrad_grad_output, gemms.wgrad_grad_output, torch.tensor([0, 0], device=device)
        ),
    }  # fmt: skip
    made = []
    for name, (function, tensor, first, second, *seed) in casts.items():
        cast = functools.partial(function, tensor, first, second, *seed)
        made.append(cast())
        if first is not None or second is not None:
            yield Part(name, cast)
    (x_rows, x_columns), (w_rows, w_columns), (dy_rows, dy_columns) = made
    if gemms.wgrad_input_is_fprops:
        x_columns = x_rows
    if gemms.dgrad_weight_is_fprops:
        w_columns = w_rows
    operands = ((x_rows, w_rows), (dy_rows, w_columns), (dy_columns, x_columns))
    yield from _experts(call, operands) if isinstance(call, GroupedCall) else _dense(call, operands)


def _call(shape: _Shape, device: torch.device) -> tuple[GemmCall, int]:
    """A call of such a layer in bf16, and on how many rows."""
    if not shape.experts:
        return GemmCall(shape.gemms, GemmState(), torch.bfloat16, True), shape.rows
    scores = normal((shape.rows // shape.top, shape.experts), device, 4)
    alignment = alignment_of(shape.gemms)
    groups = TokenGroups.of(scores.topk(shape.top).indices, shape.experts, alignment)
    like = torch.empty((groups.source.shape[0], 0), dtype=torch.bfloat16, device=device)
    return grouped_call(shape.gemms, GemmState(), groups.offsets, like, alignment), like.shape[0]


def _dense(call: GemmCall, operands: tuple[tuple[Any, Any], ...]) -> Iterator[Part]:
    (x, w), (dy, w_down), (dy_down, x_down) = operands
    pairs = {
        "fprop": (x, w),
        "dgrad": (dy, w_down.transpose(0, 1)),
        "wgrad": (dy_down.transpose(0, 1), x_down.transpose(0, 1)),
    }
    calls = (
        functools.partial(call.fprop, x, w, None),
        functools.partial(call.dgrad, dy, w_down),
        functools.partial(call.wgrad, dy_down, x_down, torch.bfloat16),
    )
    for (name, pair), product in zip(pairs.items(), calls, strict=True):
        yield Part(name, product, functools.partial(_kernel, "matmul", *pair))


def _experts(call: GroupedCall, operands: tuple[tuple[Any, Any], ...]) -> Iterator[Part]:
    (x, w), (dy, w_down), (dy_down, x_down) = operands
    offsets = call.groups.offsets
    if call.gemms == LayerGemms() and x.is_cuda:  # bf16 is measured by torch's own
        pairs = {"fprop": (x, w.transpose(-1, -2)), "dgrad": (dy, w_down), "wgrad": (dy_down.transpose(0, 1), x_down)}
        for name, pair in pairs.items():
            yield Part(name, functools.partial(torch_grouped, *pair, offsets), lambda: TORCH)
        return
    named = functools.partial(_chosen, "grouped_matmul")
    yield Part("fprop", functools.partial(call.fprop, x, w, None), functools.partial(named, x, w))
    yield Part(
        "dgrad", functools.partial(call.dgrad, dy, w_down), functools.partial(named, dy, w_down.transpose(-1, -2))
    )
    wgrad = functools.partial(call.wgrad, dy_down, x_down, torch.bfloat16)
    yield Part("wgrad", wgrad, lambda: _wgrad_kernel(call, dy_down, x_down))


def _wgrad_kernel(call: GroupedCall, dy: torch.Tensor, x: torch.Tensor) -> str:
    values, _, ends = call.wgrad_operands(dy, x)
    return _chosen("grouped_wgrad", *values, ends)


def _kernel(op: str, a: torch.Tensor, b: torch.Tensor) -> str:
    """What computes a @ b.T of matrices."""
    plain = not any(isinstance(t, BlockScaledTensor) for t in (a, b))
    return TORCH if plain else _chosen(op, a, b)


def _chosen(op: str, *operands: torch.Tensor) -> str:
    return explain(op, *operands).chosen or "none"


# -- timing ------------------------------------------------------------------------------------------------------------


def time_step(timer: Timer, step: Call) -> tuple[Timing, str]:
    """Time a step as a CUDA graph, or between events where it cannot be captured; also return which."""
    if timer.device.type != "cuda":
        step()
        return timer.time(step), "wall"
    step(), step()  # compile, tune and fill caches outside of a capture
    try:
        return timer.time(step), "cuda graph"
    except RuntimeError:  # a host synchronization, or random numbers from the host
        torch.cuda.synchronize(timer.device)
        return _between_events(timer, step), "events"


def _between_events(timer: Timer, step: Call) -> Timing:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(timer.samples):
        before.record()
        step()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    times.sort()
    return Timing(statistics.median(times), times[-1 - len(times) // 10] - times[len(times) // 10])
