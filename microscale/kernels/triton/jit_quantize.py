"""The jitted code of quantize: one source for every format, specialised by its properties.

Everything that decides a bit is integer arithmetic or one IEEE operation (`div_rn`, no fused multiply-add: kernels are
launched with `enable_fp_fusion=False`), so the interpreter, every architecture and the reference give the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton import packed
from microscale.kernels.triton.jit_common import bits_of, scale_offset, widen
from microscale.kernels.triton.jit_encode import encode, random_bytes, store_packed
from microscale.kernels.triton.jit_scale import BY_ROW, outer_scale, scale_and_factor
from microscale.kernels.triton.jit_search import block_errors, first_best

E2M1_FROM_EXPONENTS = tl.constexpr(packed.E2M1_FROM_EXPONENTS)
E2M1_FROM_EXPONENTS_REGISTERS = tl.constexpr(packed.registers(6))
E2M1_FROM_FACTORS = tl.constexpr(packed.E2M1_FROM_FACTORS)
E2M1_FROM_FACTORS_REGISTERS = tl.constexpr(packed.registers(3))


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
def _e2m1_from_factors(words, factor, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes of two E2M1 codes from words of two bf16 and FP32 factors: fl32(x * factor) rounded to nearest even.

    A block whose factor is NaN gets the code of +6 everywhere, as the reference does.
    """
    shape: tl.constexpr = (BLOCKS, BLOCK // 2)
    keep = tl.where(factor == factor, -1, 0)
    return tl.inline_asm_elementwise(
        E2M1_FROM_FACTORS, E2M1_FROM_FACTORS_REGISTERS,
        [words, tl.broadcast_to(factor[:, None], shape), tl.broadcast_to(keep[:, None], shape)],
        dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def quantize_rows(
    x, qdata, scales, source, decode, seed, thresholds, code_of, tile_bits, tile_choice, multipliers,
    total, lines, count, rows, columns, blocks, tile_rows, tile_columns, matrix_stride, row_stride, column_stride,
    BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_P2: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, OUTER_TOP: tl.constexpr, WRITES_OUTER: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr, METRIC: tl.constexpr,
    STOCHASTIC: tl.constexpr, SWIZZLE: tl.constexpr, FLAT: tl.constexpr, DOWN: tl.constexpr, BATCHED: tl.constexpr,
    WIDE: tl.constexpr, ENCODER: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr,
    E_PRECISION: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr,
    E_SUBNORMALS: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_SUBNORMALS: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize `total` blocks along the rows of x; one program takes BLOCKS of them.

    x is matrices of `rows` rows, `lines` in all, of `columns` elements; block i is block i % blocks of line
    i // blocks. Blocks are padded to BLOCK_P2 lanes, ragged rows with zeros. FLAT: x is dense and columns whole blocks,
    so that block i starts at i * BLOCK. DOWN: neighbours in memory are of neighbouring rows, so blocks are taken down
    the rows. ENCODER: 0 portable; 1 by the fp8 conversions of sm_90; 2 and 3 packed 16-bit arithmetic for dense bf16 to
    E2M1, x then being its 32-bit words.

    source, decode, count: the outer scale (`amax.py`); WRITES_OUTER: the first program writes `decode`. TILE_BLOCKS:
    blocks of a scale tile, 0 if there is none; then the bits of its amax are in tile_bits [matrices, tile_rows,
    tile_columns]. CANDIDATES: how many `multipliers` there are, 0 if the scale rule has none; the best of each tile is
    in tile_choice, that of a block without a tile is searched here.
    """
    HAS_OUTER: tl.constexpr = OUTER > 0
    SEARCHES: tl.constexpr = CANDIDATES > 0 and TILE_BLOCKS == 0
    first = tl.program_id(0) * BLOCKS
    if WIDE:
        first = first.to(tl.int64)
    block = first + tl.arange(0, BLOCKS)
    live = block < total
    if DOWN:
        row, column_block = block % lines, block // lines
        block = row * blocks + column_block
    elif not FLAT or SWIZZLE or OUTER >= BY_ROW or TILE_BLOCKS > 0:
        row, column_block = block // blocks, block % blocks
    else:
        row, column_block = block, block  # not used: a division costs more than the rest of the address
    lane = tl.arange(0, BLOCK_P2)
    if ENCODER >= 2:
        # Two bf16 lanes to a 32-bit word: half the instructions until the codes are packed.
        word = tl.arange(0, BLOCK // 2)
        words = tl.load(x + block[:, None] * (BLOCK // 2) + word[None, :], mask=live[:, None], other=0)
    else:
        if FLAT:
            start, inside = x + block.to(tl.int64) * BLOCK, tl.where(live, BLOCK, 0)
            values = tl.load(x + block[:, None] * BLOCK + lane[None, :], mask=live[:, None], other=0.0)
        else:
            if BATCHED:
                start = x + (row // rows).to(tl.int64) * matrix_stride + (row % rows).to(tl.int64) * row_stride
            else:
                start = x + row.to(tl.int64) * row_stride
            start += column_block.to(tl.int64) * BLOCK * column_stride
            inside = tl.where(live, columns - column_block * BLOCK, 0)
            mask = (lane[None, :] < inside[:, None]) & (lane < BLOCK)[None, :]
            values = tl.load(start[:, None] + (lane.to(tl.int64) * column_stride)[None, :], mask=mask, other=0.0)
        values = widen(values)
    if TILE_BLOCKS > 0:
        if TILE_ROWS == 1:
            tile = row * tile_columns + column_block // TILE_BLOCKS
        else:
            tile = (row // rows * tile_rows + row % rows // TILE_ROWS) * tile_columns + column_block // TILE_BLOCKS
        amax_bits = tl.load(tile_bits + tile, mask=live, other=0)
    elif ENCODER >= 2:
        pair = tl.reduce(words & 0x7FFF7FFF, 1, _max_u16x2)
        amax_bits = tl.maximum(pair & 0xFFFF, pair >> 16) << 16
    else:
        amax_bits = tl.max(bits_of(values) & 0x7FFFFFFF, axis=1)
    outer_amax, outer_encode, outer_decode = outer_scale(
        source, decode, count, row, rows, live, OUTER, OUTER_LANES, OUTER_TOP
    )
    if WRITES_OUTER:
        if tl.program_id(0) == 0:
            tl.store(decode, outer_decode)
    multiplier = 1.0
    if SEARCHES:
        if OUTER >= BY_ROW:
            parts = outer_amax[:, None], outer_encode[:, None], outer_decode[:, None]
        else:
            parts = outer_amax, outer_encode, outer_decode
        errors = block_errors(
            start, inside, column_stride, amax_bits, tl.load(multipliers + tl.arange(0, CANDIDATES)),
            parts[0], parts[1], parts[2], thresholds, code_of, METRIC, HAS_OUTER, OUTER_TOP, BLOCK,
            EXPONENT_ONLY, RULE, E_INVERSE, E_EMAX, E_PRECISION, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
            E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SUBNORMALS, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST,
            S_MAX, S_MAX_CODE, S_NAN_CODE, S_SIGNED, S_SUBNORMALS, S_BIAS, S_WIDE,
        )  # fmt: skip
        multiplier = tl.load(multipliers + first_best(errors))
    elif CANDIDATES > 0:
        multiplier = tl.load(multipliers + tl.load(tile_choice + tile, mask=live, other=0))
    scale, factor = scale_and_factor(
        amax_bits, outer_encode, outer_decode, HAS_OUTER, EXPONENT_ONLY, RULE, E_MAX, E_INVERSE, E_EMAX, E_PRECISION,
        S_BIAS, S_WIDE, S_MANTISSA, S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE,
        ENCODER > 0 and S_IS_E4M3, S_SIGNED, S_SUBNORMALS, multiplier, CANDIDATES > 0,
    )  # fmt: skip
    if SWIZZLE:
        place = scale_offset(row, column_block, rows, blocks, True)
    else:
        place = block
    tl.store(scales + place, scale if S_WIDE else scale.to(scales.dtype.element_ty), mask=live)
    if ENCODER == 2:
        octets = _e2m1_from_exponents(words, scale, amax_bits, BLOCKS, BLOCK)
        tl.store(qdata + block[:, None] * BLOCK_BYTES + word[None, :], octets, mask=live[:, None])
    elif ENCODER == 3:
        octets = _e2m1_from_factors(words, factor, BLOCKS, BLOCK)
        tl.store(qdata + block[:, None] * BLOCK_BYTES + word[None, :], octets, mask=live[:, None])
    else:
        if STOCHASTIC:
            random = random_bytes(seed, block[:, None].to(tl.int64) * BLOCK + lane[None, :])
        else:
            random = 0
        if ENCODER == 1:
            codes = _encode_by_fp8(values, factor, E_MANTISSA)
        else:
            codes = encode(
                values * factor[:, None], random, thresholds, code_of, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
                E_MAX_CODE, E_NAN_CODE, E_SIGNED, STOCHASTIC, E_SUBNORMALS, E_SYMMETRIC, E_LEVELS,
            )  # fmt: skip
        store_packed(qdata, codes, block, live, BLOCK, BLOCK_P2, BLOCK_BYTES, BLOCKS, GROUP, E_WIDTH)
