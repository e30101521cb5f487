"""Jitted code of SiLU and RMSNorm, and the kernels that write them as they are, for whatever no fused kernel serves.

The arithmetic is that of `microscale.numerics.activations`, operation for operation; see there for why.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, float_of, widen
from microscale.kernels.triton.jit_scale import key_to_float, order_key, zero_key
from microscale.numerics import activations

LOG2_E = tl.constexpr(activations.LOG2_E)
LN2_HIGH = tl.constexpr(activations.LN2_HIGH)
LN2_LOW = tl.constexpr(activations.LN2_LOW)
ROUND = tl.constexpr(activations.ROUND)
EXP = tl.constexpr(activations.EXP)
TERMS = tl.constexpr(len(activations.EXP))
X_MIN = tl.constexpr(activations.X_MIN)
X_MAX = tl.constexpr(activations.X_MAX)
SIGMOID_TINY = tl.constexpr(activations.SIGMOID_TINY)
RUN = tl.constexpr(activations.RUN)
OCTET = tl.constexpr(activations.OCTET)


@triton.jit
def fused_multiply_add(a, b, c, INTERPRETED: tl.constexpr):
    """FP32 a * b + c, rounded once. The interpreter's own `tl.fma` rounds twice; INTERPRETED rounds FP64 to odd."""
    if INTERPRETED:
        wide_c = c.to(tl.float64)
        product = a.to(tl.float64) * b.to(tl.float64)
        total = product + wide_c
        part = total - product
        lost = (product - (total - part)) + (wide_c - part)
        bits = total.to(tl.int64, bitcast=True)
        toward = tl.where((lost > 0) == (total > 0), 1, -1)
        odd = tl.where((tl.abs(lost) > 0) & ((bits & 1) == 0), bits + toward, bits)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _like(x, VALUE: tl.constexpr):
    return tl.full(x.shape, VALUE, tl.float32)


@triton.jit
def _reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x of FP32 x in [1, 2**127), 0 where x is above 2**126.

    Compiled: the hardware's approximation, which flushes subnormal results to 0, and one Newton step. That is what
    `rcp.rn` does for these x, without its branch for all others.
    """
    if INTERPRETED:
        return tl.where(x > SIGMOID_TINY, 0.0, tl.div_rn(_like(x, 1.0), x))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 y, e, n;  rcp.approx.ftz.f32 y, $1;  neg.f32 n, $1;  fma.rn.f32 e, n, y, 0f3F800000;"
            "  fma.rn.f32 $0, y, e, y; }",
            "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def silu(x, INTERPRETED: tl.constexpr):
    """x / (1 + exp(-x)) of FP32 x."""
    clamped = tl.maximum(tl.minimum(x, X_MAX), X_MIN)
    shifted = fused_multiply_add(clamped, _like(x, -LOG2_E), _like(x, ROUND), INTERPRETED)
    n = shifted - ROUND
    r = fused_multiply_add(n, _like(x, LN2_HIGH), clamped, INTERPRETED)
    r = fused_multiply_add(n, _like(x, LN2_LOW), r, INTERPRETED)
    power = _like(x, EXP[0])
    for i in tl.static_range(1, TERMS):
        power = fused_multiply_add(power, r, _like(x, EXP[i]), INTERPRETED)
    exponential = float_of(bits_of(power) + (bits_of(shifted) << 23))
    return x * _reciprocal(exponential + 1.0, INTERPRETED)


@triton.jit
def sum_neighbours(values, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Sums of 2**LEVELS neighbours of [SIZE]; each level adds two numbers, so no layout can change the result."""
    for level in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, (SIZE >> (level + 1), 2)), axis=1)
    return values


@triton.jit
def inverse_rms(totals, columns, eps_bits, T: tl.constexpr, ROWS: tl.constexpr):
    """1 / sqrt(total / columns + eps) of ROWS rows, given to the T // ROWS lanes of each."""
    size = tl.zeros_like(totals) + columns
    eps = float_of(tl.zeros(totals.shape, tl.int32) + eps_bits)
    root = tl.sqrt_rn(tl.div_rn(totals, size) + eps)
    inverse = tl.div_rn(_like(root, 1.0), root)
    return tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, T // ROWS)), (T,))


@triton.jit
def _rounded(values, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """FP32 values rounded to a dtype, to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter's own conversion truncates
        b = bits_of(values)
        b = tl.where((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, b + 0x7FFF + ((b >> 16) & 1))
        return (b >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(DTYPE)


@triton.jit
def _store_part(parts, key, DTYPE: tl.constexpr):
    """Write the largest of a program's `order_key`s as FP32 to parts[program]."""
    tl.store(parts + tl.program_id(0), key_to_float(tl.maximum(key, zero_key(DTYPE)), DTYPE))


@triton.jit
def silu_mul_rows(
    gate, up, y, parts, columns, row_tiles, gate_row, gate_column, up_row, up_column,
    SIZE: tl.constexpr, AMAX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write silu(gate) * up to dense y, SIZE elements of a row a program.

    AMAX: also the amax over its finite values, FP32, to parts[program].
    """
    pid = tl.program_id(0)
    row = (pid // row_tiles).to(tl.int64)
    column = (pid % row_tiles).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = column < columns
    gates = widen(tl.load(gate + row * gate_row + column * gate_column, mask=live, other=0.0))
    ups = widen(tl.load(up + row * up_row + column * up_column, mask=live, other=0.0))
    values = _rounded(silu(gates, INTERPRETED) * ups, y.dtype.element_ty, INTERPRETED)
    tl.store(y + row * columns + column, values, mask=live)
    if AMAX:
        _store_part(parts, tl.max(tl.where(live, order_key(values), 0), axis=0), y.dtype.element_ty)


@triton.jit
def rms_norm_rows(
    x, weight, y, parts, total_rows, columns, row_stride, column_stride, eps_bits,
    T: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    AMAX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write x / rms(x) * weight to dense y, ROWS rows a program; AMAX as of `silu_mul_rows`."""
    LANES: tl.constexpr = T // ROWS
    row = tl.program_id(0) * ROWS + tl.arange(0, T) // LANES
    known = (row < total_rows)[:, None]
    start = row.to(tl.int64)[:, None]
    lane = (tl.arange(0, T) % LANES * RUN)[:, None] + tl.arange(0, OCTET)[None, :]
    chunks = tl.cdiv(columns, LANES * RUN)
    sums = tl.zeros((T, OCTET), tl.float32)
    for chunk in range(chunks):
        for octet in tl.static_range(RUN // OCTET):
            column = chunk * (LANES * RUN) + octet * OCTET + lane
            live = known & (column < columns)
            values = widen(tl.load(x + start * row_stride + column.to(tl.int64) * column_stride, mask=live, other=0.0))
            sums = fused_multiply_add(values, values, sums, INTERPRETED)
    totals = sum_neighbours(tl.reshape(sums, (T * OCTET,)), T * OCTET, LEVELS)
    inverse = inverse_rms(totals, columns, eps_bits, T, ROWS)[:, None]
    best = tl.zeros((T, OCTET), tl.int32)
    for chunk in range(chunks):
        for octet in tl.static_range(RUN // OCTET):
            column = chunk * (LANES * RUN) + octet * OCTET + lane
            live = known & (column < columns)
            values = widen(tl.load(x + start * row_stride + column.to(tl.int64) * column_stride, mask=live, other=0.0))
            values = values * inverse
            if HAS_WEIGHT:
                values = values * widen(tl.load(weight + column, mask=live, other=0.0))
            rounded = _rounded(values, x.dtype.element_ty, INTERPRETED)
            tl.store(y + start * columns + column, rounded, mask=live)
            if AMAX:
                best = tl.maximum(best, tl.where(live, order_key(rounded), 0))
    if AMAX:
        _store_part(parts, tl.max(tl.max(best, axis=1), axis=0), y.dtype.element_ty)
