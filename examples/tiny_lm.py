"""Train a small Llama on Python's own source text with bf16 and with training recipes, and compare. No downloads.

    python examples/tiny_lm.py                                            a tiny model, on a CPU in a minute
    python examples/tiny_lm.py --device cuda --recipes all --seeds 0,1    30 M parameters, every recipe and ablation

Every run of a seed starts from the same weights and sees the same bytes in the same order, so that what differs is the
recipe. Ablations are recipes too: nvfp4_train-no_hadamard is nvfp4_train with that field taken out. After each bf16
run, its weights are quantized by every inference recipe, and the held-out perplexity of each is measured; after
quantization-aware training, that under the recipe it is meant for. --out writes all as JSON after every run, --picture
draws the loss curves; an interrupt or --seconds keeps what there is, and --add goes on from it. --jobs makes several
runs at once, each in a process of its own; one that fails is listed with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_lm_model import Config, TinyLM, read_corpus
from tiny_lm_train import ABLATIONS, PLAIN, Setup, Size, perplexities, recipe_of, train

import microscale as ms
from microscale.bench.timing import environment
from microscale.report.training import losses_to_png, over_seeds, over_seeds_text

ABLATED = "nvfp4_train"  # whose ablations `--recipes all` runs
SIZES = {
    "tiny": Size(Config(dim=64, layers=2, heads=4, kv_heads=2, ffn=192, length=64), 8, 200, 64, 2e-3),
    "30m": Size(Config(), 64, 400, None, 1e-3),
}
KEPT = ("corpus", "device", "torch", "triton", "microscale")  # of an environment: what runs of one file share
CHANGED = ("steps", "batch", "lr", "warmup", "floor", "average")  # options that replace what a size says


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = arguments().parse_args(argv)
    if (options.picture or options.diagnostics) and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib")
    device = torch.device(options.device)
    options.size = options.size or ("30m" if device.type == "cuda" else "tiny")
    given = {key: getattr(options, key) for key in CHANGED if getattr(options, key) is not None}
    size = dataclasses.replace(SIZES[options.size], **given)
    corpus = read_corpus(size.model.length, device)
    setup = Setup(size, corpus, device, options.compile, options.diagnostics, options.eager)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    result: dict[str, Any] = {
        "environment": environment(device) | {"corpus": corpus.facts, "jobs": options.jobs},
        "model": describe(setup),
        "runs": [],
        "perplexities": [],
        "skipped": [],
    }
    names = wanted(options.recipes)
    if options.add:
        keep(result, setup, options)
    made = {(run["recipe"], run["seed"]) for run in result["runs"]}
    todo = [(name, seed) for seed in seeds for name in names if (name, seed) not in made]  # what is cut off is a seed
    try:
        (run_here if options.jobs == 1 else run_apart)(setup, result, todo, options)
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
    say("--lr", type=float, help="peak learning rate")
    say("--warmup", type=float, help="share of the steps in which the learning rate rises")
    say("--floor", type=float, help="share of the peak learning rate at the end")
    say("--average", type=float, help="evaluate the mean of the weights over this last share of the steps")
    say("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    say("--compile", action="store_true", help="torch.compile the model")
    say("--eager", action="store_true", help="no CUDA graphs")
    say("--losses-only", action="store_true", help="no perplexities of quantized models")
    say("--jobs", type=int, default=1, help="runs at once, each in a process of its own on the same device")
    say("--seconds", type=float, default=math.inf, help="start no run that would likely end after so long")
    say("--diagnostics", type=Path, help="folder: what quantizing did, in eight steps of each run; without CUDA graphs")
    say("--out", type=Path, help="JSON file")
    say("--add", action="store_true", help="keep the runs that --out has of the same model, and make only others")
    say("--picture", type=Path, help="PNG file; needs matplotlib")
    return parser


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


# -- the runs ----------------------------------------------------------------------------------------------------------

Todo = Sequence[tuple[str, int]]  # recipe and seed


def run_here(setup: Setup, result: dict[str, Any], todo: Todo, options: argparse.Namespace) -> None:
    """Make one run after the other in this process."""
    start, taken = time.perf_counter(), 0.0
    for name, seed in todo:
        begin = time.perf_counter()
        if begin - start + taken > options.seconds:
            skip(result, name, seed, "out of time")
            continue
        run, model = train(setup, name, seed)
        found = {"runs": [run], "perplexities": []}
        if not options.losses_only:
            found["perplexities"] = perplexities(setup, model, name, seed)
        taken = max(taken, time.perf_counter() - begin)
        add(result, found, todo, time.perf_counter() - start)
        write(result, options)


def run_apart(setup: Setup, result: dict[str, Any], todo: Todo, options: argparse.Namespace) -> None:
    """Make `--jobs` runs at once, each by this script in a process of its own; what fails is skipped with its reason.

    How fast a run is that shares the device with others says nothing: `tokens_per_s` is None.
    """
    start, taken, waiting = time.perf_counter(), 0.0, list(todo)
    running: list[Job] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    name, seed = waiting.pop(0)
                    if time.perf_counter() - start + taken > options.seconds:
                        skip(result, name, seed, "out of time")
                    else:
                        running.append(Job(Path(folder), name, seed, options))
                time.sleep(0.05)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    found = job.result()
                    if isinstance(found, str):
                        skip(result, job.name, job.seed, found)
                        continue
                    taken = max(taken, time.perf_counter() - job.begin)
                    for run in found["runs"]:
                        run["tokens_per_s"] = None
                    add(result, found, todo, time.perf_counter() - start)
                    write(result, options)
        finally:
            for job in running:
                job.process.kill()
                job.process.wait()


class Job:
    """One run in a process of its own."""

    def __init__(self, folder: Path, name: str, seed: int, options: argparse.Namespace) -> None:
        self.name, self.seed, self.begin = name, seed, time.perf_counter()
        self.out, self.log = (folder / f"{name}-{seed}.{end}" for end in ("json", "log"))
        words = [sys.executable, str(Path(__file__).resolve()), "--recipes", name, "--seeds", str(seed)]
        for key in ("size", "device", "diagnostics", *CHANGED):
            if getattr(options, key) is not None:
                words += [f"--{key}", str(getattr(options, key))]
        words += [f"--{key}" for key in ("compile", "eager", "losses-only") if getattr(options, key.replace("-", "_"))]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # imports what we import
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*words, "--out", str(self.out)], stdout=log, stderr=log, env=env)

    def result(self) -> dict[str, Any] | str:
        """What the ended process wrote, or why there is nothing: the last line that it said."""
        if self.process.returncode == 0:
            found: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8"))
            return found
        said = self.log.read_text(encoding="utf-8", errors="replace").strip()
        print(f"-- {self.name}, seed {self.seed}\n{said}", file=sys.stderr, flush=True)
        return f"exit code {self.process.returncode}: {said.splitlines()[-1] if said else 'it said nothing'}"


def keep(result: dict[str, Any], setup: Setup, options: argparse.Namespace) -> None:
    """Take over the runs that a file has, if they are of the same model, steps, text, device and versions.

    Those whose perplexities are asked for now, and were not then, are made again.
    """
    if options.out is None:
        raise SystemExit("--add goes with --out, the file to add to")
    if not options.out.exists():
        return
    before = json.loads(options.out.read_text(encoding="utf-8"))
    here, there = ({k: v for k, v in r["environment"].items() if k in KEPT} for r in (result, before))
    same = before["model"] == result["model"] and here == there
    if not same or any(run["steps"] != setup.size.steps for run in before["runs"]):
        raise SystemExit(f"{options.out} is of another model, steps, text, device or version: give another --out")
    measured = {(row["trained_by"], row["seed"]) for row in before["perplexities"]}
    for run in before["runs"]:
        has_none = run["recipe"] != PLAIN and recipe_of(run["recipe"]).inference is None
        if options.losses_only or has_none or (run["recipe"], run["seed"]) in measured:
            result["runs"].append(run)
    result["perplexities"] = before["perplexities"]
    relate(result)


def skip(result: dict[str, Any], name: str, seed: int, reason: str) -> None:
    """Write down that there is no such run."""
    result["skipped"].append({"recipe": name, "seed": seed, "reason": reason})
    print(f"{name}, seed {seed}: {reason}", file=sys.stderr, flush=True)


def add(result: dict[str, Any], found: dict[str, Any], todo: Todo, seconds: float) -> None:
    """Add a run and its perplexities, in the order in which they were asked for, and relate all to bf16."""
    place = {pair: i for i, pair in enumerate(todo)}  # not in it: kept from before, so first
    result["runs"] += found["runs"]
    result["runs"].sort(key=lambda run: place.get((run["recipe"], run["seed"]), -1))
    result["perplexities"] += found["perplexities"]
    result["perplexities"].sort(key=lambda row: place.get((row["trained_by"], row["seed"]), -1))
    relate(result)
    for run in found["runs"]:
        print(f"{seconds:6.1f} s  {line(run)}", file=sys.stderr, flush=True)


# -- results -----------------------------------------------------------------------------------------------------------


def describe(setup: Setup) -> dict[str, Any]:
    """What is the same in all runs."""
    size = setup.size
    return dataclasses.asdict(size.model) | {
        "parameters": sum(p.numel() for p in TinyLM(size.model).parameters()),
        "tokens_per_step": size.batch * size.model.length,
        "learning_rate": size.lr,
        "warmup": size.warmup,
        "floor": size.floor,
        "average": size.average,
        "held_out_tokens": setup.held_out * size.model.length,
        "compiled": setup.compile,
    }


def relate(result: dict[str, Any]) -> None:
    """Set the ratios to bf16 of the same seed, and what the seeds come to.

    A run's final loss is held against bf16's, a perplexity against that of bf16 training without quantization.
    """
    runs, rows = result["runs"], result["perplexities"]
    base = {run["seed"]: run["final_loss"] for run in runs if run["recipe"] == PLAIN}
    plain = {row["seed"]: row["perplexity"] for row in rows if row["recipe"] == row["trained_by"] == PLAIN}
    for key, found, known in (("final_loss", runs, base), ("perplexity", rows, plain)):
        for row in found:
            ours, theirs = row[key], known.get(row["seed"])
            row["ratio_to_bf16"] = ours / theirs if ours is not None and theirs else None
    result["summary"] = over_seeds(runs, "final_loss")
    result["perplexity_summary"] = over_seeds(rows, "perplexity", ("recipe", "trained_by"))


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
    rate = "-" if run["tokens_per_s"] is None else f"{run['tokens_per_s']:.0f}"
    return f"{run['recipe']:<28} {run['seed']:>4}  {loss:>10}  {ratio:>8}  {rate:>10}"


def table(result: dict[str, Any]) -> str:
    """The results as text: runs, what seeds come to, then perplexities."""
    rows = [f"{'recipe':<28} {'seed':>4}  {'held out':>10}  {'to bf16':>8}  {'tokens/s':>10}"]
    rows += [line(run) for run in result["runs"]]
    rows += ["", f"{'recipe':<28} {'seeds':>5}  {'held out':>18}  {'to bf16':>18}"]
    for row in result.get("summary", []):
        mean, ratio = over_seeds_text(row)
        rows.append(f"{row['recipe']:<28} {row['seeds']:>5}  {mean:>18}  {ratio:>18}")
    rows += ["", f"{'quantized by':<20} {'trained by':<12} {'seeds':>5}  {'perplexity':>18}  {'to bf16':>18}"]
    for row in result.get("perplexity_summary", []):
        mean, ratio = over_seeds_text(row)
        rows.append(f"{row['recipe']:<20} {row['trained_by']:<12} {row['seeds']:>5}  {mean:>18}  {ratio:>18}")
    rows += [f"skipped: {row['recipe']}, seed {row['seed']}: {row['reason']}" for row in result["skipped"]]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
