"""Reference `align_rows`: an MX operand as E4M3 codes with one power of two per row, which FP8 tensor cores multiply.

    value[r, k]  ~=  e4m3[r, k] * row_scale[r]        row_scale a power of two

The row's largest block exponent decides: it is mapped to the largest power of two under which no code of the element
exceeds 448. Every other block is then smaller by 2**(its exponent - the largest), and rounded to nearest even on
E4M3's grid. A number of up to four significant bits keeps them all down to 2**-6 and loses them below, one by one;
what is lost is never more than 2**-10 of the row scale.
"""

from __future__ import annotations

import math

import torch

from microscale.numerics import bits, codec, fragments, layout, packing
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

TARGET = ElementSpec(name="e4m3", exponent=4, mantissa=3, bias=7, nan="all_ones")
ALIGN = 16  # columns are padded with zeros to a multiple of this: what FP8 matrix products ask for
LARGEST_ROW, SMALLEST_ROW = 127, -126  # row scales are normal FP32 numbers, which no product flushes
NOTHING_LEFT = -40  # 2**-40 times any code that is taken rounds to zero


def lift(element: ElementSpec) -> int:
    """Return the largest power of two that takes no finite code of an element above 448."""
    largest = max(value for value in element.table if math.isfinite(value))
    return math.floor(math.log2(TARGET.max_value / largest))


def span(element: ElementSpec) -> int:
    """Return how far below its row's largest exponent a block's may be so that E4M3 holds all its bits.

    14 for E2M1; 0 or less for elements of 8 bits, whose smallest numbers lose bits in all but the largest blocks.
    """
    lowest, target = ((e.bias or 0) + (e.mantissa or 0) for e in (element, TARGET))
    return lift(element) + target - lowest


def _embeds(element: ElementSpec) -> bool:
    """Whether codes, moved to where E4M3 has their parts, are NaN exactly where E4M3 is."""
    if (element.exponent, element.mantissa) == (TARGET.exponent, TARGET.mantissa):
        return element.nan == TARGET.nan
    return not element.has_nan and not element.inf


def fits(fmt: FormatSpec | None) -> bool:
    """Return True if a format's blocks can become E4M3: no more than three mantissa bits, scales that are exponents."""
    if fmt is None or fmt.outer_scale is not None:
        return False
    element, scale = fmt.element, fmt.scale
    mantissa, exponent, bias = element.mantissa or 0, element.exponent or 0, element.bias or 0
    if element.kind != "float" or not element.subnormals or element.width not in (4, 6, 8):
        return False
    # codes are E5M2, or numbers of E4M3 but for a power of two: the kernel works on FP16, which has both
    five = (exponent, mantissa, bias, element.nan, element.inf) == (5, 2, 15, "ieee", True)
    in_range = mantissa <= 3 and 0 <= bias <= 15 and lift(element) <= 8 + min(bias, 7)
    in_range = five or (in_range and exponent <= 4 and _embeds(element))
    powers = scale.exponent_only and scale.width == 8 and scale.nan == "all_ones"
    return in_range and powers and fmt.block in (16, 32, 64, 128, 256)


def is_exact(qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec, columns: int) -> bool:
    """Return True if `align_rows` keeps every value; arguments as its, scales strided. Reads the device's memory once.

    Blocks of zeros and NaN blocks are kept whatever their scales. Elements have neither NaN nor infinity.
    """
    blocks, bias, stored = -(-columns // fmt.block), fmt.scale.bias or 0, scale.to(torch.int32)
    if not stored.numel():
        return True
    nan = stored.eq(fmt.scale.nan_code or 0)
    top = stored.masked_fill(nan, 0).amax(-1, keepdim=True)
    row = (top - bias - lift(fmt.element)).clamp(SMALLEST_ROW, LARGEST_ROW)
    shift = stored - bias - row
    lost = ~nan & ((shift < lift(fmt.element) - span(fmt.element)) | (shift > lift(fmt.element)))
    if not bool(lost.any()):
        return True
    zeros = [code for code, value in enumerate(fmt.element.table) if value == 0]
    codes = packing.unpack(qdata, fmt.element.width).unflatten(-1, (blocks, fmt.block))
    empty = torch.isin(codes, torch.tensor(zeros, dtype=torch.uint8, device=codes.device)).all(-1)
    return not bool((lost & ~empty).any())


def align_rows(
    qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec, columns: int, scale_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (float8_e4m3fn [..., R, columns padded to 16], FP32 row scales [..., R, 1]) of blocks along the last axis.

    qdata uint8 [..., R, bytes] and scale [..., R, blocks], or swizzled blobs, or both in layout fragments, as in
    `dequantize`. NaN blocks (scale 255) and codes that are NaN or infinite become NaN; a row of nothing but NaN blocks
    has the smallest scale. Only elements beyond 448 can saturate, under scales within 2**-8 of the largest there is.
    """
    blocks, shape = -(-columns // fmt.block), qdata.shape[:-1]
    if scale_layout == layout.FRAGMENTS:
        qdata, scale = fragments.restore(qdata, scale, fmt, columns)
    elif scale_layout == layout.SWIZZLED:
        scale = layout.unswizzle(scale, shape[-1] if shape else 1, blocks).reshape(*shape, blocks)
    bias, stored = fmt.scale.bias or 0, scale.to(torch.int32)
    nan = stored.eq(fmt.scale.nan_code or 0)
    top = stored.masked_fill(nan, 0).amax(-1, keepdim=True) if blocks else stored.new_zeros(*shape, 1)
    row = (top - bias - lift(fmt.element)).clamp(SMALLEST_ROW, LARGEST_ROW)
    shift = (stored - bias - row).clamp(min=NOTHING_LEFT)
    values = codec.decode(packing.unpack(qdata, fmt.element.width), fmt.element).unflatten(-1, (blocks, fmt.block))
    values = values * bits.power_of_two(shift)[..., None]
    values = values.masked_fill(nan[..., None] | values.isinf(), torch.nan)
    codes = codec.encode(values.flatten(-2)[..., :columns], TARGET)
    codes = torch.nn.functional.pad(codes, (0, -columns % ALIGN))
    return codes.view(torch.float8_e4m3fn), bits.power_of_two(row)
