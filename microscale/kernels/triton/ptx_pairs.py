"""PTX that decodes two neighbouring codes of 4 to 8 bits to a pair of bfloat16, made from the properties of a format.

Its registers are those that `wgmma` takes as the left operand, so nothing moves between decoding and multiplying. For
one pair of 4-bit floats: two multiplications that spread the codes over the halves of a word, two masks, the power of
two that bfloat16's bias is short of, the scale: 3 instructions a code. Everything is exact where a code times a scale
is a bfloat16 number.
"""

from __future__ import annotations

import functools
import math

from microscale.kernels.triton import ptx_sixes
from microscale.kernels.triton.properties import is_fp8
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

TOP = 127  # the largest exponent of bfloat16
MOST_FRACTION = 6  # of integers: bits by which the smallest scale, 2**-127, stays a bfloat16 number
ONE_SCALE = "=r,r"  # constraints of `scale`
PAIR, SCALED_PAIR = "=h,=h,r", "=h,=h,r,r"  # of `pair`
TWO_PAIRS = "=h,=h,=h,=h,r"  # of `look_up`
_AND_OR = "0xEA"  # lop3: the third operand, and the first where the second has ones
_NOTHING = "0x80008000"  # -0 twice: what is added where only a product is wanted
_NAN = "0x7FC0"


def has_pairs(element: ElementSpec) -> bool:
    """Return True for elements of which `pair` decodes two."""
    if element.kind == "int":
        return (
            element.width in (4, ptx_sixes.WIDTH, 8)
            and element.fraction is not None
            and element.fraction <= MOST_FRACTION
        )
    if element.kind != "float" or not element.sign or not element.subnormals:
        return False
    small = element.width in (4, ptx_sixes.WIDTH) and element.nan == "none" and not element.inf and _fits(element)
    return small or is_fp8(element)


def has_scale(scale: ElementSpec) -> bool:
    """Return True for scales that `scale` decodes: all of a byte, an exponent or a small float with subnormals."""
    if scale.width > 8 or scale.inf:
        return False
    if scale.exponent_only:
        return scale.width == 8 and scale.bias == TOP
    return scale.kind == "float" and scale.subnormals and scale.nan in ("none", "all_ones") and _fits(scale)


def _fits(element: ElementSpec) -> bool:
    """Whether bfloat16 has the exponents, with room for the power of two that decoding multiplies by."""
    return 0 <= (element.bias or 0) <= TOP and (element.mantissa or 0) <= 7 and element.max is None


def lift(element: ElementSpec) -> int:
    """Return the power of two that integers are short of: it joins the scale, which stays a bfloat16 number."""
    return -(element.fraction or 0) if element.kind == "int" else 0


# -- scales ------------------------------------------------------------------------------------------------------------


@functools.cache
def scale(fmt: FormatSpec) -> str:
    """Return assembly that leaves the scale in the low byte of $1, as bfloat16, in both halves of $0."""
    spec = fmt.scale
    lines = [".reg .pred bad", ".reg .b32 t, u", f"and.b32 t, $1, {(1 << spec.width) - 1}"]
    if spec.exponent_only:
        lines += [
            "setp.eq.u32 bad, t, 255", "shl.b32 t, t, 7",
            "max.u32 t, t, 64",  # 2**-127 is subnormal
            f"selp.b32 t, {_NAN}, t, bad", "mul.lo.u32 $0, t, 0x10001",
        ]  # fmt: skip
    else:
        digits = (1 << (spec.width - int(spec.sign))) - 1
        top = digits - 1 if spec.nan == "all_ones" else digits
        lines += [f"and.b32 u, t, {digits}", f"setp.gt.u32 bad, u, {top}", f"shl.b32 u, u, {7 - (spec.mantissa or 0)}"]
        if spec.sign:
            lines += [f"and.b32 t, t, {digits + 1}", f"shl.b32 t, t, {16 - spec.width}", "or.b32 u, u, t"]
        lines += [f"selp.b32 u, {_NAN}, u, bad", "mul.lo.u32 u, u, 0x10001"]
        lines += [*_times("u", "u", TOP - (spec.bias or 0)), "mov.b32 $0, u"]
    if lift(fmt.element):
        lines += ["mov.b32 u, $0", *_times("$0", "u", lift(fmt.element))]
    return _block(lines)


def _times(out: str, value: str, power: int) -> list[str]:
    """Lines that multiply a pair by a power of two that is a bfloat16 number."""
    if power == 0 and out == value:
        return []
    return [
        f"mov.b32 factor, 0x{((power + TOP) << 7) * 0x10001:08X}", f"mov.b32 zero, {_NOTHING}",
        f"fma.rn.bf16x2 {out}, {value}, factor, zero",
    ]  # fmt: skip


def _block(lines: list[str]) -> str:
    return "{\n.reg .b32 factor, zero;\n" + "".join(f"{line};\n" for line in lines) + "}"


# -- codes -------------------------------------------------------------------------------------------------------------


@functools.cache
def pair(element: ElementSpec, scaled: bool) -> str:
    """Return assembly that decodes the codes at the bottom of $2 to the bfloat16 halves $0 and $1.

    Those of 6 bits are in its halves, as `ptx_sixes.gather` leaves them. `scaled`: times the pair $3; then integers
    count as whole numbers here, see `lift`.
    """
    lines = [".reg .b32 t, u, v", f"mov.b32 zero, {_NOTHING}"]
    if element.kind == "int":
        lines += _integers(element.width)
        power = 0 if scaled else lift(element)
    elif element.width < 8:
        lines += ["mov.b32 u, $2"] if element.width == ptx_sixes.WIDTH else _small_floats(element)
        power = TOP - (element.bias or 0)
    else:
        lines += _fp8(element)
        power = 0
    lines += _times("u", "u", power)
    if scaled:
        lines.append("fma.rn.bf16x2 u, u, $3, zero")
    return _block([*lines, "mov.b32 {$0, $1}, u"])


def _small_floats(element: ElementSpec) -> list[str]:
    """Sign, exponent and mantissa where bfloat16 has them, of two codes of 4 bits; nothing overlaps."""
    at, mantissa = 7 - (element.mantissa or 0), 0x0007
    digits = mantissa << at
    return [
        f"mul.lo.u32 u, $2, 0x{(1 << at) + (1 << at + 12):08X}", f"and.b32 u, u, 0x{digits * 0x10001:08X}",
        "mul.lo.u32 v, $2, 0x01001000", f"lop3.b32 u, v, 0x80008000, u, {_AND_OR}",
    ]  # fmt: skip


def _integers(width: int) -> list[str]:
    """128 + the bits below the sign, less 128 or, where the sign is set, more: exact in bfloat16."""
    sign = 1 << (width - 1)
    spread = {4: "mul.lo.u32 t, $2, 0x00001001", ptx_sixes.WIDTH: "mov.b32 t, $2", 8: "prmt.b32 t, $2, 0, 0x4140"}
    return [
        spread[width],
        f"and.b32 v, t, 0x{sign * 0x10001:08X}", "or.b32 v, v, 0x43004300",
        f"and.b32 u, t, 0x{(sign - 1) * 0x10001:08X}", "or.b32 u, u, 0x43004300",
        "mov.b32 factor, 0xBF80BF80", "fma.rn.bf16x2 u, v, factor, u",
    ]  # fmt: skip


def _fp8(element: ElementSpec) -> list[str]:
    """By the hardware: to f16, which holds every code, NaN and infinity too; then by FP32 to bfloat16, exactly."""
    kind = "e4m3x2" if element.mantissa == 3 else "e5m2x2"
    return [
        ".reg .b16 low, high", ".reg .f32 first, second",
        "mov.b32 {low, high}, $2", f"cvt.rn.f16x2.{kind} t, low", "mov.b32 {low, high}, t",
        "cvt.f32.f16 first, low", "cvt.f32.f16 second, high", "cvt.rn.bf16x2.f32 u, second, first",
    ]  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------


def parts(element: ElementSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return, for each code of a table, the bits of two bfloat16 whose sum is the value to 2**-16 of it.

    Both have the value's sign, and neither is zero unless it is: infinity times the value is not NaN.
    """
    high = [_below(v) for v in element.table]
    low = [_nearest(v - _value(h)) for v, h in zip(element.table, high, strict=True)]
    return tuple(high), tuple(low)


def _below(value: float) -> int:
    """The bits of the last bfloat16 on the way from zero to a value, before it; those of zero for zero."""
    import struct

    (bits,) = struct.unpack("I", struct.pack("f", value))
    exact = _value(int(bits) >> 16) == value
    return (int(bits) >> 16) - int(exact and value != 0)


def _value(bits: int) -> float:
    import struct

    return float(struct.unpack("f", struct.pack("I", bits << 16))[0])


def _nearest(value: float) -> int:
    """The bits of the bfloat16 nearest to a value that is far from its ends."""
    import struct

    (bits,) = struct.unpack("I", struct.pack("f", value))
    return (int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) >> 16


def has_tables(element: ElementSpec) -> bool:
    """Return True for codebooks of 4 bits that `look_up` decodes."""
    return (
        element.kind == "codebook" and element.width == 4 and all(math.isfinite(v) for v in element.table)
        and all(v == 0 or 2.0**-60 < abs(v) < 2.0**60 for v in element.table)
    )  # fmt: skip


@functools.cache
def look_up(element: ElementSpec) -> str:
    """Return assembly that decodes the codes in the low byte of $4: $0 and $1 the `parts` that are high, $2, $3 low.

    PRMT picks bytes by three bits of a code, from the lower or the upper half of a table; the fourth bit, spread over a
    byte, chooses between the two.
    """
    lines = [".reg .b32 c, m, x, y, p, q", "and.b32 c, $4, 0x77", "shl.b32 m, $4, 4"]
    # the top bit of each code over a byte of its own: byte 0 has the second code's, shifted byte 0 the first's
    lines += ["prmt.b32 m, m, $4, 0x00C8"]
    for out, table in (("{$0, $1}", parts(element)[0]), ("{$2, $3}", parts(element)[1])):
        for name, shift in (("x", 0), ("y", 8)):
            octets = [bits >> shift & 0xFF for bits in table]
            words = [sum(octet << 8 * i for i, octet in enumerate(octets[at : at + 4])) for at in (0, 4, 8, 12)]
            lines += [f"mov.b32 p, 0x{words[0]:08X}", f"mov.b32 q, 0x{words[1]:08X}", f"prmt.b32 {name}, p, q, c"]
            lines += [f"mov.b32 p, 0x{words[2]:08X}", f"mov.b32 q, 0x{words[3]:08X}", "prmt.b32 p, p, q, c"]
            lines.append(f"lop3.b32 {name}, p, m, {name}, 0xE2")  # the first where the second has ones, else the third
        lines += ["prmt.b32 x, x, y, 0x5140", f"mov.b32 {out}, x"]
    return _block(lines)
