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
from typing import Literal, Self

from pydantic import Field, model_validator

from microscale.spec.base import Spec

Kind = Literal["float", "int", "codebook"]
NanPolicy = Literal["none", "all_ones", "ieee"]


class ElementSpec(Spec):
    """One number encoding of 2 to 8 bits, or a native 16/32-bit float (scales only).

    `nan`: `none`, `all_ones` (only the code with every exponent and mantissa bit set, as E4M3 and E8M0 do), or `ieee`
    (the top exponent with a nonzero mantissa, as E5M2). `inf`: the top exponent with a zero mantissa is infinity.
    `max` caps the largest finite value that encoding produces (codes above it still decode).
    """

    name: str = ""
    description: str = ""
    kind: Kind = "float"
    sign: bool = True
    exponent: int | None = Field(None, ge=1, le=8, description="exponent bits of a float")
    mantissa: int | None = Field(None, ge=0, le=23, description="explicit mantissa bits of a float")
    bias: int | None = Field(None, description="exponent bias of a float; default 2**(exponent-1)-1")
    nan: NanPolicy = "none"
    inf: bool = False
    subnormals: bool = Field(True, description="false: exponent field 0 is an ordinary exponent and there is no zero")
    bits: int | None = Field(None, ge=2, le=32, description="width of an int; derived for floats and codebooks")
    fraction: int | None = Field(None, ge=0, description="bits right of the binary point of an int")
    symmetric: bool = Field(True, description="an int leaves its most negative code unused")
    values: tuple[float, ...] | None = Field(None, description="value of each code of a codebook")
    max: float | None = Field(None, gt=0, description="largest magnitude that encoding produces")

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
            raise ValueError(f"a {self.kind} element has no {', '.join(wrong)}")

    def _check_float(self) -> None:
        self._only("exponent", "mantissa", "bias", "bits")
        if self.exponent is None or self.mantissa is None:
            raise ValueError("a float needs 'exponent' and 'mantissa' (an int needs 'bits', a codebook 'values')")
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent - 1) - 1)
        width = int(self.sign) + self.exponent + self.mantissa
        if self.bits not in (None, width):
            raise ValueError(f"bits is {self.bits}, but sign + exponent + mantissa is {width}")
        object.__setattr__(self, "bits", width)
        if not 2 <= width <= 8 and self.torch_dtype is None:
            raise ValueError(f"{width} bits: elements are 2 to 8 bits wide, or fp32, bf16, fp16 exactly")
        if self.nan == "ieee" and self.mantissa == 0:
            raise ValueError("nan: ieee needs a mantissa; use all_ones")
        if self.inf and self.nan != "ieee":
            raise ValueError("inf: true needs nan: ieee (the top exponent holds both)")
        top = self._top_finite_code()
        if top < 1:
            raise ValueError("every code is NaN, infinity or zero: the element has no maximum")
        if self.max is not None and not self._is_finite_value(self.max):
            raise ValueError(f"max {self.max} is not a finite value of this element")
        self._check_range()

    def _check_range(self) -> None:
        """Every code must decode exactly in FP32, and the codec must be able to scale by powers of two in FP32."""
        if self.torch_dtype is not None:
            return
        lowest = (0 if not self.subnormals else 1) - (self.bias or 0) - (self.mantissa or 0)
        if lowest < (-127 if self.exponent_only else -126) or self._float_value(self._top_finite_code()) >= 2.0**128:
            raise ValueError(f"bias {self.bias} puts values outside FP32's normal range (2**-126 to 2**128)")

    def _check_int(self) -> None:
        self._only("bits", "fraction")
        if self.bits is None or self.bits > 8:
            raise ValueError("an int element needs 'bits' from 2 to 8")
        if self.nan != "none" or self.inf:
            raise ValueError("an int element has no NaN and no infinity")
        if self.max is not None:
            raise ValueError("an int element derives its maximum from bits and fraction")
        if self.fraction is None:
            object.__setattr__(self, "fraction", 0)

    def _check_codebook(self) -> None:
        self._only("bits", "values")
        values = self.values or ()
        width = len(values).bit_length() - 1
        if len(values) != 2**width or not 2 <= width <= 8:
            raise ValueError(f"a codebook needs 2**bits values, 2 to 8 bits; got {len(values)}")
        if self.bits not in (None, width):
            raise ValueError(f"bits is {self.bits}, but {len(values)} values are {width} bits")
        object.__setattr__(self, "bits", width)
        if not all(math.isfinite(v) for v in values):
            raise ValueError("codebook values must be finite")
        if len({v for v in values if v != 0}) == 0:
            raise ValueError("every value is zero: the element has no maximum")
        if self.nan != "none" or self.inf or self.max is not None:
            raise ValueError("a codebook has no NaN, no infinity and no separate max")

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
