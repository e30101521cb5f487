"""Numbers as sums of 16-bit floats, so that tensor cores multiply them exactly.

A product of two bfloat16 numbers is exact in FP32. So a matrix whose values have up to 8 significant bits multiplies
exactly as it is, and any other one after it has been written as a sum of matrices that have: an FP32 number is three
pieces of 8 bits, a float16 number one of 8 and one of 3. Pieces are cut off, not rounded, so they have the number's
sign and their magnitudes add up to its own; then what accumulation adds to the error does not depend on how many
pieces there are. Each piece after the first is stored 2**8 times larger than the one before, because the last bits of
FP32's subnormal numbers, 2**-149, are below what bfloat16 holds, 2**-133.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch

from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

BFLOAT16_BITS, FLOAT16_BITS, FP32_BITS = 8, 11, 24
FLOAT16_LOWEST, FLOAT16_MAX = -24, 65504.0  # exponent of its last bit; largest number
PIECE_SCALE = 2.0**8  # of each piece over the one before
_TOP_BITS = -(1 << (FP32_BITS - BFLOAT16_BITS))  # mask of sign, exponent and 7 mantissa bits


class _Range(NamedTuple):
    """Of all finite values: most significant bits, exponent of the lowest bit, largest magnitude."""

    bits: int
    lowest: int
    largest: float


@functools.lru_cache(maxsize=1024)
def _range(element: ElementSpec) -> _Range:
    if element.width > 8:
        bits = {"float32": FP32_BITS, "float16": FLOAT16_BITS, "bfloat16": BFLOAT16_BITS}[element.torch_dtype or ""]
        return _Range(bits, -149, math.inf)
    ratios = [abs(ctypes.c_float(v).value).as_integer_ratio() for v in element.table if math.isfinite(v) and v]
    zeros = [(n & -n).bit_length() - 1 for n, _ in ratios]
    return _Range(
        max(n.bit_length() - z for (n, _), z in zip(ratios, zeros, strict=True)),
        min(z - (d.bit_length() - 1) for (_, d), z in zip(ratios, zeros, strict=True)),
        max(n / d for n, d in ratios),
    )


@functools.lru_cache(maxsize=1024)
def significant_bits(fmt: FormatSpec) -> int:
    """Return how many significant bits code * scale can have, at most FP32's 24; the outer scale is not in it."""
    element, scale = _range(fmt.element).bits, _range(fmt.scale).bits
    both = element + scale if min(element, scale) > 1 else max(element, scale)  # a power of two adds none
    return min(both, FP32_BITS)


@functools.lru_cache(maxsize=1024)
def fits_float16(fmt: FormatSpec) -> bool:
    """Return True if every finite code * scale is a float16 number."""
    element, scale = _range(fmt.element), _range(fmt.scale)
    return (
        significant_bits(fmt) <= FLOAT16_BITS
        and element.lowest + scale.lowest >= FLOAT16_LOWEST
        and element.largest * scale.largest <= FLOAT16_MAX
    )


def pieces_of(bits: int) -> int:
    """Return how many bfloat16 pieces a number of so many significant bits has."""
    return -(-bits // BFLOAT16_BITS)


def split(x: torch.Tensor, pieces: int) -> list[torch.Tensor]:
    """Return `pieces` bfloat16 tensors whose sum, piece i times 2**(-8 i), is x, which has 8 bits for each at most.

    x is float32, or float16 (any 2 pieces). Exact for every finite value; an infinity or NaN stands in the first piece
    and zeros in the others.
    """
    rest = x.to(torch.float32)
    finite = rest.isfinite()
    whole = bool(x.numel()) and pieces > 1
    found = []
    for i in range(pieces):
        if i == pieces - 1 and whole:
            found.append(rest.to(torch.bfloat16))  # at most 8 bits are left
            break
        top = (rest.contiguous().view(torch.int32) & _TOP_BITS).view(torch.float32)
        found.append((torch.where(finite, top, rest) if i == 0 else top).to(torch.bfloat16))
        rest = (rest - top) * PIECE_SCALE
        rest = torch.where(finite, rest, 0.0) if i == 0 else rest
    return found
