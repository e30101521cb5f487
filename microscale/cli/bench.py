"""`bench`: time the ops of this machine: on the device against a copy and torch's bf16, or their host code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.cli import options, output
from microscale.errors import InputError, unknown_name

if TYPE_CHECKING:
    from microscale.bench import BenchReport

SUITES = ("quantize", "matmul", "overhead", "train")


def bench(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    formats: Annotated[str | None, typer.Option("--formats", metavar="A,B", help="Default: all.")] = None,
    shapes: Annotated[str | None, typer.Option("--shapes", metavar="MxK,MxK", help="Matmul: N x K of weights.")] = None,
    device: Annotated[str, typer.Option("--device", help="cuda or cpu.")] = "cuda",
    samples: Annotated[int, typer.Option("--samples", min=3, help="Timed calls per row.")] = 21,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the JSON there too.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=0, help="Suites quantize, matmul: compile in so many processes first.")
    ] = 0,
    m: Annotated[str | None, typer.Option("--m", metavar="M,M", help="Suite matmul: rows of the activations.")] = None,
    cases: Annotated[
        str | None, typer.Option("--cases", metavar="A,B", help="Suite matmul: weight_only, both_scaled, grouped, mlp.")
    ] = None,
    recipes: Annotated[str | None, typer.Option("--recipes", metavar="A,B", help="Suite train. Default: all.")] = None,
    as_json: options.Json = False,
) -> None:
    """Time the kernels of this machine, each checked first.

    Suites `quantize` and `matmul`: on the device; the L2 cache is cold and each call is one CUDA-graph replay. Quantize
    and dequantize are compared with the reference bit for bit, and held against the copy bandwidth of the same run;
    products are compared with float64 on a sample, and held against torch's bf16 products. Suite `overhead`: host time
    of a small call, 1x4096 unless --shapes says otherwise, and where it goes. Suite `train`: training steps.
    """
    if suite not in SUITES:
        raise unknown_name("suite", suite, SUITES)
    _check_options(suite, {"matmul": {"--m": m, "--cases": cases}, "train": {"--recipes": recipes}})
    sizes = [options.parse_shape(s, "--shapes") for s in shapes.split(",")] if shapes else None
    if sizes and any(len(s) != 2 for s in sizes):
        raise InputError(f"--shapes {shapes!r}: each shape has two sizes", "for example 4096x4096,16384x8192")
    names = [options.format_like(f, "--formats") for f in options.split_list([formats] if formats else None) or []]

    def save(report: BenchReport) -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(output.plain(report), indent=1) + "\n")

    with output.progress("bench") as step:
        common: dict[str, Any] = {"samples": samples, "progress": step}
        if suite == "quantize":
            report, show = _quantize(device, names, sizes, common | {"jobs": jobs, "save": save}), _print
        elif suite == "matmul":
            plan = {"cases": _names(cases), "shapes": sizes, "rows": _rows(m)}
            report, show = _matmul(device, names, plan, common | {"jobs": jobs, "save": save}), _print_matmul
        elif suite == "overhead":
            report, show = _overhead(device, names, sizes, common), _print_overhead
        else:
            report, show = _train(device, _names(recipes), common | {"save": save}), _print_any
    save(report)
    if as_json:
        output.emit_json(report)
    else:
        show(report)


def _check_options(suite: str, own: dict[str, dict[str, str | None]]) -> None:
    """Raise InputError for an option that another suite takes."""
    for owner, given in own.items():
        for option, value in given.items():
            if value is not None and owner != suite:
                raise InputError(f"suite {suite} has no {option}", f"it belongs to: microscale bench {owner}")


def _names(text: str | None) -> list[str] | None:
    return options.split_list([text] if text else None)


def _rows(text: str | None) -> list[int] | None:
    """Read --m. Raises InputError for what is no positive number."""
    found = _names(text)
    if found is None:
        return None
    if not all(n.isdigit() and int(n) for n in found):
        raise InputError(f"--m {text!r}: each is a positive number of rows", "for example 1,16,4096")
    return [int(n) for n in found]


def _quantize(device: str, names: list[Any], sizes: list[Any] | None, common: dict[str, Any]) -> BenchReport:
    from microscale.bench import bench_quantize

    return bench_quantize(device, names or None, sizes, **common)


def _overhead(device: str, names: list[Any], sizes: list[Any] | None, common: dict[str, Any]) -> BenchReport:
    from microscale.bench import bench_overhead

    return bench_overhead(device, names or None, sizes, **common)


def _matmul(device: str, names: list[Any], plan: dict[str, Any], common: dict[str, Any]) -> BenchReport:
    from microscale.bench import bench_matmul, default_plan

    return bench_matmul(device, names or None, default_plan(device).changed(**plan), **common)


def _train(device: str, names: list[str] | None, common: dict[str, Any]) -> BenchReport:
    from microscale.bench import bench_train

    return bench_train(device, names, **common)


def _head(report: BenchReport) -> str:
    place = report.environment
    ceilings = ", ".join(
        f"{name.removesuffix('_tflops')} {value:.0f} {'TFLOP/s' if name.endswith('_tflops') else 'GB/s'}"
        for name, value in report.ceilings.items()
    )
    return f"{place['device']}, torch {place['torch']}, triton {place.get('triton', 'none')}; {ceilings}\n"


def _print_matmul(report: BenchReport) -> None:
    print(_head(report))
    rows = []
    for r in report.rows:
        numbers = ("-",) * 5
        if r.us is not None:
            numbers = (f"{r.us:.1f}", f"{r.us_spread:.1f}", f"{r.bf16_us:.1f}", f"{r.speedup:.2f}", f"{r.ratio:.2f}")
        sizes = (str(r.m), f"{r.n}x{r.k}")
        rows.append((r.op, r.case, r.format, r.activations, *sizes, *numbers, r.kernel, r.note))
    numeric = ("us", "spread", "bf16 us", "speed-up", "of floor")
    columns = ("op", "case", "format", "activations", "M", "N x K", *numeric, "kernel", "note")
    output.emit_table(columns, rows, right=("M", *numeric))
    for label, error in report.environment.get("failed", {}).items():
        print(f"not measured: {label}: {error}")


def _print_any(report: BenchReport) -> None:
    print(_head(report))
    rows = [output.plain(r) for r in report.rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    output.emit_table(columns, [tuple(_cell(row.get(name)) for name in columns) for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    print(_head(report))
    rows = []
    for r in report.rows:
        numbers = ("-", "-", "-", "-")
        if r.us is not None:
            numbers = (f"{r.us:.1f}", f"{r.us_spread:.1f}", f"{r.gb_per_s:.0f}", f"{r.ratio:.2f}")
        rows.append((r.op, r.format, r.mode, "x".join(map(str, r.shape)), *numbers, r.kernel, r.note))
    columns = ("op", "format", "mode", "shape", "us", "spread", "GB/s", "of copy", "kernel", "note")
    output.emit_table(columns, rows, right=("us", "spread", "GB/s", "of copy"))
