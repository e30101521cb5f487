"""`FormatSpec`: what is stored. An element, a block along one axis, a scale dtype, an optional FP32 outer scale.

x  ~=  decode(qdata) * decode(scale) * outer_scale          (all stored scales are decode scales)
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, Strict, model_validator

from microscale.errors import InputError
from microscale.spec.base import Spec
from microscale.spec.element import ElementSpec
from microscale.spec.fields import AsInteger, FieldError, Name, Number

BaseRule = Literal["floor", "ceil", "rceil", "even", "nearest"]
EXPONENT_RULES = ("floor", "ceil", "rceil", "even")
MANTISSA_RULES = ("nearest",)
MAX_BLOCK = 65536  # data is padded to whole blocks: a slip of the keyboard must not ask for terabytes
ROW, ROW_WORD = -1, "row"  # a block that is a whole row, however long: as a number, and as it is written
_BLOCK = "elements that share one scale, along one axis; `row`: all of a row"


def _block_from_word(value: Any) -> Any:
    return ROW if isinstance(value, str) and value == ROW_WORD else value


def _check_block(value: int) -> int:
    if value < 1 and value != ROW:
        raise FieldError(f"block must be at least 1, not {value}", f"block: {_BLOCK}")
    return value


Block = Annotated[
    int, Strict(), Field(le=MAX_BLOCK), AfterValidator(_check_block), AsInteger, BeforeValidator(_block_from_word)
]


class ScaleRuleSpec(Spec):
    """How a block's scale follows from its amax.

    Without candidates, `base` decides alone: `floor`, `ceil`, `rceil`, `even` for exponent-only scales, `nearest` for
    scales with a mantissa. With candidates, the block is quantized once for each multiplier of its amax, and the one
    with the smallest error by `metric` wins; the first wins a tie (four-over-six is candidates 1 and 1.5).
    """

    name: str = ""
    base: BaseRule | None = Field(None, description="default: floor for exponent-only scales, nearest otherwise")
    candidates: tuple[Number, ...] = Field((), description="multipliers of the amax to try")
    metric: Literal["mse", "mae", "max"] | None = Field(None, description="error that picks the candidate")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.candidates) != (self.metric is not None):
            absent = "metric: mse" if self.candidates else "candidates: [1.0, 1.5]"
            raise FieldError("candidates and metric go together", f"add {absent}, for example", "candidates", "metric")
        for i, c in enumerate(self.candidates):
            if not 0 < c < 16:
                hint = "candidates are multipliers of the amax between 0 and 16"
                raise FieldError(f"candidates[{i}] is {c:g}", hint, ("candidates", i))
            if c in self.candidates[:i]:
                raise FieldError(f"candidates[{i}], {c:g}, is listed twice", "delete one", ("candidates", i))
        if self.base is None and not self.candidates:
            hint = f"write base: {EXPONENT_RULES[0]}, or candidates: [1.0, 1.5] and metric: mse"
            raise FieldError("a scale rule needs a base rule, or candidates and a metric", hint)
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
    scale_max: Number | None = Field(None, gt=0, description="block scale that the largest block gets")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: object) -> object:
        if isinstance(data, str) and data != "fp32":
            hint = f"write {{per: {data}}}" if data in ("tensor", "row", "expert") else "write fp32, or {per: row}"
            raise FieldError(f"outer_scale {data!r} is not one of fp32, or a mapping", hint)
        return {"dtype": data} if isinstance(data, str) else data

    @property
    def name(self) -> str:
        """What there is one of, and the scale aimed at where that is given: "row", "tensor:256"."""
        return self.per if self.scale_max is None else f"{self.per}:{self.scale_max:.17g}"


class FormatSpec(Spec):
    """One microscaling format. Everything that quantize, the kernels, the docs and the tests know of it is derived.

    `block: row` (the number `ROW`) is one scale for a whole row along the blocked axis. Stored tensors and kernels know
    numbers only: whoever quantizes asks `for_row` first, so a tensor's own format says how long its rows were.
    """

    name: Name
    description: str = ""
    element: ElementSpec
    block: Block = Field(description=_BLOCK)
    scale: ElementSpec
    scale_rule: ScaleRuleSpec
    outer_scale: OuterScaleSpec | None = None
    references: tuple[str, ...] = ()
    _base: FormatSpec | None = PrivateAttr(None)  # what this is a variant of

    @model_validator(mode="after")
    def _check(self) -> Self:
        element, scale = self.element, self.scale
        if element.width > 8:
            reason = f"element {element.name} is {element.width} bits wide; elements have 2 to 8"
            raise FieldError(reason, f"{element.name} can only be a scale", "element")
        if element.kind == "float" and not element.sign:
            raise FieldError(
                f"element {element.name} has no sign; it can only be a scale", "use one that has a sign", "element"
            )
        if self.block != ROW and self.block % (group := element.pack_group):
            reason = (
                f"block {self.block} is no multiple of {group}, the {element.width}-bit elements that fill whole bytes"
            )
            below, above = (self.block // group * group, (self.block // group + 1) * group)
            raise FieldError(reason, f"use {f'{below} or ' if below else ''}{above}", "block", "element")
        if scale.kind != "float":
            article = "an" if scale.kind == "int" else "a"
            reason = f"scale {scale.name} is {article} {scale.kind} element; scales are floats"
            raise FieldError(reason, "use e8m0, e4m3 or fp32, for example", "scale")
        if not scale.has_nan:
            reason = f"scale {scale.name} has no NaN code, so a block with NaN or Inf could not be marked"
            raise FieldError(reason, "use e8m0, e4m3 or fp32, or declare its nan: all_ones", "scale")
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
            kinds = ("only an exponent", "a mantissa")
            kind, other = kinds if scale.exponent_only else kinds[::-1]
            label = rule.base if rule.name == rule.base else f"{rule.name} (base {rule.base})"
            reason = f"scale_rule {label} does not fit scale {scale.name}, which has {kind}"
            hint = f"use scale_rule {', '.join(allowed)}, or a scale with {other}"
            raise FieldError(reason, hint, "scale_rule", "scale")
        if rule.base == "even" and self.element.precision is None:
            reason = "scale_rule even needs the element's mantissa width, which a codebook has not"
            raise FieldError(reason, "use scale_rule floor, ceil or rceil", "scale_rule", "element")

    def _check_outer(self) -> None:
        if self.outer_scale is None:
            return
        if self.scale.exponent_only:
            reason = f"outer_scale needs a scale with a mantissa; {self.scale.name} has only an exponent"
            raise FieldError(
                reason, "use a scale such as e4m3, or a format without outer_scale", "outer_scale", "scale"
            )
        if self.scale.width > 8:
            reason = f"outer_scale adds nothing to a {self.scale.width}-bit scale"
            raise FieldError(reason, "use an 8-bit scale, or a format without outer_scale", "outer_scale", "scale")
        top = self.outer_scale.scale_max
        if top is not None and top > self.scale.max_value:
            reason = f"scale_max {top:g} is above the largest {self.scale.name}, {self.scale.max_value:g}"
            raise FieldError(reason, "leave scale_max out to use that", ("outer_scale", "scale_max"), "scale")

    def identity(self) -> dict[str, Any]:
        """Return the fields that make this format what it is, as plain data."""
        return {**super().identity(), "block": ROW_WORD if self.block == ROW else self.block}

    # -- derived --

    @property
    def block_text(self) -> str:
        """The block as it is written: a number, or "row"."""
        return ROW_WORD if self.block == ROW else str(self.block)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per element: the code and its share of the block scale; scales of rows are not counted."""
        return self.element.width + (0 if self.block == ROW else self.scale.width / self.block)

    @property
    def block_bytes(self) -> int:
        """Bytes of the packed codes of one block; of a row, 0: they depend on its length."""
        return 0 if self.block == ROW else self.block * self.element.width // 8

    @property
    def scale_max(self) -> float:
        """Largest block scale that the outer scale aims at."""
        outer = self.outer_scale
        return outer.scale_max if outer is not None and outer.scale_max is not None else self.scale.max_value

    @property
    def storage(self) -> tuple[str, int, str]:
        """What the stored bytes mean: equal for two formats whose tensors may be concatenated."""
        return (self.element.key, self.block, self.scale.key)

    def for_row(self, columns: int) -> FormatSpec:
        """Return this format for rows of so many elements: `block: row` becomes a number, filled up to whole bytes.

        The format itself if its block is a number. Raises InputError for rows longer than any block.
        """
        return self if self.block != ROW else _for_row(self, int(columns))

    def variant(self, **changes: Any) -> FormatSpec:
        """Return this format with some fields changed and a name that says which, as in nvfp4[block=32].

        What equals the format's own value changes nothing, and a variant of a variant is named after the first format.
        Raises ValueError (pydantic's) for what cannot be.
        """
        given = {**{name: getattr(self, name) for name in type(self).model_fields}, **changes}
        made, base = FormatSpec(**given), self._base or self
        if made == self:
            return self
        parts = {k: getattr(made, k) for k in sorted(given) if k not in (*self.prose, "name")}
        real = {k: v for k, v in parts.items() if v != getattr(base, k)}
        if not real:
            return base
        words = {"block": made.block_text}
        label = ",".join(f"{k}={'none' if v is None else getattr(v, 'name', words.get(k, v))}" for k, v in real.items())
        made = FormatSpec(**{**given, "name": f"{base.name}[{label}]"})
        made._base = base
        return made


@functools.lru_cache(maxsize=4096)
def _for_row(fmt: FormatSpec, columns: int) -> FormatSpec:
    group = fmt.element.pack_group
    block = max(1, -(-columns // group)) * group
    if block > MAX_BLOCK:
        reason = f"{fmt.name} has one scale a row, and a row of {columns} is longer than a block may be, {MAX_BLOCK}"
        raise InputError(reason, "use a format with a scale for each of many blocks, such as fp8_block128")
    return FormatSpec.from_key(fmt.variant(block=block).key)
