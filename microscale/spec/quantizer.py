"""`QuantizerSpec`: how to get from a high-precision tensor to a format: rounding, scale tile, Hadamard, outer mode."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from microscale.spec.base import Spec
from microscale.spec.format import FormatSpec

HADAMARD_SIZES = (2, 4, 8, 16, 32, 64, 128)


class HadamardSpec(Spec):
    """A block-diagonal Hadamard transform along the blocked axis, `y = (x * sign) @ H / sqrt(size)`.

    `sign` is a vector of +1 and -1 of length `size`; None is all +1. A size alone (`hadamard: 16`) is accepted.
    """

    size: int
    sign: tuple[int, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_size(cls, data: object) -> object:
        return {"size": data} if isinstance(data, int) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size not in HADAMARD_SIZES:
            raise ValueError(f"Hadamard size {self.size}: use one of {', '.join(map(str, HADAMARD_SIZES))}")
        if self.sign is not None and (len(self.sign) != self.size or any(s not in (1, -1) for s in self.sign)):
            raise ValueError(f"sign needs {self.size} entries of +1 or -1")
        return self


class QuantizerSpec(Spec):
    """Everything that decides the bytes. `scale_tile` (rows, columns) shares one amax; storage stays 1 x block."""

    format: FormatSpec
    rounding: Literal["nearest_even", "stochastic"] = "nearest_even"
    scale_tile: tuple[int, int] | None = Field(None, description="rows and columns that share one amax")
    hadamard: HadamardSpec | None = None
    outer_scale_mode: Literal["dynamic", "static"] = Field(
        "dynamic", description="static: the amax comes from calibration, not from the tensor at hand"
    )

    @field_validator("scale_tile", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        fmt = self.format
        if self.scale_tile is not None:
            rows, columns = self.scale_tile
            if rows < 1 or columns < 1 or columns % fmt.block:
                raise ValueError(f"scale_tile {rows}x{columns}: columns must be a multiple of the block, {fmt.block}")
            if rows > 1 and fmt.outer_scale is not None and fmt.outer_scale.per == "row":
                raise ValueError("a scale_tile of several rows cannot have an outer scale per row")
            if (rows, columns) == (1, fmt.block):
                object.__setattr__(self, "scale_tile", None)
        if self.outer_scale_mode == "static" and fmt.outer_scale is None:
            raise ValueError(f"outer_scale_mode: static, but {fmt.name} has no outer scale")
        return self

    @property
    def name(self) -> str:
        """The format's name and whatever differs from plain quantization, in one short text."""
        extra = [f"tile={self.scale_tile[0]}x{self.scale_tile[1]}"] if self.scale_tile else []
        extra += [self.rounding] if self.rounding != "nearest_even" else []
        extra += [f"hadamard={self.hadamard.size}"] if self.hadamard else []
        extra += ["static"] if self.outer_scale_mode == "static" else []
        return self.format.name + (f"({', '.join(extra)})" if extra else "")
