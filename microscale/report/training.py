"""What runs of training come to: numbers over seeds; pictures, drawn with matplotlib (extra `report`), of loss curves
and of what diagnostics found.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from microscale.errors import InputError
from microscale.nn.diagnostics import Diagnosis
from microscale.report.picture import _COLORS, _FAINT, _FONT, _INK, _figure_class

_PANEL = (6.4, 4.4)  # inches
_DASHES = ("-", "--", ":", "-.")  # colours first, then dashes, so that many curves can be told apart


def over_seeds(rows: Iterable[Mapping[str, Any]], value: str, by: Sequence[str] = ("recipe",)) -> list[dict[str, Any]]:
    """Return what rows that differ by their `seed` come to: one row for each value of the keys `by`, in their order.

    Args:
        rows: with `seed`, the keys of `by`, the number `value` (None: not finite) and `ratio_to_bf16`, that number
            against bf16's of the same seed (None or missing: there is none).
        value: the number's key.
        by: what rows have in common that belong together.

    Returns:
        Rows of the keys `by`, `seeds` (how many), `not_finite` (how many of them have no number), `mean` and `std` of
        the others, `ratio` (the mean of the ratios) and `ratio_se` (its standard error). Two seeds at least make a
        `std` or a standard error, else it is None. Pairing takes out what seeds have in common, so the ratio is known
        better than the means are.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    made = []
    for key, group in groups.items():
        found = [row[value] for row in group if row[value] is not None]
        ratios = [row["ratio_to_bf16"] for row in group if row.get("ratio_to_bf16") is not None]
        error = _spread(ratios)
        made.append(
            dict(zip(by, key, strict=True))
            | {"seeds": len(group), "not_finite": len(group) - len(found)}
            | {"mean": _mean(found), "std": _spread(found), "ratio": _mean(ratios)}
            | {"ratio_se": None if error is None else error / math.sqrt(len(ratios))}
        )
    return made


def over_seeds_text(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return a row of `over_seeds` as text: `mean ± std`, and by how many percent it differs from bf16, ± its error."""
    if row["mean"] is None:
        return "not finite", ""
    mean = f"{row['mean']:.4f}" + ("" if row["std"] is None else f" ± {row['std']:.4f}")
    if row["not_finite"]:
        mean += f" ({row['not_finite']} not finite)"
    if row["ratio"] is None:
        return mean, ""
    error = "" if row["ratio_se"] is None else f" ± {100 * row['ratio_se']:.2f}"
    return mean, f"{100 * (row['ratio'] - 1):+.2f}{error} %"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def losses_to_png(runs: Sequence[Mapping[str, Any]], path: str | Path, *, dpi: int = 150) -> Path:
    """Draw the loss curves of `examples/tiny_lm.py` runs, seeds averaged, and write them as PNG; return the path.

    Left the training loss, right the held-out loss against the first recipe's, in percent, where steps are shared.
    Raises MissingDependencyError without matplotlib, InputError for no runs.
    """
    if not runs:
        raise InputError("there are no runs to draw", "train at least one recipe")
    losses, held_out = _by_recipe(runs, "losses"), _by_recipe(runs, "held_out")
    first, *others = held_out
    figure, axes = _panels(2 if others else 1)
    for i, (name, curve) in enumerate(losses.items()):
        axes[0].plot(list(curve), list(curve.values()), label=name, **_style(i))
    _finish(axes[0], "Training loss", "nats per byte, log scale")
    _log(axes[0])
    base = held_out[first]
    for i, name in enumerate(others, 1):
        points = {step: 100 * (loss / base[step] - 1) for step, loss in held_out[name].items() if base.get(step)}
        axes[1].plot(list(points), list(points.values()), label=name, marker=".", **_style(i))
    if others:
        axes[1].axhline(0, **_style(0))
        _finish(axes[1], f"Held-out loss against {first}", "percent above (down is better)")
    return _save(figure, path, dpi)


def diagnostics_to_png(rows: Iterable[Diagnosis], path: str | Path, *, dpi: int = 150) -> Path:
    """Draw what `microscale.nn.diagnose` found over the steps and write it as PNG; return the path.

    Four panels: SQNR in dB, underflow and clipped shares in percent, amax. A line is the median over layers of one
    operand in one GEMM, the band around it reaches from the least to the greatest layer. Raises
    MissingDependencyError without matplotlib, InputError for no rows.
    """
    found = list(rows)
    if not found:
        raise InputError("there is nothing to draw: no step was observed", "observe more steps: diagnose(every=...)")
    figure, axes = _panels(2, 2)
    operands = list(dict.fromkeys(f"{row.gemm} {row.operand}" for row in found))
    panels: tuple[tuple[str, str, Callable[[Diagnosis], float | None], bool], ...] = (
        ("SQNR", "dB (up is better)", lambda row: row.sqnr_db, False),
        ("Underflow", "percent of nonzero values", lambda row: 100 * row.underflow, False),
        ("Clipped", "percent of values", lambda row: 100 * row.clipped, False),
        ("Largest magnitude", "log scale", lambda row: row.amax or None, True),
    )
    for panel, (title, label, value, log) in zip(axes, panels, strict=True):
        for i, operand in enumerate(operands):
            by_step: dict[int, list[float]] = {}
            for row in found:
                number = value(row)
                if f"{row.gemm} {row.operand}" == operand and number is not None and math.isfinite(number):
                    by_step.setdefault(row.step, []).append(number)
            steps = sorted(by_step)
            middle = [sorted(by_step[s])[len(by_step[s]) // 2] for s in steps]
            panel.plot(steps, middle, label=operand, marker=".", **_style(i))
            low, high = ([pick(by_step[s]) for s in steps] for pick in (min, max))
            panel.fill_between(steps, low, high, alpha=0.12, linewidth=0, color=_style(i)["color"])
        if log:
            _log(panel)
        _finish(panel, title, label)
    return _save(figure, path, dpi)


def _by_recipe(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """Mean over seeds at every step that some run has a finite value for."""
    sums: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        curve = sums.setdefault(str(run["recipe"]), {})
        for step, value in run[key]:
            if value is not None:
                curve.setdefault(step, []).append(value)
    return {name: {s: sum(v) / len(v) for s, v in sorted(curve.items())} for name, curve in sums.items()}


def _panels(columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    size = (_PANEL[0] * columns, _PANEL[1] * rows)
    figure = _figure_class()(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _style(i: int) -> dict[str, Any]:
    dash = _DASHES[i // len(_COLORS) % len(_DASHES)]
    return {"color": _COLORS[i % len(_COLORS)], "linestyle": dash, "linewidth": 1.2}


def _log(axes: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, however short it is."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    shown = "123456789" if high < 10 * low else "25" if high < 1000 * low else ""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else "")


def _finish(axes: Any, title: str, ylabel: str) -> None:
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.grid(color=_FAINT, linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: str | Path, dpi: int) -> Path:
    """One legend for all panels, below them."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=min(4, len(named)), frameon=False,
        fontsize=_FONT,
    )  # fmt: skip
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=dpi)
    return target
