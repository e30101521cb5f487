"""The records of a plan: a layer without its data, what happens to it, and the whole, with totals, tables and JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch

from microscale.errors import InputError
from microscale.spec.match import matches
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.recipe import RecipeSpec

LayerKind = Literal["linear", "embedding"]
Use = tuple[str, LayerKind]
"""A module that uses a weight: its full name and what kind of layer it is."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight of a model, without its data.

    `dtype` is a torch dtype's name ("bfloat16"). `sharers` are the other modules that use the same parameter (tied
    weights, modules reachable by several names). `fixed` says why the weight has to stay as it is (empty: it can be
    quantized); `stored_bytes` overrides what shape and dtype say, for weights that are quantized already.
    """

    name: str
    type: LayerKind
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    sharers: tuple[Use, ...] = ()
    fixed: str = ""
    stored_bytes: int | None = None

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every module that uses this weight, the layer's own first."""
        return ((self.name, self.type), *self.sharers)

    @property
    def bytes(self) -> int:
        """Bytes of the weight as it is now. Raises InputError if `dtype` is no torch dtype."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise InputError(f"{self.dtype!r} is no torch dtype", "write it as torch does: bfloat16, float32")
        return math.prod(self.shape) * found.itemsize


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer. `weight` and `input` are None where that operand stays in high precision.

    `rule` is the index of the recipe's rule that decides the layer (None: no rule names it). `reason` says why a layer
    stays in high precision; it is empty for a layer that is quantized.
    """

    layer: Layer
    rule: int | None
    weight: QuantizerSpec | None
    input: QuantizerSpec | None
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def is_quantized(self) -> bool:
        """True if some operand of this layer is quantized."""
        return self.weight is not None or self.input is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; quantizers appear by their short name."""
        return {
            "name": self.layer.name,
            "type": self.layer.type,
            "parameter": self.layer.parameter,
            "shape": list(self.layer.shape),
            "dtype": self.layer.dtype,
            "shared_with": [list(use) for use in self.layer.sharers],
            "rule": self.rule,
            "weight": self.weight.name if self.weight is not None else None,
            "input": self.input.name if self.input is not None else None,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of a plan that are treated alike: the same type, rule, quantizers and reason."""

    type: LayerKind
    rule: int | None
    weight: QuantizerSpec | None
    input: QuantizerSpec | None
    reason: str
    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe does to a whole model. `str(plan)` is a table, `summary()` a short one.

    `other_bytes` counts the tensors that are no layer's weight: biases, norms, buffers, modules of other kinds.
    """

    recipe: RecipeSpec
    layers: tuple[LayerPlan, ...]
    other_bytes: int = 0

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The layers of which some operand is quantized."""
        return tuple(row for row in self.layers if row.is_quantized)

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole model as it is: every layer and `other_bytes`."""
        return sum(row.bytes_before for row in self.layers) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole model once the plan is carried out."""
        return sum(row.bytes_after for row in self.layers) + self.other_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What is allowed but worth knowing: rules that match layers, all of which earlier rules take."""
        uses = [use for row in self.layers for use in row.layer.uses]
        decided = {rule_index(self.recipe, use) for use in uses}
        return tuple(
            f"{rule_text(self.recipe, i)} decides no layer: earlier rules take all that it matches"
            for i, rule in enumerate(self.recipe.rules)
            if i not in decided and any(rule.applies(*use) for use in uses)
        )

    def groups(self) -> tuple[Group, ...]:
        """Return the layers grouped by type, rule, quantizers and reason, in order of first appearance."""
        found: dict[tuple[Any, ...], list[LayerPlan]] = {}
        for row in self.layers:
            found.setdefault((row.layer.type, row.rule, row.weight, row.input, row.reason), []).append(row)
        groups = []
        for rows in found.values():
            before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
            first, names = rows[0], tuple(row.layer.name for row in rows)
            kind = (first.layer.type, first.rule, first.weight, first.input, first.reason)
            groups.append(Group(*kind, names, before, after))
        return tuple(groups)

    def summary(self) -> str:
        """Return one line per group of layers treated alike, and the totals."""
        rows = [("layers", "type", "rule", "weight", "input", "bytes", "")]
        for group in self.groups():
            rule = "-" if group.rule is None else rule_text(self.recipe, group.rule)
            formats, size = _formats(group), change_text(group.bytes_before, group.bytes_after)
            rows.append((str(len(group.layers)), group.type, rule, *formats, size, group.reason))
        return "\n".join([*_aligned(rows), *self._footer()])

    def __str__(self) -> str:
        """Render one line per layer and the totals."""
        rows = [("layer", "type", "shape", "rule", "weight", "input", "bytes", "")]
        for row in self.layers:
            rule = "-" if row.rule is None else rule_text(self.recipe, row.rule, row.layer.name)
            shape, size = "x".join(map(str, row.layer.shape)), change_text(row.bytes_before, row.bytes_after)
            shared = ", ".join(name for name, _ in row.layer.sharers)
            remark = row.reason or (f"shared with {shared}" if shared else "")
            rows.append((row.layer.name or "(the model)", row.layer.type, shape, rule, *_formats(row), size, remark))
        return "\n".join([*_aligned(rows), *self._footer()])

    def _footer(self) -> list[str]:
        before, after = self.bytes_before, self.bytes_after
        ratio = f", {before / after:.2f}x smaller" if 0 < after < before else ""
        total = (
            f"{self.recipe.name}: {len(self.quantized)} of {len(self.layers)} layers quantized; "
            f"{change_text(before, after)}{ratio} ({size_text(self.other_bytes)} in other tensors)"
        )
        return [total, *(f"note: {note}" for note in self.notes)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` rebuilds the plan from it."""
        return {
            "recipe": self.recipe.name,
            "definition": self.recipe.identity(),
            "layers": [row.to_dict() for row in self.layers],
            "layers_quantized": len(self.quantized),
            "other_bytes": self.other_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild a plan from `to_dict` data, also after JSON. The recipe's prose is not part of that data."""
        recipe = RecipeSpec.model_validate(data["definition"])
        rows = []
        for item in data["layers"]:
            sharers = tuple((name, kind) for name, kind in item["shared_with"])
            layer = Layer(
                item["name"], item["type"], item["parameter"], tuple(item["shape"]), item["dtype"], sharers,
                stored_bytes=item["bytes_before"],
            )  # fmt: skip
            weight = quantizer_of(recipe, layer, "weight") if item["weight"] is not None else None
            inputs = quantizer_of(recipe, layer, "input") if item["input"] is not None else None
            sizes = (item["bytes_before"], item["bytes_after"])
            rows.append(LayerPlan(layer, item["rule"], weight, inputs, item["reason"], *sizes))
        return cls(recipe, tuple(rows), data["other_bytes"])


# -- what a recipe says of a use of a weight ---------------------------------------------------------------------------


def rule_index(recipe: RecipeSpec, use: Use) -> int | None:
    """Return the index of the rule that decides a module, or None."""
    rule = recipe.rule_for(*use)
    return None if rule is None else recipe.rules.index(rule)


def rule_text(recipe: RecipeSpec, index: int, name: str | None = None) -> str:
    """Return "rules[1] '*'": the index, and the pattern that matches `name` (None: all of the rule's patterns)."""
    patterns = [p for p in recipe.rules[index].match if name is None or matches((p,), name)]
    shown = patterns if name is None else patterns[:1]
    return f"rules[{index}] {' '.join(repr(p) for p in shown)}".rstrip()


def quantizer_of(recipe: RecipeSpec, layer: Layer, operand: Literal["weight", "input"]) -> QuantizerSpec | None:
    """Return the quantizer of a layer's fprop operand, None for high precision.

    The indices that an embedding takes are no operand: the input is that of the first linear use of the weight.
    """
    use = next((use for use in layer.uses if operand == "weight" or use[1] == "linear"), None)
    return None if use is None else quantizer_of_use(recipe, use, operand)


def quantizer_of_use(recipe: RecipeSpec, use: Use, operand: Literal["weight", "input"]) -> QuantizerSpec | None:
    """Return what the deciding rule says of one operand in one module."""
    rule = recipe.rule_for(*use)
    if rule is None or (operand == "input" and use[1] == "embedding"):
        return None
    return recipe.quantizer(rule.fprop, operand)


# -- text --------------------------------------------------------------------------------------------------------------


def size_text(count: int) -> str:
    """Return a number of bytes in decimal units: 812 B, 1.18 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def change_text(before: int, after: int) -> str:
    """Return "1.18 MB -> 0.33 MB", or one size where nothing changes."""
    return size_text(before) if before == after else f"{size_text(before)} -> {size_text(after)}"


def _formats(row: LayerPlan | Group) -> tuple[str, str]:
    return ("-" if row.weight is None else row.weight.name, "-" if row.input is None else row.input.name)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
