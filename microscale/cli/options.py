"""Options that several commands share, and how their text becomes specs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from microscale.errors import InputError
from microscale.spec import document
from microscale.spec.registry import QuantizerLike, register_format

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
From = Annotated[
    list[Path] | None,
    typer.Option("--from", metavar="PATH", help="Formats to know by name: a YAML file or a folder of them."),
]
Recipe = Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A recipe: name or YAML path.")]


def register(paths: list[Path] | None) -> list[str]:
    """Register the formats of `--from`; returns their names."""
    for path in paths or []:
        if not path.exists():
            raise InputError(f"--from {path}: no such file or folder", "give a format's YAML file, or a folder of them")
    return [spec.name for path in paths or [] for spec in register_format(path)]


def format_like(text: str, option: str) -> QuantizerLike:
    """Return a format argument as the library takes it: a name, a path, or an inline `{format: mxfp4, block: 16}`."""
    return _mapping(text, option) if text.lstrip().startswith("{") else text


def _mapping(text: str, option: str) -> dict[str, Any]:
    data = document.parse(text, option).data
    if not isinstance(data, dict):
        raise InputError(f"{option}: {text!r} is no mapping", "write it as '{format: mxfp4, scale_rule: floor}'")
    return data


def split_list(values: list[str] | None) -> list[str] | None:
    """Split repeated, comma-separated values; commas inside braces or brackets do not separate. None stays None."""
    if values is None:
        return None
    found, depth, current = [], 0, ""
    for char in ",".join(values) + ",":
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth <= 0:
            found.append(current.strip())
            current, depth = "", 0
        else:
            current += char
    found.append(current.strip())
    return [f for f in found if f]


def parse_shape(text: str, option: str = "--shape") -> tuple[int, ...]:
    """Return 64x4096x11008 as a tuple. Raises InputError for anything else."""
    parts = text.lower().replace(",", "x").split("x")
    if not all(p.strip().isdigit() for p in parts):
        raise InputError(f"{option} {text!r} is not a shape", "write sizes with an x between them: 64x4096x11008")
    return tuple(int(p) for p in parts)
