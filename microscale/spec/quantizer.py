"""`QuantizerSpec`: how to get from a high-precision tensor to a format: rounding, scale tile, Hadamard, outer mode."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from microscale.spec.base import Spec
from microscale.spec.explain import seen
from microscale.spec.fields import FieldError, Integer
from microscale.spec.format import MAX_BLOCK, ROW, FormatSpec

HADAMARD_SIZES = (2, 4, 8, 16, 32, 64, 128)


class HadamardSpec(Spec):
    """A block-diagonal Hadamard transform along the blocked axis, `y = (x * sign) @ H / sqrt(size)`.

    `sign` is a vector of +1 and -1 of length `size`; None is all +1. A size alone (`hadamard: 16`) is accepted.
    """

    size: Integer
    sign: tuple[Integer, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_size(cls, data: object) -> object:
        if isinstance(data, int) and not isinstance(data, bool):
            return {"size": data}
        if not isinstance(data, Mapping | HadamardSpec):
            hint = f"sizes: {', '.join(map(str, HADAMARD_SIZES))}"
            raise FieldError(f"hadamard must be a size, or a mapping with size and sign, not {seen(data)}", hint)
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size not in HADAMARD_SIZES:
            hint = f"use one of {', '.join(map(str, HADAMARD_SIZES))}"
            raise FieldError(f"Hadamard size {self.size} is no power of two from 2 to 128", hint, "size")
        if self.sign is not None and (len(self.sign) != self.size or any(s not in (1, -1) for s in self.sign)):
            hint = "leave it out for all +1"
            raise FieldError(f"sign needs {self.size} entries of +1 or -1, not {seen(self.sign)}", hint, "sign")
        return self


class QuantizerSpec(Spec):
    """Everything that decides the bytes. `scale_tile` (rows, columns) shares one amax; storage stays 1 x block."""

    format: FormatSpec
    rounding: Literal["nearest_even", "stochastic"] = "nearest_even"
    scale_tile: tuple[Integer, Integer] | None = Field(None, description="rows and columns that share one amax")
    hadamard: HadamardSpec | None = None
    outer_scale_mode: Literal["dynamic", "static"] = Field(
        "dynamic", description="static: the amax comes from calibration, not from the tensor at hand"
    )

    @field_validator("scale_tile", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if value is not None and not (isinstance(value, list | tuple) and len(value) == 2):
            hint = "write [16, 16], or 16 for a square"
            raise FieldError(f"scale_tile must be rows and columns, not {seen(value)}", hint)
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        fmt = self.format
        if self.scale_tile is not None:
            rows, columns = self.scale_tile
            tile = f"scale_tile {rows}x{columns}"
            if not (1 <= rows <= MAX_BLOCK and 1 <= columns <= MAX_BLOCK):
                raise FieldError(f"{tile}: rows and columns are from 1 to {MAX_BLOCK}", "write [16, 16]", "scale_tile")
            if fmt.block == ROW:
                reason = f"{tile}, but {fmt.name} has one scale for a whole row"
                raise FieldError(reason, "leave it out, or give the format a block", "scale_tile", "block")
            if columns % fmt.block:
                reason = f"{tile}: columns must be a multiple of the block, {fmt.block}"
                raise FieldError(reason, f"write [{rows}, {fmt.block}], or change the block", "scale_tile", "block")
            if rows > 1 and fmt.outer_scale is not None and fmt.outer_scale.per == "row":
                reason = f"{tile} of several rows cannot have an outer scale per row"
                raise FieldError(reason, "use outer_scale: {per: tensor}, or one row", "scale_tile", "outer_scale")
            if (rows, columns) == (1, fmt.block):
                object.__setattr__(self, "scale_tile", None)
        if self.outer_scale_mode == "static" and fmt.outer_scale is None:
            reason = f"outer_scale_mode static, but {fmt.name} has no outer scale"
            raise FieldError(reason, "leave it out, or use a format with outer_scale", "outer_scale_mode")
        return self

    def for_row(self, columns: int) -> QuantizerSpec:
        """Return this quantizer with its format for rows of so many elements; see `FormatSpec.for_row`."""
        return self if self.format.block != ROW else _for_row(self, int(columns))

    @property
    def name(self) -> str:
        """The format's name and whatever differs from plain quantization, in one short text."""
        extra = [f"tile={self.scale_tile[0]}x{self.scale_tile[1]}"] if self.scale_tile else []
        extra += [self.rounding] if self.rounding != "nearest_even" else []
        extra += [f"hadamard={self.hadamard.size}"] if self.hadamard else []
        extra += ["static"] if self.outer_scale_mode == "static" else []
        return self.format.name + (f"({', '.join(extra)})" if extra else "")


@functools.lru_cache(maxsize=4096)
def _for_row(spec: QuantizerSpec, columns: int) -> QuantizerSpec:
    return QuantizerSpec.from_key(spec.model_copy(update={"format": spec.format.for_row(columns)}).key)
