"""A report as one HTML file: no scripts, nothing loaded from elsewhere, the picture inline as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from microscale.report import columns as cells
from microscale.report.columns import Column
from microscale.report.picture import to_svg
from microscale.report.results import CompareReport, FormatResult, LayerError

Row = TypeVar("Row")

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead, .note, footer { color: #52606d; } .note, footer { font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th { border-bottom: 2px solid #9aa5b1; } th.left, td.left { text-align: left; }
tbody tr:first-child { background: #eef8f3; } tbody tr:hover { background: #f5f7fa; }
svg { width: 100%; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 1.25rem; }
.warn { background: #fff8e6; border-left: 4px solid #e6a700; padding: .4rem .8rem; }
footer { margin-top: 3rem; border-top: 1px solid #e4e7eb; padding-top: .75rem; }
"""


def to_html(report: CompareReport, path: str | Path) -> Path:
    """Write the report as one self-contained HTML file and return its path; folders on the way are made.

    Raises MissingDependencyError without matplotlib, InputError for a report with nothing in it.
    """
    target, text = Path(path), page(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


def page(report: CompareReport) -> str:
    """Return the HTML text."""
    name = Path(report.model).name or report.model
    parts = [
        f"<h1>{escape(name)}: accuracy against bits per value</h1>",
        f'<p class="lead">{escape(cells.summary(report))}.</p>',
        f"<figure>{to_svg(report)}</figure>",
        *_model_section(report),
        *_weights_section(report),
        _how_to_read(report),
        _footer(report),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: microscale compare</title><style>{_CSS}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _model_section(report: CompareReport) -> Iterable[str]:
    if report.reference is None:
        return
    order = "KL" if report.reference.task == "causal_lm" else "relative error"
    yield f"<h2>Model output under each recipe, smallest {order} first</h2>"
    yield f'<p class="note">{escape(cells.reference_line(report))}.</p>'
    if report.recipes:
        yield _table(cells.recipe_columns(report), report.recipes)
    for row in report.skipped:
        hint = f" ({escape(row.hint)})" if row.hint else ""
        yield f'<p class="warn">Skipped {escape(row.recipe)}: {escape(row.reason)}{hint}</p>'


def _weights_section(report: CompareReport) -> Iterable[str]:
    if not report.formats:
        return
    yield "<h2>Weights in each format, best SQNR first</h2>"
    yield _table(cells.format_columns(report), report.formats)
    yield from (f'<p class="warn">{escape(line)}.</p>' for line in cells.losses(report))
    yield "<h2>Layer by layer</h2>"
    yield from (_layers(row) for row in report.formats)


def _layers(row: FormatResult) -> str:
    outer = f", outer scale {row.outer_scale}" if row.outer_scale else ""
    facts = f"{row.description}. Element {row.element}, scale {row.scale} per {row.block}{outer}."
    columns: list[Column[LayerError]] = [
        Column("layer", lambda r: r.name, "", left=True),
        Column("values", lambda r: f"{r.values:,}", ""),
        Column("SQNR dB", lambda r: cells.decibel(r.sqnr_db), ""),
        Column("clipped", lambda r: cells.share(r.clipped), ""),
        Column("flushed", lambda r: cells.share(r.flushed), ""),
    ]
    return (
        f'<details><summary>{escape(row.format)}</summary><p class="note">{escape(facts)}</p>'
        f"{_table(columns, row.layers)}</details>"
    )


def _table(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    def cell(tag: str, column: Column[Row], text: str, title: str = "") -> str:
        kind = ' class="left"' if column.left else ""
        hover = f' title="{escape(title)}"' if title else ""
        return f"<{tag}{kind}{hover}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, column.header, column.meaning) for column in columns)
    body = "".join("<tr>" + "".join(cell("td", c, c.cell(row)) for c in columns) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


_GUIDE = """
<h2>How to read this</h2>
<p>In the picture, up is better and left is smaller: a format is worth considering if no other one is above it and to
its left. Weights are measured one by one. Errors of a model's output also depend on how the errors of layers add up,
and they are what counts in the end. Models run in FP32 apart from what a recipe quantizes, a few texts of similar
length at a time; padding counts nowhere.</p>
"""


def _how_to_read(report: CompareReport) -> str:
    columns: list[Column[Any]] = [*cells.recipe_columns(report)] if report.recipes else []
    columns += cells.format_columns(report) if report.formats else []
    terms = {column.header: column.meaning for column in columns}
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in terms.items())
    return f"{_GUIDE}<dl>{rows}</dl>"


def _footer(report: CompareReport) -> str:
    versions = " · ".join(f"{name} {version}" for name, version in report.environment.items())
    return f"<footer>{escape(report.model)}<br>{escape(versions)} · {report.seconds:.0f} s</footer>"
