"""A report as text for a terminal, as one HTML file, and as a PNG.

`to_text` needs nothing but rich; `to_html` and `to_png` draw with matplotlib (extra `report`).
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from microscale.report import columns as cells
from microscale.report.columns import Column
from microscale.report.html import to_html
from microscale.report.picture import to_png
from microscale.report.results import CompareReport

__all__ = ["renderable", "to_html", "to_png", "to_text"]

Row = TypeVar("Row")
_UNLIMITED = 1000
# A rule under the header and nothing else, in ASCII: what goes to a pipe may have to pass any encoding.
_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def to_text(report: CompareReport, *, width: int | None = None, color: bool | None = None) -> str:
    """Return the report as ranked tables.

    `width` in characters: default the terminal's, unlimited where stdout is none. Columns that do not fit are left out,
    and a line says which. `color`: ANSI styles; default only in a terminal.
    """
    terminal = sys.stdout.isatty()
    if width is None:
        width = shutil.get_terminal_size().columns if terminal else _UNLIMITED
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal if color is None else color,
        color_system="auto" if color is None else "standard" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as capture:
        console.print(renderable(report, console))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def renderable(report: CompareReport, console: Console) -> RenderableType:
    """Return the report as one rich object that fits the console's width."""
    parts: list[RenderableType] = [Text(report.model, style="bold"), Text(cells.summary(report))]
    if report.formats:
        parts += [
            Text(),
            _title("weights, best SQNR first"),
            *_table(console, cells.format_columns(report), report.formats),
        ]
        parts += [Text(line, style="yellow") for line in cells.losses(report)]
    if report.reference is not None:
        order = "lowest KL" if report.reference.task == "causal_lm" else "smallest relative error"
        parts += [Text(), _title(f"model output, {order} first"), Text(cells.reference_line(report))]
    if report.recipes:
        parts += _table(console, cells.recipe_columns(report), report.recipes)
    for row in report.skipped:
        parts.append(
            Text(f"skipped {row.recipe}: {row.reason}" + (f" ({row.hint})" if row.hint else ""), style="yellow")
        )
    return Group(*parts)


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _table(console: Console, columns: Sequence[Column[Row]], rows: Sequence[Row]) -> list[RenderableType]:
    """The table with as many columns as fit, and a line that names the others."""
    kept = list(columns)
    table = _build(kept, rows)
    unlimited = console.options.update(width=_UNLIMITED)
    while Measurement.get(console, unlimited, table).maximum > console.width and any(c.rank for c in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
        table = _build(kept, rows)
    left_out = [column.header for column in columns if column not in kept]
    note = f"not shown at this width: {', '.join(left_out)}"
    return [table, *([Text(note, style="dim")] if left_out else [])]


def _build(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> Table:
    table = Table(box=_RULE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="left" if column.left else "right", no_wrap=True)
    for place, row in enumerate(rows, 1):
        table.add_row(str(place), *(column.cell(row) for column in columns), style="green" if place == 1 else "")
    return table
