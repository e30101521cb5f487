"""PTX that brings 6-bit codes to the lanes that hold their values: three words to two pairs of codes in each lane.

Of 16 codes of a row, 12 bytes, the left operand of wgmma has pairs c and c + 4 in lane c of four. Pair c begins at bit
12 c of 48, at bit 0 or 4 of a byte: one PRMT with a selector of the lane finds its bytes, one multiplication by a power
of two of the lane undoes the 4. The four lanes read the same 12 bytes, which shared memory gives to all at once.
A pair takes 7 instructions, 3 of them multiplications, which other units do; `ptx_pairs.pair` then scales it.
"""

from __future__ import annotations

import functools

from microscale.spec.element import ElementSpec

WIDTH = 6  # bits of a code
GATHER = "=&r,=&r,r,r,r,r,r,r"  # constraints of `gather`: three words; selectors of the first and second pair; factor


def bottom(element: ElementSpec) -> int:
    """Return the bit of a half where a code begins in floats of bfloat16's layout: zero for integers."""
    return 7 - (element.mantissa or 0) if element.kind == "float" else 0


def base(element: ElementSpec) -> int:
    """Return the bit to which the factor of a lane brings a code: its bottom, but that pairs at bit 4 stay there."""
    return max(4, bottom(element))


@functools.cache
def gather(element: ElementSpec) -> str:
    """Return assembly that leaves this lane's pairs of the 16 codes of words $2 to $4 in the halves of $0 and $1.

    $5 and $6 choose bytes of $2 and $3, and of $3 and $4; $7 is 2**(base - where a pair begins in them). Floats come
    with sign, exponent and mantissa where bfloat16 has them, integers as codes at the bottom of each half.
    """
    lines = []
    for out, words, selector in (("$0", "$2, $3", "$5"), ("$1", "$3, $4", "$6")):
        lines += [
            f"prmt.b32 t, {words}, {selector}", "mul.lo.u32 t, t, $7", "shl.b32 u, t, 10",
            "lop3.b32 u, t, u, 0x0000FFFF, 0xE4",  # the low half of the first, the high half of the second
            *_placed(element, out),
        ]  # fmt: skip
    return "{\n.reg .b32 t, u;\n" + "".join(f"{line};\n" for line in lines) + "}"


def _placed(element: ElementSpec, out: str) -> list[str]:
    """Lines that move codes at `base` of the halves of u to where they are wanted."""
    down = base(element) - bottom(element)
    if element.kind != "float":
        return [f"shr.u32 u, u, {down}", f"and.b32 {out}, u, {_both((1 << WIDTH) - 1)}"]
    digits = ((1 << WIDTH - 1) - 1) << bottom(element)
    shifted = [f"shr.u32 t, u, {down}"] if down else ["mov.b32 t, u"]
    return [
        *shifted, f"and.b32 t, t, {_both(digits)}", f"shl.b32 u, u, {16 - WIDTH - base(element)}",
        f"lop3.b32 {out}, u, 0x80008000, t, 0xEA",
    ]  # fmt: skip


def _both(half: int) -> str:
    return f"0x{half * 0x10001:08X}"
