"""The cuBLAS backend: products of what torch's own matmul cannot multiply. Importing it registers the kernels."""

from microscale.kernels.cublas import rows_e4m3, scaled_mm, two_pass

__all__ = ["rows_e4m3", "scaled_mm", "two_pass"]
