"""The Triton backend. The records here import no Triton; the jitted code is loaded when a kernel first runs."""

from microscale.kernels.triton import dequantize, quantize

__all__ = ["dequantize", "quantize"]
