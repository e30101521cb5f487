"""`tune`: measure the cuts of the decode GEMM on this GPU, and keep the best."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from microscale.bench.timing import Timer
from microscale.errors import InputError
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import fragment_tuning, fragments
from microscale.numerics import fragments as orders
from microscale.numerics import layout
from microscale.spec.format import FormatSpec
from microscale.spec.registry import find_format

FORMATS = ("mxfp4", "nvfp4", "mxfp6", "mxfp8")
SHAPES = ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 14336))
EIGHTS = (1, 2, 8)


def tune(
    formats: Sequence[str] = FORMATS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    rows: Sequence[int] = (1, 16, 64),
    samples: int = 7,
    jobs: int = 0,
    out: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure every cut for weights of `shapes` (N, K) and up to `rows` rows of bfloat16, on the current GPU.

    Writes {"device", "versions", "cuts": {key: cut}, "us": {key: microseconds}} to `out` (default: the user's cache
    folder, where the kernel finds it), joined with what is there, after every shape. `jobs`: processes that compile
    first, side by side. Raises InputError without a GPU, or for a format or shape that has no layout fragments.
    """
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is here to tune for", "the shipped tables and the rule serve every machine")
    name = torch.cuda.get_device_name()
    file = fragment_tuning.cache_file(name) if out is None else out
    found: dict[str, Any] = {"device": name, "versions": fragment_tuning.versions(), "cuts": {}, "us": {}}
    if file.exists() and (before := json.loads(file.read_text())).get("versions") == found["versions"]:
        found |= before
    problems = [
        (fmt, eights, shape)
        for fmt in (find_format(f) for f in formats)
        for eights in sorted({eights_of(n) for n in rows})
        for shape in shapes
    ]
    for fmt, _, (n, k) in problems:
        if not orders.fits(fmt, n, k):
            raise InputError(f"{fmt.name} [{n}, {k}] has no layout fragments", "sizes are multiples of 64")
    if jobs:
        _compile(problems, jobs)
    timer = Timer("cuda", samples)
    for done, (fmt, eights, (n, k)) in enumerate(problems):
        if progress is not None:
            progress(done, len(problems), f"{fmt.name} {n}x{k}, {8 * eights} rows")
        key = fragment_tuning.key_of(fmt, eights, n, k)
        best, us = _best(fmt, eights, n, k, timer)
        found["cuts"][key], found["us"][key] = list(best), round(us, 2)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    fragment_tuning.forget()
    return found


def eights_of(rows: int) -> int:
    """Return rows of x in eights, as the kernel has them: 1, 2, 4 or 8."""
    return 1 if rows <= 8 else 2 if rows <= 16 else 4 if rows <= 32 else 8


def _operands(fmt: FormatSpec, eights: int, n: int, k: int) -> tuple[torch.Tensor, Parts]:
    """Random bytes: time does not depend on them."""
    scale = torch.randint(100, 120, (n, k // fmt.block), dtype=torch.uint8, device="cuda")
    qdata = torch.randint(0, 256, (n, k * fmt.element.width // 8), dtype=torch.uint8, device="cuda")
    outer = torch.ones((), device="cuda") if fmt.outer_scale is not None else None
    x = torch.randn(1 if eights == 1 else 8 * eights, k, device="cuda").to(torch.bfloat16)
    return x, Parts(qdata.mT, scale.mT, outer, fmt, -2, k, layout.FRAGMENTS)


def _best(fmt: FormatSpec, eights: int, n: int, k: int, timer: Timer) -> tuple[fragment_tuning.Tuning, float]:
    x, weight = _operands(fmt, eights, n, k)
    timed = []
    for cut in fragment_tuning.candidates(eights, n, k):
        timing = timer.time(lambda cut=cut: fragments.run(x, weight, None, torch.bfloat16, eights, cut))  # type: ignore[misc]
        timed.append((timing.us, cut))
    us, best = min(timed)
    return best, us


def _compile(problems: Sequence[tuple[FormatSpec, int, tuple[int, int]]], jobs: int) -> None:
    """Call every cut once on a small weight, in processes of their own, which leave kernels in Triton's cache."""
    import concurrent.futures
    import multiprocessing

    wanted = sorted({
        (fmt.key, eights, cut._replace(splits=1 << (cut.splits - 1).bit_length()))
        for fmt, eights, (n, k) in problems
        for cut in fragment_tuning.candidates(eights, n, k)
    })  # fmt: skip
    fresh = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, fresh) as pool:
        for done in [pool.submit(_call_once, wanted[i::jobs]) for i in range(jobs)]:
            done.result()


def _call_once(wanted: Sequence[tuple[str, int, fragment_tuning.Tuning]]) -> None:
    for key, eights, cut in wanted:
        x, weight = _operands(FormatSpec.from_key(key), eights, 1024, 2048)
        fragments.run(x, weight, None, torch.bfloat16, eights, cut)
