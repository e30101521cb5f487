"""The jitted code of `long_rows`: rows that are one block each, in chunks that need no mask."""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, widen
from microscale.kernels.triton.jit_encode import encode
from microscale.kernels.triton.jit_quantize import _encode_by_fp8
from microscale.kernels.triton.jit_scale import scale_and_factor


@triton.jit
def quantize_long_rows(
    x, qdata, scales,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ENCODER: tl.constexpr,
    EXPONENT_ONLY: tl.constexpr, RULE: tl.constexpr, E_INVERSE: tl.constexpr, E_EMAX: tl.constexpr,
    E_PRECISION: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr,
    E_SUBNORMALS: tl.constexpr, E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
    S_WIDTH: tl.constexpr, S_MANTISSA: tl.constexpr, S_LOWEST: tl.constexpr, S_MAX: tl.constexpr,
    S_MAX_CODE: tl.constexpr, S_NAN_CODE: tl.constexpr, S_SIGNED: tl.constexpr, S_SUBNORMALS: tl.constexpr,
    S_BIAS: tl.constexpr, S_WIDE: tl.constexpr, S_IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantize dense rows of CHUNKS * CHUNK elements as one block each, one a program. ENCODER: as `quantize_rows`."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)[None, :]
    first = row * (CHUNK * CHUNKS)
    parts = ()
    for i in tl.static_range(CHUNKS):
        parts += (tl.load(x + first + i * CHUNK + lane),)
    top = bits_of(widen(parts[0])) & 0x7FFFFFFF
    for i in tl.static_range(1, CHUNKS):
        top = tl.maximum(top, bits_of(widen(parts[i])) & 0x7FFFFFFF)
    scale, factor = scale_and_factor(
        tl.max(top, axis=1), 1.0, 1.0, False, EXPONENT_ONLY, RULE, E_MAX, E_INVERSE, E_EMAX, E_PRECISION,
        S_BIAS, S_WIDE, S_MANTISSA, S_LOWEST, S_WIDTH, S_MAX, S_MAX_CODE, S_NAN_CODE,
        ENCODER > 0 and S_IS_E4M3, S_SIGNED, S_SUBNORMALS, 1.0, False,
    )  # fmt: skip
    tl.store(scales + row + tl.arange(0, 1), scale if S_WIDE else scale.to(scales.dtype.element_ty))
    for i in tl.static_range(CHUNKS):
        values = widen(parts[i])
        if ENCODER == 1:
            codes = _encode_by_fp8(values, factor, E_MANTISSA)
        else:
            codes = encode(
                values * factor[:, None], 0, scales, scales, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX, E_MAX_CODE,
                E_NAN_CODE, E_SIGNED, False, E_SUBNORMALS, E_SYMMETRIC, E_LEVELS,
            )  # fmt: skip
        tl.store(qdata + first + i * CHUNK + lane, codes.to(tl.uint8))
