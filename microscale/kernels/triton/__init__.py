"""The Triton backend. The records here import no Triton; the jitted code is loaded when a kernel first runs."""

from microscale.kernels.triton import dequantize, groups, producers, quantize, quantize_blocks, quantize_both

__all__ = ["dequantize", "groups", "producers", "quantize", "quantize_blocks", "quantize_both"]
