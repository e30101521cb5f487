"""PTX that looks eight 4-bit codes up and multiplies them by their scale, as bfloat16, two at a time.

PRMT picks four bytes of eight by four selectors of four bits: it looks four codes up at once in a table of eight bytes,
the low or the high ones of the bfloat16 of the eight magnitudes. A selector with its high bit set gives the sign of
its byte eight times, which makes sign bits out of codes wherever they stand. About 3 instructions a code, where going
through FP32 takes 5.
"""

from __future__ import annotations

import functools
import math
import struct

from microscale.spec.element import ElementSpec

_OR_AND = "0xEA"  # lop3: the third operand, and the first where the second has ones
CONSTRAINTS = "=h," * 8 + "r,r"


def has_table(element: ElementSpec) -> bool:
    """Return True for elements of 4 bits that are a sign and a magnitude, which is a bfloat16 number."""
    if element.width != 4 or element.kind != "float" or not element.sign:
        return False
    return all(math.isfinite(v) and not _bits(v) & 0xFFFF for v in element.table)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("I", struct.pack("f", value))
    return int(bits)


@functools.cache
def look_up(element: ElementSpec) -> tuple[str, str]:
    """Return assembly that leaves the eight values in the halves of p0 to p3, and what moves these to $0 to $7.

    Operands: the word of codes $8, the scale as bfloat16 twice $9. Exact where the products are bfloat16 numbers.
    """
    low, high = (
        [_word([_bits(v) >> shift & 0xFF for v in element.table[first : first + 4]]) for first in (0, 4)]
        for shift in (16, 24)
    )
    lines = [
        ".reg .b32 m, n, x, y, lo, hi, s, p0, p1, p2, p3, zero", "mov.b32 zero, 0x80008000",
        "and.b32 m, $8, 0x77777777", "shr.u32 n, m, 16", "shl.b32 x, $8, 4",
        f"mov.b32 p0, {low[0]}", f"mov.b32 p1, {low[1]}", f"mov.b32 p2, {high[0]}", f"mov.b32 p3, {high[1]}",
        "prmt.b32 lo, p0, p1, m", "prmt.b32 hi, p2, p3, m", "prmt.b32 y, p0, p1, n", "prmt.b32 s, p2, p3, n",
        "prmt.b32 p0, lo, hi, 0x5140", "prmt.b32 p1, lo, hi, 0x7362",
        "prmt.b32 p2, y, s, 0x5140", "prmt.b32 p3, y, s, 0x7362",
    ]  # fmt: skip
    for i in range(4):  # of byte i the high code's sign is on top; of the word that is shifted by a code, the low one's
        lines.append(f"prmt.b32 s, x, $8, 0x{0xC080 + 0x1111 * i:04X}")
        lines.append(f"lop3.b32 p{i}, s, 0x80008000, p{i}, {_OR_AND}")
        lines.append(f"fma.rn.bf16x2 p{i}, p{i}, $9, zero")
    moves = "".join(f"  mov.b32 {{${2 * i}, ${2 * i + 1}}}, p{i};" for i in range(4))
    return "".join(f"{line};\n" for line in lines), moves


def _word(octets: list[int]) -> str:
    return f"0x{sum(octet << 8 * i for i, octet in enumerate(octets)):08X}"
