"""`ElementSpec`: how one stored code maps to a number. Scales are elements too (E8M0, E4M3, FP32, ...).

Kinds:
  float     sign, exponent and mantissa bits with a bias; subnormals unless switched off (E8M0 has none, and no zero)
  int       two's complement with a fixed binary point: value = code / 2**fraction
  codebook  a table of 2**bits values, any order

Code layout of a float: [sign][exponent][mantissa], most significant first (OCP MX v1.0 section 5.3, OFP8).
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from microscale.spec.base import Spec
from microscale.spec.fields import AsInteger, FieldError, Flag, Number

Kind = Literal["float", "int", "codebook"]
NanPolicy = Literal["none", "all_ones", "ieee"]

_KINDS_HINT = "a float has exponent and mantissa, an int bits and fraction, a codebook values"
_WIDTHS = tuple(2**bits for bits in range(2, 9))


class ElementSpec(Spec):
    """One number encoding of 2 to 8 bits, or a native 16/32-bit float (scales only).

    `nan`: `none`, `all_ones` (only the code with every exponent and mantissa bit set, as E4M3 and E8M0 do), or `ieee`
    (the top exponent with a nonzero mantissa, as E5M2). `inf`: the top exponent with a zero mantissa is infinity.
    `max` caps the largest finite value that encoding produces (codes above it still decode).
    """

    name: str = ""
    description: str = ""
    kind: Kind = "float"
    sign: Flag = True
    exponent: Annotated[int, Strict(), Field(ge=1, le=8), AsInteger] | None = Field(
        None, description="exponent bits of a float"
    )
    mantissa: Annotated[int, Strict(), Field(ge=0, le=23), AsInteger] | None = Field(
        None, description="explicit mantissa bits of a float"
    )
    bias: Annotated[int, Strict(), Field(ge=-512, le=512), AsInteger] | None = Field(
        None, description="exponent bias of a float; default 2**(exponent-1)-1"
    )
    nan: NanPolicy = "none"
    inf: Flag = False
    subnormals: Flag = Field(True, description="false: exponent field 0 is an ordinary exponent and there is no zero")
    bits: Annotated[int, Strict(), Field(ge=2, le=32), AsInteger] | None = Field(
        None, description="width of an int; derived for floats and codebooks"
    )
    fraction: Annotated[int, Strict(), Field(ge=0, le=126), AsInteger] | None = Field(
        None, description="bits right of the binary point of an int"
    )
    symmetric: Flag = Field(True, description="an int leaves its most negative code unused")
    values: tuple[Number, ...] | None = Field(None, description="value of each code of a codebook")
    max: Number | None = Field(None, gt=0, description="largest magnitude that encoding produces")

    @model_validator(mode="before")
    @classmethod
    def _infer_kind(cls, data: object) -> object:
        if isinstance(data, dict) and "kind" not in data:
            if "values" in data:
                return {**data, "kind": "codebook"}
            if "bits" in data and "exponent" not in data:
                return {**data, "kind": "int"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        checks = {"float": self._check_float, "int": self._check_int, "codebook": self._check_codebook}
        checks[self.kind]()
        if not self.name:
            object.__setattr__(self, "name", self._default_name())
        return self

    def _only(self, *allowed: str) -> None:
        owned = {"exponent", "mantissa", "bias", "bits", "fraction", "values"}
        wrong = sorted(f for f in owned - set(allowed) if getattr(self, f) is not None)
        if wrong:
            article = "an" if self.kind == "int" else "a"
            raise FieldError(f"{wrong[0]} does not belong to {article} {self.kind} element", _KINDS_HINT, *wrong)

    def _check_float(self) -> None:
        self._only("exponent", "mantissa", "bias", "bits")
        if self.exponent is None or self.mantissa is None:
            raise FieldError("a float element needs 'exponent' and 'mantissa'", _KINDS_HINT)
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent - 1) - 1)
        width = int(self.sign) + self.exponent + self.mantissa
        if self.bits not in (None, width):
            reason = f"bits is {self.bits}, but sign + exponent + mantissa is {width}"
            raise FieldError(reason, "leave bits out of a float", "bits")
        object.__setattr__(self, "bits", width)
        if not 2 <= width <= 8 and self.torch_dtype is None:
            reason = f"mantissa, exponent and sign are {width} bits; elements have 2 to 8"
            raise FieldError(reason, "wider floats are fp32, bf16 and fp16, exactly", "mantissa", "exponent", "sign")
        if self.nan == "ieee" and self.mantissa == 0:
            raise FieldError("nan: ieee needs a mantissa", "use nan: all_ones, or nan: none", "nan")
        if self.inf and self.nan != "ieee":
            raise FieldError("inf: true needs nan: ieee (the top exponent holds both)", "leave inf out", "inf")
        if self._top_finite_code() < 1:
            reason = "every code is NaN, infinity or zero: the element has no maximum"
            raise FieldError(reason, "give it more bits, or nan: none", "nan", "mantissa")
        self._check_range()
        if self.max is not None and not self._is_finite_value(self.max):
            raise FieldError(f"max {self.max:g} is not a finite value of this element", self._near(self.max), "max")

    def _check_range(self) -> None:
        """Every code must decode exactly in FP32, and the codec must be able to scale by powers of two in FP32."""
        if self.torch_dtype is not None:
            return
        lowest = (0 if not self.subnormals else 1) - (self.bias or 0) - (self.mantissa or 0)
        if lowest < (-127 if self.exponent_only else -126) or self._float_value(self._top_finite_code()) >= 2.0**128:
            reason = f"bias {self.bias} puts values outside FP32's normal range (2**-126 to 2**128)"
            raise FieldError(reason, f"leave it out for {2 ** ((self.exponent or 1) - 1) - 1}", "bias", "exponent")

    def _check_int(self) -> None:
        self._only("bits", "fraction")
        if self.bits is None or self.bits > 8:
            raise FieldError("an int element needs 'bits' from 2 to 8", _KINDS_HINT, "bits")
        if self.nan != "none" or self.inf:
            raise FieldError("an int element has no NaN and no infinity", "leave nan and inf out", *self._specials())
        if self.max is not None:
            raise FieldError("an int element derives its maximum from bits and fraction", "leave max out", "max")
        if self.fraction is None:
            object.__setattr__(self, "fraction", 0)

    def _check_codebook(self) -> None:
        self._only("bits", "values")
        values = self.values or ()
        width = len(values).bit_length() - 1
        if len(values) != 2**width or not 2 <= width <= 8:
            reason = f"a codebook needs 2**bits values, 2 to 8 bits; got {len(values)}"
            raise FieldError(
                reason, f"give {', '.join(map(str, _WIDTHS[:-1]))} or {_WIDTHS[-1]}, one twice if need be", "values"
            )
        if self.bits not in (None, width):
            reason = f"bits is {self.bits}, but {len(values)} values are {width} bits"
            raise FieldError(reason, "leave bits out of a codebook", "bits")
        object.__setattr__(self, "bits", width)
        for i, value in enumerate(values):
            if not abs(value) < 2.0**128:
                raise FieldError(f"values[{i}] is {value:g}", "a codebook holds finite FP32 numbers", ("values", i))
        if not any(values):
            raise FieldError("every value is zero: the element has no maximum", "give one that is not", "values")
        if self.nan != "none" or self.inf or self.max is not None:
            reason = "a codebook has no NaN, no infinity and no separate max"
            raise FieldError(reason, "leave nan, inf and max out", *self._specials(), "max")

    def _specials(self) -> list[str]:
        return [key for key, given in (("nan", self.nan != "none"), ("inf", self.inf)) if given]

    def _near(self, value: float) -> str:
        """Hint with the values of an element that are nearest to one that it has not."""
        values = {v for v in self.table if 0 < v < math.inf} if self.width <= 8 else set()
        near = sorted(sorted(values, key=lambda v: abs(v - min(value, 2 * max(values))))[:2])
        return f"near it are {' and '.join(f'{v:g}' for v in near)}" if near else "leave max out"

    def _default_name(self) -> str:
        if self.kind == "float":
            return f"{'' if self.sign else 'u'}e{self.exponent}m{self.mantissa}"
        return f"int{self.bits}" if self.kind == "int" else f"codebook{self.bits}"

    def _is_finite_value(self, value: float) -> bool:
        if self.bits is None or self.bits > 8:
            return math.isfinite(value)
        return value in self.table and math.isfinite(value)

    def _top_finite_code(self) -> int:
        """Largest magnitude code that is a number (floats)."""
        assert self.exponent is not None and self.mantissa is not None
        ones = 2 ** (self.exponent + self.mantissa) - 1
        if self.nan == "ieee" or self.inf:
            return ones - 2**self.mantissa
        return ones - 1 if self.nan == "all_ones" else ones

    # -- derived properties: the only source of format facts, nothing re-derives them from a dtype --

    @property
    def width(self) -> int:
        """Bits of one stored code."""
        assert self.bits is not None
        return self.bits

    @property
    def torch_dtype(self) -> str | None:
        """Name of the torch dtype of a 16- or 32-bit native float ("float32", ...), else None: codes are uint8."""
        if self.kind != "float" or not self.sign or self.nan != "ieee" or not self.inf:
            return None
        native = {(8, 23): "float32", (8, 7): "bfloat16", (5, 10): "float16"}
        return native.get((self.exponent or 0, self.mantissa or 0))

    @property
    def exponent_only(self) -> bool:
        """True for scales that are powers of two and nothing else (E8M0)."""
        return self.kind == "float" and self.mantissa == 0 and not self.sign and not self.subnormals

    @property
    def has_nan(self) -> bool:
        """True if some code means NaN."""
        return self.nan != "none"

    @property
    def nan_code(self) -> int | None:
        """The positive NaN code that encoding writes (E4M3 0x7F, E5M2 0x7F, E8M0 0xFF), or None."""
        if not self.has_nan or self.kind != "float":
            return None
        return 2 ** (self.width - int(self.sign)) - 1

    @functools.cached_property
    def max_code(self) -> int:
        """The code of the largest positive value."""
        if self.kind == "int":
            return 2 ** (self.width - 1) - 1
        if self.kind == "codebook":
            return self.table.index(max(self.table))
        top = self._top_finite_code()
        if self.max is None:
            return top
        return max(c for c in range(top + 1) if self.table[c] == self.max)

    @functools.cached_property
    def max_value(self) -> float:
        """Largest finite magnitude that encoding produces."""
        if self.kind == "int":
            return self.max_code / 2.0 ** (self.fraction or 0)
        if self.kind == "codebook":
            return max(abs(v) for v in self.table)
        return self.max if self.max is not None else self._float_value(self._top_finite_code())

    @functools.cached_property
    def max_exponent(self) -> int:
        """floor(log2(max_value)): `emax` of the OCP scale rule."""
        return math.frexp(self.max_value)[1] - 1

    @property
    def precision(self) -> int | None:
        """Mantissa bits below the leading one in the top binade; None for a codebook, where it has no meaning."""
        if self.kind == "float":
            return self.mantissa
        return self.width - 2 if self.kind == "int" else None

    @property
    def pack_group(self) -> int:
        """Elements in the smallest whole number of bytes: 1 for 8 bits, 2 for 4, 4 for 6, 8 for 3, 5 and 7."""
        return 8 // math.gcd(8, self.width)

    @functools.cached_property
    def table(self) -> tuple[float, ...]:
        """Value of every code, 2**width floats (8 bits at most)."""
        if self.width > 8:
            raise ValueError(f"{self.name} has 2**{self.width} codes; only elements of up to 8 bits have a table")
        if self.kind == "codebook":
            return tuple(self.values or ())
        if self.kind == "int":
            half, step = 2 ** (self.width - 1), 2.0 ** -(self.fraction or 0)
            return tuple((c - 2 * half if c >= half else c) * step for c in range(2 * half))
        magnitudes = [self._float_value(c) for c in range(2 ** (self.width - int(self.sign)))]
        return tuple(magnitudes + [-v for v in magnitudes] if self.sign else magnitudes)

    def _float_value(self, code: int) -> float:
        """Value of a magnitude code (no sign bit)."""
        exponent_bits, mantissa_bits, bias = self.exponent or 0, self.mantissa or 0, self.bias or 0
        e, m = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if self.nan == "all_ones" and code == 2 ** (exponent_bits + mantissa_bits) - 1:
            return math.nan
        if e == 2**exponent_bits - 1 and (self.nan == "ieee" or self.inf):
            return math.inf if m == 0 and self.inf else math.nan
        if e == 0 and self.subnormals:
            return math.ldexp(m, 1 - bias - mantissa_bits)
        return math.ldexp(2**mantissa_bits + m, e - bias - mantissa_bits)
