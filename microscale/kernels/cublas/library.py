"""cuBLAS as torch has loaded it: one GEMM on plain tensors, with what torch's own matmul does not offer.

Torch's matmul rounds the product to the operands' dtype and takes its factor from the host. Here the product is

    out = alpha * (a @ b) + (out or 0)          in FP32, rounded once to out's dtype

with `alpha` in the device's memory where it is computed there, and slices of a larger result as `out`. The handle is
torch's own, which holds the current stream and the workspace that goes with it, so calls are captured by CUDA graphs
as torch's are; nothing waits for the device. cuBLAS is deterministic for a fixed stream and workspace.

The library is found under its soname: it is in the process already. Its entry points with 64-bit sizes are used (CUDA
12 and later). cuBLAS stores columns first, so what it computes is `out.T = b.T @ a.T`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from microscale.errors import NoKernelError

# Values of cublas_api.h and library_types.h.
NO_TRANSPOSE, TRANSPOSE = 0, 1
POINTERS_ON_HOST, POINTERS_ON_DEVICE = 0, 1
FULL_PRECISION_REDUCTION = 16  # CUBLAS_DEFAULT_MATH with CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
COMPUTE_FP32, DEFAULT_ALGORITHM = 68, -1
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}

OUT_DTYPES = {  # of a GEMM that accumulates in FP32, by the dtype of its operands
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_MATRIX = [_POINTER, _INT, _LONG]
_HEAD = [_POINTER, _INT, _INT, _LONG, _LONG, _LONG, _POINTER]
_SIGNATURES: dict[str, list[Any]] = {
    "cublasGemmEx_64": [*_HEAD, *_MATRIX, *_MATRIX, _POINTER, *_MATRIX, _INT, _INT],
    "cublasGemmStridedBatchedEx_64": [
        *_HEAD, *_MATRIX, _LONG, *_MATRIX, _LONG, _POINTER, *_MATRIX, _LONG, _LONG, _INT, _INT,
    ],
    "cublasGetPointerMode_v2": [_POINTER, ctypes.POINTER(_INT)],
    "cublasSetPointerMode_v2": [_POINTER, _INT],
    "cublasGetMathMode": [_POINTER, ctypes.POINTER(_INT)],
    "cublasSetMathMode": [_POINTER, _INT],
}  # fmt: skip


# -- the library -------------------------------------------------------------------------------------------------------


@functools.cache
def load() -> ctypes.CDLL:
    """Return the cuBLAS of this process. Raises NoKernelError if torch was built without CUDA, or with one too old."""
    version = torch.version.cuda
    if version is None:
        raise NoKernelError("this torch was built without CUDA, so there is no cuBLAS", "install a CUDA build of torch")
    name = f"libcublas.so.{version.split('.')[0]}"
    found = _open(name)
    if found is None or not hasattr(found, "cublasGemmEx_64"):
        reason = "was not found" if found is None else "has no 64-bit interface"
        hint = "use torch with CUDA 12 or later, or microscale.use_backend('reference')"
        raise NoKernelError(f"{name} {reason}", hint)
    for entry, arguments in _SIGNATURES.items():
        function = getattr(found, entry)
        function.argtypes, function.restype = arguments, _INT
    return found


def _open(name: str) -> ctypes.CDLL | None:
    """The library of this soname: what is loaded, what the loader finds, or the file of the wheel that torch needs."""
    wheels = (str(path) for root in sys.path for path in sorted(Path(root).glob(f"nvidia/*/lib/{name}")))
    for candidate in itertools.chain([name], wheels):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(candidate)
    return None


def check(status: int, what: str) -> None:
    """Raise NoKernelError for a cuBLAS status other than success."""
    if status:
        raise NoKernelError(f"{what} failed with cuBLAS status {status}", "microscale.use_backend('reference')")


@contextlib.contextmanager
def modes(blas: Any, handle: int, pointers: int) -> Iterator[None]:
    """Within the block, scalars are where `pointers` says and reductions are in FP32; then as before."""
    pointer_mode, math_mode = _INT(), _INT()
    check(blas.cublasGetMathMode(handle, math_mode), "cublasGetMathMode")
    check(blas.cublasGetPointerMode_v2(handle, pointer_mode), "cublasGetPointerMode")
    try:
        check(blas.cublasSetMathMode(handle, FULL_PRECISION_REDUCTION), "cublasSetMathMode")
        check(blas.cublasSetPointerMode_v2(handle, pointers), "cublasSetPointerMode")
        yield
    finally:
        blas.cublasSetPointerMode_v2(handle, pointer_mode.value)
        blas.cublasSetMathMode(handle, math_mode.value)


# -- matrices ----------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """How cuBLAS reads matrices [B, R, C] of memory. `operation` is for out.T = b.T @ a.T: none for dense rows."""

    address: int
    dtype: int
    operation: int
    leading: int
    stride: int


def matrix(t: torch.Tensor) -> Matrix | None:
    """Describe matrices [B, R, C] as they lie; None if neither their rows nor their columns are dense."""
    rows, columns = t.shape[-2:]
    stride, row, column = t.stride()
    step = 0 if t.shape[0] == 1 else stride
    place = (t.data_ptr(), TYPES[t.dtype])
    if (column == 1 or columns <= 1) and (row >= columns or rows <= 1):
        return Matrix(*place, NO_TRANSPOSE, max(row if rows > 1 else columns, 1), step)
    if (row == 1 or rows <= 1) and (column >= rows or columns <= 1):
        return Matrix(*place, TRANSPOSE, max(column if columns > 1 else rows, 1), step)
    return None


def readable(t: torch.Tensor) -> torch.Tensor:
    """Return matrices [B, R, C] that a GEMM can read: t itself, or a dense copy."""
    return t if matrix(t) is not None else t.contiguous()


# -- the product -------------------------------------------------------------------------------------------------------

_ZERO, _ONE = ctypes.c_float(0.0), ctypes.c_float(1.0)
_constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}


def gemm(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: torch.Tensor | float = 1.0, accumulate: bool = False
) -> None:
    """Write alpha * (a @ b), plus `out` itself if `accumulate`, to `out`; FP32 throughout, rounded once.

    Args:
        a, b: [B, M, K] and [B, K, N], both bfloat16 or both float16, with dense rows or columns (see `readable`).
            Either B may be 1 and is used for every matrix of `out` then. M, N and K are at least 1.
        out: [B, M, N] with dense rows, of a dtype in `OUT_DTYPES`. It overlaps neither operand.
        alpha: a number, or FP32 on the device with one element.

    Raises NoKernelError if cuBLAS cannot be had or refuses.
    """
    if a.get_device() != torch.cuda.current_device():
        with torch.cuda.device(a.device):
            return gemm(a, b, out, alpha, accumulate)
    blas, handle = load(), torch.cuda.current_blas_handle()
    left, right, result = matrix(a), matrix(b), matrix(out)
    if left is None or right is None or result is None or result.operation != NO_TRANSPOSE:
        raise NoKernelError("matrices without dense rows or columns", "this is a bug in microscale: please report it")
    pointers = POINTERS_ON_HOST
    one: Any = ctypes.byref(_ONE)
    beta: Any = one if accumulate else ctypes.byref(_ZERO)
    if isinstance(alpha, torch.Tensor):
        pointers = POINTERS_ON_DEVICE
        keep = constants(a.device)
        factor: Any = alpha.data_ptr()
        beta = keep[accumulate].data_ptr()
    else:
        factor = one if alpha == 1.0 else ctypes.byref(ctypes.c_float(alpha))
    (m, n), k, batch = out.shape[-2:], a.shape[-1], out.shape[0]
    head = (handle, right.operation, left.operation, n, m, k, factor)
    tail = (COMPUTE_FP32, DEFAULT_ALGORITHM)
    first, second, third = ((x.address, x.dtype, x.leading) for x in (right, left, result))
    with modes(blas, handle, pointers):
        if batch == 1:
            check(blas.cublasGemmEx_64(*head, *first, *second, beta, *third, *tail), "cublasGemmEx")
            return
        steps = (right.stride, left.stride, result.stride)
        status = blas.cublasGemmStridedBatchedEx_64(
            *head, *first, steps[0], *second, steps[1], beta, *third, steps[2], batch, *tail
        )
        check(status, "cublasGemmStridedBatchedEx")


def constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP32 0 and 1 in a device's memory, where cuBLAS looks for beta when alpha is there.

    The copies from the host are complete when this returns, so that any stream may read them. While a graph is being
    captured nothing may be copied like that: it gets constants of its own, which it writes whenever it runs.
    """
    found = _constants.get(device)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros((), device=device), torch.ones((), device=device)
        values = torch.tensor([0.0, 1.0], device=device)
        found = _constants[device] = (values[0], values[1])
    return found
