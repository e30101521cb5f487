"""PTX that turns a thread's codes into bfloat16 pairs times a block scale, made from the properties of a format.

The codes lie as `numerics/fragments.py` puts them: shifting a word and masking it leaves two codes with sign, exponent
and mantissa where bfloat16 has them. As bfloat16 they are too small by 2**(127 - bias), which multiplying by the scale,
brought up by as much, makes good exactly. Integers below 8 bits, their sign bit flipped, become 128 + half their range
+ code in bfloat16, of which one multiply-add with a scale that is a power of two leaves code times scale; those of 8
bits become their low bits on 128, less 128, or 256 if negative.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from microscale.numerics import fragments
from microscale.numerics.fragments import Piece
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

TOP = 127  # the largest exponent of bfloat16


class Decoder(NamedTuple):
    """Inline assembly and its constraints. The decoded numbers are too small by 2**drop, which the accumulator gets."""

    assembly: str
    constraints: str
    drop: int


def raised(element: ElementSpec) -> int:
    """The power of two by which the masked bits of an element fall short of its value."""
    return TOP - (element.bias or 0) if element.kind == "float" else -(element.fraction or 0)


def _shift(fmt: FormatSpec) -> int:
    """What is added to an exponent-only scale's code to give bfloat16's exponent field."""
    return raised(fmt.element) - (fmt.scale.bias or 0) + TOP


def drop_of(fmt: FormatSpec) -> int:
    """The power of two that leaves the scales so that all of them, or the least, are normal bfloat16 numbers."""
    if fmt.scale.exponent_only:
        return min(0, _shift(fmt) - 1)
    return max(0, raised(fmt.element) + math.frexp(fmt.scale.max_value)[1] - TOP)


def window(fmt: FormatSpec) -> tuple[int, int]:
    """Return the least scale code whose products are all bfloat16 numbers, and the greatest that is decoded.

    A matrix with a greater one, or with a smaller one for elements other than zero, is not for this.
    """
    if not fmt.scale.exponent_only:
        return 0, fmt.scale.max_code
    smallest = min(v for v in fmt.element.table if v > 0)
    least = (fmt.scale.bias or 0) - 133 - (math.frexp(smallest)[1] - 1)
    room = 8 if fmt.element.kind == "int" else 0  # integers are multiplied as they are, or on 128
    return max(0, least), min(2**fmt.scale.width - 2, 254 - _shift(fmt) + drop_of(fmt) - room)


@functools.lru_cache(maxsize=256)
def decoder(fmt: FormatSpec, first: int, by_row: bool = False) -> Decoder:
    """Return the assembly for one vector group: all vectors of a lane and its scale bytes from byte `first` on.

    Inputs: the vectors (4 registers each), the word of scales (4 registers, all the same). Outputs: for each 16 rows
    and each 16 of K the four registers of the A operand of `mma.m16n8k16`; or, `by_row`, the eight pairs of each row as
    they are to be stored, with nothing dropped.
    """
    element = fmt.element
    held = 4 if element.width == 6 else 2
    vectors, outputs = held * element.width // 8, held // 2 * 16
    constants = {"zero": 0x8000, "minus": 0xBF80, "one": 0x3F80, "base": 0x8000 | _base(element)}
    lines = ["{", f".reg .b32 t, u, c, {', '.join(constants)}, s<4>, z<4>;"]
    lines += [f"mov.b32 {name}, {_both(half)};" for name, half in constants.items()]
    lines += [line for row in range(held) for line in _scale(fmt, f"s{row}", f"${outputs + 4 * vectors}", first + row)]
    fused = _base(element) and fmt.scale.exponent_only  # (base + code) scale - base scale, exactly
    lines += [f"fma.rn.bf16x2 z{row}, s{row}, base, zero;" for row in range(held) if fused]
    for row in range(held):
        for pair, pieces in enumerate(fragments.places(element)):
            step, late = divmod(pair, 2)
            out = f"${row * 8 + pair if by_row else (row // 2 * 4 + step) * 4 + late * 2 + row % 2}"
            words = [f"${outputs + row * element.width // 2 + p.word}" for p in pieces]
            lines += _pair(element, pieces, words, out, (f"s{row}", f"z{row}" if fused else "zero"))
            if by_row and drop_of(fmt):
                lines += [f"mov.b32 c, {_both((drop_of(fmt) + TOP) * 128)};", f"fma.rn.bf16x2 {out}, {out}, c, zero;"]
    registers = ",".join(["=&r"] * outputs + ["r"] * (4 * vectors + 4))
    return Decoder("\n".join([*lines, "}"]), registers, drop_of(fmt))


def _scale(fmt: FormatSpec, out: str, word: str, byte: int) -> list[str]:
    """Lines that leave a scale byte, brought up, in both halves of `out`."""
    lines = [f"prmt.b32 {out}, {word}, 0, 0x4{byte}4{byte};"]
    up, scale = raised(fmt.element) - drop_of(fmt), fmt.scale
    if scale.exponent_only:
        field = up - (scale.bias or 0) + TOP
        return [*lines, f"mad.lo.u32 {out}, {out}, 128, {_both(field * 128)};"]
    lines.append(f"shl.b32 {out}, {out}, {7 - (scale.mantissa or 0)};")
    left = up + TOP - (scale.bias or 0)
    while left:
        step = max(-126, min(TOP, left))
        left -= step
        lines += [f"mov.b32 c, {_both((step + TOP) * 128)};", f"fma.rn.bf16x2 {out}, {out}, c, zero;"]
    return lines


def _both(half: int) -> str:
    """A constant with the same 16 bits in both halves, as a 32-bit sum would give it for a negative one."""
    return f"0x{(half * 0x10001) & 0xFFFFFFFF:08x}"


def _base(element: ElementSpec) -> int:
    """What integers below 8 bits are counted from, 128 + half their range, in bfloat16; 0 for other elements."""
    return 0x4300 | 1 << element.width - 1 if element.kind == "int" and element.width < 8 else 0


def _pair(
    element: ElementSpec, pieces: tuple[Piece, ...], words: list[str], out: str, scale: tuple[str, str]
) -> list[str]:
    """Lines that decode one pair of codes into `out`: times the first of `scale`, plus the second."""
    lines: list[str] = []
    grouped: dict[tuple[str, int], int] = {}
    for piece, word in zip(pieces, words, strict=True):  # pieces at one distance in one word are one shift and mask
        mask = ((1 << piece.size) - 1) << piece.target
        key = word, piece.target - piece.bit
        grouped[key] = grouped.get(key, 0) | mask
    for i, ((word, shift), mask) in enumerate(grouped.items()):
        source = word if shift == 0 else "t"
        if shift:
            lines.append(f"{'shl.b32' if shift > 0 else 'shr.u32'} t, {word}, {abs(shift)};")
        both = _both(mask)
        lines.append(f"and.b32 u, {source}, {both};" if i == 0 else f"lop3.b32 u, {source}, {both}, u, 0xea;")
    if base := _base(element):
        if len(grouped) == 1:  # the mask and the base at once
            lines[-1] = f"lop3.b32 u, {source}, {both}, {_both(base)}, 0x6a;"
        else:
            lines.append(f"xor.b32 u, u, {_both(base)};")
        if scale[1] == "zero":
            lines.append("fma.rn.bf16x2 u, u, one, base;")
    elif element.kind == "int":
        low, sign = (1 << element.width - 1) - 1, 1 << element.width - 1
        lines += [
            f"lop3.b32 t, u, {_both(sign)}, 0x43004300, 0xea;",
            f"lop3.b32 u, u, {_both(low)}, 0x43004300, 0xea;",
            "fma.rn.bf16x2 u, t, minus, u;",
        ]
    return [*lines, f"fma.rn.bf16x2 {out}, u, {scale[0]}, {scale[1]};"]


def mma() -> tuple[str, str]:
    """Return assembly and constraints of four steps of 16 of K: 4 x A (4 registers each), 2 x B (4 each), C (4); D."""
    lines = ["{"]
    for step in range(4):
        a = ", ".join(f"${4 + 4 * step + i}" for i in range(4))
        b = ", ".join(f"${20 + 2 * step + i}" for i in range(2))
        c = ", ".join(f"${(28 if step == 0 else 0) + i}" for i in range(4))
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$0, $1, $2, $3}}, {{{a}}}, {{{b}}}, {{{c}}};"
        )
    return "\n".join([*lines, "}"]), ",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 4)
