"""The runs of tiny_lm.py: one model trained by one recipe, its held-out loss, and its perplexity once quantized.

On a GPU a run is a CUDA graph, replayed: all that a step reads and writes is on the device (batches, learning rate,
losses and the number of the step), so that the host has nothing to do but to replay it. The first three steps are made
eagerly, since they compile and select kernels; a schedule that switches layers to high precision starts anew.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_lm_model import Config, Corpus, TinyLM

import microscale as ms
from microscale.nn.diagnostics import diagnose
from microscale.report.training import diagnostics_to_png

PLAIN = "bf16"
WARM_UP = 3  # eager steps before a graph is captured
ABLATIONS: dict[str, dict[str, object]] = {  # what is changed in every quantizer of a recipe that has it
    "no_hadamard": {"hadamard": None},
    "no_stochastic": {"rounding": "nearest_even"},
    "no_2d": {"scale_tile": None},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model with what it is trained on: `batch` sequences a step, `eval_windows` sequences held out (None: all).

    The learning rate rises to `lr` within the share `warmup` of the steps, and falls to the share `floor` of it. With
    `average`, what is evaluated in the end is the mean of the weights over that last share of the steps.
    """

    model: Config
    batch: int
    steps: int
    eval_windows: int | None
    lr: float
    warmup: float = 0.1
    floor: float = 0.0
    average: float = 0.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share. `eager`: no CUDA graphs, though the device has them."""

    size: Size
    corpus: Corpus
    device: torch.device
    compile: bool = False
    diagnostics: Path | None = None
    eager: bool = False

    @property
    def held_out(self) -> int:
        """How many windows the final evaluation has."""
        count = self.corpus.windows
        return count if self.size.eval_windows is None else min(count, self.size.eval_windows)


def train(setup: Setup, name: str, seed: int) -> tuple[dict[str, Any], TinyLM]:
    """Train one model by one recipe; return its record and the model."""
    with _side_stream(setup.device):
        return _train(setup, name, seed)


def _train(setup: Setup, name: str, seed: int) -> tuple[dict[str, Any], TinyLM]:
    size = setup.size
    torch.manual_seed(seed)
    model = TinyLM(size.model).to(setup.device)  # made on the CPU: the same weights everywhere
    state = None if name == PLAIN else ms.prepare_training_(model, recipe_of(name), seed=seed)
    forward = torch.compile(model) if setup.compile else model
    steps = Steps(setup, model, forward, seed)
    held_out: list[tuple[int, float]] = []
    clock = Clock(setup.device)
    with diagnosed(setup, name, seed) as observed:
        for step in range(size.steps):
            if step == min(10, size.steps // 2):
                clock.start(step)  # kernels are compiled by now
            steps()
            if state is not None and state.step((step + 1) / size.steps):
                steps.forget()  # layers switched: what was captured is no longer what they do
            observed()
            if (step + 1) % every_eighth(size) == 0 and step + 1 < size.steps:
                with clock.paused():
                    held_out.append((step + 1, evaluate(setup, forward, max(1, setup.held_out // 4))))
    seconds, counted = clock.stop(size.steps)
    steps.finish()
    held_out.append((size.steps, final := evaluate(setup, forward, setup.held_out)))
    return record(name, seed, setup, steps.losses, held_out) | {
        "final_loss": number(final),
        "tokens_per_s": counted * size.batch * size.model.length / seconds,
        "layers": 0 if state is None else len(state.layers),
        "graphs": steps.captured,
    }, model


class Steps:
    """The optimizer steps of one run; call it once a step. `losses` [steps] are on the device, each at its step."""

    def __init__(self, setup: Setup, model: TinyLM, forward: Callable[..., torch.Tensor], seed: int) -> None:
        size, device = setup.size, setup.device
        self.corpus, self.forward, self.parameters = setup.corpus, forward, list(model.parameters())
        self.batches = setup.corpus.order(size.steps, size.batch, seed)
        self.rates = torch.tensor([size.lr * schedule(i, size) for i in range(size.steps)], device=device)
        self.rate = torch.zeros((), device=device)  # what the optimizer reads: that of this step
        self.losses = torch.zeros(size.steps, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        decayed = [p for p in self.parameters if p.dim() > 1]
        others = [p for p in self.parameters if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu)
        self.captures = on_gpu and not setup.eager and setup.diagnostics is None  # observers see no graph
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = self.done = self.captured = 0
        self.averaged_from = size.steps - round(size.average * size.steps)
        self.mean = [torch.zeros_like(p) for p in self.parameters] if size.average else []

    def __call__(self) -> None:
        """Make one step; the host does not wait for it."""
        if self.captures and self.graph is None and self.eager >= WARM_UP:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self._step()  # is not made, only written down
            self.captured += 1
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
            self.eager += 1
        self.done += 1
        if self.mean and self.done > self.averaged_from:
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, self.parameters, 1 / (self.done - self.averaged_from))

    def _step(self) -> None:
        """Forward, backward and update; no number of it comes from the host."""
        self.rate.copy_(self.rates.index_select(0, self.step)[0])
        tokens = self.corpus.batch(self.batches.index_select(0, self.step)[0])
        loss = loss_of(self.forward, tokens)
        self.losses.index_copy_(0, self.step, loss.detach()[None])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: a graph's backward makes its own
        self.step.add_(1)

    def forget(self) -> None:
        """Drop the graph with its memory; eager steps come again before another is captured."""
        if self.graph is not None:
            torch.cuda.synchronize()  # it may still run
        self.graph, self.eager = None, 0

    def finish(self) -> None:
        """Drop the graph, and leave the weights as they are to be evaluated."""
        self.forget()
        if self.mean:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.mean)


def schedule(step: int, size: Size) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine down."""
    rise = max(1, round(size.warmup * size.steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, size.steps - rise)
    return size.floor + (1 - size.floor) * 0.5 * (1 + math.cos(math.pi * done))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream of our own, since the default one cannot be captured; all runs share it, and so its memory."""
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(device), _stream(device)
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


class Clock:
    """Wall-clock time of the steps alone; the device is waited for at each end of what counts."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.first, self.begin = device, 0.0, 0, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, step: int) -> None:
        """Forget what was measured, and count from this step on."""
        self.seconds, self.first, self.begin = 0.0, step, self._now()

    @contextlib.contextmanager
    def paused(self) -> Any:
        """Leave out what happens inside."""
        self.seconds += self._now() - self.begin
        yield
        self.begin = self._now()

    def stop(self, steps: int) -> tuple[float, int]:
        """Return seconds and the number of steps that they took."""
        return self.seconds + self._now() - self.begin, steps - self.first


# -- what a run is asked -----------------------------------------------------------------------------------------------


def loss_of(model: Callable[..., torch.Tensor], tokens: torch.Tensor, autocast: bool = True) -> torch.Tensor:
    """Mean cross entropy of the next byte, in nats; tokens [B, L + 1]. Autocast: bf16 products of FP32 weights."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(setup: Setup, model: Callable[..., torch.Tensor], windows: int, autocast: bool = True) -> float:
    """Mean loss on held-out windows, the same ones for every model."""
    rows = setup.corpus.held_out(windows).split(setup.size.batch)
    total = sum(loss_of(model, row, autocast).double() * len(row) for row in rows)
    return float(total) / sum(map(len, rows))


def perplexities(setup: Setup, model: TinyLM, trained_by: str, seed: int) -> list[dict[str, Any]]:
    """Held-out perplexity per byte of a trained model in bfloat16, and quantized by the recipes it is of use for.

    For a bf16 model these are all inference recipes, for quantization-aware training its own; else there are none.
    """
    names = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]
    if trained_by != PLAIN:
        names = [name for name in (recipe_of(trained_by).inference,) if name is not None]
        if not names:
            return []
    plain = copy.deepcopy(model)
    if trained_by != PLAIN:
        ms.finish_training_(plain, "high_precision")
    plain = plain.to(torch.bfloat16)
    examples = [setup.corpus.batch(row)[:, :-1] for row in setup.corpus.order(2, setup.size.batch, seed)]
    losses = {PLAIN: evaluate(setup, plain, setup.held_out, autocast=False)}
    for name in names:
        quantized = copy.deepcopy(plain)
        ms.quantize_(quantized, name, calibrate=examples)
        losses[name] = evaluate(setup, quantized, setup.held_out, autocast=False)
    return [
        {"recipe": name, "trained_by": trained_by, "seed": seed, "loss": number(loss), "perplexity": number(exp(loss))}
        for name, loss in losses.items()
    ]


def recipe_of(name: str) -> ms.RecipeSpec:
    """Return a recipe by name, or what is left of it without something: RECIPE-no_hadamard."""
    base, _, what = name.partition("-")
    spec = ms.find_recipe(base)
    if not what:
        return spec
    if what not in ABLATIONS:
        raise SystemExit(f"no ablation {what!r}: it is one of {', '.join(ABLATIONS)}")
    changed = {key: q.model_copy(update=ABLATIONS[what]) for key, q in spec.quantizers.items()}
    if changed == spec.quantizers:
        raise SystemExit(f"{base} has nothing that {what} would take out")
    signs = tuple(key for key in spec.random_signs if changed[key].hadamard is not None)
    return spec.model_copy(update={"name": f"{base}_{what}", "quantizers": changed, "random_signs": signs})


@contextlib.contextmanager
def diagnosed(setup: Setup, name: str, seed: int) -> Iterator[Callable[[], None]]:
    """Give what to call after each step; with --diagnostics, steps before evaluations are watched and drawn."""
    if setup.diagnostics is None or name == PLAIN:
        yield lambda: None
        return
    path = setup.diagnostics / f"{name}-{seed}.jsonl"
    path.unlink(missing_ok=True)
    with diagnose(every=every_eighth(setup.size), to=path, start=1) as watch:
        yield watch.step
    if watch.rows:
        diagnostics_to_png(watch.rows, path.with_suffix(".png"))


def every_eighth(size: Size) -> int:
    """How many steps pass between evaluations, and between diagnoses."""
    return max(1, size.steps // 8)


def record(
    name: str, seed: int, setup: Setup, losses: torch.Tensor, held_out: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Return what is written of a run: losses are means over intervals, in nats a byte, at the interval's last step."""
    steps = len(losses)
    every = max(1, steps // 100)
    ends = range(every, steps + 1, every)
    found = losses.double().tolist()
    means = [sum(found[end - every : end]) / every for end in ends]
    return {
        "recipe": name,
        "seed": seed,
        "steps": steps,
        "tokens": steps * setup.size.batch * setup.size.model.length,
        "losses": [[end, number(mean)] for end, mean in zip(ends, means, strict=True)],
        "held_out": [[step, number(loss)] for step, loss in held_out],
    }


def exp(value: float) -> float:
    """e to a power; inf where that is too large."""
    return math.exp(value) if value < 700 else math.inf


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None."""
    return value if math.isfinite(value) else None
