"""`RecipeSpec`: which tensor of which layer gets which quantizer, in which of the three GEMMs.

    fprop   y  = x  @ w.T      operands input, weight
    dgrad   dx = dy @ w        operands grad_output, weight
    wgrad   dw = dy.T @ x      operands grad_output, input

An operand that a GEMM does not name stays in high precision. The first rule that matches a layer decides it; a layer
that no rule names stays in high precision.

A recipe that says something of dgrad or wgrad is for training (`is_training`). There a GEMM names both its operands:
a quantizer, `high_precision`, or, in the backward GEMMs, `fprop`: the weight or input as fprop quantized it. A backward
of those and unquantized gradients is exactly the straight-through gradient of quantization-aware training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from microscale.errors import did_you_mean
from microscale.spec.base import Spec
from microscale.spec.fields import FieldError, Flag, Name
from microscale.spec.match import compile_pattern, matches
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.training import (
    FPROP,
    HIGH_PRECISION,
    LayerGemms,
    Saved,
    ScheduleSpec,
    Sign,
    check_training,
    last_blocks,
    layer_gemms,
)

LayerType = Literal["linear", "embedding"]
OPERANDS = {"fprop": {"input", "weight"}, "dgrad": {"grad_output", "weight"}, "wgrad": {"grad_output", "input"}}


class GemmSpec(Spec):
    """The quantizer of each operand of one GEMM, by its name in the recipe's `quantizers`; None is high precision.

    `high_precision` says so in words, `fprop` reuses what fprop quantized (dgrad's weight, wgrad's input).
    """

    input: str | None = None
    weight: str | None = None
    grad_output: str | None = None

    def operands(self) -> dict[str, str]:
        """Return what is written of each operand: {operand: quantizer name, high_precision or fprop}."""
        fields = {"input": self.input, "weight": self.weight, "grad_output": self.grad_output}
        return {k: v for k, v in fields.items() if v is not None}

    def quantizers(self) -> dict[str, str]:
        """Return the operands with a quantizer of their own: {operand: quantizer name}."""
        return {k: v for k, v in self.operands().items() if v not in (HIGH_PRECISION, FPROP)}


class Rule(Spec):
    """One line of a recipe. `match` is a pattern or a list of patterns (see `microscale.spec.match`)."""

    match: tuple[str, ...]
    types: tuple[LayerType, ...] = ("linear",)
    keep: Literal["high_precision"] | None = None
    optional: Flag = Field(False, description="true: matching no layer is no error")
    fprop: GemmSpec | None = None
    dgrad: GemmSpec | None = None
    wgrad: GemmSpec | None = None
    last: Annotated[float, Strict(), Field(gt=0, lt=1)] | None = Field(
        None, description="training: only in this share of the model's numbered blocks, counted from the last"
    )
    save: Saved | None = Field(None, description="training: instead of the recipe's")

    @field_validator("match", "types", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not patterns:
            raise FieldError("match needs at least one pattern", "write match: '*' for every layer")
        for i, pattern in enumerate(patterns):
            try:
                compile_pattern(pattern)
            except ValueError as error:
                hint = "after re: stands a Python regular expression; without it a pattern is a glob, as in '*.q_proj'"
                raise FieldError(str(error), hint, (i,)) from None
        return patterns

    @model_validator(mode="after")
    def _check(self) -> Self:
        gemms = self.gemms()
        if (self.keep is not None) == bool(gemms):
            reason = "a rule either keeps high_precision or names quantizers in fprop, dgrad or wgrad"
            hint = "delete one of the two" if gemms else "write keep: high_precision, or fprop: {weight: NAME}"
            raise FieldError(reason, hint, *(["keep"] if gemms else []))
        for name, gemm in gemms.items():
            wrong = set(gemm.operands()) - OPERANDS[name]
            if wrong:
                operand = sorted(wrong)[0]
                hint = f"its operands are {' and '.join(sorted(OPERANDS[name]))}"
                raise FieldError(f"{name} has no operand {operand!r}", hint, (name, operand))
            if not set(gemm.operands().values()) - {HIGH_PRECISION}:
                raise FieldError(f"{name} names no quantizer", "leave it out to keep it in high precision", name)
        return self

    def gemms(self) -> dict[str, GemmSpec]:
        """Return the GEMMs this rule quantizes: a subset of fprop, dgrad, wgrad."""
        fields = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        return {k: v for k, v in fields.items() if v is not None}

    def applies(self, name: str, layer_type: str) -> bool:
        """Return True if this rule decides the layer `name` of type `layer_type`."""
        return layer_type in self.types and matches(self.match, name)


class RecipeSpec(Spec):
    """A named set of quantizers and an ordered list of rules.

    Of training recipes: `save` is what a layer keeps for its backward (`quantized`: the bytes; `recompute`: the tensors
    in high precision, quantized again); `main_grad` accumulates weight gradients into `weight.main_grad` in that dtype;
    `schedule` leaves quantization at some point of training; `inference` names the recipe that the trained model is
    quantized with; `random_signs` are the quantizers whose Hadamard signs come from the seed (written in YAML as
    `hadamard: {size: 16, sign: random}`).
    """

    name: Name
    description: str = ""
    quantizers: dict[str, QuantizerSpec] = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()
    save: Saved | None = Field(None, description="what a layer keeps for its backward; quantized unless written")
    main_grad: Literal["fp32"] | None = Field(None, description="fp32: add weight gradients to weight.main_grad")
    schedule: ScheduleSpec | None = None
    inference: str | None = Field(None, description="the recipe that the trained model is quantized with")
    random_signs: tuple[str, ...] = Field((), description="quantizers whose Hadamard signs are drawn from the seed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.quantizers:
            if not name.strip() or not name.isprintable():
                raise FieldError(f"a quantizer cannot be called {name!r}", "give it a name", ("quantizers", name))
            if name in (HIGH_PRECISION, FPROP):
                reason = f"a quantizer cannot be called {name!r}, which rules use for something else"
                raise FieldError(reason, "give it another name", ("quantizers", name))
        used: set[str] = set()
        for i, rule in enumerate(self.rules):
            for gemm_name, gemm in rule.gemms().items():
                for operand, quantizer in gemm.quantizers().items():
                    if quantizer not in self.quantizers:
                        close = did_you_mean(quantizer, self.quantizers)
                        hint = close or f"it has {', '.join(self.quantizers)}"
                        where = ("rules", i, gemm_name, operand)
                        raise FieldError(f"no quantizer {quantizer!r} in this recipe", hint, where)
                    used.add(quantizer)
        unused = sorted(set(self.quantizers) - used)
        if unused:
            hint = "delete it, or name it in a rule's fprop, dgrad or wgrad"
            raise FieldError(f"quantizer {unused[0]!r} is used by no rule", hint, ("quantizers", unused[0]))
        check_training(self, OPERANDS)
        return self

    @property
    def is_training(self) -> bool:
        """True if some rule quantizes a backward GEMM."""
        return any(rule.dgrad or rule.wgrad for rule in self.rules)

    def rule_for(self, name: str, layer_type: str) -> Rule | None:
        """Return the first rule that applies to a layer, or None."""
        return next((r for r in self.rules if r.applies(name, layer_type)), None)

    def quantizer(self, gemm: GemmSpec | None, operand: str) -> QuantizerSpec | None:
        """Return the quantizer of one operand of a GEMM, or None for high precision."""
        name = gemm.quantizers().get(operand) if gemm is not None else None
        return None if name is None else self.quantizers[name]

    def gemms_of(self, rule: Rule, signs: Sign | None = None) -> LayerGemms:
        """Return what a layer under `rule` does; `signs(size)` gives the +-1 vector of Hadamards with random signs."""
        return layer_gemms(self, rule, signs)

    def resolved(self, names: Iterable[str]) -> RecipeSpec:
        """Return the recipe for a model whose layers have these full names: `last` becomes a pattern of its blocks."""
        if all(rule.last is None for rule in self.rules):
            return self
        known = list(names)
        rules = [
            rule if rule.last is None else rule.model_copy(update={
                "match": last_blocks(rule.last, known, [n for n in known if matches(rule.match, n)]), "last": None,
            })
            for rule in self.rules
        ]  # fmt: skip
        return self.model_copy(update={"rules": tuple(rules)})
