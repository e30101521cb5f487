"""What a recipe would do to a model, layer by layer, before anything is touched.

A `Layer` describes one weight without its data, so the same planner serves modules (on the meta device too) and
checkpoints that are never loaded. The first rule that matches a layer decides it. A layer that no rule names, or that
cannot be quantized, stays in high precision and its row says why. A weight that several modules use is one row, and is
quantized only if the recipe treats all of them alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from microscale.errors import InputError, RecipeError, did_you_mean
from microscale.nn.records import (
    Group,
    Layer,
    LayerKind,
    LayerPlan,
    Plan,
    quantizer_of,
    quantizer_of_use,
    rule_index,
    rule_text,
)
from microscale.ops.api import INPUT_DTYPES
from microscale.spec.match import matches
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.recipe import RecipeSpec, Rule
from microscale.spec.registry import RecipeLike, find_recipe, list_recipes

__all__ = ["Group", "Layer", "LayerKind", "LayerPlan", "Plan", "Progress", "make_plan", "plan", "quantized_bytes"]

Progress = Callable[[int, int, str], None]
"""Called after each layer with (layers done, layers in all, name of the layer just done)."""


_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)


def plan(model: torch.nn.Module | str | Path, recipe: RecipeLike) -> Plan:
    """Return what `recipe` would do to a module or to a checkpoint (a folder or one safetensors file); touches nothing.

    A module may live on the meta device; a checkpoint is planned from its headers alone. Raises RecipeError as
    `make_plan` does, CheckpointError for a path that is no checkpoint, InputError for anything else.
    """
    if isinstance(model, torch.nn.Module):
        from microscale.nn.discover import describe

        layers, other_bytes = describe(model)
    elif isinstance(model, str | Path):
        from microscale.interop.checkpoint import Checkpoint

        layers, other_bytes = Checkpoint(Path(model)).describe()
    else:
        raise InputError(f"cannot plan a {type(model).__name__}", "pass an nn.Module, or the path of a checkpoint")
    return make_plan(layers, recipe, other_bytes)


def make_plan(layers: Iterable[Layer], recipe: RecipeLike, other_bytes: int = 0) -> Plan:
    """Decide every layer by a recipe. `other_bytes`: bytes of the model's tensors that are no layer's weight.

    Raises RecipeError for a training recipe, for quantizers that mean nothing in inference, for a non-optional rule
    that matches no layer, and for a recipe that quantizes nothing here; SpecError as `find_recipe` does.
    """
    spec, found = find_recipe(recipe), tuple(layers)
    _check_inference(spec)
    _check_rules(spec, found)
    made = Plan(spec, tuple(_decide(layer, spec) for layer in found), other_bytes)
    if not made.quantized:
        hint = (
            "recipes reach the weights of nn.Linear and GroupedLinear, "
            "and of nn.Embedding where a rule says `types: [embedding]`"
        )
        if any(layer.stored_bytes for layer in found):
            hint = "start again from the high-precision model to quantize by another recipe"
        raise RecipeError(f"recipe {spec.name!r} quantizes nothing here: {_why_nothing(made)}", hint)
    return made


def quantized_bytes(shape: tuple[int, ...], quantizer: QuantizerSpec, *, by_expert: bool = False) -> int:
    """Return the bytes stored for a tensor of `shape` blocked along its last axis: codes, scales and outer scales.

    `by_expert`: each matrix [..., E, N, K] has an outer scale of its own where the format has one for a tensor.
    """
    columns = shape[-1] if shape else 1
    fmt = quantizer.format.for_row(columns)
    rows, blocks = math.prod(shape[:-1]), -(-columns // fmt.block)
    outer = 0
    if fmt.outer_scale is not None:
        each = math.prod(shape[:-2])
        outer = {"tensor": each if by_expert else 1, "row": rows, "expert": each}[fmt.outer_scale.per]
    return rows * blocks * (fmt.block_bytes + -(-fmt.scale.width // 8)) + 4 * outer


# -- deciding ----------------------------------------------------------------------------------------------------------


def _decide(layer: Layer, recipe: RecipeSpec) -> LayerPlan:
    index, before = rule_index(recipe, (layer.name, layer.type)), layer.bytes
    weight, inputs = quantizer_of(recipe, layer, "weight"), quantizer_of(recipe, layer, "input")
    reason = layer.fixed or _conflict(layer, recipe, weight, inputs) or _obstacle(layer, weight)
    if not reason and weight is None and inputs is None:
        reason = "no rule names it"
        if index is not None:
            kept = recipe.rules[index].keep is not None
            reason = "kept in high precision" if kept else f"the rule quantizes no operand of an {layer.type}"
    if reason:
        return LayerPlan(layer, index, None, None, reason, before, before)
    by_expert = len(layer.shape) == 3  # [E, N, K]
    after = before if weight is None else quantized_bytes(layer.shape, weight, by_expert=by_expert)
    return LayerPlan(layer, index, weight, inputs, "", before, after)


def _obstacle(layer: Layer, weight: QuantizerSpec | None) -> str:
    """Return why a weight cannot be quantized as its rule says, from its dtype and shape."""
    if weight is None:
        return ""
    if layer.dtype not in _DTYPES:
        return f"its dtype is {layer.dtype}; formats take {', '.join(_DTYPES)}"
    size = 1 if weight.hadamard is None else weight.hadamard.size
    return f"its rows are no multiple of the Hadamard size {size}" if layer.shape[-1] % size else ""


def _conflict(layer: Layer, recipe: RecipeSpec, weight: QuantizerSpec | None, inputs: QuantizerSpec | None) -> str:
    """Return why a shared weight cannot be quantized: the recipe treats the modules that use it differently."""
    for use in layer.uses:
        alike = quantizer_of_use(recipe, use, "weight") == weight
        alike = alike and (use[1] == "embedding" or quantizer_of_use(recipe, use, "input") == inputs)
        if not alike:
            return f"shares its weight with {use[0]}, which {_treatment(recipe, use)}"
    return ""


def _treatment(recipe: RecipeSpec, use: tuple[str, LayerKind]) -> str:
    index = rule_index(recipe, use)
    if index is None:
        return "no rule names"
    verb = "keeps in high precision" if recipe.rules[index].keep is not None else "treats differently"
    return f"{rule_text(recipe, index, use[0])} {verb}"


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_inference(recipe: RecipeSpec) -> None:
    """Refuse what has no meaning in inference, and what would change the product instead of approximating it."""
    if recipe.is_training:
        usable = [name for name in list_recipes() if not find_recipe(name).is_training]
        hint = f"it quantizes the backward GEMMs; recipes for inference: {', '.join(usable)}"
        raise RecipeError(f"recipe {recipe.name!r} is for training", hint)
    for i, rule in enumerate(recipe.rules):
        where = f"recipe {recipe.name!r}, {rule_text(recipe, i)}"
        weight, inputs = recipe.quantizer(rule.fprop, "weight"), recipe.quantizer(rule.fprop, "input")
        if weight is not None and weight.outer_scale_mode == "static":
            hint = "leave outer_scale_mode out of the weight's quantizer"
            raise RecipeError(f"{where}: a weight is at hand and needs no calibration", hint)
        if any(q is not None and q.rounding == "stochastic" for q in (weight, inputs)):
            raise RecipeError(f"{where}: stochastic rounding is for gradients", "leave rounding out of the quantizer")
        rotations = [None if q is None else q.hadamard for q in (weight, inputs)]
        if rotations[0] != rotations[1]:
            hint = "give input and weight the same hadamard; it cancels only when both carry it"
            raise RecipeError(f"{where}: a hadamard on one operand changes the product", hint)
        if rotations[0] is not None and "embedding" in rule.types:
            raise RecipeError(f"{where}: an embedding looks rows up and cannot undo a hadamard", "use types: [linear]")


def _check_rules(recipe: RecipeSpec, layers: tuple[Layer, ...]) -> None:
    uses = [use for layer in layers for use in layer.uses]
    for i, rule in enumerate(recipe.rules):
        if not rule.optional and not any(rule.applies(*use) for use in uses):
            count = f"none of the model's {len(uses)} layers" if uses else "nothing: the model has no layers"
            raise RecipeError(f"recipe {recipe.name!r}: {rule_text(recipe, i)} matches {count}", _way_out(rule, uses))


def _way_out(rule: Rule, uses: list[tuple[str, LayerKind]]) -> str:
    """Name what the rule may have meant: layers of another type, a similar name, or nothing in this model."""
    optional = "write `optional: true` if it need not match"
    other = next((kind for name, kind in uses if matches(rule.match, name)), None)
    if other is not None:
        return f"layers of type {other} have such names: write `types: [{other}]`; {optional}"
    known = sorted({part for name, _ in uses for part in (name, name.rpartition(".")[2])})
    guesses = (did_you_mean(pattern.removeprefix("re:").strip("*."), known) for pattern in rule.match)
    close = next((guess for guess in guesses if guess), "")
    if not close and uses:
        close = f"layers are {', '.join(name for name, _ in uses[:4])}{', ...' if len(uses) > 4 else ''};"
    return f"{close} {optional}".strip()


def _why_nothing(made: Plan) -> str:
    if not made.layers:
        return "the model has no linear and no embedding layer"
    counts = Counter(row.reason for row in made.layers).most_common()
    shown = [f"{reason} ({count} layer{'s' * (count > 1)})" for reason, count in counts[:3]]
    return "; ".join(shown + ["..."] * (len(counts) > 3))
