"""What commands print: JSON and aligned text on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ProgressCallback = Callable[[int, int, str], None]
_UNLIMITED = 10_000  # columns: what goes to a file or a pipe is never cut
_NARROWEST = 30  # columns that a wrapped description needs to be readable


def emit_json(data: Any) -> None:
    """Print one JSON document on stdout; NaN and infinity, which JSON has not, become "nan", "inf" and "-inf"."""
    print(json.dumps(plain(data), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Return dataclasses, mappings, sequences and paths as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def emit_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print aligned columns on stdout, those named in `right` right-aligned.

    In a terminal that is wide enough the last column wraps; elsewhere every row is one line.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        wraps = name == columns[-1]
        table.add_column(name, justify="right" if name in right else "left", no_wrap=not wraps, overflow="fold")
    for row in rows:
        table.add_row(*row)
    fixed = sum(2 + max(map(len, column)) for column in list(zip(columns, *rows, strict=True))[:-1])
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    if console.is_terminal and console.width >= fixed + _NARROWEST:
        console.print(table)
        return
    wide = Console(file=sys.stdout, width=_UNLIMITED, markup=False, highlight=False, emoji=False)
    with wide.capture() as capture:
        wide.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))  # rich pads the last column


@contextlib.contextmanager
def progress(label: str) -> Iterator[ProgressCallback]:
    """Show a progress bar on stderr while the block runs; yields `callback(done, total, what)`.

    Where stderr is no terminal nothing is shown, so that logs stay readable.
    """
    console = Console(file=sys.stderr, markup=False, highlight=False, emoji=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task: TaskID = bar.add_task(label, total=None, what="")

        def callback(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield callback
