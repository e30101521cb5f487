"""The Triton backend. The records here import no Triton; the jitted code is loaded when a kernel first runs."""

from microscale.kernels.triton import (
    align_rows,
    dequantize,
    dot_scaled,
    fragments,
    fragments_fp16,
    fragments_scaled,
    fragments_wide,
    grouped,
    groups,
    producers,
    quantize,
    quantize_blocks,
    quantize_both,
    quantize_rows,
    wgmma,
)

__all__ = [
    "align_rows",
    "dequantize",
    "dot_scaled",
    "fragments",
    "fragments_fp16",
    "fragments_scaled",
    "fragments_wide",
    "grouped",
    "groups",
    "producers",
    "quantize",
    "quantize_blocks",
    "quantize_both",
    "quantize_rows",
    "wgmma",
]
