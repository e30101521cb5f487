"""The train suite: forward and backward of one transformer block, every training recipe against bf16 in the same run.

`us` is a whole step of the block, casts included: forward, and the gradients of the input and of every weight. It is
timed as a CUDA graph; where a step cannot be captured, between two events around the eager step, host time included
(`timed` says which; on a CPU it is wall-clock time). bf16 is the same block with plain linear layers.

`breakdown` times the parts of the linear layers alone, at the block's shapes, summed over its layers, in microseconds:

    fprop, dgrad, wgrad                     the products, operands quantized before
    cast input, cast weight, cast gradient  quantizing an operand for all GEMMs that want it, from one read if possible
    rest                                    what is left of the step: attention, norms, activations, and what differs
                                            between parts alone and the step

`saved_bytes` is what the linear layers keep from forward to backward, each alone, summed: memory of the allocator after
the forward minus before, less the output (the quantized weights of a step that live in it too are `weight_bytes`, and
are not counted). On a CPU it is the tensors that autograd saves. `saved_ratio` is bf16's over the recipe's.

`kernels` names what computes the products of the layer with the most work.

In a block with experts, all of this includes the layers of experts, on as many tokens for each as a random router
gives; sorting tokens by expert and summing them again is in `rest`. Tokens that a recipe's rounding sends to other
experts than bf16 does count in `sqnr_db` like any other difference.

Before it is timed, a step is held against bf16: `sqnr_db` of the block's output less its input, of the input's
gradient, and of all weight gradients together. A row that is not finite or below 3 dB gets no time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from microscale.bench.blocks import BLOCKS, BlockSize, Layer, OneBlock, linears, make_block
from microscale.bench.product import Bench, failures, normal, raise_if_lost
from microscale.bench.timing import BenchReport, Timer, Timing, environment
from microscale.bench.train_parts import breakdown, time_step
from microscale.errors import InputError
from microscale.nn.training import Training, prepare_training_
from microscale.nn.training_experts import GroupedLinear
from microscale.spec.recipe import RecipeSpec
from microscale.spec.registry import RecipeLike, find_recipe, list_recipes

PLAIN = "bf16"
FLOOR_DB = 3.0  # worse than this is no rounding error


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """One recipe on one block; see the module. `speedup` is bf16's time over the recipe's; times in microseconds."""

    block: str
    recipe: str
    tokens: int
    us: float | None
    us_spread: float | None
    bf16_us: float | None
    speedup: float | None
    saved_bytes: int | None
    saved_ratio: float | None
    weight_bytes: int | None
    breakdown: dict[str, float]
    kernels: dict[str, str]
    sqnr_db: dict[str, float]
    timed: str
    checked: bool
    note: str = ""


def bench_train(
    device: str = "cuda",
    recipes: Sequence[RecipeLike] | None = None,
    blocks: Sequence[BlockSize] | None = None,
    *,
    samples: int = 11,
    progress: Callable[[int, int, str], None] | None = None,
    save: Callable[[BenchReport], None] | None = None,
) -> BenchReport:
    """Time training steps of blocks (default those of the device) under recipes (default all that train).

    `progress` is called as (done, total, what), `save` with what there is after every row. Raises InputError if there
    is no such device, or for a recipe that does not train.
    """
    place = _device(device)
    specs = [find_recipe(r) for r in (recipes if recipes is not None else _training_recipes())]
    for spec in specs:
        if not spec.is_training:
            raise InputError(f"recipe {spec.name!r} is for inference", f"use one of {', '.join(_training_recipes())}")
    bench = Bench(place, samples)
    found, rows = environment(place), list[TrainRow]()
    sizes = BLOCKS[place.type] if blocks is None else tuple(blocks)
    try:
        for size in sizes:
            suite = _Suite(size, bench.timer)
            for recipe in (None, *specs):
                if progress is not None:
                    what = PLAIN if recipe is None else recipe.name
                    progress(len(rows), len(sizes) * (len(specs) + 1), f"{size.name} {what}")
                rows.append(suite.row(recipe))
                if save is not None:
                    save(BenchReport(found, bench.ceilings, tuple(rows)))
    except KeyboardInterrupt:  # what is measured is worth keeping
        found["interrupted"] = True
    return BenchReport(found, bench.ceilings, tuple(rows))


def _training_recipes() -> list[str]:
    return [name for name in list_recipes() if find_recipe(name).is_training]


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type not in BLOCKS:
        raise InputError(f"no benchmark for device {name!r}", f"use {' or '.join(BLOCKS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is here to measure", "use --device cpu for the reference on this machine")
    return device


class _Suite:
    """One block, its input and the gradient of its output; bf16 is measured first."""

    def __init__(self, size: BlockSize, timer: Timer) -> None:
        self.size, self.timer = size, timer
        self.plain = make_block(size, timer.device)
        shape = (size.batch, size.length, size.dim)
        self.x = normal(shape, timer.device, seed=1).requires_grad_()
        self.dy = normal(shape, timer.device, seed=2)
        self.base: TrainRow | None = None
        self.wanted: tuple[torch.Tensor, ...] | None = None

    def row(self, recipe: RecipeSpec | None) -> TrainRow:
        """Check and time one recipe; None is bf16, and comes first."""
        name = PLAIN if recipe is None else recipe.name
        try:
            row = self._measured(name, recipe)
        except failures() as error:
            raise_if_lost(error)
            return self._row(name, None, note=f"failed: {type(error).__name__}: {error}".splitlines()[0])
        if recipe is None:
            self.base = row
        return row

    def _measured(self, name: str, recipe: RecipeSpec | None) -> TrainRow:
        block = copy.deepcopy(self.plain)
        training = None if recipe is None else prepare_training_(block, recipe, seed=0)
        step = functools.partial(_step, block, training, self.x, self.dy)
        levels = self._levels(step())
        if not all(level >= FLOOR_DB for level in levels.values()):  # NaN too
            shown = ", ".join(f"{key} {level:.1f} dB" for key, level in levels.items())
            return self._row(name, None, levels=levels, note=f"differs from bf16: {shown}")
        timing, timed = time_step(self.timer, step)
        parts, kernels = breakdown(self.size, block, recipe, self.timer)
        parts["rest"] = timing.us - sum(parts.values())
        saved = saved_bytes(block, training, self.size)
        return self._row(name, timing, saved, parts=parts, kernels=kernels, levels=levels, timed=timed)

    def _levels(self, got: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """SQNR against bf16 in dB; inf for bf16 itself."""
        if self.wanted is None:
            self.wanted = got
        ours, theirs = ((y - self.x, dx - self.dy, *dws) for y, dx, *dws in (got, self.wanted))
        pairs = list(zip(theirs, ours, strict=True))
        return {"out": _sqnr(pairs[:1]), "dx": _sqnr(pairs[1:2]), "dw": _sqnr(pairs[2:])}

    def _row(
        self,
        name: str,
        timing: Timing | None,
        saved: tuple[int, int] = (0, 0),
        *,
        levels: dict[str, float] | None = None,
        note: str = "",
        **measured: Any,
    ) -> TrainRow:
        us, spread = (None, None) if timing is None else (timing.us, timing.us_spread)
        plain, before = (us, saved[0]) if self.base is None else (self.base.us, self.base.saved_bytes)
        return TrainRow(
            block=self.size.name,
            recipe=name,
            tokens=self.size.tokens,
            us=us,
            us_spread=spread,
            bf16_us=plain,
            speedup=plain / us if us and plain else None,
            saved_bytes=saved[0] if us else None,
            saved_ratio=before / saved[0] if before and saved[0] else None,
            weight_bytes=saved[1] if us else None,
            sqnr_db={key: level for key, level in (levels or {}).items() if math.isfinite(level)},
            checked=timing is not None,
            note=note,
            breakdown=measured.get("parts", {}),
            kernels=measured.get("kernels", {}),
            timed=measured.get("timed", ""),
        )


def _step(block: OneBlock, training: Training | None, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return output, gradient of the input, gradients of the weights. Nothing accumulates, so steps are alike."""
    y = block(x)
    gradients = torch.autograd.grad(y, (x, *block.parameters()), dy)
    if training is not None:
        training.step(0.0)  # the weights quantized for this step are not those of the next
    return (y.detach(), *gradients)


def _sqnr(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    wanted, got = ([t.detach().float() for t in side] for side in zip(*pairs, strict=True))
    signal = sum(float(a.square().sum(dtype=torch.float64)) for a in wanted)
    noise = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(wanted, got, strict=True))
    return 10 * math.log10(signal / noise) if noise and signal else (math.inf if noise == 0 else math.nan)


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(block: OneBlock, training: Training | None, size: BlockSize) -> tuple[int, int]:
    """Return what the linear layers keep for their backward, each alone, summed: (activations, quantized weights).

    What does not grow with the tokens is the weight's: two batches tell the two apart.
    """
    activations = weights = 0
    for layer in linears(block).values():
        measure = _allocated if layer.weight.is_cuda else _saved_tensors
        once, twice = (measure(layer, training, *_batch(layer, size, times)) for times in (1, 2))
        activations, weights = activations + twice - once, weights + max(0, 2 * once - twice)
    return activations, weights


def _batch(layer: Layer, size: BlockSize, times: int) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """So many batches of tokens for a layer, and what else it is called with: experts have equal shares."""
    device = layer.weight.device
    if not isinstance(layer, GroupedLinear):
        return normal((times * size.batch, size.length, layer.in_features), device).requires_grad_(), ()
    unit = layer.alignment
    each = -(-times * size.tokens * size.top // (layer.experts * unit)) * unit
    offsets = torch.arange(1, layer.experts + 1, device=device, dtype=torch.int32) * each
    return normal((layer.experts * each, layer.in_features), device).requires_grad_(), (offsets, unit)


def _allocated(layer: Layer, training: Training | None, source: torch.Tensor, others: tuple[Any, ...]) -> int:
    """What the allocator holds after the forward and not before, output apart.

    The input is made inside, so that it counts where it is kept, as it would be under a loop that goes on without it.
    """
    device = source.device
    layer(source * 1, *others)  # compile, and make what lasts
    if training is not None:
        training.step(0.0)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    y = layer(source * 1, *others)
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before - y.numel() * y.element_size()


def _saved_tensors(layer: Layer, training: Training | None, source: torch.Tensor, others: tuple[Any, ...]) -> int:
    """The bytes that autograd saves, parameters apart; for machines whose allocator does not count."""
    if training is not None:
        training.step(0.0)
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(source * 1, *others)
    del y
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    return sum(count for place, count in storages.items() if place not in parameters)
