"""Quantized activations times a prepared weight: who takes it, what scales and bias become, the product on a GPU."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.dispatch import Operand, Problem
from microscale.kernels.reference import align_rows as reference_rows
from microscale.kernels.reference import matmul as reference
from microscale.kernels.reference.dequantize import dequantize as reference_dequantize
from microscale.kernels.triton import dequantize, fragments, fragments_scaled, fragments_wide, properties
from microscale.ops import late
from tests.kernels.products import check, parts, wide

KERNEL, WIDE, ROWS, TWO_PASS = (
    "triton.matmul_fragments_scaled", "triton.matmul_fragments_scaled_wide", "cublas.rows_e4m3", "cublas.two_pass",
)  # fmt: skip
PAIRS = (("mxfp4", "mxfp8"), ("mxfp4", "fp8_row"), ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4"))
HOPPER = (9, 0)


def problem(m=16, w="mxfp4", a="mxfp8", k=4096, n=8192, capability=HOPPER, out="bfloat16", **changes):
    lead = m if isinstance(m, tuple) else (m,)
    fmt = ms.find_format(a).for_row(k)
    outer = "scalar" if fmt.outer_scale is not None else None
    first = late.describe((*lead, k), fmt, -1, -1, "strided", outer)
    outer = "scalar" if ms.find_format(w).outer_scale is not None else None
    second = Operand((k, n), "uint8", ms.find_format(w), -2, "fragments", outer)
    first = dataclasses.replace(first, **changes.pop("first", {}))
    second = dataclasses.replace(second, **changes.pop("second", {}))
    return Problem("matmul", (first, second), "cuda", capability, None, out, **changes)


def chosen(*args, **changes):
    return dispatch.explain_problem(problem(*args, **changes)).chosen


def refusal(kernel=KERNEL, **changes):
    found = dispatch.explain_problem(problem(**changes)).refused
    return next((r.reason for r in found if r.kernel == kernel), None)


# -- what runs where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "a"), PAIRS)
def test_one_weight_serves_every_number_of_rows(w, a):
    """Few: as they are read. Many: FP8 tensor cores where the pair has them, else bfloat16's. Never a fallback."""
    many = (WIDE, WIDE, TWO_PASS) if w == "nvfp4" else (ROWS,) * 3
    for m, kernel in zip((1, 5, 16, 33, 64, 128, 256, 257, 2048, 2049), (KERNEL,) * 7 + many, strict=True):
        assert chosen(m, w, a) == kernel, m
        assert not dispatch.explain_problem(problem(m, w, a)).fallback
    assert chosen((2, 8), w, a) == KERNEL and chosen((0,), w, a) != KERNEL
    few = [(64, KERNEL), (65, TWO_PASS)]
    assert [(m, chosen(m, w, a, capability=(8, 0))) for m, _ in few] == few
    assert chosen(64, w, a, capability=(8, 9)) == KERNEL
    assert chosen(65, w, a, capability=(8, 9)) == (TWO_PASS if w == "nvfp4" else ROWS)


def test_exact_products_leave_bfloat16():
    with dispatch.exact_products():
        assert [chosen(m) for m in (64, 256, 257, 2048, 2049)] == [KERNEL, KERNEL, WIDE, WIDE, TWO_PASS]
    with dispatch.exact_products(), dispatch.strict():
        assert dispatch.select(problem(8192)).name == TWO_PASS


def test_rows_that_are_not_exact_are_decoded():
    changes = {"second": {"exact_rows": False}}
    assert [chosen(m, **changes) for m in (256, 257, 2048, 2049)] == [KERNEL, WIDE, WIDE, TWO_PASS]


def test_other_results():
    """FP32 and float16 results, a bias, a residual after it."""
    for out in ("float32", "float16"):
        assert [chosen(m, out=out) for m in (1, 256, 2048, 2049)] == [KERNEL, KERNEL, WIDE, TWO_PASS]
    for dtype in ("float32", "bfloat16"):
        assert chosen(bias=Operand((8192,), dtype)) == KERNEL
    assert chosen(out="float32", rounded="bfloat16") == KERNEL


def test_what_it_refuses_and_why():
    assert "prepare made" in refusal(second={"layout": "strided"})
    assert chosen(second={"layout": "strided"}) == ROWS
    assert "left operand" in refusal(first={"format": None, "dtype": "bfloat16"})
    assert "left operand" in refusal(first={"axis": -2})
    assert "left operand" in refusal(first={"layout": "fragments"})
    assert "bfloat16 numbers" in refusal(first={"format": ms.find_format("fp8_block128"), "one_block": False})
    assert "bfloat16 numbers" in refusal(first={"format": ms.find_format("nf4")})
    assert "constant along K" in refusal(first={"outer": "mixed"})
    assert "constant along K" in refusal(second={"outer": "mixed"})
    assert "per column" in refusal(bias=Operand((16, 8192), "bfloat16"))
    assert "at most 256 rows" in refusal(m=257) and "at most 2048 rows" in refusal(WIDE, m=2049)
    assert "8.0" in refusal(capability=(7, 5)) and "9.0" in refusal(WIDE, capability=(10, 0))
    assert refusal(first={"layout": "swizzle_32_4_4"}) is None


# -- what is made of scales and bias -----------------------------------------------------------------------------------


@pytest.fixture
def doubles(monkeypatch):
    """The kernels that multiply and decode, on the CPU; what they were called with."""
    calls = []

    def multiply(name):
        def run(a, b, bias, out_dtype):
            assert a.dtype == torch.bfloat16 and a.dim() == 2 and b.layout == "fragments"
            calls.append((name, None if b.outer_scale is None else b.outer_scale.numel(), bias is not None, out_dtype))
            return reference.matmul(a, b, bias, out_dtype)

        return run

    def decode(qdata, scale, outer, fmt, columns, scale_layout, dtype):
        values = reference_dequantize(qdata, scale, outer, fmt, columns, scale_layout, torch.float32)
        assert torch.equal(values.to(dtype).float().nan_to_num(7), values.nan_to_num(7))  # exact
        return values.to(dtype)

    monkeypatch.setattr(fragments, "matmul", multiply("few"))
    monkeypatch.setattr(fragments_wide, "matmul", multiply("wide"))
    monkeypatch.setattr(dequantize, "dequantize", decode)
    monkeypatch.setattr(properties, "capability", lambda device: HOPPER)
    return calls


def run(a, b, bias=None, out_dtype=torch.bfloat16):
    return fragments_scaled.matmul(late.late(parts(a), -1), parts(b), bias, out_dtype)


@pytest.mark.parametrize(("w", "a"), PAIRS)
def test_the_product(w, a, doubles):
    """Within the bound, with and without a bias, in every dtype, of two and three dimensions, in both layouts."""
    q = ms.prepare(ms.quantize(torch.randn(128, 192) * 0.02, w))
    bias = torch.randn(128)
    for lead in ((1,), (5,), (16,), (17,), (2, 3), (2, 1, 20)):
        x = ms.quantize(torch.randn(*lead, 192) * torch.exp(2 * torch.randn(*lead, 1)), a)
        for out in (torch.bfloat16, torch.float32, torch.float16):
            for added in (None, bias, bias.bfloat16(), bias[:1]):
                check(run(x, q.t(), added, out), x, q.t(), added, out)
    blobs = [x.to_layout("swizzle_32_4_4")] if a != "fp8_row" else []
    for other in blobs:
        assert torch.equal(run(other, q.t()), run(x, q.t()))


def test_which_kernel_and_how_many_passes(doubles):
    """A number is the kernel's; one for each row needs FP32 sums, and the bias comes after it."""
    bias = torch.randn(64)
    for w, a, m, expected in (
        ("mxfp4", "mxfp8", 16, ("few", None, True, torch.bfloat16)),
        ("mxfp4", "mxfp8", 17, ("wide", None, True, torch.bfloat16)),
        ("nvfp4", "nvfp4", 4, ("few", 1, True, torch.bfloat16)),
        ("mxfp4", "nvfp4", 4, ("few", 1, True, torch.bfloat16)),
        ("nvfp4", "mxfp8", 40, ("wide", 1, True, torch.bfloat16)),
        ("mxfp4", "fp8_row", 4, ("few", None, False, torch.float32)),
        ("mxfp4", "fp8_row", 1, ("few", 1, True, torch.bfloat16)),
        ("nvfp4", "fp8_row", 4, ("few", 1, False, torch.float32)),
    ):
        q, x = ms.prepare(ms.quantize(torch.randn(64, 128), w)), ms.quantize(torch.randn(m, 128), a)
        check(run(x, q.t(), bias), x, q.t(), bias)
        assert doubles.pop() == expected and not doubles


def test_elsewhere_there_is_one_kernel(doubles, monkeypatch):
    monkeypatch.setattr(properties, "capability", lambda device: (8, 9))
    q, x = ms.prepare(ms.quantize(torch.randn(64, 128), "mxfp4")), ms.quantize(torch.randn(40, 128), "mxfp8")
    run(x, q.t())
    assert doubles[0][0] == "few"


def test_scales_of_both_at_the_ends_of_fp32(doubles):
    """Outer scales whose product FP32 lacks, though not the result; ones per column beside one of all."""
    for size in (1e-17, 1e18):
        q = ms.prepare(ms.quantize(torch.randn(64, 128) * size, "nvfp4"))
        x = ms.quantize(torch.randn(5, 128) * size, "nvfp4")
        assert size > 1 or bool(x.outer_scale * q.outer_scale < 2.0**-126)
        error = (run(x, q.t(), None, torch.float32).double() - wide(x) @ wide(q.t())).abs()
        assert bool((error <= 1e-5 * (wide(x).abs() @ wide(q.t()).abs())).all())
    q = ms.prepare(ms.quantize(torch.randn(64, 128), "nvfp4"))
    rows = q.replace(outer_scale=torch.rand(64, 1) + 0.5)
    for a in ("nvfp4", "fp8_row", "mxfp8"):
        x = ms.quantize(torch.randn(5, 128), a)
        check(run(x, rows.t()), x, rows.t())


def test_rows_that_are_nan(doubles):
    x = torch.randn(6, 128)
    x[1, 3], x[2], x[4, 70] = torch.nan, 0, torch.inf
    for w, a in PAIRS[:3]:
        q = ms.prepare(ms.quantize(torch.randn(64, 128), w))
        got = run(ms.quantize(x, a), q.t())
        assert got.isnan().all(1).tolist() == [False, True, False, False, True, False] and not got[2].any()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def exact_or_fp8(got, x, q, bias, kernel, out):
    """Within the bound of FP32 sums of exact operands; for E4M3 rows within that of `rows_e4m3`, times two."""
    if kernel != ROWS:
        check(got, x, q.t(), bias, out)
        return
    a, b = wide(x), wide(q.t())
    wanted = a @ b + (0 if bias is None else bias.double())
    error = (got.double() - wanted).abs() - 1.01 * torch.finfo(out).eps / 2 * wanted.abs()
    assert bool((error <= 2.0**-9 * (a.abs() @ b.abs())).all())


@pytest.mark.gpu
@pytest.mark.parametrize(("w", "a"), PAIRS)
def test_on_a_gpu(w, a):
    """From one prepared weight, every number of rows, bias, FP32; the same bits twice; NaN rows."""
    hopper = torch.cuda.get_device_capability() == HOPPER
    if not (8, 0) <= torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs sm_80 to sm_90")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    q = ms.quantize((normal(448, 1024) * 0.05).bfloat16(), w)
    made = ms.prepare(q, quantized_activations=True)
    assert made.scale_layout == "fragments"
    assert (made.meta.exact_rows is None) == (reference_rows.span(q.format.element) <= 0 or w == "nvfp4")
    bias = normal(448).bfloat16()
    for m in (1, 5, 16, 33, 64, 200, 300, 600):
        x = ms.quantize((normal(m, 1024) * torch.exp(normal(m, 1))).bfloat16(), a)
        kinds = [(bias, torch.bfloat16), *([(None, torch.bfloat16), (bias, torch.float32)] if m == 5 else [])]
        for added, out in kinds:  # each compiles
            kernel = ms.explain("matmul", x, made, out).chosen
            if hopper:
                assert (kernel == KERNEL) == (m <= 256)
            with dispatch.strict():
                got = ms.matmul(x, made.t(), added, out)
                assert torch.equal(got, ms.matmul(x, made.t(), added, out)), m
            exact_or_fp8(got, x, q, added, kernel, out)
            if kernel == ROWS:  # which multiplies the same bytes
                assert torch.equal(got, ms.matmul(x, q.t(), added, out))
        if m > 256:
            with dispatch.exact_products(), dispatch.strict():
                check(ms.matmul(x, made.t(), bias), x, q.t(), bias)
    odd = normal(6, 1024).bfloat16()
    odd[1, 3], odd[2] = torch.nan, 0
    if w != "nvfp4":
        got = ms.matmul(ms.quantize(odd, a), made.t())
        assert got.isnan().all(1).tolist() == [False, True, False, False, False, False] and not got[2].any()


@pytest.mark.gpu
def test_odd_operands_on_a_gpu():
    """Three dimensions, swizzled scales, rows cut from a larger tensor; a linear layer and its residual; a graph."""
    if not (8, 0) <= torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs sm_80 to sm_90")
    q = ms.quantize(torch.randn(128, 256, device="cuda").bfloat16(), "mxfp4")
    made = ms.prepare(q, quantized_activations=True)
    x = torch.randn(2, 5, 256, device="cuda").bfloat16()
    for a in (ms.quantize(x, "mxfp8"), ms.quantize(x, "mxfp8", layout="swizzle_32_4_4"), ms.quantize(x, "fp8_row")):
        flat = a.dequantize(torch.float32).reshape(10, 256)
        wanted = flat.double() @ q.dequantize(torch.float32).double().t()
        got = ms.matmul(a, made.t()).reshape(10, 128)
        torch.testing.assert_close(got.double(), wanted, rtol=2.0**-8, atol=1e-3)
    a, residual = ms.quantize(x[0], "fp8_row"), torch.randn(5, 128, device="cuda").bfloat16()
    got = ms.matmul(a[1:4], made.t(), residual=residual[1:4])
    assert torch.equal(got, ms.matmul(a, made.t(), residual=residual)[1:4])
    graph = torch.cuda.CUDAGraph()
    ms.matmul(a, made.t())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        held = ms.matmul(a, made.t())
    graph.replay()
    assert torch.equal(held, ms.matmul(a, made.t()))
