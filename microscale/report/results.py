"""The records that `compare` returns: plain frozen dataclasses, JSON in both directions.

Every number has its unit in its name or its docstring. Shares are fractions of 1. JSON has no infinity and no NaN, so
None stands for both: a level in dB is None where there is no error to speak of (an all-zero layer, or a format that
holds every value exactly), and a cosine or an error of outputs is None where the model gave NaN or infinity.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch


@dataclasses.dataclass(frozen=True)
class LayerError:
    """One weight in one format. `clipped` is a share of all values, `flushed` a share of the nonzero ones."""

    name: str
    values: int
    sqnr_db: float | None
    clipped: float
    flushed: float
    lost: int = 0


@dataclasses.dataclass(frozen=True)
class FormatResult:
    """All quantized weights in one format.

    bits_per_value         of the format: the code and its share of the block scale
    stored_bits_per_value  measured: every stored byte, padding and outer scales included
    layer_bytes            of the quantized layers; `model_bytes` adds everything that stays as it is
    sqnr_db_mean           mean of the layers' SQNR in dB; `sqnr_db_overall` is of all values taken together
    clipped                share of values beyond what their block's scale reaches, by more than half of the last step
    flushed                share of nonzero values that became zero
    lost                   values that were finite and are not any more (they share a block with a NaN or an infinity)
    """

    format: str
    description: str
    element: str
    block: int | str  # "row": one scale for each row
    scale: str
    outer_scale: str | None
    bits_per_value: float
    stored_bits_per_value: float
    layer_bytes: int
    model_bytes: int
    sqnr_db_mean: float | None
    sqnr_db_overall: float | None
    sqnr_db_worst: float | None
    worst_layer: str
    clipped: float
    flushed: float
    lost: int
    seconds: float
    layers: tuple[LayerError, ...]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The unquantized model that the recipes are held against.

    `task` is "encoder" or "causal_lm"; `output` says what is compared. `perplexity` is None for an encoder.
    """

    architecture: str
    task: str
    output: str
    dtype: str
    texts: int
    tokens: int
    truncated: int
    perplexity: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class RecipeResult:
    """The model under one recipe, against the unquantized one.

    cosine_mean, cosine_worst   of a text's outputs, all its tokens as one vector; mean and worst over texts
    worst_text                  index of that worst text
    relative_error              |y - y0| / |y0| of a text's outputs, mean over texts
    kl                          causal LM: mean KL(p || q) per token in nats, p the unquantized model's distribution
    perplexity                  causal LM: exp of the mean cross entropy per predicted token
    stored_bits_per_value       of the quantized weights, from the plan's bytes
    """

    recipe: str
    description: str
    weight: str
    input: str | None
    layers: int
    stored_bits_per_value: float
    layer_bytes: int
    model_bytes: int
    cosine_mean: float | None
    cosine_worst: float | None
    worst_text: int
    relative_error: float | None
    kl: float | None
    perplexity: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class SkippedRecipe:
    """A recipe that was not run, and why."""

    recipe: str
    reason: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class CompareReport:
    """What `compare` found. Formats and recipes are ranked, best first.

    `layers` weights with `values` values are quantized, `source_layer_bytes` large as stored in the checkpoint;
    `other_bytes` stay as they are. `reference`, `recipes` and `skipped` are empty without input texts.
    """

    model: str
    layers: int
    values: int
    source_layer_bytes: int
    other_bytes: int
    formats: tuple[FormatResult, ...]
    reference: Reference | None = None
    recipes: tuple[RecipeResult, ...] = ()
    skipped: tuple[SkippedRecipe, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def source_bytes(self) -> int:
        """Bytes of the whole checkpoint as it is stored."""
        return self.source_layer_bytes + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` takes; `from_dict` is the inverse."""
        return dict(_plain(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a report from `to_dict()`, for instance to render a saved one again."""
        made = dict(data)
        made["formats"] = tuple(
            FormatResult(**{**f, "layers": tuple(LayerError(**row) for row in f["layers"])}) for f in data["formats"]
        )
        made["recipes"] = tuple(RecipeResult(**r) for r in data["recipes"])
        made["skipped"] = tuple(SkippedRecipe(**s) for s in data["skipped"])
        made["reference"] = None if data["reference"] is None else Reference(**data["reference"])
        return cls(**made)


def _plain(value: Any) -> Any:
    """Tuples to lists, so that the data equals what JSON gives back."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def rank_formats(results: Iterable[FormatResult]) -> tuple[FormatResult, ...]:
    """Order by mean SQNR, best first; fewer bits first where it is equal."""
    return tuple(sorted(results, key=lambda r: (-decibels(r.sqnr_db_mean), r.stored_bits_per_value, r.format)))


def rank_recipes(results: Iterable[RecipeResult]) -> tuple[RecipeResult, ...]:
    """Order by KL (causal LM) or relative error (encoder), best first."""
    return tuple(sorted(results, key=lambda r: (output_error(r), r.stored_bits_per_value, r.recipe)))


def decibels(level: float | None) -> float:
    """Return a level for sorting: None, no error at all, is above every number."""
    return math.inf if level is None else level


def output_error(result: RecipeResult) -> float:
    """Return the error that ranks a recipe: KL, or else the relative error; a model that gives NaN is last."""
    if result.relative_error is None:
        return math.inf
    return result.relative_error if result.kl is None else result.kl


def environment(*packages: str) -> dict[str, str]:
    """Return versions and machine, for the foot of a report. `packages` are added where they are installed."""
    found = {}
    for name in ("microscale", "torch", *packages):
        try:
            found[name] = torch.__version__ if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    return {**found, "python": sys.version.split()[0], "machine": machine}
