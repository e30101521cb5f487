"""Jitted code of the fused producers: SiLU(gate) * up and RMSNorm, rounded to bf16 in registers and quantized there.

As in `jit_blocks.py` threads own blocks as tuples of words, two bf16 to a word. The unit here is a *run* of 16 or 32
elements, which is stored 16 neighbouring bytes to a thread: several blocks, one, or a part of one.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton.jit_activations import fused_multiply_add, inverse_rms, silu, sum_neighbours
from microscale.kernels.triton.jit_blocks import _outer, _shared
from microscale.kernels.triton.jit_common import float_of, scale_offset
from microscale.kernels.triton.jit_runs import quantize_run
from microscale.kernels.triton.jit_words import _round_pair, amax_bits, high, load_words, low, max_pair, store_words
from microscale.numerics import activations

LANE = tl.constexpr(activations.RUN)  # elements in a row that are summed before all others
BY_ROW = tl.constexpr(outer_scales.BY_ROW)


@triton.jit
def silu_mul_words(gate, up, COUNT: tl.constexpr, INTERPRETED: tl.constexpr):
    """silu(gate) * up of COUNT words, rounded to bf16."""
    words = ()
    for i in tl.static_range(COUNT):
        first = silu(low(gate[i]), INTERPRETED) * low(up[i])
        second = silu(high(gate[i]), INTERPRETED) * high(up[i])
        words = words + (_round_pair(first, second, INTERPRETED),)
    return words


@triton.jit
def _shared_bits(words, T: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr):
    """Bits of the amax of the block that neighbouring runs are parts of, or () for blocks within a run."""
    if BLOCK <= RUN:
        return ()
    else:
        return (_shared(amax_bits(words, 0, RUN // 2, PORTABLE), T, BLOCK // RUN),)


@triton.jit
def _scale_place(whole, row, run, rows, row_runs, RUN: tl.constexpr, BLOCK: tl.constexpr, SWIZZLE: tl.constexpr):
    """Where the first scale of a run stands: run `run` of its row, `whole` of all rows."""
    if SWIZZLE:
        return scale_offset(row, run * RUN // BLOCK, rows, row_runs * RUN // BLOCK, True)
    else:
        return whole * RUN // BLOCK


@triton.jit
def _store_scales(scales, place, made, live, T: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """Store the scales of runs; where runs are parts of a block, the first of them stores its scale."""
    if BLOCK > RUN:
        live = live & (tl.arange(0, T) % (BLOCK // RUN) == 0)
    for i in tl.static_range(len(made)):
        tl.store(scales + place + i, made[i], mask=live)


@triton.jit
def silu_mul_quantize_runs(
    gate, up, qdata, scales, source, decode, seed, thresholds, code_of, multipliers,
    total, count, rows, row_runs, gate_row_words, up_row_words,
    T: tl.constexpr, RUN: tl.constexpr, FLAT: tl.constexpr, SWIZZLE: tl.constexpr, WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr, OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, WRITES_OUTER: tl.constexpr,
    OUTER_TOP: tl.constexpr, STOCHASTIC: tl.constexpr, ENCODER: tl.constexpr, PTX: tl.constexpr,
    CONSTRAINTS: tl.constexpr, PORTABLE: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize silu(gate) * up: `total` runs, `row_runs` to a row.

    gate and up are words, rows `gate_row_words` and `up_row_words` apart; FLAT: both are dense. `rows`: of one matrix,
    for swizzled scales.
    """
    WORDS: tl.constexpr = RUN // 2
    OUT: tl.constexpr = RUN * E_WIDTH // 32
    INNER: tl.constexpr = min(BLOCK, RUN)  # what a run holds of a block
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    run = pid * T + tl.arange(0, T)
    live = run < total
    row = run
    if SWIZZLE or OUTER >= BY_ROW or not FLAT:
        row = run // row_runs
    if FLAT:
        gate_start, up_start = run * WORDS, run * WORDS
    else:
        gate_start = row * gate_row_words + (run % row_runs) * WORDS
        up_start = row * up_row_words + (run % row_runs) * WORDS
    amax, encode, decoded = _outer(source, decode, count, row, rows, live, OUTER, OUTER_LANES, WRITES_OUTER, OUTER_TOP)
    gates = load_words(gate, gate_start, live, T, WORDS)
    words = silu_mul_words(gates, load_words(up, up_start, live, T, WORDS), WORDS, INTERPRETED)
    bits = _shared_bits(words, T, RUN, BLOCK, PORTABLE)
    made, codes = quantize_run(
        words, bits, run.to(tl.int64) * (RUN // 16), amax, encode, decoded, seed, thresholds, code_of, multipliers,
        RUN, OUTER > 0, OUTER_TOP, STOCHASTIC, ENCODER, PTX, CONSTRAINTS, PORTABLE,
        INNER, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
        E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX, S_MAX_CODE,
        S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
    )  # fmt: skip
    place = _scale_place(run, row, run % row_runs, rows, row_runs, RUN, BLOCK, SWIZZLE)
    _store_scales(scales, place, made, live, T, RUN, BLOCK)
    store_words(qdata, run * OUT, live, codes, T, OUT)


@triton.jit
def _add_squares(totals, words, COUNT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sums for each lane and each place in an octet, with the squares of COUNT words added in order."""
    made = ()
    for lane in tl.static_range(2 * COUNT // LANE):
        sums = totals[lane]
        for i in tl.static_range(LANE // 8):
            more = ()
            for j in tl.static_range(4):
                word = words[lane * (LANE // 2) + 4 * i + j]
                first, second = low(word), high(word)
                more = more + (
                    fused_multiply_add(first, first, sums[2 * j], INTERPRETED),
                    fused_multiply_add(second, second, sums[2 * j + 1], INTERPRETED),
                )
            sums = more
        made = made + (sums,)
    return made


@triton.jit
def _sum_of_eight(sums):
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))


@triton.jit
def _scaled_words(words, inverse, weight, start, live, T: tl.constexpr, COUNT: tl.constexpr, WEIGHT: tl.constexpr,
                  INTERPRETED: tl.constexpr):  # fmt: skip
    """(x * inverse) * weight of COUNT words of x, rounded to bf16. WEIGHT: 0 none, 1 words of bf16, 2 FP32."""
    if WEIGHT == 1:
        factors = load_words(weight, start, live, T, COUNT)
    elif WEIGHT == 2:
        factors = load_words(weight, start * 2, live, T, COUNT * 2)
    scaled = ()
    for i in tl.static_range(COUNT):
        first, second = low(words[i]) * inverse, high(words[i]) * inverse
        if WEIGHT == 1:
            first, second = first * low(factors[i]), second * high(factors[i])
        elif WEIGHT == 2:
            first, second = first * float_of(factors[2 * i]), second * float_of(factors[2 * i + 1])
        scaled = scaled + (_round_pair(first, second, INTERPRETED),)
    return scaled


@triton.jit
def _normalized_rows(
    x, row, lane, known, columns, row_runs, row_words, eps_bits, T: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, LEVELS: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(the words of the rows, for each chunk, if HELD; 1 / rms of each thread's row)."""
    zero = tl.zeros((T,), tl.float32)
    eight = (zero, zero, zero, zero, zero, zero, zero, zero)
    sums = (eight, eight) if RUN > LANE else (eight,)
    held = ()
    for c in tl.static_range(CHUNKS):
        words = _load_run(x, row, c * (T // ROWS) + lane, known, row_runs, row_words, T, RUN)
        sums = _add_squares(sums, words, RUN // 2, INTERPRETED)
        if HELD:
            held = held + (words,)
    totals = _sum_of_eight(sums[0])
    if RUN > LANE:
        totals += _sum_of_eight(sums[1])
    return held, inverse_rms(sum_neighbours(totals, T, LEVELS), columns, eps_bits, T, ROWS)


@triton.jit
def _load_run(x, row, run, known, row_runs, row_words, T: tl.constexpr, RUN: tl.constexpr):
    """The words of run `run` of each thread's row, zeros past its end."""
    return load_words(x, row * row_words + run * (RUN // 2), known & (run < row_runs), T, RUN // 2)


@triton.jit
def rms_norm_quantize_runs(
    x, weight, qdata, scales, source, decode, seed, thresholds, code_of, multipliers,
    total_rows, count, rows, columns, row_runs, row_words, eps_bits,
    T: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, WEIGHT: tl.constexpr, SWIZZLE: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
    OUTER: tl.constexpr, OUTER_LANES: tl.constexpr, WRITES_OUTER: tl.constexpr, OUTER_TOP: tl.constexpr,
    STOCHASTIC: tl.constexpr, ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    PORTABLE: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, EXPONENT_ONLY: tl.constexpr, CARRY: tl.constexpr,
    E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr, E_KIND: tl.constexpr, E_WIDTH: tl.constexpr,
    E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr, E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr,
    E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_BIAS: tl.constexpr,
    S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Normalize and quantize ROWS rows a program, T // ROWS threads to a row, run after run in CHUNKS steps.

    x is words, rows `row_words` apart. HELD: the words stay in registers between the sum and the codes; otherwise they
    are loaded again, from the cache.
    """
    OUT: tl.constexpr = RUN * E_WIDTH // 32
    INNER: tl.constexpr = min(BLOCK, RUN)  # what a run holds of a block
    row = tl.program_id(0) * ROWS + tl.arange(0, T) // (T // ROWS)
    lane = tl.arange(0, T) % (T // ROWS)
    known = row < total_rows
    if WIDE:
        row = row.to(tl.int64)
    held, inverse = _normalized_rows(
        x, row, lane, known, columns, row_runs, row_words, eps_bits, T, RUN, ROWS, LEVELS, CHUNKS, HELD, INTERPRETED
    )
    amax, encode, decoded = _outer(source, decode, count, row, rows, known, OUTER, OUTER_LANES, WRITES_OUTER, OUTER_TOP)
    for c in tl.static_range(CHUNKS):
        run = c * (T // ROWS) + lane
        live = known & (run < row_runs)
        words = held[c] if HELD else _load_run(x, row, run, known, row_runs, row_words, T, RUN)
        words = _scaled_words(words, inverse, weight, run * (RUN // 2), live, T, RUN // 2, WEIGHT, INTERPRETED)
        whole = row * row_runs + run
        bits = _shared_bits(words, T, RUN, BLOCK, PORTABLE)
        made, codes = quantize_run(
            words, bits, whole.to(tl.int64) * (RUN // 16), amax, encode, decoded, seed, thresholds, code_of,
            multipliers, RUN, OUTER > 0, OUTER_TOP, STOCHASTIC, ENCODER, PTX, CONSTRAINTS, PORTABLE,
            INNER, CANDIDATES, EXPONENT_ONLY, CARRY, E_INVERSE, E_EMAX, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX,
            E_MAX_CODE, E_NAN_CODE, E_SIGNED, E_SYMMETRIC, E_LEVELS, S_WIDTH, S_MANTISSA, S_LOWEST, S_MAX, S_MAX_CODE,
            S_NAN_CODE, S_SIGNED, S_BIAS, S_WIDE, S_IS_E4M3,
        )  # fmt: skip
        place = _scale_place(whole, row, run, rows, row_runs, RUN, BLOCK, SWIZZLE)
        _store_scales(scales, place, made, live, T, RUN, BLOCK)
        store_words(qdata, whole * OUT, live, codes, T, OUT)


@triton.jit
def _finite_keys(words, best, COUNT: tl.constexpr, PORTABLE: tl.constexpr):
    """Maxima, in both halves of a word, of |x| + 0x80 in bits of bf16; what is not finite wraps to below 0x80."""
    for i in tl.static_range(COUNT):
        key = ((words[i] & 0x7FFF7FFF) + 0x00800080) & 0x7FFF7FFF
        best = max_pair(best, key, PORTABLE)
    return best


@triton.jit
def rms_norm_amax_runs(
    x, weight, parts, total_rows, columns, row_runs, row_words, eps_bits,
    T: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, WEIGHT: tl.constexpr, PROGRAMS: tl.constexpr, INTERPRETED: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The amax over finite values that the rows of a program have once they are normalized: FP32 parts[program].

    The PROGRAMS share the rows; arguments as of `rms_norm_quantize_runs`.
    """
    lane = tl.arange(0, T) % (T // ROWS)
    best = tl.full((T,), 0x00800080, tl.int32)
    for first in range(tl.program_id(0) * ROWS, total_rows, PROGRAMS * ROWS):
        row = (first + tl.arange(0, T) // (T // ROWS)).to(tl.int64)
        known = row < total_rows
        held, inverse = _normalized_rows(
            x, row, lane, known, columns, row_runs, row_words, eps_bits, T, RUN, ROWS, LEVELS, CHUNKS, HELD, INTERPRETED
        )
        for c in tl.static_range(CHUNKS):
            run = c * (T // ROWS) + lane
            live = known & (run < row_runs)
            words = held[c] if HELD else _load_run(x, row, run, known, row_runs, row_words, T, RUN)
            words = _scaled_words(words, inverse, weight, run * (RUN // 2), live, T, RUN // 2, WEIGHT, INTERPRETED)
            best = _finite_keys(words, best, RUN // 2, PORTABLE)
    key = tl.max(tl.maximum(best & 0xFFFF, best >> 16), axis=0)
    tl.store(parts + tl.program_id(0), float_of((key - 0x80) << 16))
