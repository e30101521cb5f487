"""The picture of a report: accuracy against bits per value, drawn with matplotlib (extra `report`), no display needed.

One panel for the weights (SQNR in dB) and, where a model was run, one for its outputs (KL or relative error). Up is
better in both. Points of one width stand on nearly the same spot, so each group's labels are stacked beside it, in the
order of their points, as far apart as their height needs, and joined to their points by thin lines.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microscale.errors import InputError, MissingDependencyError
from microscale.report.results import CompareReport, FormatResult, RecipeResult, output_error

_INK, _FAINT = "#1f2933", "#cbd2d9"
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe-Ito: told apart by colour-blind eyes
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PANEL = (6.4, 5.4)  # inches
_FONT = 8.5  # points, of the labels
_DOT = {"s": 34, "zorder": 3, "linewidths": 0.6, "edgecolors": "white"}
_BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}  # of a label: grid lines stop at it
_LEADER = {"arrowstyle": "-", "color": "#9aa5b1", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
_LINE = 1.35  # height of a label in units of its font size


@dataclasses.dataclass(frozen=True)
class Point:
    """One mark: `x` bits per value, `y` the quantity drawn, `kind` what colour and marker stand for."""

    name: str
    x: float
    y: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes. `log`: the y axis is logarithmic and small values are on top."""

    title: str
    ylabel: str
    points: tuple[Point, ...]
    log: bool = False
    note: str = ""


def to_png(report: CompareReport, path: str | Path, *, dpi: int = 150) -> Path:
    """Write the picture as PNG and return the path. Raises MissingDependencyError without matplotlib."""
    target = Path(path)
    figure = draw(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=dpi)
    return target


def to_svg(report: CompareReport) -> str:
    """Return the picture as one `<svg>` element whose text stays text. Raises as `draw` does."""
    figure, buffer = draw(report), io.StringIO()
    import matplotlib as mpl

    # A fixed salt and no metadata: the same report gives the same bytes, and no address is in them.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "microscale"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", '<svg role="img" aria-label="accuracy against bits per value"', 1)


def draw(report: CompareReport) -> Any:
    """Return a matplotlib Figure. Raises MissingDependencyError without matplotlib, InputError for an empty report."""
    figure_class = _figure_class()
    panels = _panels(report)
    if not panels:
        raise InputError("the report has nothing to draw", "compare at least one format, or one recipe with inputs")
    height = max(_PANEL[1], 1.8 + max(len(panel.points) for panel in panels) * _LINE * _FONT / 72)
    figure = figure_class(figsize=(_PANEL[0] * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    figure.draw_without_rendering()  # fixes the axes' size, which the labels' distances depend on
    for axes, panel in zip(figure.axes, panels, strict=True):
        _draw_labels(axes, panel)
    return figure


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"drawing the picture needs matplotlib ({error})",
            "pip install 'microscale[report]', or: pip install matplotlib",
        ) from None
    return Figure


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _panels(report: CompareReport) -> list[Panel]:
    made = []
    if report.formats:
        points, exact = [], []
        for row in report.formats:
            if row.sqnr_db_mean is None:
                exact.append(row.format)
            else:
                points.append(Point(row.format, row.stored_bits_per_value, row.sqnr_db_mean, _scale_kind(row)))
        note = f"no error at all: {', '.join(exact)}" if exact else ""
        made.append(Panel("Weights", "SQNR, mean over layers (dB)", tuple(points), note=note))
    if report.recipes:
        kl = report.reference is not None and report.reference.task == "causal_lm"
        label = "KL(p || q) per token (nats, log scale)" if kl else "relative error |y − y0| / |y0| (log scale)"
        rows = [(row, output_error(row)) for row in report.recipes]
        drawn = [Point(r.recipe, r.stored_bits_per_value, e, _operand_kind(r)) for r, e in rows if 0 < e < math.inf]
        left = [r.recipe for r, e in rows if not 0 < e < math.inf]
        note = f"not on a log axis (zero or not finite): {', '.join(left)}" if left else ""
        made.append(Panel("Model output", label, tuple(drawn), log=True, note=note))
    return [panel for panel in made if panel.points]


def _scale_kind(row: FormatResult) -> str:
    return f"scale {row.scale}" + (", outer fp32" if row.outer_scale else "")


def _operand_kind(row: RecipeResult) -> str:
    return "weights only" if row.input is None else "weights and activations"


# -- drawing -----------------------------------------------------------------------------------------------------------


def _draw_panel(axes: Any, panel: Panel) -> None:
    kinds = list(dict.fromkeys(p.kind for p in sorted(panel.points, key=lambda p: p.kind)))
    for i, kind in enumerate(kinds):
        points = [p for p in panel.points if p.kind == kind]
        style = {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        axes.scatter([p.x for p in points], [p.y for p in points], label=kind, **_DOT, **style)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leading_digit(value) in "25" else "")
    axes.set_xlabel("stored bits per value", color=_INK)
    axes.set_ylabel(panel.ylabel, color=_INK)
    axes.set_title(f"{panel.title} (up is better)", loc="left", color=_INK, fontsize=11)
    axes.grid(color=_FAINT, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    _set_heights(axes, panel)
    if panel.note:
        axes.text(0.01, 0.01, panel.note, transform=axes.transAxes, fontsize=7.5, color=_INK, va="bottom")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(2, len(kinds)), frameon=False, fontsize=_FONT
    )


def _leading_digit(value: float) -> str:
    return f"{value:e}"[0]


def _set_heights(axes: Any, panel: Panel) -> None:
    """Leave room above and below, where the labels of a tall group may have to go."""
    low, high = min(p.y for p in panel.points), max(p.y for p in panel.points)
    near = max(sum(abs(p.x - q.x) <= 1 for q in panel.points) for p in panel.points)
    margin = max(0.08, 0.6 * near * _LINE * _FONT / 72 / _PANEL[1])
    if panel.log:
        factor = max(high / low, 10.0) ** margin
        axes.set_ylim(high * factor, low / factor)  # inverted: small errors on top
    else:
        axes.set_ylim(low - margin * max(high - low, 1.0), high + margin * max(high - low, 1.0))


def _draw_labels(axes: Any, panel: Panel) -> None:
    """Write the names beside each group of points, spread so that no two overlap, in pixels of the laid-out axes."""
    scale, box = axes.figure.dpi / 72, axes.get_window_extent()
    line, offset = _LINE * _FONT * scale, 2 * _FONT * scale
    widths = {p: _width(p.name, scale) + line / 2 for p in panel.points}
    left, right = min(p.x for p in panel.points), max(p.x for p in panel.points)
    margin = 0.08 * max(right - left, 1.0)
    used = max(0.3, 1 - (max(widths.values()) + offset) / box.width)  # share of the axes that points may take
    axes.set_xlim(left - margin, left - margin + (max(right - left, 1.0) + margin) / used)
    to_pixels, from_pixels = axes.transData, axes.transData.inverted()
    places = {p: to_pixels.transform((p.x, p.y)) for p in panel.points}
    for group in _groups(places, widths, offset):
        rising = sorted(group, key=lambda p: places[p][1])
        heights = spread([places[p][1] for p in rising], line, box.y0 + line, box.y1 - line / 2)
        column = max(places[p][0] for p in group) + offset
        for point, height in zip(rising, heights, strict=True):
            axes.annotate(
                _short(point.name),
                xy=(point.x, point.y),
                xytext=from_pixels.transform((column, height)),
                va="center",
                fontsize=_FONT,
                color=_INK,
                bbox=_BEHIND,
                arrowprops=_LEADER,
                zorder=4,
            )


def _groups(places: dict[Point, Any], widths: dict[Point, float], offset: float) -> list[list[Point]]:
    """Points whose labels share a column: the next group starts right of where this one's labels end."""
    groups: list[list[Point]] = []
    end = -math.inf
    for point in sorted(places, key=lambda p: places[p][0]):
        if not groups or places[point][0] > end:
            groups.append([])
        groups[-1].append(point)
        end = places[point][0] + offset + max(widths[p] for p in groups[-1])
    return groups


def _width(name: str, scale: float) -> float:
    """A label's width in pixels; `scale` is pixels per point."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), _short(name), size=_FONT).get_extents().width) * scale


def _short(name: str, limit: int = 36) -> str:
    return name if len(name) <= limit else f"{name[: limit - 3]}..."


def spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move rising positions as little as possible so that neighbours are `distance` apart, within [low, high].

    Positions that run into each other form a block centred on their mean, as in isotonic regression; if they do not
    fit between the bounds, they are spaced evenly.
    """
    if len(wanted) > 1 and distance * (len(wanted) - 1) > high - low:
        return [low + i * (high - low) / (len(wanted) - 1) for i in range(len(wanted))]
    blocks: list[tuple[float, int]] = []  # (sum of wanted - own offset, count)
    for i, position in enumerate(wanted):
        total, count = position - i * distance, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    levels = [total / count for total, count in blocks for _ in range(count)]
    top = high - distance * (len(wanted) - 1)
    return [min(max(level, low), top) + i * distance for i, level in enumerate(levels)]
