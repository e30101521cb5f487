"""What Gluon calls differently from one release of Triton to the next."""
# mypy: ignore-errors

from triton.experimental.gluon import language as gl

together = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7; 3.6
