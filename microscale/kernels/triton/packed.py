"""PTX for E2M1 (4-bit) codes from bf16 in packed 16-bit arithmetic: sm_80 to sm_90 have no instruction for it.

For power-of-two scales, |x| / scale becomes f16 in both lanes of a register and is multiplied by 2**-14. That puts
E2M1's exponent field (bias 1) where f16's (bias 15) is, with E2M1's subnormals on f16's, exactly: a bf16 significand of
8 bits fits f16 down to a quarter of the smallest code, and everything below rounds to zero anyway. Rounding to nearest
even is then one integer addition at bit 9, and a code is the three bits above. About 7 instructions an element, against
24 for integer rounding in FP32. FP32 factors take about 10, most of them on the FP32 pipe; see `_FACTORS`.

Four words (eight bf16) become four bytes in one output register. Operand numbers follow
`tl.inline_asm_elementwise(pack=4)`: $0 is the output, then four registers of each operand in turn.
"""

from __future__ import annotations

_FROM_F16 = """
    mul.f16x2 u, a, k;  shr.u32 t, u, 9;  and.b32 t, t, 0x00010001;  add.u32 u, u, 0x00FF00FF;  add.u32 u, u, t;
    shr.u32 u, u, 9;  and.b32 u, u, 0x00070007;  shr.u32 c, {source}, 12;  and.b32 c, c, {signs};  or.b32 c, c, u;
    shr.u32 t, c, 12;  or.b32 q{i}, c, t;"""

_EXPONENTS = """
    fma.rn.bf16x2 x, ${x}, ${lift}, z;  and.b32 a, x, 0x7FFF7FFF;  max.u16x2 a, a, ${low};  min.u16x2 a, a, ${high};
    shl.b32 a, a, 3;  sub.u32 a, a, ${base};"""

# h = |x| * factor in FP32 as the reference rounds it. E2M1's codes rise by 1 for every 0.5 up to 2, 1 up to 4 and 2 up
# to 6: code = rn(4 sat(h/2)) + rn(2 sat(h/2 - 1)) + rn(sat(h/2 - 2)), where rn is the rounding to an integer of adding
# 2**23. Each summand starts where the one before it is full, on an even code, so ties go to the even code. All of it
# runs on the FP32 pipe, which issues twice as often as the integer pipe.
_FACTORS = """
    mul.rn.f32 h, {value}, ${factor};  mul.rn.sat.f32 f, h, 0f3F000000;  fma.rn.f32 m, f, 0f40800000, 0f4B000000;
    fma.rn.sat.f32 f, h, 0f3F000000, 0fBF800000;  fma.rn.f32 m, f, 0f40000000, m;
    fma.rn.sat.f32 f, h, 0f3F000000, 0fC0000000;  add.rn.f32 m, m, f;  mov.b32 c{i}, m;"""

_PACK = """
    prmt.b32 q0, q0, q1, 0x0040;  prmt.b32 q2, q2, q3, 0x0040;  prmt.b32 $0, q0, q2, 0x5410;
}"""


def _from_exponents() -> str:
    # z: -0, which keeps the sign of a zero product
    lines = ["{ .reg .b32 a, u, t, c, k, x, z, q0, q1, q2, q3;  mov.b32 k, 0x04000400;  mov.b32 z, 0x80008000;"]
    for i in range(4):
        lines.append(_EXPONENTS.format(x=1 + i, low=5 + i, high=9 + i, base=13 + i, lift=21 + i))
        lines.append(_FROM_F16.format(i=i, source="x", signs=f"${17 + i}"))
    return "".join([*lines, _PACK])


def _from_factors() -> str:
    lines = ["{ .reg .b32 a, t, c0, c1, c2, c3, q0, q1, o, e, u;  .reg .f32 h, f, m, v;"]
    for half in range(2):
        for i in range(2):
            word, factor = 1 + 2 * half + i, 5 + 2 * half + i
            lines.append(f"\n    shl.b32 a, ${word}, 16;  mov.b32 v, a;  abs.f32 v, v;")
            lines.append(_FACTORS.format(value="v", factor=factor, i=2 * i))
            lines.append(f"\n    and.b32 a, ${word}, 0x7FFF0000;  mov.b32 v, a;")
            lines.append(_FACTORS.format(value="v", factor=factor, i=2 * i + 1))
        # Four codes into 16 bits; what 2**23 leaves above is cut off by the byte selection below.
        lines.append(f"\n    mad.lo.u32 c0, c1, 16, c0;  mad.lo.u32 c2, c3, 16, c2;  mad.lo.u32 q{half}, c2, 256, c0;")
    # Signs: the upper bytes of the odd elements stand where they belong, those of the even ones four bits higher.
    lines.append("""
    prmt.b32 q0, q0, q1, 0x5410;
    prmt.b32 o, $1, $2, 0x0073;  prmt.b32 u, $3, $4, 0x0073;  prmt.b32 o, o, u, 0x5410;  and.b32 o, o, 0x80808080;
    prmt.b32 e, $1, $2, 0x0051;  prmt.b32 u, $3, $4, 0x0051;  prmt.b32 e, e, u, 0x5410;  shr.u32 e, e, 4;
    and.b32 e, e, 0x08080808;  or.b32 o, o, e;  or.b32 q0, q0, o;
    and.b32 q0, q0, $9;  not.b32 u, $9;  and.b32 u, u, 0x77777777;  or.b32 $0, q0, u;
}""")
    return "".join(lines)


def registers(operands: int) -> str:
    """Return the constraint string of one output and four registers of each operand."""
    return "=r" + ",r" * (4 * operands)


E2M1_FROM_EXPONENTS = _from_exponents()
E2M1_FROM_FACTORS = _from_factors()
