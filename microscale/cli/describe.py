"""Formats and recipes as plain data and as text, for `formats`, `recipes` and the tables of the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec, OuterScaleSpec
from microscale.spec.recipe import RecipeSpec, Rule

FORMAT_COLUMNS = ("name", "element", "block", "scale", "rule", "outer", "bits/value", "description")
RECIPE_COLUMNS = ("name", "weight", "input", "description")
_VALUES_PER_LINE = 8


def outer_text(outer: OuterScaleSpec | None) -> str:
    """Return "fp32 per tensor", or "none"."""
    return "none" if outer is None else f"{outer.dtype} per {outer.per}"


def format_row(spec: FormatSpec) -> tuple[str, ...]:
    """Return one row under `FORMAT_COLUMNS`."""
    return (
        spec.name,
        spec.element.name,
        spec.block_text,
        spec.scale.name,
        spec.scale_rule.name,
        outer_text(spec.outer_scale),
        f"{spec.bits_per_value:g}",
        spec.description,
    )


def element_data(element: ElementSpec) -> dict[str, Any]:
    """Return an element's fields and what follows from them; `values` lists every code of a narrow one."""
    data = {k: v for k, v in element.identity().items() if v is not None}
    data |= {"description": element.description, "bits": element.width, "max": element.max_value}
    if element.width <= 8:
        data["values"] = list(element.table)
    return data


def format_data(spec: FormatSpec, *, values: bool = False) -> dict[str, Any]:
    """Return a format as JSON data: its fields, and what is derived from them."""
    outer = spec.outer_scale
    element, scale = element_data(spec.element), element_data(spec.scale)
    if not values:
        element.pop("values", None)
    scale.pop("values", None)
    return {
        "name": spec.name,
        "description": spec.description,
        "element": element,
        "block": spec.identity()["block"],
        "scale": scale,
        "scale_rule": spec.scale_rule.identity(),
        "outer_scale": None if outer is None else {**outer.identity(), "scale_max": spec.scale_max},
        "bits_per_value": spec.bits_per_value,
        "block_bytes": spec.block_bytes or None,
        "references": list(spec.references),
    }


def element_text(element: ElementSpec) -> str:
    """Return an element in one line."""
    if element.kind == "float":
        parts = f"{'1 sign + ' if element.sign else ''}{element.exponent} exponent + {element.mantissa} mantissa bits"
        nan = {"none": "no NaN", "all_ones": "NaN all ones", "ieee": "NaN as in IEEE 754"}[element.nan]
        parts += f", bias {element.bias}, {nan}, {'infinity' if element.inf else 'no infinity'}"
    elif element.kind == "int":
        parts = f"{element.width} bits, {element.fraction} of them right of the binary point"
    else:
        parts = f"table of {len(element.table)} values"
    return f"{element.name}: {element.kind}, {parts}, max {element.max_value:g}"


def format_text(spec: FormatSpec) -> Iterator[str]:
    """Yield the lines of `microscale formats NAME`."""
    rule = spec.scale_rule
    search = f": best of {', '.join(f'{c:g}' for c in rule.candidates)} by {rule.metric}" if rule.candidates else ""
    outer = outer_text(spec.outer_scale)
    if spec.outer_scale is not None:
        outer += f", the largest block scale is {spec.scale_max:g}"
    yield f"{spec.name}  {spec.description}".rstrip()
    yield f"  element      {element_text(spec.element)}"
    size = f", {spec.block_bytes} bytes of codes" if spec.block_bytes else ", however long"
    yield f"  block        {spec.block_text} along one axis{size}"
    yield f"  scale        {element_text(spec.scale)}"
    yield f"  scale rule   {rule.name}{search}"
    yield f"  outer scale  {outer}"
    yield f"  bits/value   {spec.bits_per_value:g}"
    if spec.references:
        yield f"  references   {'; '.join(spec.references)}"
    yield "  values of the element's codes:"
    table, digits = spec.element.table, 2 if spec.element.width > 4 else 1
    width = max(len(f"{v:g}") for v in table)
    for start in range(0, len(table), _VALUES_PER_LINE):
        row = " ".join(f"{v:>{width}g}" for v in table[start : start + _VALUES_PER_LINE])
        yield f"    0x{start:0{digits}X}  {row}"


def operand_names(recipe: RecipeSpec, operand: str) -> str:
    """Return the quantizers that the recipe's fprop rules give one operand, or "high precision"."""
    found = [recipe.quantizer(rule.fprop, operand) for rule in recipe.rules]
    return ", ".join(dict.fromkeys(q.name for q in found if q is not None)) or "high precision"


def recipe_row(recipe: RecipeSpec) -> tuple[str, ...]:
    """Return one row under `RECIPE_COLUMNS`."""
    return recipe.name, operand_names(recipe, "weight"), operand_names(recipe, "input"), recipe.description


def recipe_data(recipe: RecipeSpec) -> dict[str, Any]:
    """Return a recipe as JSON data: quantizers in full, rules in order."""
    return {
        **recipe.identity(),
        "description": recipe.description,
        "references": list(recipe.references),
        "training": recipe.is_training,
    }


def recipe_text(recipe: RecipeSpec) -> Iterator[str]:
    """Yield the lines of `microscale recipes NAME`."""
    yield f"{recipe.name}  {recipe.description}".rstrip()
    yield "  quantizers"
    width = max(len(name) for name in recipe.quantizers)
    for name, quantizer in recipe.quantizers.items():
        yield f"    {name:<{width}}  {quantizer.name}"
    yield "  rules, the first match wins; what no rule matches stays in high precision"
    for i, rule in enumerate(recipe.rules):
        yield f"    {i}  {_rule_text(rule)}"
    if recipe.random_signs:
        yield f"  Hadamard signs from the seed: {', '.join(recipe.random_signs)}"
    if recipe.main_grad is not None:
        yield f"  weight gradients are added to main_grad in {recipe.main_grad}"
    if recipe.schedule is not None:
        yield f"  high precision from {recipe.schedule.high_precision_from:g} of training on"
    if recipe.inference is not None:
        yield f"  afterwards quantized by {recipe.inference}"


def _rule_text(rule: Rule) -> str:
    action = "keep in high precision"
    if rule.keep is None:
        gemms = (
            f"{name} {', '.join(f'{k}={v}' for k, v in gemm.operands().items())}" for name, gemm in rule.gemms().items()
        )
        action = "; ".join(gemms)
    types = "" if rule.types == ("linear",) else f" ({', '.join(rule.types)})"
    where = f", last {rule.last:g} of the blocks" if rule.last is not None else ""
    saved = f", saves {rule.save}" if rule.save is not None else ""
    return f"{' '.join(rule.match)}{types}{where}: {action}{saved}{' (optional)' if rule.optional else ''}"
