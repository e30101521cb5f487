"""Dense products in two passes on a GPU: within the derived bound of FP64, repeatable, captured, bounded in memory."""

import math

import pytest
import torch

import microscale as ms
from microscale.kernels.cublas import library, two_pass
from microscale.testing import assert_same_bits
from tests.kernels.products import check, parts

pytestmark = pytest.mark.gpu

FORMATS = ms.list_formats()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def product(a, b, bias=None, out_dtype=None):
    return two_pass.two_pass(parts(a), parts(b), bias, a.dtype if out_dtype is None else out_dtype)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_of_every_format(fmt, dtype):
    """Odd and even sizes, every result dtype, biases that the GEMM adds and biases that it does not."""
    for m, n, k in ((5, 7, 72), (129, 257, 391), (256, 384, 512), (1, 33, 64), (33, 1, 128)):
        x, q = normal(m, k, dtype=dtype), ms.quantize(normal(n, k, dtype=dtype), fmt)
        for out_dtype in DTYPES:
            check(product(x, q.t(), None, out_dtype), x, q.t())
        for bias in (normal(n, dtype=dtype), normal(n, dtype=torch.float32), normal(m, n, dtype=dtype)):
            check(product(x, q.t(), bias), x, q.t(), bias)
        check(product(q, x.t()), q, x.t())


@pytest.mark.parametrize("right", FORMATS)
def test_every_pair(right):
    b = ms.quantize(normal(71, 136), right)
    for left in FORMATS:
        a = ms.quantize(normal(45, 136), left)
        check(product(a, b.t()), a, b.t())
        check(product(a, b.t(), None, torch.float32), a, b.t())


@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "nvfp4_row", "mxfp6", "nf4", "fp8_block128"])
def test_cuts_and_layouts(monkeypatch, fmt, layout):
    """The three GEMMs of training, blocks along either dimension, chunks of a small workspace."""
    monkeypatch.setattr(two_pass, "WORKSPACE", 1 << 19)
    x, w, dy = normal(1000, 520), normal(776, 520), normal(1000, 776)

    def q(t, axis):
        return ms.quantize(t, fmt, axis=axis, layout=layout)

    for a, b in (
        (q(x, -1), q(w, -1).t()),
        (q(dy, -1), q(w, 0)),
        (q(dy, 0).t(), q(x, 0)),
        (dy, q(w, -1)),
        (x, q(w, 0).t()),
    ):
        check(product(a, b), a, b)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6", "mxfp8", "nvfp4"])
def test_prepared_weights(fmt):
    q = ms.quantize(normal(320, 192), fmt)
    x, dy, prepared = normal(70, 192), normal(300, 320), q.to_layout("fragments")
    assert_same_bits(product(x, prepared.t()), product(x, q.t()))
    assert_same_bits(product(dy, prepared), product(dy, q))


def test_leading_dimensions_and_strides():
    q, stack = ms.quantize(normal(48, 128), "nvfp4_row"), ms.quantize(normal(3, 48, 128), "nvfp4")
    big = normal(3, 40, 300)
    for x in (normal(2, 3, 40, 128), big[:, :, 3:131], big[:, ::2, 3:131], normal(3, 128, 40).mT, big[:, :, :256:2]):
        check(product(x, q.t()), x, q.t())
        if x.dim() == 3:
            check(product(x, stack.mT), x, stack.mT)
            bias = normal(3, 1, 48)
            check(product(x, stack.mT, bias), x, stack.mT, bias)
    for x in (normal(40, 128), normal(2, 1, 40, 128), ms.quantize(normal(40, 128), "mxfp8")):
        check(product(x, stack.mT), x, stack.mT)


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "fp8_block128"])
def test_nan_and_infinity(fmt):
    w = normal(70, 128, dtype=torch.float32).abs() + 0.5
    w[2, 70] = math.nan
    q = ms.quantize(w, fmt)
    for dtype in DTYPES:
        x = normal(50, 128, dtype=dtype).abs() + 0.5
        x[1, 3], x[3, 5] = math.inf, math.nan
        got, expected = product(x, q.t(), None, torch.float32), x.double() @ q.dequantize(torch.float32).double().t()
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    for m, n, k in ((0, 4, 64), (3, 0, 64), (3, 4, 0)):
        made = product(normal(m, k), ms.quantize(normal(n, k), fmt).t(), torch.ones(n, device="cuda"))
        assert torch.equal(made, torch.ones(m, n, device="cuda").bfloat16())


def test_tiny_and_huge_tensors():
    for first, second in ((2e-19, 3e-18), (3e18, 5e17), (1e-38, 1e18)):
        a, b = (ms.quantize(normal(64, 128, dtype=torch.float32) * s, "nvfp4") for s in (first, second))
        check(product(a, b.t()), a, b.t())


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "nvfp4_row", "nf4"])
def test_graphs_and_repetition(fmt):
    """Replays follow the inputs, and equal runs give equal bits."""
    q, x, bias = ms.quantize(normal(384, 512), fmt), normal(200, 512), normal(384)
    a = ms.quantize(x, fmt)
    calls = [lambda: product(x, q.t(), bias), lambda: product(a, q.t())]
    for call in calls:  # compiles what Triton has in it
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls]
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        check(captured[0], x, q.t(), bias), check(captured[1], a, q.t())
        for call, made in zip(calls, captured, strict=True):
            assert_same_bits(call(), made)
            assert_same_bits(call(), call())


def test_a_first_capture_writes_its_own_constants():
    library._constants.clear()
    a, b, alpha = normal(1, 32, 64), normal(1, 64, 48), torch.tensor(0.5, device="cuda")
    out = torch.ones(1, 32, 48, device="cuda")
    library.gemm(a, b, torch.empty_like(out), 1.0, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.gemm(a, b, out, alpha, True)
    assert not library._constants
    out.fill_(2.0)
    alpha.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(out, 2 + 0.25 * (a.float() @ b.float()), rtol=1e-4, atol=1e-4)


def test_modes_of_the_handle_are_torchs_again():
    a, b = normal(1, 64, 64), normal(1, 64, 64)
    handle, blas = torch.cuda.current_blas_handle(), library.load()
    before = [library._INT(), library._INT()]
    blas.cublasGetMathMode(handle, before[0]), blas.cublasGetPointerMode_v2(handle, before[1])
    library.gemm(a, b, torch.empty_like(a), torch.ones((), device="cuda"))
    after = [library._INT(), library._INT()]
    blas.cublasGetMathMode(handle, after[0]), blas.cublasGetPointerMode_v2(handle, after[1])
    assert [v.value for v in before] == [v.value for v in after]
    torch.testing.assert_close(torch.mm(a[0], b[0]), (a[0].float() @ b[0].float()).bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("fmt", "both"), [("mxfp4", False), ("nvfp4", True), ("nvfp4_row", False), ("nf4", False)])
def test_memory_is_bounded(fmt, both):
    """Beside the result: one workspace for decoded operands, another for FP32 sums, and what cuBLAS itself has."""
    x, q = normal(4096, 8192), ms.quantize(normal(16384, 8192), fmt)
    a = ms.quantize(x, fmt) if both else x
    product(a[:64], q.t())
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = product(a, q.t())
    torch.cuda.synchronize()
    sums = 0 if fmt in ("mxfp4", "nvfp4") else 1
    extra = torch.cuda.max_memory_allocated() - base - out.numel() * 2
    assert extra <= (1 + sums) * two_pass.workspace(out.device) + (4 << 20), extra
    rows = torch.randint(0, 4096, (16,), device="cuda")
    picked = a.index_select(0, rows)
    check(out[rows], picked, q.t())


def test_more_than_two_billion_elements():
    x, q = normal(65536, 64), ms.quantize(normal(40000, 64), "mxfp8")
    out = product(x, q.t())
    assert out.numel() > 2**31
    rows = torch.tensor([0, 1, 40000, 65535], device="cuda")
    check(out[rows], x[rows], q.t())


def test_what_a_linear_layer_runs():
    x, q = normal(2048, 1024), ms.quantize(normal(2048, 1024), "nvfp4")
    assert ms.explain("matmul", x, q).chosen == "cublas.two_pass"
    assert ms.explain("matmul", x.float(), q.as_dtype(torch.float32)).chosen == "cublas.split_two_pass"
    with ms.strict():
        check(torch.nn.functional.linear(x, q), x, q.t())
    grad = torch.nn.functional.linear(x.requires_grad_(), q)
    grad.backward(torch.ones_like(grad))
    assert x.grad.shape == x.shape
