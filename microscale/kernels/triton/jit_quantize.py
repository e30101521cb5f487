"""The jitted code of quantize: one source for every format, specialised by its properties.

Everything that decides a bit is integer arithmetic or one IEEE operation (`div_rn`, no fused multiply-add: kernels are
launched with `enable_fp_fusion=False`), so the interpreter, every architecture and the reference give the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton import packed
from microscale.kernels.triton.jit_common import bits_of, decode_float, float_of, power_of_two, scale_offset, widen

E2M1_FROM_EXPONENTS = tl.constexpr(packed.E2M1_FROM_EXPONENTS)
E2M1_FROM_EXPONENTS_REGISTERS = tl.constexpr(packed.registers(6))
E2M1_FROM_FACTORS = tl.constexpr(packed.E2M1_FROM_FACTORS)
E2M1_FROM_FACTORS_REGISTERS = tl.constexpr(packed.registers(3))


@triton.jit
def _round_float(a, random, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Magnitude codes of FP32 a in [0, max] for a float element with subnormals; see microscale.numerics.codec."""
    KEPT: tl.constexpr = 23 - MANTISSA
    UNIT: tl.constexpr = 2.0 ** (MANTISSA - LOWEST)
    MAGIC_EXPONENT: tl.constexpr = LOWEST - MANTISSA + 23
    MAGIC: tl.constexpr = 2.0**MAGIC_EXPONENT
    b = bits_of(a)
    if STOCHASTIC:
        normal = (b >> KEPT) + ((((b >> (KEPT - 9)) & 511) + 2 * random + 1) >> 9)
        fixed = (a * (UNIT * 512)).to(tl.int32)
        small = (fixed + 2 * random + 1) >> 9
    else:
        normal = (b + ((1 << (KEPT - 1)) - 1) + ((b >> KEPT) & 1)) >> KEPT
        small = bits_of(a + MAGIC) - ((MAGIC_EXPONENT + 127) << 23)
    return tl.where(a < 2.0**LOWEST, small, normal - ((126 + LOWEST) << MANTISSA))


@triton.jit
def _encode(
    y, random, thresholds, code_of,
    KIND: tl.constexpr, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr,
    MAX_CODE: tl.constexpr, NAN_CODE: tl.constexpr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Codes (int32) of FP32 y: round to nearest even or stochastically, saturate; NaN becomes NAN_CODE."""
    b = bits_of(y)
    magnitude_bits = b & 0x7FFFFFFF
    a = tl.minimum(float_of(magnitude_bits), MAX)
    negative = b < 0
    if KIND == 0:
        codes = _round_float(a, random, MANTISSA, LOWEST, STOCHASTIC)
        if SIGNED:
            codes = codes | (((b >> 31) & 1) << (WIDTH - 1))
        else:
            codes = tl.where(negative, 0, codes)
    elif KIND == 1:
        units = a * (2.0**MANTISSA)
        if STOCHASTIC:
            q = ((units * 512).to(tl.int32) + 2 * random + 1) >> 9
        else:
            q = bits_of(units + 8388608.0) - 0x4B000000
        codes = tl.where(negative, -q, q) & ((1 << WIDTH) - 1)
    else:
        rank = tl.zeros_like(b)
        for i in tl.static_range((1 << WIDTH) - 1):
            rank += (y >= tl.load(thresholds + i)).to(tl.int32)
        codes = tl.load(code_of + rank).to(tl.int32)
    return tl.where(magnitude_bits > 0x7F800000, NAN_CODE, codes)


@triton.jit
def _max_u16x2(a, b):
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _encode_by_fp8(values, factor, MANTISSA: tl.constexpr):
    """Codes of E4M3 or E5M2 elements by the hardware's conversion (sm_90 and later).

    `cvt.rn.satfinite` rounds to nearest even, saturates, and drops the sign of NaN, as the reference does.
    """
    scaled = values * factor[:, None]
    if MANTISSA == 3:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = scaled.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return codes


@triton.jit
def _e2m1_from_exponents(words, scale, amax_bits, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes of two E2M1 codes from words of two bf16, for block scales 2**(scale - 127).

    A power-of-two scale is an exponent subtraction: clamping and subtracting in both 16-bit lanes gives |x| / scale as
    exact f16 (see `packed.py`). Lanes are clamped to [2**-14, 6] * scale in the bits of bf16, where order is integer
    order. Blocks below 2**-112, whose lanes would leave the range of that subtraction, are first multiplied by 2**100,
    exactly; an all-zero block has codes 0 under any scale. A block that is not finite gets the code of +6 everywhere,
    as the reference does.
    """
    shape: tl.constexpr = (BLOCKS, BLOCK // 2)
    finite = amax_bits < 0x7F800000
    tiny = (scale < 15) & (amax_bits > 0)
    scale = tl.where(finite, tl.where(tiny, scale + 100, tl.maximum(scale, 15)), 127)
    lift = tl.where(tiny, 0x71807180, 0x3F803F80)  # 2**100 or 1, twice
    six = (scale + 2) << 7 | 0x40
    low = tl.where(finite, (scale - 14) << 7, six) * 0x10001
    base = ((scale - 15) << 10) * 0x10001
    signs = tl.where(finite, 0x00080008, 0)
    return tl.inline_asm_elementwise(
        E2M1_FROM_EXPONENTS, E2M1_FROM_EXPONENTS_REGISTERS,
        [words, tl.broadcast_to(low[:, None], shape), tl.broadcast_to((six * 0x10001)[:, None], shape),
         tl.broadcast_to(base[:, None], shape), tl.broadcast_to(signs[:, None], shape),
         tl.broadcast_to(lift[:, None], shape)],
        dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _e2m1_from_factors(words, factor, amax_bits, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes of two E2M1 codes from words of two bf16 and FP32 factors: fl32(x * factor) rounded to nearest even.

    A block that is not finite (amax_bits) gets the code of +6 everywhere, as the reference does.
    """
    shape: tl.constexpr = (BLOCKS, BLOCK // 2)
    keep = tl.where(amax_bits < 0x7F800000, -1, 0)
    return tl.inline_asm_elementwise(
        E2M1_FROM_FACTORS, E2M1_FROM_FACTORS_REGISTERS,
        [words, tl.broadcast_to(factor[:, None], shape), tl.broadcast_to(keep[:, None], shape)],
        dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _normalized_exponent(a, CARRY: tl.constexpr):
    """floor(log2 a) of FP32 a > 0, subnormals included, after adding CARRY to the mantissa bits."""
    small = a < 1.1754943508222875e-38
    y = tl.where(small, a * 16777216.0, a)
    return ((bits_of(y) + CARRY) >> 23) - 127 - tl.where(small, 24, 0)


@triton.jit
def _exponent_scale(
    amax, RULE: tl.constexpr, E_MAX: tl.constexpr, E_EMAX: tl.constexpr, E_PRECISION: tl.constexpr,
    S_BIAS: tl.constexpr, S_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Biased exponent codes (int32) of a finite amax."""
    if RULE == 2:
        exponent = _normalized_exponent(tl.div_rn(amax, tl.full(amax.shape, E_MAX, tl.float32)), 0x7FFFFF)
    elif RULE == 1:
        exponent = _normalized_exponent(amax, 0x7FFFFF) - E_EMAX
    elif RULE == 3:
        exponent = _normalized_exponent(amax, 1 << (22 - E_PRECISION)) - E_EMAX
    else:
        exponent = _normalized_exponent(amax, 0) - E_EMAX
    return tl.minimum(tl.maximum(exponent + S_BIAS, 0), S_MAX_CODE)


@triton.jit
def _scale_and_factor(
    amax_bits, encode, decode, HAS_OUTER: tl.constexpr, EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr,
    E_MAX: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_PRECISION: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr,
    S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_WIDTH: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_NATIVE: tl.constexpr,
):  # fmt: skip
    """Stored scale (int32 code, or FP32 when S_WIDE) and the factor that elements are multiplied with."""
    finite = amax_bits < 0x7F800000
    amax = float_of(amax_bits)
    nan = float_of(tl.full(amax_bits.shape, 0x7FC00000, tl.int32))
    if EXPONENT_ONLY:
        scale = _exponent_scale(amax, RULE, E_MAX, E_EMAX, E_PRECISION, S_BIAS, S_MAX_CODE)
        factor = power_of_two(S_BIAS - scale)
        scale = tl.where(finite, scale, S_NAN_CODE)
    else:
        if HAS_OUTER:
            value = amax * (encode * E_INVERSE)
        else:
            value = tl.div_rn(amax, tl.full(amax.shape, E_MAX, tl.float32))
        if S_WIDE:
            scale = tl.where(finite, tl.maximum(value, 1.1754943508222875e-38), nan)
            divisor = scale
        elif S_NATIVE:  # the scale is E4M3 and the hardware converts it, rounding to nearest even and saturating
            native = tl.where(finite, value, nan).to(tl.float8e4nv)
            scale = native.to(tl.uint8, bitcast=True)
            divisor = native.to(tl.float32)
        else:
            value = tl.minimum(value, S_MAX)
            scale = tl.where(finite, _round_float(value, 0, S_MANTISSA, S_LOWEST, False), S_NAN_CODE)
            divisor = decode_float(scale, S_MANTISSA, S_LOWEST, S_WIDTH, False)
        if HAS_OUTER:
            divisor = divisor * decode
        if S_NATIVE:  # the same IEEE result as the division, in a third of the instructions
            factor = tl.inline_asm_elementwise(
                "rcp.rn.f32 $0, $1;", "=r,r", [divisor], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            factor = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), divisor)
        factor = tl.minimum(factor, 3.4028234663852886e38)
    return scale, tl.where(finite, factor, nan)


@triton.jit
def _random_bytes(seed, index):
    """Byte index % 16 of the Philox block of counter index // 16; see microscale.numerics.rounding."""
    key, offset = tl.load(seed), tl.load(seed + 1)
    counter = index >> 4
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = offset.to(tl.uint32) + tl.zeros_like(c0)
    c3 = (offset >> 32).to(tl.uint32) + tl.zeros_like(c0)
    r0, r1, r2, r3 = tl.philox(key.to(tl.uint64), c0, c1, c2, c3)
    word = (index >> 2) & 3
    chosen = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    return ((chosen >> ((index & 3) * 8).to(tl.uint32)) & 255).to(tl.int32)


@triton.jit
def quantize_rows(
    x, qdata, scales, encode, decode, seed, thresholds, code_of,
    total, rows, columns, blocks, row_stride, column_stride,
    BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_P2: tl.constexpr,
    OUTER: tl.constexpr, STOCHASTIC: tl.constexpr, SWIZZLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ENCODER: tl.constexpr, OUTER_TOP: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr,
    E_PRECISION: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr,
    S_KIND: tl.constexpr, S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr,
    S_MAX: tl.constexpr, S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize `total` blocks along the rows of x; one program takes BLOCKS of them.

    x is rows of `columns` elements; block i is block i % blocks of row i // blocks; rows counts the rows of one matrix
    (it matters to swizzled scales only). Blocks are padded to BLOCK_P2 lanes, ragged rows with zeros. FLAT: x is dense
    and columns whole blocks, so that block i starts at i * BLOCK. ENCODER: 0 portable; 1 by the fp8 conversions of
    sm_90; 2 and 3 packed 16-bit arithmetic for dense bf16 to E2M1, x then being its 32-bit words.
    """
    first = tl.program_id(0) * BLOCKS
    if WIDE:
        first = first.to(tl.int64)
    block = first + tl.arange(0, BLOCKS)
    live = block < total
    if not FLAT or SWIZZLE or OUTER == 2:
        row, column_block = block // blocks, block % blocks
    else:
        row, column_block = block, block  # not used: a division costs more than the rest of the address
    lane = tl.arange(0, BLOCK_P2)
    if ENCODER >= 2:
        # Two bf16 lanes to a 32-bit word: half the instructions until the codes are packed.
        word = tl.arange(0, BLOCK // 2)
        words = tl.load(x + block[:, None] * (BLOCK // 2) + word[None, :], mask=live[:, None], other=0)
        pair = tl.reduce(words & 0x7FFF7FFF, 1, _max_u16x2)
        amax_bits = tl.maximum(pair & 0xFFFF, pair >> 16) << 16
    else:
        if FLAT:
            values = tl.load(x + block[:, None] * BLOCK + lane[None, :], mask=live[:, None], other=0.0)
        else:
            column = column_block[:, None] * BLOCK + lane[None, :]
            mask = live[:, None] & (column < columns) & (lane < BLOCK)[None, :]
            start = x + row[:, None].to(tl.int64) * row_stride
            values = tl.load(start + column.to(tl.int64) * column_stride, mask=mask, other=0.0)
        values = widen(values)
        amax_bits = tl.max(bits_of(values) & 0x7FFFFFFF, axis=1)
    HAS_OUTER: tl.constexpr = OUTER > 0
    if OUTER == 2:
        outer_encode = tl.load(encode + row, mask=live, other=1.0)
        outer_decode = tl.load(decode + row, mask=live, other=1.0)
    elif OUTER == 1:
        outer_encode, outer_decode = tl.load(encode), tl.load(decode)
    elif OUTER == 3:
        # From the amax in `encode`, as microscale.numerics.scaling.outer_from_amax; `decode` is written.
        tensor_amax = tl.load(encode)
        outer_encode = tl.minimum(tl.div_rn(OUTER_TOP, tensor_amax), 3.4028234663852886e38)
        outer_encode = tl.where(tensor_amax == 0, 1.0, outer_encode)
        outer_decode = tl.div_rn(1.0, outer_encode)
        if tl.program_id(0) == 0:
            tl.store(decode, outer_decode)
    else:
        outer_encode, outer_decode = 1.0, 1.0
    scale, factor = _scale_and_factor(
        amax_bits, outer_encode, outer_decode, HAS_OUTER, EXPONENT_ONLY, RULE, E_MAX, E_INVERSE, E_EMAX, E_PRECISION,
        S_BIAS, S_WIDE, S_MANTISSA, S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE,
        ENCODER > 0 and S_IS_E4M3,
    )  # fmt: skip
    if SWIZZLE:
        place = scale_offset(row, column_block, rows, blocks, True)
    else:
        place = block
    tl.store(scales + place, scale if S_WIDE else scale.to(tl.uint8), mask=live)
    if ENCODER == 2:
        octets = _e2m1_from_exponents(words, scale, amax_bits, BLOCKS, BLOCK)
        tl.store(qdata + block[:, None] * BLOCK_BYTES + word[None, :], octets, mask=live[:, None])
    elif ENCODER == 3:
        octets = _e2m1_from_factors(words, factor, amax_bits, BLOCKS, BLOCK)
        tl.store(qdata + block[:, None] * BLOCK_BYTES + word[None, :], octets, mask=live[:, None])
    else:
        if STOCHASTIC:
            random = _random_bytes(seed, block[:, None].to(tl.int64) * BLOCK + lane[None, :])
        else:
            random = 0
        if ENCODER == 1:
            codes = _encode_by_fp8(values, factor, E_MANTISSA)
        else:
            codes = _encode(
                values * factor[:, None], random, thresholds, code_of, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
                E_MAX_CODE, E_NAN_CODE, E_SIGNED, STOCHASTIC,
            )  # fmt: skip
        _store_packed(qdata, codes, block, live, BLOCK, BLOCK_P2, BLOCK_BYTES, BLOCKS, GROUP, E_WIDTH)


@triton.jit
def _store_packed(
    qdata, codes, block, live, BLOCK: tl.constexpr, BLOCK_P2: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store codes [BLOCKS, BLOCK_P2] as a little-endian bit stream, GROUP codes to GROUP * WIDTH / 8 bytes."""
    GROUPS: tl.constexpr = BLOCK_P2 // GROUP
    OCTETS: tl.constexpr = GROUP * WIDTH // 8
    if GROUP == 2:
        low, high = tl.split(tl.reshape(codes.to(tl.int32), (BLOCKS, GROUPS, 2)))
        codes = low | (high << WIDTH)
    elif GROUP > 2:
        shift = (tl.arange(0, GROUP) * WIDTH)[None, None, :]
        if GROUP * WIDTH > 31:
            codes = codes.to(tl.int64)
        codes = tl.sum(tl.reshape(codes, (BLOCKS, GROUPS, GROUP)) << shift, axis=2)
    group = tl.arange(0, GROUPS)
    mask = live[:, None] & (group * GROUP < BLOCK)[None, :]
    start = qdata + block[:, None] * BLOCK_BYTES + group[None, :] * OCTETS
    for i in tl.static_range(OCTETS):
        tl.store(start + i, ((codes >> (8 * i)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def finite_amax(x, out, total, SIZE: tl.constexpr, ITERATIONS: tl.constexpr):
    """Atomic maximum of |x| over finite values of a dense tensor, as FP32 bits in int32 out[0], which starts at 0."""
    offset = tl.program_id(0).to(tl.int64) * (SIZE * ITERATIONS) + tl.arange(0, SIZE)
    best = tl.zeros((SIZE,), tl.int32)
    for i in tl.static_range(ITERATIONS):
        at = offset + i * SIZE
        b = bits_of(widen(tl.load(x + at, mask=at < total, other=0.0))) & 0x7FFFFFFF
        best = tl.maximum(best, tl.where(b < 0x7F800000, b, 0))
    tl.atomic_max(out, tl.max(best, axis=0))
