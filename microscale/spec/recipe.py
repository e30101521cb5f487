"""`RecipeSpec`: which tensor of which layer gets which quantizer, in which of the three GEMMs.

    fprop   y  = x  @ w.T      operands input, weight
    dgrad   dx = dy @ w        operands grad_output, weight
    wgrad   dw = dy.T @ x      operands grad_output, input

An operand that a GEMM does not name stays in high precision. The first rule that matches a layer decides it; a layer
that no rule names stays in high precision.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from microscale.spec.base import Spec
from microscale.spec.match import compile_pattern, matches
from microscale.spec.quantizer import QuantizerSpec

LayerType = Literal["linear", "embedding"]


class GemmSpec(Spec):
    """The quantizer of each operand of one GEMM, by its name in the recipe's `quantizers`; None is high precision."""

    input: str | None = None
    weight: str | None = None
    grad_output: str | None = None

    def operands(self) -> dict[str, str]:
        """Return the named operands: {operand: quantizer name}."""
        fields = {"input": self.input, "weight": self.weight, "grad_output": self.grad_output}
        return {k: v for k, v in fields.items() if v is not None}


class Rule(Spec):
    """One line of a recipe. `match` is a pattern or a list of patterns (see `microscale.spec.match`)."""

    match: tuple[str, ...]
    types: tuple[LayerType, ...] = ("linear",)
    keep: Literal["high_precision"] | None = None
    optional: bool = Field(False, description="true: matching no layer is no error")
    fprop: GemmSpec | None = None
    dgrad: GemmSpec | None = None
    wgrad: GemmSpec | None = None

    @field_validator("match", "types", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not patterns:
            raise ValueError("match needs at least one pattern")
        for pattern in patterns:
            compile_pattern(pattern)
        return patterns

    @model_validator(mode="after")
    def _check(self) -> Self:
        gemms = self.gemms()
        if (self.keep is not None) == bool(gemms):
            raise ValueError("a rule either keeps high_precision or names quantizers in fprop, dgrad or wgrad")
        allowed = {"fprop": {"input", "weight"}, "dgrad": {"grad_output", "weight"}, "wgrad": {"grad_output", "input"}}
        for name, gemm in gemms.items():
            wrong = set(gemm.operands()) - allowed[name]
            if wrong:
                raise ValueError(
                    f"{name} has no operand {sorted(wrong)[0]!r}; it has {' and '.join(sorted(allowed[name]))}"
                )
            if not gemm.operands():
                raise ValueError(f"{name} names no quantizer; leave it out to keep it in high precision")
        return self

    def gemms(self) -> dict[str, GemmSpec]:
        """Return the GEMMs this rule quantizes: a subset of fprop, dgrad, wgrad."""
        fields = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        return {k: v for k, v in fields.items() if v is not None}

    def applies(self, name: str, layer_type: str) -> bool:
        """Return True if this rule decides the layer `name` of type `layer_type`."""
        return layer_type in self.types and matches(self.match, name)


class RecipeSpec(Spec):
    """A named set of quantizers and an ordered list of rules."""

    name: str
    description: str = ""
    quantizers: dict[str, QuantizerSpec] = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        used: set[str] = set()
        for i, rule in enumerate(self.rules):
            for gemm_name, gemm in rule.gemms().items():
                for operand, quantizer in gemm.operands().items():
                    if quantizer not in self.quantizers:
                        raise ValueError(
                            f"rules[{i}].{gemm_name}.{operand}: no quantizer {quantizer!r} in this recipe; "
                            f"it has {', '.join(self.quantizers)}"
                        )
                    used.add(quantizer)
        unused = sorted(set(self.quantizers) - used)
        if unused:
            raise ValueError(f"quantizer {unused[0]!r} is used by no rule")
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
        name = gemm.operands().get(operand) if gemm is not None else None
        return None if name is None else self.quantizers[name]
