"""What cuBLAS is told: a stand-in computes from addresses, sizes and leading dimensions alone, columns first."""

import ctypes
import itertools

import numpy as np
import pytest
import torch

import microscale as ms
from microscale.kernels.cublas import library


class Blas:
    """Computes from addresses, sizes and leading dimensions alone, as cuBLAS does: columns first."""

    def types(self, dtype):
        return {0: (np.float32, torch.float32), 2: (np.int16, torch.float16), 14: (np.int16, torch.bfloat16)}[dtype]

    def __init__(self):
        self.state, self.seen, self.calls = {"math": 3, "pointers": 5}, [], 0

    def cublasGetMathMode(self, handle, out):
        out.value = self.state["math"]

    def cublasGetPointerMode_v2(self, handle, out):
        out.value = self.state["pointers"]

    def cublasSetMathMode(self, handle, value):
        self.state["math"] = value

    def cublasSetPointerMode_v2(self, handle, value):
        self.state["pointers"] = value

    def _columns(self, address, dtype, rows, columns, leading):
        storage, kind = self.types(dtype)
        assert leading >= max(1, rows)
        count = leading * (columns - 1) + rows
        flat = np.frombuffer((ctypes.c_char * (count * np.dtype(storage).itemsize)).from_address(address), storage)
        return torch.from_numpy(flat).view(kind).as_strided((rows, columns), (1, leading))

    def _scalar(self, value):
        on_device = self.state["pointers"] == library.POINTERS_ON_DEVICE
        assert isinstance(value, int) == on_device
        return ctypes.c_float.from_address(value).value if on_device else value._obj.value

    def cublasGemmEx_64(self, handle, ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc, compute, algo):
        assert (handle, compute, algo, self.state["math"]) == (7, 68, -1, library.FULL_PRECISION_REDUCTION)
        self.calls += 1
        left = self._columns(a, at, k, m, lda).t() if ta else self._columns(a, at, m, k, lda)
        right = self._columns(b, bt, n, k, ldb).t() if tb else self._columns(b, bt, k, n, ldb)
        out = self._columns(c, ct, m, n, ldc)
        beta = self._scalar(beta)
        made = self._scalar(alpha) * (left.double() @ right.double()) + (beta * out.double() if beta else 0)
        out.copy_(made)
        return 0

    def cublasGemmStridedBatchedEx_64(
        self, handle, ta, tb, m, n, k, alpha, a, at, lda, sa, b, bt, ldb, sb, beta, c, ct, ldc, sc, count, compute, algo
    ):
        for i in range(count):
            ai, bi, ci = (p + i * s * (4 if t == 0 else 2) for p, s, t in ((a, sa, at), (b, sb, bt), (c, sc, ct)))
            self.cublasGemmEx_64(
                handle, ta, tb, m, n, k, alpha, ai, at, lda, bi, bt, ldb, beta, ci, ct, ldc, compute, algo
            )
        return 0


@pytest.fixture
def blas(monkeypatch):
    made = Blas()
    monkeypatch.setattr(library, "load", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what CPU tensors say they are on
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(library, "_constants", {})
    return made


def lying(shape, how, dtype=torch.bfloat16):
    """Matrices [B, R, C] that lie in one of several ways."""
    b, r, c = shape
    big = torch.randn(b, r + 3, c + 5).to(dtype)
    if how == "rows":
        return big[:, :r, :c].contiguous()
    if how == "columns":
        return big[:, :r, :c].mT.contiguous().mT
    return big[:, 1 : r + 1, 2 : c + 2] if how == "rows of larger" else big.mT.contiguous().mT[:, 1 : r + 1, 2 : c + 2]


WAYS = ("rows", "columns", "rows of larger", "columns of larger")


@pytest.mark.parametrize(("left", "right"), list(itertools.product(WAYS, WAYS)))
@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (3, 4, 2, 6), (2, 1, 1, 1), (1, 1, 8, 5), (1, 8, 1, 5), (2, 3, 4, 1)])
def test_arguments_of_cublas(blas, left, right, shape):
    batch, m, n, k = shape
    for of_a, of_b in ((batch, batch), (1, batch), (batch, 1)):
        a, b = lying((of_a, m, k), left), lying((of_b, k, n), right)
        for alpha, accumulate in ((1.0, False), (0.25, True), (torch.tensor(0.5), True), (torch.tensor(0.5), False)):
            whole = torch.full((batch, m + 2, n + 2), 3.0)
            out = whole[:, 1:-1, 1:-1]
            library.gemm(a, b, out, alpha, accumulate)
            expected = torch.full_like(whole, 3.0)
            expected[:, 1:-1, 1:-1] = float(alpha) * (a.float() @ b.float()) + (3.0 if accumulate else 0)
            torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
    assert blas.state == {"math": 3, "pointers": 5}


def test_modes_are_restored_when_cublas_refuses(blas):
    a = torch.ones(1, 2, 2).bfloat16()
    blas.cublasGemmEx_64 = lambda *args: 15
    with pytest.raises(ms.MicroscaleError, match="status 15"):
        library.gemm(a, a, torch.empty(1, 2, 2), torch.ones(()))
    assert blas.state == {"math": 3, "pointers": 5}


def test_matrices_that_no_gemm_can_read():
    x = torch.randn(4, 6, 8)
    for t in (x[:, :, ::2], x[..., :1].expand(4, 6, 8), x[:, :1].expand(4, 6, 8), x[:, ::2, ::2].mT):
        assert library.matrix(t) is None
        assert torch.equal(library.readable(t), t) and library.matrix(library.readable(t)) is not None
    assert library.matrix(x[:, :, :1]).leading == 8 and library.matrix(x[:, :1, :]).leading == 8


@pytest.mark.skipif(torch.version.cuda is not None, reason="for torch without CUDA")
def test_without_cuda_the_library_says_so():
    with pytest.raises(ms.MicroscaleError, match="built without CUDA"):
        library.load()


def test_constants_of_a_captured_graph_are_its_own(monkeypatch):
    monkeypatch.setattr(library, "_constants", {})
    place, capturing = torch.device("cpu"), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    capturing.append(1)
    assert [float(t) for t in library.constants(place)] == [0, 1] and not library._constants
    capturing.clear()
    kept = library.constants(place)
    capturing.append(1)
    assert library.constants(place) is kept and [float(t) for t in kept] == [0, 1]
