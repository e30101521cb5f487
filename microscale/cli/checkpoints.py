"""`plan`, `quantize`, `inspect`, `compare`: commands on a checkpoint, which is a folder or one safetensors file."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microscale.cli import options, output

if TYPE_CHECKING:
    from microscale.interop import CheckpointReport

Source = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint: a folder, or one safetensors file.")]


def plan(
    model: Source,
    recipe: options.Recipe,
    summary: Annotated[bool, typer.Option("--summary", help="One line for layers that are treated alike.")] = False,
    source: options.From = None,
    as_json: options.Json = False,
) -> None:
    """Show what a recipe would do to each layer; touch nothing.

    Only the headers of the checkpoint are read.
    """
    from microscale.nn.plan import plan as make_plan

    options.register(source)
    made = make_plan(model, recipe)
    if as_json:
        output.emit_json(made.to_dict())
    else:
        print(made.summary() if summary else made)


def quantize(
    model: Source,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Where the quantized checkpoint is written.")],
    recipe: options.Recipe,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    dialect: Annotated[str, typer.Option("--dialect", help="How quantized tensors are stored.")] = "microscale",
    source: options.From = None,
    as_json: options.Json = False,
) -> None:
    """Quantize a checkpoint, tensor by tensor.

    Memory is bounded by the largest tensor. OUT appears when it is complete; tokenizer and config files are copied.
    """
    from microscale.interop import quantize_checkpoint

    options.register(source)
    with output.progress("quantize") as progress:
        made = quantize_checkpoint(model, destination, recipe, dialect=dialect, overwrite=overwrite, progress=progress)
    if as_json:
        output.emit_json({"path": destination, "plan": made.to_dict()})
    else:
        print(made.summary())
        print(f"wrote {destination}")


def inspect(
    model: Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show what a checkpoint holds, quantized or not.

    Only the headers are read.
    """
    from microscale.interop import inspect as inspect_checkpoint

    found = inspect_checkpoint(model)
    if as_json:
        output.emit_json(found.to_dict())
        return
    print("\n".join(_header(found)))
    print()
    if tensors:
        rows = [
            _tensor_row(t.name, t.format or t.dtype, t.shape, t.stored_bytes, t.bits_per_value) for t in found.tensors
        ]
        output.emit_table(("tensor", "stored as", "shape", "bytes", "bits/value"), rows, right=("bytes", "bits/value"))
    else:
        rows = [
            (name, str(count), str(values), str(size), f"{8 * size / values:.4g}" if values else "-")
            for name, (count, values, size) in found.formats().items()
        ]
        columns = ("stored as", "tensors", "values", "bytes", "bits/value")
        output.emit_table(columns, rows, right=columns[1:])


def _header(found: CheckpointReport) -> Iterator[str]:
    """Where it is, who wrote it, and how large it is."""
    from microscale.nn.records import size_text

    yield f"{found.path}"
    if found.dialect is None:
        unknown = (
            f"quantized by {found.quant_method}, which is not read here" if found.quant_method else "not quantized"
        )
        yield f"  dialect   none: {unknown}"
    else:
        yield f"  dialect   {found.dialect}, written by version {found.version}"
    if found.recipe is not None:
        yield f"  recipe    {found.recipe}"
    if found.inputs:
        counts = Counter(found.inputs.values())
        yield f"  inputs    {', '.join(f'{name} in {count} layers' for name, count in counts.items())}"
    bits = "" if found.bits_per_value is None else f", {found.bits_per_value:.4g} bits per value"
    yield f"  files     {len(found.files)}, {size_text(sum(f.bytes for f in found.files))}"
    yield f"  tensors   {len(found.tensors)}, {size_text(found.stored_bytes)}{bits}"


def _tensor_row(name: str, stored_as: str, shape: tuple[int, ...], size: int, bits: float | None) -> tuple[str, ...]:
    return name, stored_as, "x".join(map(str, shape)) or "scalar", str(size), "-" if bits is None else f"{bits:.4g}"


def compare(
    model: Source,
    formats: Annotated[
        list[str] | None, typer.Option("--formats", metavar="A,B,...", help="Formats to measure; all if not given.")
    ] = None,
    recipes: Annotated[
        list[str] | None, typer.Option("--recipes", metavar="A,B,...", help="Recipes to run; all if not given.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE", help="Texts, one a line: run the model under each recipe."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report with pictures.")] = None,
    source: options.From = None,
    as_json: options.Json = False,
) -> None:
    """Measure what each format and recipe costs and gives.

    The weights need only safetensors files; --inputs needs a local transformers model.
    """
    from microscale.report import compare as compare_checkpoint
    from microscale.report import render

    options.register(source)
    names = options.split_list(formats)
    quantizers = None if names is None else [options.format_like(name, "--formats") for name in names]
    with output.progress("compare") as progress:
        report = compare_checkpoint(model, quantizers, options.split_list(recipes), inputs, progress=progress)
    if as_json:
        output.emit_json(report.to_dict())
    else:
        print(render.to_text(report), end="")
    if html is not None:  # last: a picture that cannot be drawn must not cost the numbers
        print(f"wrote {render.to_html(report, html)}", file=sys.stderr)
