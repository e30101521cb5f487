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

Before it is timed, a step is held against bf16: `sqnr_db` of the block's output less its input, of the input's
gradient, and of all weight gradients together. A row that is not finite or below 3 dB gets no time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from microscale.bench.blocks import BLOCKS, BlockSize, OneBlock, linears, make_block
from microscale.bench.product import Bench, failures, normal, raise_if_lost
from microscale.bench.timing import BenchReport, Timer, Timing, environment
from microscale.errors import InputError
from microscale.nn.training import Training, prepare_training_
from microscale.ops import explain, matmul, quantize, quantize_both
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.recipe import RecipeSpec
from microscale.spec.registry import RecipeLike, find_recipe, list_recipes
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor

PLAIN = "bf16"
FLOOR_DB = 3.0  # worse than this is no rounding error
Call = Callable[[], object]


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
        parts, kernels = _breakdown(self.size, block, recipe, self.timer)
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


# -- the breakdown -----------------------------------------------------------------------------------------------------


def _breakdown(
    size: BlockSize, block: OneBlock, recipe: RecipeSpec | None, timer: Timer
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the time of each part, all linear layers together, and the kernels of the products of the largest.

    Layers of one shape and rule are timed once.
    """
    layers = linears(block)
    spec = None if recipe is None else recipe.resolved(layers)
    alike = Counter((m.out_features, m.in_features, _gemms(spec, name)) for name, m in layers.items())
    total: dict[str, float] = {}
    kernels: dict[str, str] = {}
    for n, k, gemms in sorted(alike, key=lambda key: key[0] * key[1]):
        for part, call in _parts(size.tokens, n, k, gemms, timer.device):
            total[part] = total.get(part, 0.0) + alike[n, k, gemms] * time_step(timer, call)[0].us
            if call.func is _product:
                kernels[part] = _kernel(*call.args)
    return total, kernels


def _gemms(recipe: RecipeSpec | None, name: str) -> LayerGemms:
    rule = None if recipe is None else recipe.rule_for(name, "linear")
    return LayerGemms() if recipe is None or rule is None else recipe.gemms_of(rule)


def _parts(
    m: int, n: int, k: int, gemms: LayerGemms, device: torch.device
) -> Iterator[tuple[str, functools.partial[Any]]]:
    """Yield the casts and products of one layer, ready to be called."""
    x, w, dy = normal((m, k), device, 1), normal((n, k), device, 2) * k**-0.5, normal((m, n), device, 3)
    seed = torch.tensor([0, 0], device=device)
    casts = {
        "cast input": (x, gemms.fprop_input, gemms.wgrad_input),
        "cast weight": (w, gemms.fprop_weight, gemms.dgrad_weight),
        "cast gradient": (dy, gemms.dgrad_grad_output, gemms.wgrad_grad_output),
    }
    made = {}
    for part, (tensor, rows, columns) in casts.items():
        call = functools.partial(_cast, tensor, rows, columns, seed)
        made[part] = call()
        if rows is not None or columns is not None:
            yield part, call
    (x_rows, x_columns), (w_rows, w_columns), (dy_rows, dy_columns) = made.values()
    if gemms.wgrad_input_is_fprops:
        x_columns = x_rows
    if gemms.dgrad_weight_is_fprops:
        w_columns = w_rows
    yield "fprop", functools.partial(_product, x_rows, w_rows.transpose(0, 1))
    yield "dgrad", functools.partial(_product, dy_rows, w_columns)
    yield "wgrad", functools.partial(_product, dy_columns.transpose(0, 1), x_columns)


def _cast(
    x: torch.Tensor, rows: QuantizerSpec | None, columns: QuantizerSpec | None, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize along rows, columns or both; an operand without a quantizer stays as it is."""
    if rows is not None and columns is not None:
        return quantize_both(x, rows, columns, generator=seed)
    return (
        x if rows is None else quantize(x, rows, generator=seed),
        x if columns is None else quantize(x, columns, axis=-2, generator=seed),
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a, b) if _are_plain(a, b) else matmul(a, b)


def _kernel(a: torch.Tensor, b: torch.Tensor) -> str:
    return "torch" if _are_plain(a, b) else explain("matmul", a, b.transpose(0, 1)).chosen or "none"


def _are_plain(*operands: torch.Tensor) -> bool:
    return not any(isinstance(t, BlockScaledTensor) for t in operands)


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(block: OneBlock, training: Training | None, size: BlockSize) -> tuple[int, int]:
    """Return what the linear layers keep for their backward, each alone, summed: (activations, quantized weights).

    What does not grow with the tokens is the weight's: two batches tell the two apart.
    """
    activations = weights = 0
    for layer in linears(block).values():
        measure = _allocated if layer.weight.is_cuda else _saved_tensors
        once, twice = (measure(layer, training, (i * size.batch, size.length)) for i in (1, 2))
        activations, weights = activations + twice - once, weights + max(0, 2 * once - twice)
    return activations, weights


def _allocated(layer: torch.nn.Linear, training: Training | None, rows: tuple[int, int]) -> int:
    """What the allocator holds after the forward and not before, output apart.

    The input is made inside, so that it counts where it is kept, as it would be under a loop that goes on without it.
    """
    device = layer.weight.device
    source = normal((*rows, layer.in_features), device).requires_grad_()
    layer(source * 1)  # compile, and make what lasts
    if training is not None:
        training.step(0.0)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    y = layer(source * 1)
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before - y.numel() * y.element_size()


def _saved_tensors(layer: torch.nn.Linear, training: Training | None, rows: tuple[int, int]) -> int:
    """The bytes that autograd saves, parameters apart; for machines whose allocator does not count."""
    source = normal((*rows, layer.in_features), layer.weight.device).requires_grad_()
    if training is not None:
        training.step(0.0)
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(source * 1)
    del y
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    return sum(count for place, count in storages.items() if place not in parameters)
