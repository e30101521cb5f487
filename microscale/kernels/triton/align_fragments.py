"""`align_rows` of a weight in layout `fragments`: the same codes and row scales, read in the order they lie in.

Two launches. The first reads the scales alone, a 17th of a 4-bit weight, for the largest of each row. The second
decodes a lane's codes times their block scale in registers, as every kernel of this layout does, which is exact in
bfloat16; then each pair is multiplied by the row's power of two, exactly or to what E4M3 rounds to zero, and the
hardware converts it. 16 codes of a row are neighbours in a lane, so that they are stored at once. Some 5 instructions
for an element of 4 bits, of which memory at full speed leaves time for 11.

Bytes per element as in `align_rows.py`. What a prepared weight cannot hold (NaN, scales beyond bfloat16) is not asked
for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import ptx_decode
from microscale.kernels.triton.fragments import row_parts
from microscale.kernels.triton.launch import launch
from microscale.numerics.fragments import DEPTH, ROWS
from microscale.spec.format import FormatSpec

WARPS = 4  # of a program, each on a step of 64 rows by 64 of K
TOP_BYTES, TOP_WARPS = 8192, 8  # of scales that a program looks at together for the largest


def align_fragments(qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (float8_e4m3fn [..., N, K], FP32 [..., N, 1]) of qdata [..., N, bytes] and scale [..., N, K / block].

    They are a matrix, or experts, in layout fragments; bit-equal to the reference's `align_rows` of the plain one.
    Formats are those that both the reference's `fits` and `numerics.fragments.fits` accept; K is a multiple of 64, so
    nothing is padded. Needs sm_89 or later.
    """
    from microscale.kernels.triton import jit_align_fragments, jit_align_rows

    shape, depth = qdata.shape[:-1], scale.shape[-1] * fmt.block
    rows, steps = shape.numel(), depth // DEPTH
    codes = torch.empty((*shape, depth), dtype=torch.uint8, device=qdata.device)
    row_scales = torch.empty((*shape, 1), dtype=torch.float32, device=qdata.device)
    qdata, scale = _aligned(qdata), _aligned(scale)
    launch(jit_align_rows.fragment_row_scales, rows // ROWS, (scale, row_scales, steps), top_constants(fmt), TOP_WARPS)
    chunks = -(-steps // WARPS)
    for part in row_parts(rows, depth):
        given, scales, powers, made = (t.view(rows, t.shape[-1])[part] for t in (qdata, scale, row_scales, codes))
        args = (_words(given), _words(scales), powers.view(torch.int32), _words(made), steps, chunks)
        programs = given.shape[0] // ROWS * chunks
        launch(jit_align_fragments.align_fragments, programs, args, constants_of(fmt), WARPS)
    return codes.view(torch.float8_e4m3fn), row_scales


@functools.lru_cache(maxsize=64)
def top_constants(fmt: FormatSpec) -> Mapping[str, Any]:
    """Return the constexpr arguments of `fragment_row_scales`; one object for the same ones."""
    size = ROWS * DEPTH // fmt.block
    return {
        "SIZE": size, "STEPS": TOP_BYTES // size, "S_BIAS": fmt.scale.bias or 0, "S_NAN": fmt.scale.nan_code,
        "LIFT": reference.lift(fmt.element),
    }  # fmt: skip


@functools.lru_cache(maxsize=64)
def constants_of(fmt: FormatSpec) -> Mapping[str, Any]:
    """Return the constexpr arguments of `align_fragments`; one object for the same ones."""
    held = 4 if fmt.element.width == 6 else 2
    low, high = (ptx_decode.decoder(fmt, first, True) for first in (0, 2 if held == 2 else 0))
    encode, encode_in = encoder()
    return {
        "HELD": held, "WIDTH": fmt.element.width, "BLOCK": fmt.block, "WARPS": WARPS,
        "DECODE": low.assembly, "DECODE_NEXT": high.assembly, "DECODE_IN": low.constraints,
        "ENCODE": encode, "ENCODE_IN": encode_in,
    }  # fmt: skip


@functools.cache
def encoder() -> tuple[str, str]:
    """Return assembly and constraints that make E4M3 of eight bfloat16 pairs times a pair of factors.

    Outputs: four words of four codes. Inputs: the pairs ($4 to $11), the factors ($12 to $15, all the same).
    """
    lines = ["{", ".reg .b32 zero, u, v;", ".reg .f32 x, y;", ".reg .b16 low, high;", "mov.b32 zero, 0x80008000;"]
    for word in range(4):
        for half, pair in (("low", 4 + 2 * word), ("high", 5 + 2 * word)):
            lines += [
                f"fma.rn.bf16x2 u, ${pair}, $12, zero;",
                "shl.b32 v, u, 16;", "mov.b32 x, v;", "and.b32 v, u, 0xffff0000;", "mov.b32 y, v;",
                f"cvt.rn.satfinite.e4m3x2.f32 {half}, y, x;",  # the first goes to the upper byte
            ]  # fmt: skip
        lines.append(f"mov.b32 ${word}, {{low, high}};")
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * 12)


def _words(data: torch.Tensor) -> torch.Tensor:
    return data.view(-1).view(torch.int32)


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """Data, dense and on 16 bytes, so that words can be read of it."""
    dense = data.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()
