"""The jitted code of dequantize: every format and layout, specialised by properties.

`dequantize_runs` serves dense rows of whole blocks: a thread reads eight neighbouring codes as words and writes their
values, 16 bytes of them side by side with those of the next thread, so that stores fill whole sectors. Only two things
cross threads: the look-up of a codebook, by shuffles, and FP32 output, 32 bytes a thread, which Triton puts in order
through shared memory. `dequantize_rows` serves everything else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, scale_offset
from microscale.kernels.triton.jit_decode import decode, decode_run, decode_scale, lift


@triton.jit
def _store_rounded(out, values, live, EVEN: tl.constexpr, INTERPRETED: tl.constexpr):
    """Store FP32 values rounded to nearest even to out's dtype, where `live` unless EVEN."""
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion truncates; compiled, the hardware's rounds to nearest even.
        b = bits_of(values)
        even = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.int16)
        rounded = tl.where((b & 0x7FFFFFFF) > 0x7F800000, tl.full(b.shape, 0x7FC0, tl.int16), even)
        rounded = rounded.to(tl.bfloat16, bitcast=True)
    else:
        rounded = values.to(out.dtype.element_ty)
    if EVEN:
        tl.store(out, rounded)
    else:
        tl.store(out, rounded, mask=live)


# -- dense rows of whole blocks ----------------------------------------------------------------------------------------


@triton.jit
def _load(place, live, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=live)


@triton.jit
def _load_run(words, t, live, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The words of run t, WIDTH bytes; of 6-bit codes the second word has only 16 bits that are the run's."""
    if WIDTH == 4:
        return (_load(words + t, live, EVEN),)
    elif WIDTH == 8:
        pair = _load(words + (t * 2)[:, None] + tl.arange(0, 2)[None, :], live[:, None], EVEN)
        return tl.split(pair)
    else:  # a run starts on a word, or in the middle of one
        place = words + ((t * 3) >> 1)
        low = _load(place, live, EVEN).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = _load(place + 1, live, EVEN).to(tl.uint32, bitcast=True).to(tl.uint64)
        both = (low | (high << 32)) >> ((t & 1) * 16).to(tl.uint64)
        return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def _swizzled_row(matrix, row, rows, blocks):
    """Where the scales of a row start in the 128 x 4 tiles of a matrix of `rows` rows."""
    tile_row = matrix * ((rows + 127) // 128) + (row >> 7)
    return tile_row * ((blocks + 3) // 4) * 512 + (row & 31) * 16 + ((row >> 5) & 3) * 4


@triton.jit
def _swizzled_column(column):
    return (column >> 2) * 512 + (column & 3)


@triton.jit
def dequantize_runs(
    qdata, scales, outer, table, out, runs, rows, blocks,
    BLOCK: tl.constexpr, T: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    MATRICES: tl.constexpr, OUTER: tl.constexpr, SWIZZLE: tl.constexpr, FOLD: tl.constexpr, S_WIDE: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, S_BIAS: tl.constexpr, S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr,
    S_LOWEST: tl.constexpr, S_SIGNED: tl.constexpr, S_NAN: tl.constexpr, S_TOP: tl.constexpr,
    E_FORM: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_NAN: tl.constexpr, E_TOP: tl.constexpr,
    E_LIFT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Values of `runs` runs of eight codes: (code * scale) * outer, rounded once to out's dtype.

    A program takes T * RUNS runs, T threads each RUNS of them, T apart. EVEN: programs are full. OUTER: 0 none, 1 one
    for all, 2 by row. ROWS, where rows of `blocks` blocks count (SWIZZLE, OUTER 2): 1 programs start anew with each
    row, and take a multiple of four blocks; 2 they do not start anew. MATRICES: there are several, each of `rows` rows
    and, for ROWS 2, no smaller than a program. FOLD: the scale is lifted in the place of the codes.
    """
    SPAN: tl.constexpr = T * RUNS
    PER_BLOCK: tl.constexpr = BLOCK // 8
    pid = tl.program_id(0)
    t = tl.arange(0, T)
    # the first run and its block, how many runs are left from there, row and column of the block
    if ROWS == 1:
        chunks = (blocks + SPAN // PER_BLOCK - 1) // (SPAN // PER_BLOCK)
        row = pid // chunks
        column = (pid - row * chunks) * (SPAN // PER_BLOCK)
        block = row * blocks + column
        first = block.to(tl.int64) * PER_BLOCK
        left = (blocks - column) * PER_BLOCK
    else:
        first = pid.to(tl.int64) * SPAN
        left = runs - pid * SPAN
        if PER_BLOCK > SPAN:
            block = pid // (PER_BLOCK // SPAN)
        else:
            block = pid * (SPAN // PER_BLOCK)
        if ROWS == 2:
            row = block // blocks
            column = block - row * blocks
    words = qdata.to(tl.pointer_type(tl.int32)) + first * E_WIDTH // 4
    out += first * 8
    if ROWS > 0:
        matrix = 0
        matrix_row = row
        if MATRICES:
            matrix = row // rows
            matrix_row = row - matrix * rows
    if not SWIZZLE:
        scales += block
    elif ROWS == 1:
        scales += _swizzled_row(matrix, matrix_row, rows, blocks) + _swizzled_column(column)
    if OUTER == 1:
        factor = tl.load(outer)
    elif OUTER == 2 and ROWS == 1:
        factor = tl.load(outer + row)

    codes = ()
    stored = ()
    factors = ()
    for j in tl.static_range(RUNS):
        live = t < left - j * T
        codes += (_load_run(words + j * (T * E_WIDTH // 4), t, live, E_WIDTH, EVEN),)
        place = t // PER_BLOCK + j * T // PER_BLOCK
        if ROWS == 2:
            here = column + place
            # Exact below 2**20: the quotient is half a block away from the next row, further than it may be wrong.
            down = ((here.to(tl.float32) + 0.5) * (1.0 / blocks)).to(tl.int32)
            if SWIZZLE:
                here_matrix = matrix
                here_row = matrix_row + down
                if MATRICES:
                    over = (here_row >= rows).to(tl.int32)
                    here_matrix += over
                    here_row -= over * rows
                place = _swizzled_row(here_matrix, here_row, rows, blocks) + _swizzled_column(here - down * blocks)
            if OUTER == 2:
                factors += (_load(outer + row + down, live, EVEN),)
        elif SWIZZLE:
            place = _swizzled_column(place)
        stored += (_load(scales + place, live, EVEN),)

    for j in tl.static_range(RUNS):
        scale = decode_scale(
            stored[j], table, S_WIDE, EXPONENT_ONLY, S_BIAS, S_WIDTH, S_MANTISSA, S_LOWEST, S_SIGNED, S_NAN, S_TOP
        )
        if FOLD:
            scale = lift(scale, E_LIFT)
            run = decode_run(codes[j], table, E_FORM, E_WIDTH, E_MANTISSA, E_NAN, E_TOP, 0, INTERPRETED)
        else:
            run = decode_run(codes[j], table, E_FORM, E_WIDTH, E_MANTISSA, E_NAN, E_TOP, E_LIFT, INTERPRETED)
        values = ()
        for i in tl.static_range(8):
            value = run[i] * scale
            if OUTER == 2 and ROWS == 2:
                value = value * factors[j]
            elif OUTER > 0:
                value = value * factor
            values += (value,)
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        odd = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
        places = out + j * (T * 8) + (t * 8)[:, None] + tl.arange(0, 8)[None, :]
        live = t < left - j * T
        _store_rounded(places, tl.reshape(tl.join(even, odd), (T, 8)), live[:, None], EVEN, INTERPRETED)


# -- everything else ---------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_rows(
    qdata, scales, outer, table, out,
    total, rows, columns, blocks, outer_row_stride, outer_block_stride,
    BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_P2: tl.constexpr,
    OUTER: tl.constexpr, SWIZZLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, S_WIDE: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, S_BIAS: tl.constexpr, S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr,
    S_LOWEST: tl.constexpr, S_SIGNED: tl.constexpr, S_NAN: tl.constexpr, S_TOP: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_SIGNED: tl.constexpr, E_NAN: tl.constexpr, E_TOP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Values of `total` blocks along rows of `columns` elements: (code * scale) * outer, rounded once to out's dtype.

    FLAT: columns are whole blocks of BLOCK_P2 lanes, so that block i starts at i * BLOCK. OUTER: 0 none, 1 one for all,
    2 by row and block.
    """
    first = tl.program_id(0) * BLOCKS
    if WIDE:
        first = first.to(tl.int64)
    block = first + tl.arange(0, BLOCKS)
    live = block < total
    if not FLAT or SWIZZLE or OUTER == 2:
        row, column_block = block // blocks, block % blocks
    else:
        row, column_block = block, block
    if SWIZZLE:
        place = scale_offset(row, column_block, rows, blocks, True)
    else:
        place = block
    scale = decode_scale(
        tl.load(scales + place, mask=live, other=0), table,
        S_WIDE, EXPONENT_ONLY, S_BIAS, S_WIDTH, S_MANTISSA, S_LOWEST, S_SIGNED, S_NAN, S_TOP,
    )  # fmt: skip
    if OUTER == 2:
        factor = tl.load(outer + row * outer_row_stride + column_block * outer_block_stride, mask=live, other=1.0)
    elif OUTER == 1:
        factor = tl.load(outer)
    lane = tl.arange(0, BLOCK_P2)
    if FLAT and E_WIDTH == 4:
        octet = tl.arange(0, BLOCK // 2)
        two = tl.load(qdata + block[:, None] * BLOCK_BYTES + octet[None, :], mask=live[:, None], other=0).to(tl.int32)
        codes = tl.reshape(tl.join(two & 15, two >> 4), (BLOCKS, BLOCK))
    elif FLAT and E_WIDTH == 8:
        codes = tl.load(qdata + block[:, None] * BLOCK_BYTES + lane[None, :], mask=live[:, None], other=0).to(tl.int32)
    else:
        inside = live[:, None] & (lane < BLOCK)[None, :]
        bit = lane * E_WIDTH
        start = qdata + block[:, None] * BLOCK_BYTES
        word = tl.load(start + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
        if GROUP > 2:  # a code may cross into the next byte
            crosses = inside & (bit % 8 + E_WIDTH > 8)[None, :]
            word = word | (tl.load(start + (bit // 8 + 1)[None, :], mask=crosses, other=0).to(tl.int32) << 8)
        codes = (word >> (bit % 8)[None, :]) & ((1 << E_WIDTH) - 1)
    values = decode(codes, table, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_SIGNED, E_NAN, E_TOP) * scale[:, None]
    if OUTER == 2:
        values = values * factor[:, None]
    elif OUTER == 1:
        values = values * factor
    if FLAT:
        _store_rounded(out + block[:, None] * BLOCK + lane[None, :], values, live[:, None], False, INTERPRETED)
    else:
        column = column_block[:, None] * BLOCK + lane[None, :]
        mask = live[:, None] & (column < columns) & (lane < BLOCK)[None, :]
        _store_rounded(out + row[:, None].to(tl.int64) * columns + column, values, mask, False, INTERPRETED)
