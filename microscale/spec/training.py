"""What a training recipe says beyond an inference recipe: the six operands of a layer's GEMMs, and what must agree.

The contraction of fprop runs over the input features, that of dgrad over the output features, that of wgrad over the
tokens. A Hadamard transform along a contraction cancels if and only if both operands carry the same one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Strict

from microscale.spec.base import Spec
from microscale.spec.fields import FieldError
from microscale.spec.quantizer import HadamardSpec, QuantizerSpec

if TYPE_CHECKING:
    from microscale.spec.recipe import RecipeSpec, Rule

HIGH_PRECISION = "high_precision"
FPROP = "fprop"
Saved = Literal["quantized", "recompute"]
Sign = Callable[[int], tuple[int, ...]]
_TRAINING_ONLY = ("save", "main_grad", "schedule", "inference", "random_signs")


class ScheduleSpec(Spec):
    """When training leaves quantization. `high_precision_from` is a share of all steps: 0.9 is the last tenth."""

    high_precision_from: Annotated[float, Strict(), Field(ge=0, le=1)] = Field(
        description="share of all steps after which every GEMM is in high precision"
    )


class LayerGemms(Spec):
    """What the three GEMMs of one layer do to their operands; None is high precision.

    `dgrad_weight_is_fprops`, `wgrad_input_is_fprops`: that operand is what fprop quantized, and has no quantizer.
    """

    fprop_input: QuantizerSpec | None = None
    fprop_weight: QuantizerSpec | None = None
    dgrad_grad_output: QuantizerSpec | None = None
    dgrad_weight: QuantizerSpec | None = None
    wgrad_grad_output: QuantizerSpec | None = None
    wgrad_input: QuantizerSpec | None = None
    dgrad_weight_is_fprops: bool = False
    wgrad_input_is_fprops: bool = False
    save: Saved = "quantized"

    @property
    def is_stochastic(self) -> bool:
        """True if the backward draws random numbers."""
        return any(
            q is not None and q.rounding == "stochastic" for q in (self.dgrad_grad_output, self.wgrad_grad_output)
        )


def layer_gemms(recipe: RecipeSpec, rule: Rule, signs: Sign | None) -> LayerGemms:
    """Return what a layer under `rule` does. `signs` draws the vectors of `random_signs`; None leaves them at +1."""

    def quantizer(gemm: str, operand: str) -> QuantizerSpec | None:
        spec = rule.gemms().get(gemm)
        found = recipe.quantizer(spec, operand)
        if found is None or found.hadamard is None or signs is None:
            return found
        if spec is None or spec.quantizers()[operand] not in recipe.random_signs:
            return found
        size = found.hadamard.size
        return found.model_copy(update={"hadamard": HadamardSpec(size=size, sign=signs(size))})

    return LayerGemms(
        fprop_input=quantizer("fprop", "input"),
        fprop_weight=quantizer("fprop", "weight"),
        dgrad_grad_output=quantizer("dgrad", "grad_output"),
        dgrad_weight=quantizer("dgrad", "weight"),
        wgrad_grad_output=quantizer("wgrad", "grad_output"),
        wgrad_input=quantizer("wgrad", "input"),
        dgrad_weight_is_fprops=rule.dgrad is not None and rule.dgrad.weight == FPROP,
        wgrad_input_is_fprops=rule.wgrad is not None and rule.wgrad.input == FPROP,
        save=rule.save or recipe.save or "quantized",
    )


def last_blocks(share: float, names: Iterable[str], matched: Iterable[str]) -> tuple[str, ...]:
    """Return patterns for those of `matched` that stand in the last `share` of the model's numbered blocks.

    A block is what a layer's name has up to its first number: `model.layers.7` of `model.layers.7.mlp.up_proj`. Of n
    blocks ceil(share * n) count, but never all of them. The patterns match nothing if no layer stands in such a block.
    """
    groups: dict[str, set[int]] = {}
    for name in names:
        if (found := _block(name)) is not None:
            groups.setdefault(found[0], set()).add(found[1])
    last = {
        (group, number)
        for group, numbers in groups.items()
        for number in sorted(numbers)[len(numbers) - min(math.ceil(share * len(numbers)), len(numbers) - 1) :]
    }
    inside = [re.escape(name) for name in matched if _block(name) in last]
    return (f"re:{'|'.join(inside)}" if inside else "re:(?!)",)


def _block(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    i = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return None if i is None else (".".join(parts[:i]), int(parts[i]))


# -- checks ------------------------------------------------------------------------------------------------------------


def check_training(recipe: RecipeSpec, operands: Mapping[str, set[str]]) -> None:
    """Raise FieldError for what cannot train, or for what only training knows in a recipe without a backward GEMM."""
    if not recipe.is_training:
        _check_inference(recipe)
        return
    for name in recipe.random_signs:
        if name not in recipe.quantizers:
            raise FieldError(
                f"no quantizer {name!r} in this recipe", f"it has {', '.join(recipe.quantizers)}", "random_signs"
            )
        hadamard = recipe.quantizers[name].hadamard
        if hadamard is not None and hadamard.sign is not None:
            where = ("quantizers", name, "hadamard", "sign")
            raise FieldError(
                f"the signs of {name!r} are given and random", "write one of the two", where, "random_signs"
            )
    for i, rule in enumerate(recipe.rules):
        if rule.gemms():
            _check_operands(rule, i, operands)
            _check_reuse(recipe, rule, i)
            _check_quantizers(recipe, rule, i)
            _check_hadamard(recipe, rule, i)


def _check_inference(recipe: RecipeSpec) -> None:
    hint = "delete it, or name quantizers for dgrad or wgrad"
    for field in _TRAINING_ONLY:
        if getattr(recipe, field):
            where: tuple[str | tuple[str, ...], ...] = (field,)
            if field == "random_signs":
                where = (field, ("quantizers", recipe.random_signs[0], "hadamard", "sign"))
            raise FieldError(f"{field} is for training, and this recipe has no backward GEMM", hint, *where)
    for i, rule in enumerate(recipe.rules):
        for field in ("last", "save"):
            if getattr(rule, field) is not None:
                reason = f"{field} is for training, and this recipe has no backward GEMM"
                raise FieldError(reason, hint, ("rules", i, field))
        if rule.fprop is not None and FPROP in rule.fprop.operands().values():
            raise _reuses_itself(i, rule)


def _check_operands(rule: Rule, i: int, operands: Mapping[str, set[str]]) -> None:
    if rule.types != ("linear",):
        raise FieldError("only linear layers have three GEMMs", "leave types out", ("rules", i, "types"))
    for gemm_name, gemm in rule.gemms().items():
        missing = sorted(operands[gemm_name] - set(gemm.operands()))
        if missing:
            reason = f"{gemm_name} names no quantizer for {missing[0]}"
            hint = (
                f"a training recipe names both operands of a GEMM: write {missing[0]}: high_precision if that is meant"
            )
            raise FieldError(reason, hint, ("rules", i, gemm_name))


def _check_reuse(recipe: RecipeSpec, rule: Rule, i: int) -> None:
    """`fprop` stands for a weight or an input that fprop quantizes, and quantizes without a Hadamard along it."""
    for gemm_name, gemm in rule.gemms().items():
        for operand, written in gemm.operands().items():
            if written != FPROP:
                continue
            where = ("rules", i, gemm_name, operand)
            if gemm_name == "fprop":
                raise _reuses_itself(i, rule)
            if operand == "grad_output":
                raise FieldError("fprop has no grad_output to reuse", "name a quantizer, or high_precision", where)
            first = recipe.quantizer(rule.fprop, operand)
            if first is None:
                hint = "name a quantizer, or high_precision"
                raise FieldError(f"fprop does not quantize the {operand} that {gemm_name} reuses", hint, where)
            if first.hadamard is not None:
                reason = f"fprop's {operand} is Hadamard transformed along an axis that {gemm_name} does not contract"
                raise FieldError(reason, "name a quantizer, or high_precision", where)


def _reuses_itself(i: int, rule: Rule) -> FieldError:
    operand = next((k for k, v in rule.fprop.operands().items() if v == FPROP), "input") if rule.fprop else "input"
    hint = "name a quantizer, or high_precision"
    return FieldError("fprop cannot reuse its own operand", hint, ("rules", i, "fprop", operand))


def _check_quantizers(recipe: RecipeSpec, rule: Rule, i: int) -> None:
    for gemm_name, gemm in rule.gemms().items():
        for operand, name in gemm.quantizers().items():
            quantizer, where = recipe.quantizers[name], ("rules", i, gemm_name, operand)
            if quantizer.rounding == "stochastic" and operand != "grad_output":
                reason = f"{gemm_name}'s {operand} is rounded stochastically; only gradients are"
                raise FieldError(reason, "leave rounding out of its quantizer", ("quantizers", name, "rounding"), where)
            if quantizer.outer_scale_mode == "static":
                reason = f"{gemm_name}'s {operand} has a static outer scale; training calibrates nothing"
                raise FieldError(reason, "leave outer_scale_mode out", ("quantizers", name, "outer_scale_mode"), where)
    weight = recipe.quantizer(rule.fprop, "weight")
    tile = None if weight is None else weight.scale_tile
    if rule.fprop is None or tile is None or recipe.quantizer(rule.dgrad, "weight") != weight:
        return
    if tile[0] > 1 and tile[0] != tile[1]:
        reason = f"scale_tile {tile[0]}x{tile[1]} is not square: the weight and its transpose would not agree"
        hint = f"write [{tile[1]}, {tile[1]}], or give fprop and dgrad quantizers of their own"
        raise FieldError(reason, hint, ("quantizers", rule.fprop.quantizers()["weight"], "scale_tile"))


def _check_hadamard(recipe: RecipeSpec, rule: Rule, i: int) -> None:
    for gemm_name, gemm in rule.gemms().items():
        found = {}
        for operand in gemm.operands():
            name = gemm.quantizers().get(operand)
            hadamard = None if name is None else recipe.quantizers[name].hadamard
            drawn = hadamard is not None and name in recipe.random_signs
            found[operand] = (name, hadamard, drawn)
        (one, (a, first, first_drawn)), (two, (b, second, second_drawn)) = found.items()
        if (first, first_drawn) == (second, second_drawn):
            continue
        sizes = [None if h is None else h.size for h in (first, second)]
        what = "Hadamard transforms" if sizes[0] != sizes[1] else "Hadamard signs"
        places = [("quantizers", name, "hadamard") for name in (b, a) if name is not None]
        reason = f"the {what} of {gemm_name}'s {one} and {two} disagree and would not cancel"
        raise FieldError(reason, "give both operands the same hadamard", *places, ("rules", i, gemm_name))
