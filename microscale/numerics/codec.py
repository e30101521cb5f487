"""One codec for every `ElementSpec`: FP32 to codes (nearest even or stochastic, saturating) and back.

NaN encodes as the element's NaN code, or as +max where it has none; +-Inf saturates to +-max; the sign of a zero is
kept where the element has a signed zero. Negative values of an unsigned element saturate to its smallest code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from microscale.errors import InputError
from microscale.numerics import bits
from microscale.numerics.rounding import rounds_up
from microscale.spec.element import ElementSpec

_tables: dict[tuple[str, str, torch.device], torch.Tensor] = {}


def _table(kind: str, element: ElementSpec, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Constant tensors, one per element and device (a fresh host copy each call would break CUDA-graph capture)."""
    key = (kind, element.key, device)
    found = _tables.get(key)
    if found is None:
        found = make().to(device)
        if type(found) is torch.Tensor:  # never keep a FakeTensor beyond its trace
            _tables[key] = found
    return found


def decode_table(element: ElementSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the value of every code: float32 [2**bits]. Raises InputError for 16- and 32-bit elements."""
    if element.width > 8:
        raise InputError(
            f"{element.name} has 2**{element.width} codes and no table", "its codes are torch numbers already"
        )
    return _table("decode", element, torch.device(device), lambda: torch.tensor(element.table, dtype=torch.float32))


def decode(codes: torch.Tensor, element: ElementSpec) -> torch.Tensor:
    """Return FP32 values of uint8 codes (or of the native float of a 16/32-bit element), same shape."""
    if element.torch_dtype is not None:
        return codes.to(torch.float32)
    return decode_table(element, codes.device)[codes.to(torch.int32)]


def reciprocal_table(element: ElementSpec, device: torch.device | str) -> torch.Tensor:
    """Return 1/value of every code of an exponent-only scale, exact: float32 [2**bits] (2**-127 is subnormal)."""
    inverse = [1.0 / v for v in element.table]
    return _table("reciprocal", element, torch.device(device), lambda: torch.tensor(inverse, dtype=torch.float32))


def encode(x: torch.Tensor, element: ElementSpec, random: torch.Tensor | None = None) -> torch.Tensor:
    """Return the codes of FP32 x, same shape: uint8, or the native float dtype of a 16/32-bit element.

    Rounds to nearest even, or stochastically where `random` (int32 bytes 0..255, shape of x) is given.
    Raises InputError if x is not float32: rounding to FP32 first would round twice.
    """
    if x.dtype != torch.float32:
        raise InputError(f"encode takes float32, got {x.dtype}", "convert with x.float()")
    if element.torch_dtype is not None:
        limit = element.max_value
        return x.clamp(-limit, limit).to(getattr(torch, element.torch_dtype))
    if element.kind == "codebook":
        return _encode_codebook(x, element, random)
    negative = x.view(torch.int32) < 0
    magnitude = _magnitude_codes(x.abs(), negative, element, random)
    if element.kind == "int":
        codes = torch.where(negative, -magnitude, magnitude) & (2**element.width - 1)
    elif element.sign:
        codes = torch.where(negative, magnitude | 2 ** (element.width - 1), magnitude)
    else:
        codes = torch.where(negative, 0, magnitude)
    nan = element.max_code if element.nan_code is None else element.nan_code
    return torch.where(torch.isnan(x), nan, codes).to(torch.uint8)


def _magnitude_codes(
    a: torch.Tensor, negative: torch.Tensor, element: ElementSpec, random: torch.Tensor | None
) -> torch.Tensor:
    """Codes of |x| as int32: scale so that the code's unit is 1, round, and add the exponent field."""
    if element.kind == "int":
        units = a * 2.0 ** (element.fraction or 0)
        limit = torch.where(negative, element.max_code + (not element.symmetric), element.max_code)
        return _round(torch.minimum(units, limit.to(units.dtype)), random)
    mantissa, bias = element.mantissa or 0, element.bias or 0
    lowest = (1 if element.subnormals else 0) - bias
    a = a.clamp(max=element.max_value)
    exponent = ((a.view(torch.int32) >> 23) - 127).clamp(min=lowest)
    shift = mantissa - exponent
    if element.exponent_only:  # 2**-127 is subnormal: scale in two exact steps
        half = shift >> 1
        units = (a * bits.power_of_two(half) * bits.power_of_two(shift - half)).clamp(min=1.0)
    else:
        units = a * bits.power_of_two(shift)
    codes = ((exponent - lowest) << mantissa) + _round(units, random)
    return codes if element.subnormals else (codes - 2**mantissa).clamp(min=0)


def _round(units: torch.Tensor, random: torch.Tensor | None) -> torch.Tensor:
    if random is None:
        return torch.round(units).to(torch.int32)  # half to even
    low = torch.floor(units)
    return low.to(torch.int32) + rounds_up(units - low, random).to(torch.int32)


# -- codebooks: thresholds between neighbouring values, computed once --------------------------------------------------


def _sorted_codes(element: ElementSpec) -> tuple[list[float], list[int]]:
    """Distinct FP32 values in rising order and the (lowest) code of each."""
    values = torch.tensor(element.table, dtype=torch.float32).tolist()
    first: dict[float, int] = {}
    for code, value in enumerate(values):
        first.setdefault(value + 0.0, code)
    ordered = sorted(first)
    return ordered, [first[v] for v in ordered]


def _codebook_thresholds(element: ElementSpec) -> torch.Tensor:
    """threshold[i]: the smallest FP32 number that rounds to sorted value i+1; ties go to the even code, else down."""
    values, codes = _sorted_codes(element)
    thresholds = []
    for low, high, low_code, high_code in zip(values, values[1:], codes, codes[1:], strict=False):
        middle = (low + high) / 2  # exact in double
        edge = torch.tensor(middle, dtype=torch.float32)
        ties_up = high_code % 2 == 0 and low_code % 2 == 1
        if edge.item() < middle or (edge.item() == middle and not ties_up):
            edge = torch.nextafter(edge, torch.tensor(torch.inf))
        thresholds.append(edge)
    return torch.stack(thresholds)


def codebook_tables(element: ElementSpec, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what encodes a codebook: thresholds FP32 [n-1] between its n sorted values, and the uint8 code of each."""
    place = torch.device(device)
    thresholds = _table("thresholds", element, place, lambda: _codebook_thresholds(element))
    code_of = _table("codes", element, place, lambda: torch.tensor(_sorted_codes(element)[1], dtype=torch.uint8))
    return thresholds, code_of


def _encode_codebook(x: torch.Tensor, element: ElementSpec, random: torch.Tensor | None) -> torch.Tensor:
    thresholds, code_of = codebook_tables(element, x.device)
    if random is None:
        rank = torch.bucketize(x.contiguous(), thresholds, right=True)
    else:
        values, _ = _sorted_codes(element)
        levels = _table("levels", element, x.device, lambda: torch.tensor(values, dtype=torch.float32))
        x = x.clamp(values[0], values[-1])
        low = (torch.bucketize(x.contiguous(), levels, right=True) - 1).clamp(0, len(values) - 2)
        frac = (x - levels[low]) / (levels[low + 1] - levels[low])
        rank = low + torch.where(frac >= 1, True, rounds_up(frac, random)).to(low.dtype)
    rank = torch.where(torch.isnan(x), len(thresholds), rank)
    return code_of[rank]
