"""`tune`: measure how the decode GEMM is best cut on this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microscale.cli import options, output
from microscale.errors import InputError


def tune(
    formats: Annotated[str | None, typer.Option("--formats", metavar="A,B", help="Default: four common ones.")] = None,
    shapes: Annotated[str | None, typer.Option("--shapes", metavar="NxK,NxK", help="Weights [N, K].")] = None,
    rows: Annotated[str, typer.Option("--m", metavar="M,M", help="Rows of activations, up to 64.")] = "1,16,64",
    samples: Annotated[int, typer.Option("--samples", min=3, help="Timed calls per cut.")] = 7,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Compile in so many processes first.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: the user's cache.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how to cut decode matmuls on this GPU, and keep it.

    For few activations and prepared weights. Without it a shipped table or a rule decides. Kept per kind
    of GPU and version of the kernel and Triton.
    """
    from microscale.bench import tune as tuning

    sizes = [options.parse_shape(s, "--shapes") for s in shapes.split(",")] if shapes else list(tuning.SHAPES)
    if any(len(s) != 2 for s in sizes):
        raise InputError(f"--shapes {shapes!r}: each weight has rows and columns", "for example 28672x8192")
    if not all(m.strip().isdigit() and 0 < int(m) <= 64 for m in rows.split(",")):
        raise InputError(f"--m {rows!r}", "numbers of rows from 1 to 64, as in 1,16")
    names = options.split_list([formats] if formats else None) or list(tuning.FORMATS)
    with output.progress("tune") as step:
        found = tuning.tune(
            names, [(s[0], s[1]) for s in sizes], rows=[int(m) for m in rows.split(",")], samples=samples, jobs=jobs,
            out=out, progress=step,
        )  # fmt: skip
    if as_json:
        output.emit_json(found)
    else:
        cut = [(key, " ".join(map(str, found["cuts"][key])), f"{us:.1f}") for key, us in found["us"].items()]
        output.emit_table(("weight", "cut", "us"), cut, right=("us",))
