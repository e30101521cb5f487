"""`formats`, `recipes`, `schema`: the registry on the command line, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from microscale.cli import describe, options, output
from microscale.spec.registry import find_format, find_quantizer, find_recipe, list_formats, list_recipes
from microscale.spec.schema import KINDS, schema


def formats(
    name: Annotated[
        str | None,
        typer.Argument(help="Show one in detail: a name, a YAML path, or '{format: ..., block: ...}'."),
    ] = None,
    source: options.From = None,
    as_json: options.Json = False,
) -> None:
    """List the formats, or show one with all its values."""
    options.register(source)
    if name is None:
        specs = [find_format(n) for n in list_formats()]
        if as_json:
            output.emit_json([describe.format_data(spec) for spec in specs])
        else:
            rows = [describe.format_row(spec) for spec in specs]
            output.emit_table(describe.FORMAT_COLUMNS, rows, right=("block", "bits/value"))
        return
    spec = find_quantizer(options.format_like(name, "NAME")).format
    if as_json:
        output.emit_json(describe.format_data(spec, values=True))
    else:
        print("\n".join(describe.format_text(spec)))


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one in detail: a name or a YAML path.")] = None,
    source: options.From = None,
    as_json: options.Json = False,
) -> None:
    """List the recipes, or show one with its rules."""
    options.register(source)
    if name is None:
        specs = [find_recipe(n) for n in list_recipes()]
        if as_json:
            output.emit_json([describe.recipe_data(spec) for spec in specs])
        else:
            output.emit_table(describe.RECIPE_COLUMNS, [describe.recipe_row(spec) for spec in specs])
        return
    spec = find_recipe(name)
    if as_json:
        output.emit_json(describe.recipe_data(spec))
    else:
        print("\n".join(describe.recipe_text(spec)))


def schema_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(KINDS)}.")],
    destination: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file instead of stdout.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Print a JSON Schema, for editors that check the YAML."""
    text = json.dumps(schema(kind), indent=2)
    if destination is None:
        print(text)
        return
    destination.write_text(text + "\n", encoding="utf-8")
    if as_json:
        output.emit_json({"kind": kind, "path": destination})
    else:
        print(destination)
