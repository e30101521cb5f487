"""The Triton backend. The records here import no Triton; the jitted code is loaded when a kernel first runs."""

from microscale.kernels.triton import (
    align_rows,
    dequantize,
    dot_scaled,
    fragments,
    grouped,
    groups,
    producers,
    quantize,
    quantize_blocks,
    quantize_both,
)

__all__ = [
    "align_rows",
    "dequantize",
    "dot_scaled",
    "fragments",
    "grouped",
    "groups",
    "producers",
    "quantize",
    "quantize_blocks",
    "quantize_both",
]
