"""The reference backend: plain torch, any device, every spec. It defines correctness for all other kernels."""

from microscale.kernels.reference import dequantize, grouped_wgrad, groups, matmul, producers, quantize, quantize_rows

__all__ = ["dequantize", "grouped_wgrad", "groups", "matmul", "producers", "quantize", "quantize_rows"]
