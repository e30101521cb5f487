"""Train a small Llama on Python's own source text with bf16 and with training recipes, and compare. No downloads.

    python examples/tiny_lm.py                                            a tiny model, on a CPU in a minute
    python examples/tiny_lm.py --device cuda --recipes all --seeds 0,1    30 M parameters, every recipe and ablation

Every run of a seed starts from the same weights and sees the same bytes in the same order, so that what differs is the
recipe. Ablations are recipes too: nvfp4_train-no_hadamard is nvfp4_train with that field taken out. After each bf16
run, its weights are quantized by every inference recipe, and the held-out perplexity of each is measured; after
quantization-aware training, that under the recipe it is meant for. --out writes all as JSON after every run, --picture
draws the loss curves; an interrupt or --seconds keeps what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_lm_model import Config, Corpus, TinyLM, read_corpus

import microscale as ms
from microscale.bench.timing import environment
from microscale.nn.diagnostics import diagnose
from microscale.report.training import diagnostics_to_png, losses_to_png

PLAIN = "bf16"
ABLATIONS: dict[str, dict[str, object]] = {  # what is changed in every quantizer of a recipe that has it
    "no_hadamard": {"hadamard": None},
    "no_stochastic": {"rounding": "nearest_even"},
    "no_2d": {"scale_tile": None},
}
ABLATED = "nvfp4_train"  # whose ablations `--recipes all` runs


@dataclasses.dataclass(frozen=True)
class Size:
    """A model with what it is trained on: `batch` sequences a step, `eval_windows` sequences held out."""

    model: Config
    batch: int
    steps: int
    eval_windows: int
    lr: float


SIZES = {
    "tiny": Size(Config(dim=64, layers=2, heads=4, kv_heads=2, ffn=192, length=64), 8, 200, 64, 2e-3),
    "30m": Size(Config(), 64, 400, 1024, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share."""

    size: Size
    corpus: Corpus
    device: torch.device
    compile: bool = False
    diagnostics: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = arguments().parse_args(argv)
    if (options.picture or options.diagnostics) and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib")
    device = torch.device(options.device)
    size = SIZES[options.size or ("30m" if device.type == "cuda" else "tiny")]
    size = dataclasses.replace(size, batch=options.batch or size.batch, steps=options.steps or size.steps)
    setup = Setup(size, read_corpus(size.model.length, device), device, options.compile, options.diagnostics)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    result: dict[str, Any] = {
        "environment": environment(device) | {"corpus": setup.corpus.facts},
        "model": describe(setup),
        "runs": [],
        "perplexities": [],
        "skipped": [],
    }
    try:
        run_all(setup, result, wanted(options.recipes), seeds, options)
    except KeyboardInterrupt:
        result["environment"]["interrupted"] = True
    write(result, options)
    print(table(result))
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    say = parser.add_argument
    say("--recipes", default=PLAIN + ",mxfp8_train,nvfp4_train", help="names, RECIPE-no_hadamard and the like, or all")
    say("--seeds", default="0", help="of weights, data order and recipes: 0,1,2")
    say("--size", choices=SIZES, help="default 30m on cuda, tiny on cpu")
    say("--steps", type=int, help="optimizer steps of a run")
    say("--batch", type=int, help="sequences of a step")
    say("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    say("--compile", action="store_true", help="torch.compile the model")
    say("--seconds", type=float, default=math.inf, help="start no run that would likely end after so long")
    say("--diagnostics", type=Path, help="folder: what quantizing did, in eight steps of each run")
    say("--out", type=Path, help="JSON file")
    say("--picture", type=Path, help="PNG file; needs matplotlib")
    return parser


# -- the runs ----------------------------------------------------------------------------------------------------------


def run_all(
    setup: Setup, result: dict[str, Any], recipes: Sequence[str], seeds: Sequence[int], options: argparse.Namespace
) -> None:
    """Run every recipe with every seed, seeds outermost, so that what is cut off is a whole seed."""
    start, taken = time.perf_counter(), 0.0
    for seed in seeds:
        for name in recipes:
            begin = time.perf_counter()
            if begin - start + taken > options.seconds:
                result["skipped"].append({"recipe": name, "seed": seed, "reason": "out of time"})
                continue
            run, model = train(setup, name, seed)
            result["runs"].append(run)
            result["perplexities"] += perplexities(setup, model, name, seed)
            taken = max(taken, time.perf_counter() - begin)
            relate(result)
            print(f"{time.perf_counter() - start:6.1f} s  {line(run)}", file=sys.stderr, flush=True)
            write(result, options)


def train(setup: Setup, name: str, seed: int) -> tuple[dict[str, Any], TinyLM]:
    """Train one model by one recipe; return its record and the model."""
    size, device = setup.size, setup.device
    torch.manual_seed(seed)
    model = TinyLM(size.model).to(device)  # made on the CPU: the same weights everywhere
    state = None if name == PLAIN else ms.prepare_training_(model, recipe_of(name), seed=seed)
    forward = torch.compile(model) if setup.compile else model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    batches = setup.corpus.order(size.steps, size.batch, seed)
    losses = torch.zeros(size.steps, device=device)
    held_out: list[tuple[int, float]] = []
    clock = Clock(device)
    with diagnosed(setup, name, seed) as observed:
        for step in range(size.steps):
            if step == min(10, size.steps // 2):
                clock.start(step)  # kernels are compiled by now
            for group in optimizer.param_groups:
                group["lr"] = size.lr * schedule(step, size.steps)
            loss = loss_of(forward, setup.corpus.batch(batches[step]))
            losses[step] = loss.detach()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if state is not None:
                state.step((step + 1) / size.steps)
            observed()
            if (step + 1) % every_eighth(size) == 0 and step + 1 < size.steps:
                with clock.paused():
                    held_out.append((step + 1, evaluate(setup, forward, size.eval_windows // 4)))
    seconds, counted = clock.stop(size.steps)
    held_out.append((size.steps, final := evaluate(setup, forward, size.eval_windows)))
    rate = counted * size.batch * size.model.length / seconds
    return record(name, seed, setup, losses, held_out) | {
        "final_loss": number(final),
        "tokens_per_s": rate,
        "layers": 0 if state is None else len(state.layers),
    }, model


def every_eighth(size: Size) -> int:
    """How many steps pass between evaluations, and between diagnoses."""
    return max(1, size.steps // 8)


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


def record(
    name: str, seed: int, setup: Setup, losses: torch.Tensor, held_out: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Return what is written of a run: losses are means over intervals, in nats a byte, at the interval's last step."""
    steps = len(losses)
    every = max(1, steps // 100)
    ends = range(every, steps + 1, every)
    means = [losses[end - every : end].double().mean().item() for end in ends]
    return {
        "recipe": name,
        "seed": seed,
        "steps": steps,
        "tokens": steps * setup.size.batch * setup.size.model.length,
        "losses": [[end, number(mean)] for end, mean in zip(ends, means, strict=True)],
        "held_out": [[step, number(loss)] for step, loss in held_out],
    }


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
    losses = {PLAIN: evaluate(setup, plain, setup.size.eval_windows, autocast=False)}
    for name in names:
        quantized = copy.deepcopy(plain)
        ms.quantize_(quantized, name, calibrate=examples)
        losses[name] = evaluate(setup, quantized, setup.size.eval_windows, autocast=False)
    return [
        {"recipe": name, "trained_by": trained_by, "seed": seed, "loss": number(loss), "perplexity": number(exp(loss))}
        for name, loss in losses.items()
    ]


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


# -- recipes -----------------------------------------------------------------------------------------------------------


def wanted(text: str) -> list[str]:
    """Names from the command line; bf16 first, since the others are held against it. `all`: with the ablations."""
    names = text.split(",")
    if text == "all":
        names = [PLAIN, *(name for name in ms.list_recipes() if ms.find_recipe(name).is_training)]
        names += [f"{ABLATED}-{what}" for what in ABLATIONS]
    for name in names:
        if name != PLAIN:
            recipe_of(name)  # a mistyped name fails before an hour of training
    return sorted(dict.fromkeys(names), key=lambda name: name != PLAIN)


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


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear rise over 5 % of the steps, then a cosine down to a tenth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# -- results -----------------------------------------------------------------------------------------------------------


def describe(setup: Setup) -> dict[str, Any]:
    """What is the same in all runs."""
    size = setup.size
    parameters = sum(p.numel() for p in TinyLM(size.model).parameters())
    return dataclasses.asdict(size.model) | {
        "parameters": parameters,
        "tokens_per_step": size.batch * size.model.length,
        "learning_rate": size.lr,
        "held_out_tokens": len(setup.corpus.held_out(size.eval_windows)) * size.model.length,
        "compiled": setup.compile,
    }


def relate(result: dict[str, Any]) -> None:
    """Set the ratios to bf16 of the same seed: of a run's final loss, and of a perplexity without quantization."""
    runs, rows = result["runs"], result["perplexities"]
    base = {run["seed"]: run["final_loss"] for run in runs if run["recipe"] == PLAIN}
    plain = {row["seed"]: row["perplexity"] for row in rows if row["recipe"] == row["trained_by"] == PLAIN}
    for key, found, known in (("final_loss", runs, base), ("perplexity", rows, plain)):
        for row in found:
            ours, theirs = row[key], known.get(row["seed"])
            row["ratio_to_bf16"] = ours / theirs if ours is not None and theirs else None


def exp(value: float) -> float:
    """e to a power; inf where that is too large."""
    return math.exp(value) if value < 700 else math.inf


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None."""
    return value if math.isfinite(value) else None


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write JSON and picture, where they are asked for."""
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None and result["runs"]:
        losses_to_png(result["runs"], options.picture)


def line(run: dict[str, Any]) -> str:
    """One line on a run."""
    loss = "not finite" if run["final_loss"] is None else f"{run['final_loss']:.4f}"
    ratio = "-" if run["ratio_to_bf16"] is None else f"{100 * (run['ratio_to_bf16'] - 1):+.2f} %"
    return f"{run['recipe']:<28} {run['seed']:>4}  {loss:>10}  {ratio:>8}  {run['tokens_per_s']:>10.0f}"


def table(result: dict[str, Any]) -> str:
    """The results as text: runs, then perplexities."""
    rows = [f"{'recipe':<28} {'seed':>4}  {'held out':>10}  {'to bf16':>8}  {'tokens/s':>10}"]
    rows += [line(run) for run in result["runs"]]
    rows += ["", f"{'quantized by':<20} {'trained by':<12} {'seed':>4}  {'perplexity':>10}  {'to bf16':>8}"]
    for row in result["perplexities"]:
        perplexity, ratio = row["perplexity"], row["ratio_to_bf16"]
        numbers = "not finite" if perplexity is None else f"{perplexity:>10.4f}"
        numbers += "" if ratio is None else f"  {100 * (ratio - 1):>+6.2f} %"
        rows.append(f"{row['recipe']:<20} {row['trained_by']:<12} {row['seed']:>4}  {numbers}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
