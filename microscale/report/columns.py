"""The columns of a report's tables, shared by text and HTML: header, cell text, meaning, what narrow terminals keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

from microscale.report.results import CompareReport, FormatResult, RecipeResult

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Column(Generic[Row]):
    """One column. `rank`: where width is short, the columns with the highest rank go first; 0 always stays."""

    header: str
    cell: Callable[[Row], str]
    meaning: str
    rank: int = 0
    left: bool = False


_SQNR = "signal to quantization noise, 10 log10(sum x² / sum (x - x̂)²), mean over layers; 6 dB more halves the error"
_CLIPPED = "values beyond the reach of their block's scale by more than half of the element's last step"
_KL = "KL(p || q) per token, p and q the next-token distributions of the unquantized and the quantized model"


def format_columns(report: CompareReport) -> list[Column[FormatResult]]:
    """Return the columns of the weights table."""
    unit, size = byte_unit(report.source_bytes)
    return [
        Column("format", lambda r: r.format, "a format's name, or a variant's", left=True),
        Column(
            "bits/value", lambda r: number(r.stored_bits_per_value, 3), "stored bits per quantized weight, with scales"
        ),
        Column(f"layers {unit}", lambda r: size(r.layer_bytes), "the quantized layers", rank=4),
        Column(f"model {unit}", lambda r: size(r.model_bytes), "the whole checkpoint once quantized", rank=2),
        Column("SQNR dB", lambda r: decibel(r.sqnr_db_mean), _SQNR),
        Column("overall dB", lambda r: decibel(r.sqnr_db_overall), "SQNR of all layers' values together", rank=5),
        Column("worst dB", lambda r: decibel(r.sqnr_db_worst), "the lowest SQNR of a layer", rank=1),
        Column("worst layer", lambda r: r.worst_layer, "the layer that has it", rank=6, left=True),
        Column("clipped", lambda r: share(r.clipped), _CLIPPED, rank=3),
        Column("flushed", lambda r: share(r.flushed), "nonzero values that became zero", rank=3),
    ]


def recipe_columns(report: CompareReport) -> list[Column[RecipeResult]]:
    """Return the columns of the model table; KL and perplexity only for a causal language model."""
    unit, size = byte_unit(report.source_bytes)
    columns: list[Column[RecipeResult]] = [
        Column("recipe", lambda r: r.recipe, "a recipe's name", left=True),
        Column("weights", lambda r: r.weight, "format of the weights", rank=5, left=True),
        Column(
            "activations", lambda r: r.input or "-", "format of the activations; - is unquantized", rank=6, left=True
        ),
        Column(
            "bits/value",
            lambda r: number(r.stored_bits_per_value, 3),
            "stored bits per quantized weight, with scales",
            rank=1,
        ),
        Column(f"model {unit}", lambda r: size(r.model_bytes), "the whole checkpoint once quantized", rank=3),
    ]
    if report.reference is not None and report.reference.task == "causal_lm":
        columns += [
            Column("KL nats", lambda r: number(r.kl, 5), _KL),
            Column("perplexity", lambda r: number(r.perplexity, 3), "exp of the mean cross entropy of the next token"),
        ]
    return [
        *columns,
        Column(
            "cosine", lambda r: number(r.cosine_mean, 5), "of a text's outputs as one vector, mean over texts", rank=2
        ),
        Column("worst cosine", lambda r: number(r.cosine_worst, 5), "of the text that suffers most", rank=3),
        Column(
            "rel. error", lambda r: number(r.relative_error, 4), "|y - y0| / |y0| of a text's outputs, mean over texts"
        ),
        Column("seconds", lambda r: number(r.seconds, 1), "to quantize and to run, on this machine", rank=7),
    ]


# -- cells -------------------------------------------------------------------------------------------------------------


def byte_unit(total: int) -> tuple[str, Callable[[int], str]]:
    """Return GB for what is at least 1 GB in all, else MB, and how to write bytes in it."""
    name, factor = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    return name, lambda count: f"{count / factor:.3f}" if count < 1000 * factor else f"{count / factor:.1f}"


def number(value: float | None, digits: int) -> str:
    """Fixed digits; scientific where they would show only zeros; "nan" for a value that was not finite."""
    if value is None:
        return "nan"
    small = value != 0 and abs(value) < 10.0**-digits
    return f"{value:.1e}" if small or abs(value) >= 1e7 else f"{value:.{digits}f}"


def decibel(value: float | None) -> str:
    """One hundredth of a dB; "exact" where nothing was lost."""
    return "exact" if value is None else f"{value:.2f}"


def share(value: float) -> str:
    """A share of 1 in percent."""
    percent = 100 * value
    if percent == 0:
        return "0 %"
    return f"{percent:.2f} %" if percent >= 0.01 else f"{percent:.0e} %".replace("e-0", "e-")


def summary(report: CompareReport) -> str:
    """One line on what was measured."""
    unit, size = byte_unit(report.source_bytes)
    return (
        f"{report.layers} weights, {report.values / 1e6:.2f} M values, {size(report.source_layer_bytes)} of the "
        f"checkpoint's {size(report.source_bytes)} {unit}; the other {size(report.other_bytes)} {unit} stay as they are"
    )


def reference_line(report: CompareReport) -> str:
    """One line on the run that recipes are held against, or an empty string."""
    ref = report.reference
    if ref is None:
        return ""
    cut = f", {ref.truncated} of them cut" if ref.truncated else ""
    perplexity = f", perplexity {number(ref.perplexity, 3)}" if ref.perplexity is not None else ""
    what = f"{ref.output} over all attended tokens"
    return f"{ref.architecture} in {ref.dtype} on {ref.texts} texts{cut}, {ref.tokens} tokens: {what}{perplexity}"


def losses(report: CompareReport) -> list[str]:
    """Warnings: formats in which finite values were lost to a NaN or infinity in their block."""
    return [
        f"{row.format}: {row.lost} finite values share a block with a NaN or infinity and are lost"
        for row in report.formats
        if row.lost
    ]
