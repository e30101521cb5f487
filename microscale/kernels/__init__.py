"""Kernels: who computes an op, on plain tensors and specs. Importing this package registers every kernel."""

from microscale.kernels import cublas, reference, triton

__all__ = ["cublas", "reference", "triton"]
