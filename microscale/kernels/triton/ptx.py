"""PTX that encodes sixteen bf16 held in registers, generated from the properties of an element.

A *word* is a 32-bit register of two bf16, the element that comes first in its low half; eight words are one unit of
work. Each function returns the text for `tl.inline_asm_elementwise(pack=1)`: outputs first (`WIDTH / 2` words of packed
codes), then eight words, then what its docstring names. All round to nearest even and saturate, as the reference does.

Lines. For power-of-two block scales the arithmetic stays on words. With h = |x| / scale, exact in bf16, and an element
of m mantissa bits and smallest normal exponent l, codes rise by 2**(m-l-i) per unit in binade i; so the code is the
smallest of these lines, each rounded to an integer, and the largest code:

    line i = rn(h * 2**(m-l-i) + i * 2**m)

The offsets are even, so ties to even stay ties to even, and rounding is adding 128, where the unit of bf16 is 1: one
fused multiply-add per line for two elements at once. About 5 instructions per element for E2M1, where integer rounding
in FP32 takes 24. Integers are one line that carries the sign.

Factors. Where the scale has a mantissa, x * factor has 24 significant bits. E2M1's codes rise by 1 for every 0.5 up to
2, 1 up to 4 and 2 up to 6: code = rn(4 sat(h/2)) + rn(2 sat(h/2 - 1)) + rn(sat(h/2 - 2)). Each summand starts where the
one before is full, on an even code. All of it runs on the FP32 pipe, which issues twice as often as the integer pipe.
"""

from __future__ import annotations

import functools
import struct

from microscale.spec.element import ElementSpec

MOST_LINES = 7
MOST_BIAS = 32  # so that every constant is a normal bf16
_MAGIC = 128  # bf16 has 8 significant bits: its unit is 1 in [128, 256)
_WORDS = 8
_ADD = "0xEA"  # lop3: the third operand, and the first where the second has ones
_CHOOSE = "0xE4"  # lop3: the first operand where the third has ones, else the second


def has_lines(element: ElementSpec) -> bool:
    """Return True if the encoder by lines is exact for an element: few lines, even offsets, codes that fit."""
    if element.width not in (4, 6):
        return False
    if element.kind == "int":
        return element.symmetric and abs(element.fraction or 0) <= MOST_BIAS
    if element.kind != "float" or not (element.sign and element.subnormals and element.mantissa):
        return False
    return element.nan == "none" and _binades(element) <= MOST_LINES and abs(element.bias or 0) <= MOST_BIAS


def _binades(element: ElementSpec) -> int:
    return max(1, element.max_code >> (element.mantissa or 0))


def _constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * inputs)


def _pair(value: float) -> str:
    """A bf16 constant in both halves of a word."""
    (bits,) = struct.unpack("I", struct.pack("f", value))
    assert bits & 0xFFFF == 0, f"{value} is no bf16"
    return f"0x{bits >> 16:04X}{bits >> 16:04X}"


# -- lines -------------------------------------------------------------------------------------------------------------


def _line(element: ElementSpec, x: str, c: str, minimum: str) -> str:
    """Two codes of word x, with their signs, in the low bits of the halves of c; f holds 1/scale twice, z -0."""
    if element.kind == "int":
        low, high = (_pair(_MAGIC + 64 + s * element.max_code) for s in (-1, 1))
        slope = _pair(2.0 ** (element.fraction or 0))
        return f"""
    fma.rn.bf16x2 a, {x}, f, z;  mov.b32 k, {slope};  mov.b32 t, {_pair(_MAGIC + 64)};  fma.rn.bf16x2 a, a, k, t;
    mov.b32 k, {low};  mov.b32 t, {high};  {minimum.replace("min", "max")} a, a, k;  {minimum} {c}, a, t;"""
    m, sign = element.mantissa or 0, 2 ** (element.width - 1)
    base, lowest = _MAGIC + sign // 2, 1 - (element.bias or 0)
    out = [f"\n    and.b32 a, {x}, 0x7FFF7FFF;  fma.rn.bf16x2 a, a, f, z;"]
    out.append(f"  mov.b32 c, {_pair(base + element.max_code)};")
    for i in range(_binades(element)):
        out.append(f"\n    mov.b32 k, {_pair(2.0 ** (m - lowest - i))};  mov.b32 t, {_pair(base + i * 2**m)};")
        out.append(f"  fma.rn.bf16x2 b, a, k, t;  {minimum} c, c, b;")
    # c is code + base: a last multiply-add of +-1 takes half of the sign bit away, or adds it.
    out.append(f"\n    and.b32 t, {x}, 0x80008000;  or.b32 t, t, 0x3F803F80;  mov.b32 k, {_pair(-sign / 2)};")
    out.append(f"  fma.rn.bf16x2 {c}, t, k, c;")
    return "".join(out)


def _pack_nibbles(out: str) -> str:
    """Four words of codes c0..c3, in the low nibbles of their halves, to the eight nibbles of `out`."""
    return f"""
    prmt.b32 c0, c0, c1, 0x6240;  prmt.b32 c2, c2, c3, 0x6240;
    prmt.b32 a, c0, c2, 0x5410;  prmt.b32 b, c0, c2, 0x7632;  shl.b32 b, b, 4;
    lop3.b32 {out}, a, b, 0x0F0F0F0F, {_CHOOSE};"""


def _pack_sixes(out: str, bias: int) -> str:
    """Two words of codes c0, c1, in their halves above `bias`, to the 24 low bits of `out`."""
    below = bias * 65 * 0x10001 & 0xFFFFFFFF  # what `bias` adds up to
    return f"""
    prmt.b32 a, c0, c1, 0x5410;  prmt.b32 b, c0, c1, 0x7632;  sub.u32 a, a, 0x{below:08X};  mad.lo.u32 a, b, 64, a;
    shr.u32 b, a, 16;  mad.lo.u32 {out}, b, {4096 - 65536}, a;"""


@functools.cache
def lines(element: ElementSpec, packed_min: bool) -> tuple[str, str]:
    """Return PTX and constraints. Operands: words, 1/scale as two bf16, keep.

    `keep` is all ones for a finite block, 0 otherwise: then every code is that of the largest number, as in the
    reference. `packed_min`: the architecture has min.u16x2 (sm_90), which joins three operands.
    """
    minimum = "min.u16x2" if packed_min else "min.bf16x2"
    outputs = element.width // 2
    f, keep = outputs + _WORDS, outputs + _WORDS + 1
    text = ["{ .reg .b32 a, b, c, f, k, t, z, c0, c1, c2, c3, g0, g1, g2, g3;"]
    text.append(f"  mov.b32 z, 0x80008000;  mov.b32 f, ${f};")
    word = [f"${outputs + i}" for i in range(_WORDS)]
    if element.width == 4:
        for out in range(2):
            for i in range(4):
                text.append(_line(element, word[4 * out + i], f"c{i}", minimum))
            text.append(_pack_nibbles("a"))
            text.append(f"  lop3.b32 ${out}, a, 0x{_repeat(element):08X}, ${keep}, {_CHOOSE};")
    else:
        bias = 0x4300 + (64 if element.kind == "int" else 0)
        for i in range(4):
            for j in range(2):
                text.append(_line(element, word[2 * i + j], f"c{j}", minimum))
            text.append(_pack_sixes(f"g{i}", bias))
        fields = "  ".join(f"lop3.b32 g{i}, g{i}, 0x{_repeat(element):08X}, ${keep}, {_CHOOSE};" for i in range(4))
        text.append("\n    " + fields)
        text.append("\n    prmt.b32 $0, g0, g1, 0x4210;  prmt.b32 $1, g1, g2, 0x5421;  prmt.b32 $2, g2, g3, 0x6542;")
    return "".join([*text, "\n}"]), _constraints(outputs, _WORDS + 2)


def _repeat(element: ElementSpec) -> int:
    """The code of the largest number in every field of a word (of 24 bits for 6-bit codes)."""
    return sum(element.max_code << i for i in range(0, 32 if element.width == 4 else 24, element.width))


# -- factors -----------------------------------------------------------------------------------------------------------


def _values(word: str, into: tuple[str, str]) -> str:
    """The two elements of a word as FP32."""
    return f"\n    shl.b32 a, {word}, 16;  mov.b32 {into[0]}, a;  and.b32 a, {word}, 0xFFFF0000;  mov.b32 {into[1]}, a;"


def _factor(value: str, m: str, rounding: str, unit: int, start: int) -> str:
    """Codes of |value| * factor in units of 1/unit, as the low bits of FP32 m, which starts at 2**23 + start."""
    one, two, four = (struct.pack(">f", float(unit * n)).hex().upper() for n in (1, 2, 4))
    magic = struct.pack(">f", float(2**23 + start)).hex().upper()
    return f"""
    abs.f32 h, {value};  mul.rn.f32 h, h, d;
    mul.rn.sat.f32 g, h, 0f3F000000;  fma.{rounding}.f32 {m}, g, 0f{four}, 0f{magic};
    fma.rn.sat.f32 g, h, 0f3F000000, 0fBF800000;  fma.{rounding}.f32 {m}, g, 0f{two}, {m};
    fma.rn.sat.f32 g, h, 0f3F000000, 0fC0000000;  fma.{rounding}.f32 {m}, g, 0f{one}, {m};"""


def _signs(out: str, words: list[str]) -> str:
    """The signs of four words into the top bits of the eight nibbles of `out`: bytes of ones where negative."""
    w0, w1, w2, w3 = words
    return f"""
    prmt.b32 a, {w0}, {w1}, 0xFBD9;  prmt.b32 b, {w2}, {w3}, 0xFBD9;
    prmt.b32 c, a, b, 0x5410;  prmt.b32 a, a, b, 0x7632;
    lop3.b32 a, c, a, 0x0F0F0F0F, {_CHOOSE};  lop3.b32 {out}, a, 0x88888888, {out}, {_ADD};"""


@functools.cache
def factors() -> tuple[str, str]:
    """Return PTX and constraints of E2M1 for FP32 factors. Operands: words, factor, keep (as in `lines`)."""
    text = ["{ .reg .b32 a, b, c, i0, i1, i2, i3, q0, q1, o;  .reg .f32 d, h, g, v0, v1, m0, m1, m2, m3;"]
    text.append("  mov.b32 d, $10;")
    for out in range(2):
        words = [f"${2 + 4 * out + i}" for i in range(4)]
        for half in range(2):
            for i in range(2):
                text.append(_values(words[2 * half + i], ("v0", "v1")))
                for j in range(2):
                    text.append(_factor(f"v{j}", f"m{2 * i + j}", "rn", 1, 0))
            text.append("\n    " + "  ".join(f"mov.b32 i{i}, m{i};" for i in range(4)))
            # Four codes into 16 bits; what 2**23 leaves above is cut off by the byte selection below.
            text.append(f"  mad.lo.u32 i0, i1, 16, i0;  mad.lo.u32 i2, i3, 16, i2;  mad.lo.u32 q{half}, i2, 256, i0;")
        text.append("\n    prmt.b32 o, q0, q1, 0x5410;" + _signs("o", words))
        text.append(f"  lop3.b32 ${out}, o, 0x77777777, $11, {_CHOOSE};")
    return "".join([*text, "\n}"]), _constraints(2, _WORDS + 2)


@functools.cache
def stochastic_factors() -> tuple[str, str]:
    """The same with stochastic rounding. Operands: words, factor, keep, four words of random bytes.

    An element rounds up when floor(512 * frac) + 2 r + 1 reaches 512: the code in units of 1/512, truncated, plus
    2 r + 1, shifted by 9; two elements in the halves of a word.
    """
    text = ["{ .reg .b32 a, b, c, i0, i1, p, c0, c1, c2, c3, o;  .reg .f32 d, h, g, v0, v1, m0, m1;  mov.b32 d, $10;"]
    for out in range(2):
        words = [f"${2 + 4 * out + i}" for i in range(4)]
        for i in range(4):
            text.append(_values(words[i], ("v0", "v1")))
            text += [_factor(f"v{j}", f"m{j}", "rz", 512, 1) for j in range(2)]
            random, select = f"${12 + 2 * out + i // 2}", "0x4140" if i % 2 == 0 else "0x4342"
            text.append(f"""
    mov.b32 i0, m0;  mov.b32 i1, m1;  prmt.b32 a, i0, i1, 0x5410;  prmt.b32 p, {random}, 0, {select};
    mad.lo.u32 a, p, 2, a;  shr.u32 a, a, 9;  and.b32 c{i}, a, 0x00070007;""")
        text.append(_pack_nibbles("o") + _signs("o", words))
        text.append(f"  lop3.b32 ${out}, o, 0x77777777, $11, {_CHOOSE};")
    return "".join([*text, "\n}"]), _constraints(2, _WORDS + 6)


# -- integers ----------------------------------------------------------------------------------------------------------


@functools.cache
def integers(element: ElementSpec) -> tuple[str, str]:
    """Return PTX and constraints of 4- or 8-bit integers for FP32 factors. Operands: words, factor.

    Clamped, scaled to units, and rounded by adding 1.5 * 2**23, whose low bits are then the two's complement. NaN
    clamps to the largest number, as in the reference.
    """
    unit = 2.0 ** (element.fraction or 0)
    low = -(element.max_code + (not element.symmetric)) / unit
    outputs = element.width // 2
    bounds = [struct.pack(">f", v).hex().upper() for v in (element.max_code / unit, low, unit)]
    text = ["{ .reg .b32 a, b, i0, i1, c0, c1, c2, c3;  .reg .f32 d, v0, v1;"]
    text.append(f"  mov.b32 d, ${outputs + _WORDS};")
    for out in range(outputs):
        words = _WORDS // outputs
        for i in range(words):
            text.append(_scaled(f"${outputs + words * out + i}"))
            for j in range(2):
                text.append(f"\n    min.f32 v{j}, v{j}, 0f{bounds[0]};  max.f32 v{j}, v{j}, 0f{bounds[1]};")
                text.append(f"  fma.rn.f32 v{j}, v{j}, 0f{bounds[2]}, 0f4B400000;  mov.b32 i{j}, v{j};")
            select = "0x5410" if element.width == 4 else "0x0040"
            text.append(f"\n    prmt.b32 c{i}, i0, i1, {select};")
        text.append(_pack_nibbles(f"${out}") if element.width == 4 else f"\n    prmt.b32 ${out}, c0, c1, 0x5410;")
    return "".join([*text, "\n}"]), _constraints(outputs, _WORDS + 1)


# -- native conversions ------------------------------------------------------------------------------------------------


def _scaled(word: str) -> str:
    return _values(word, ("v0", "v1")) + "  mul.rn.f32 v0, v0, d;  mul.rn.f32 v1, v1, d;"


@functools.cache
def native_fp8(mantissa: int) -> tuple[str, str]:
    """Return PTX and constraints of E4M3 or E5M2 by `cvt.rn.satfinite` (sm_89). Operands: words, factor.

    The factor of a block that is not finite is NaN, and so are its codes. Written as PTX because Triton's own cast
    rounds through f16 on sm_89.
    """
    kind = {3: "e4m3x2", 2: "e5m2x2"}[mantissa]
    text = ["{ .reg .b32 a;  .reg .b16 p, q;  .reg .f32 d, v0, v1;  mov.b32 d, $12;"]
    for out in range(4):
        for i, half in enumerate("pq"):
            text.append(_scaled(f"${4 + 2 * out + i}") + f"  cvt.rn.satfinite.{kind}.f32 {half}, v1, v0;")
        text.append(f"\n    mov.b32 ${out}, {{p, q}};")
    return "".join([*text, "\n}"]), _constraints(4, _WORDS + 1)


@functools.cache
def native_e2m1() -> tuple[str, str]:
    """Return PTX and constraints of E2M1 by `cvt.rn.satfinite.e2m1x2` (sm_100). Operands: words, factor.

    NaN converts to the largest number, as in the reference.
    """
    text = ["{ .reg .b32 a;  .reg .b8 p0, p1, p2, p3;  .reg .f32 d, v0, v1;  mov.b32 d, $10;"]
    for out in range(2):
        for i in range(4):
            text.append(_scaled(f"${2 + 4 * out + i}") + f"  cvt.rn.satfinite.e2m1x2.f32 p{i}, v1, v0;")
        text.append(f"\n    mov.b32 ${out}, {{p0, p1, p2, p3}};")
    return "".join([*text, "\n}"]), _constraints(2, _WORDS + 1)
