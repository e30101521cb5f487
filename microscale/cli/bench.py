"""`bench`: time the ops of this machine, every format: on the device against a copy, or their host code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microscale.cli import options, output
from microscale.errors import InputError, unknown_name

if TYPE_CHECKING:
    from microscale.bench import BenchReport

SUITES = ("quantize", "overhead")


def bench(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    formats: Annotated[str | None, typer.Option("--formats", metavar="A,B", help="Default: all.")] = None,
    shapes: Annotated[str | None, typer.Option("--shapes", metavar="MxK,MxK", help="Rows and columns.")] = None,
    device: Annotated[str, typer.Option("--device", help="cuda or cpu.")] = "cuda",
    samples: Annotated[int, typer.Option("--samples", min=3, help="Timed calls per row.")] = 21,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the JSON there too.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Suite quantize: compile in so many processes first.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Time the kernels of this machine, each checked first.

    Quantize and dequantize, compared with the reference bit for bit. Suite `quantize`: on the device, against the copy
    bandwidth of the same run; the L2 cache is cold and each call is one CUDA-graph replay. Suite `overhead`: host time
    of a small call, 1x4096 unless --shapes says otherwise, and where it goes.
    """
    from microscale.bench import bench_overhead, bench_quantize

    if suite not in SUITES:
        raise unknown_name("suite", suite, SUITES)
    sizes = [options.parse_shape(s, "--shapes") for s in shapes.split(",")] if shapes else None
    if sizes and any(len(s) != 2 for s in sizes):
        raise InputError(f"--shapes {shapes!r}: each shape has rows and columns", "for example 4096x4096,16384x8192")
    names = [options.format_like(f, "--formats") for f in options.split_list([formats] if formats else None) or []]
    run, show = {"quantize": (bench_quantize, _print), "overhead": (bench_overhead, _print_overhead)}[suite]

    def save(report: BenchReport) -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(output.plain(report), indent=1) + "\n")

    more = {"jobs": jobs, "save": save} if suite == "quantize" else {}
    with output.progress("bench") as step:
        report = run(device, names or None, sizes, samples=samples, progress=step, **more)
    save(report)
    if as_json:
        output.emit_json(report)
    else:
        show(report)


def _print_overhead(report: BenchReport) -> None:
    place = report.environment
    host = place["host"] or "unknown CPU"
    print(f"{place['device']}, {host}, torch {place['torch']}, triton {place.get('triton', 'none')}\n")
    rows = []
    for r in report.rows:
        numbers = ("-", "-", "-")
        if r.us is not None:
            numbers = (f"{r.us:.1f}", f"{r.us_spread:.1f}", "-" if r.ratio is None else f"{r.ratio:.2f}")
        rows.append((r.op, r.format, "x".join(map(str, r.shape)), r.mode, *numbers, r.kernel, r.note))
    columns = ("op", "format", "shape", "part", "us", "spread", "share", "kernel", "note")
    output.emit_table(columns, rows, right=("us", "spread", "share"))


def _print(report: BenchReport) -> None:
    place = report.environment
    ceilings = ", ".join(f"{name} {value:.0f} GB/s" for name, value in report.ceilings.items())
    print(f"{place['device']}, torch {place['torch']}, triton {place.get('triton', 'none')}; {ceilings}\n")
    rows = []
    for r in report.rows:
        numbers = ("-", "-", "-", "-")
        if r.us is not None:
            numbers = (f"{r.us:.1f}", f"{r.us_spread:.1f}", f"{r.gb_per_s:.0f}", f"{r.ratio:.2f}")
        rows.append((r.op, r.format, r.mode, "x".join(map(str, r.shape)), *numbers, r.kernel, r.note))
    columns = ("op", "format", "mode", "shape", "us", "spread", "GB/s", "of copy", "kernel", "note")
    output.emit_table(columns, rows, right=("us", "spread", "GB/s", "of copy"))
