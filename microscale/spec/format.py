"""`FormatSpec`: what is stored. An element, a block along one axis, a scale dtype, an optional FP32 outer scale.

x  ~=  decode(qdata) * decode(scale) * outer_scale          (all stored scales are decode scales)
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from microscale.spec.base import Spec
from microscale.spec.element import ElementSpec

BaseRule = Literal["floor", "ceil", "rceil", "even", "nearest"]
EXPONENT_RULES = ("floor", "ceil", "rceil", "even")
MANTISSA_RULES = ("nearest",)


class ScaleRuleSpec(Spec):
    """How a block's scale follows from its amax.

    Without candidates, `base` decides alone: `floor`, `ceil`, `rceil`, `even` for exponent-only scales, `nearest` for
    scales with a mantissa. With candidates, the block is quantized once for each multiplier of its amax, and the one
    with the smallest error by `metric` wins; the first wins a tie (four-over-six is candidates 1 and 1.5).
    """

    name: str = ""
    base: BaseRule | None = Field(None, description="default: floor for exponent-only scales, nearest otherwise")
    candidates: tuple[float, ...] = Field((), description="multipliers of the amax to try")
    metric: Literal["mse", "mae", "max"] | None = Field(None, description="error that picks the candidate")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.candidates) != (self.metric is not None):
            raise ValueError("candidates and metric go together")
        if any(not 0 < c < 16 for c in self.candidates):
            raise ValueError("candidates are multipliers of the amax between 0 and 16")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError("a candidate is listed twice")
        if self.base is None and not self.candidates:
            raise ValueError("a scale rule needs a base rule, or candidates and a metric")
        if not self.name:
            label = self.base if not self.candidates else f"best_of_{len(self.candidates)}_by_{self.metric}"
            object.__setattr__(self, "name", label)
        return self


class OuterScaleSpec(Spec):
    """The FP32 second level: one per tensor, per row of the blocked axis, or per expert (matrix of the last two axes).

    `scale_max` is the block scale that the largest block gets; default the maximum of the scale dtype. Four-over-six
    uses 256 to leave head-room for its 1.5x candidate.
    """

    dtype: Literal["fp32"] = "fp32"
    per: Literal["tensor", "row", "expert"] = "tensor"
    scale_max: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: object) -> object:
        return {"dtype": data} if isinstance(data, str) else data


class FormatSpec(Spec):
    """One microscaling format. Everything that quantize, the kernels, the docs and the tests know of it is derived."""

    name: str
    description: str = ""
    element: ElementSpec
    block: int = Field(ge=1, description="elements that share one scale, along one axis")
    scale: ElementSpec
    scale_rule: ScaleRuleSpec
    outer_scale: OuterScaleSpec | None = None
    references: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name or name != name.strip() or "/" in name or name.endswith((".yaml", ".yml")):
            raise ValueError(f"{name!r} cannot be a format's name (no '/', no .yaml ending, no outer spaces)")
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        element, scale = self.element, self.scale
        if element.width > 8:
            raise ValueError(f"element {element.name} is {element.width} bits wide; elements have 2 to 8")
        if element.exponent_only or (not element.sign and element.kind == "float"):
            raise ValueError(f"element {element.name} has no sign; it can only be a scale")
        if self.block % element.pack_group:
            raise ValueError(
                f"block {self.block} is no multiple of {element.pack_group}, the {element.width}-bit elements "
                "that fill whole bytes"
            )
        if scale.kind != "float":
            raise ValueError(f"scale {scale.name} is a {scale.kind}; scales are floats")
        if not scale.has_nan:
            raise ValueError(f"scale {scale.name} has no NaN code, so a block with NaN or Inf could not be marked")
        self._check_rule()
        self._check_outer()
        return self

    def _check_rule(self) -> None:
        rule, scale = self.scale_rule, self.scale
        allowed = EXPONENT_RULES if scale.exponent_only else MANTISSA_RULES
        if rule.base is None:
            base: BaseRule = "floor" if scale.exponent_only else "nearest"
            rule = ScaleRuleSpec(name=rule.name, base=base, candidates=rule.candidates, metric=rule.metric)
            object.__setattr__(self, "scale_rule", rule)
        if rule.base not in allowed:
            kind = "only an exponent" if scale.exponent_only else "a mantissa"
            raise ValueError(
                f"scale rule {rule.base!r} does not fit scale {scale.name}, which has {kind}: use {', '.join(allowed)}"
            )
        if rule.base == "even" and self.element.precision is None:
            raise ValueError("scale rule 'even' needs the element's mantissa width, which a codebook has not")

    def _check_outer(self) -> None:
        if self.outer_scale is None:
            return
        if self.scale.exponent_only:
            raise ValueError(
                f"an outer scale needs a block scale with a mantissa; {self.scale.name} has only an exponent"
            )
        if self.scale.width > 8:
            raise ValueError(f"an outer scale adds nothing to a {self.scale.width}-bit block scale")
        top = self.outer_scale.scale_max
        if top is not None and top > self.scale.max_value:
            raise ValueError(f"scale_max {top} is above the largest {self.scale.name}, {self.scale.max_value}")

    # -- derived --

    @property
    def bits_per_value(self) -> float:
        """Stored bits per element: the code and its share of the block scale (the outer scale is not counted)."""
        return self.element.width + self.scale.width / self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of the packed codes of one block."""
        return self.block * self.element.width // 8

    @property
    def scale_max(self) -> float:
        """Largest block scale that the outer scale aims at."""
        outer = self.outer_scale
        return outer.scale_max if outer is not None and outer.scale_max is not None else self.scale.max_value

    @property
    def storage(self) -> tuple[str, int, str]:
        """What the stored bytes mean: equal for two formats whose tensors may be concatenated."""
        return (self.element.key, self.block, self.scale.key)

    def variant(self, **changes: Any) -> FormatSpec:
        """Return this format with some fields changed and a name that says which; unchanged values change nothing."""
        real = {k: v for k, v in changes.items() if v is not None and v != getattr(self, k)}
        if not real:
            return self
        label = ",".join(f"{k}={getattr(v, 'name', v)}" for k, v in sorted(real.items()))
        data = {name: getattr(self, name) for name in type(self).model_fields}
        if "scale" in real and "scale_rule" not in real and real["scale"].exponent_only != self.scale.exponent_only:
            raise ValueError(f"a scale of another kind needs a scale_rule too: {label}")
        return FormatSpec(**{**data, **real, "name": f"{self.name}[{label}]"})
