"""The cuBLAS backend: products of what torch's own matmul cannot multiply. Importing it registers the kernels."""

from microscale.kernels.cublas import grouped_rows_e4m3, rows_e4m3, scaled_mm, two_pass

__all__ = ["grouped_rows_e4m3", "rows_e4m3", "scaled_mm", "two_pass"]
