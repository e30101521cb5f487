"""FP8 activations with a scale per row on the FP8 tensor cores of Ada and Hopper: as they lie, within the bound."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.cublas import rows_e4m3
from microscale.kernels.reference import align_rows as reference
from microscale.ops import late, library
from microscale.ops.prepare import noted
from tests.kernels.products import check, parts
from tests.kernels.scaled_mm_double import Double

KERNEL = "cublas.rows_e4m3"
WEIGHTS = ("mxfp4", "mxfp6", "mxfp8", "mxfp8_e5m2", "fp8_row")


@pytest.fixture
def on_cpu(monkeypatch):
    """The kernel on the CPU: the reference's `align_rows`, counted, and a double that keeps cuBLAS's contract."""
    double, aligned = Double(major=9), []

    def align_rows(*args):
        aligned.append(args[2].name)
        return reference.align_rows(*args)

    monkeypatch.setattr(rows_e4m3, "align_rows", align_rows)
    monkeypatch.setattr(rows_e4m3, "scaled_mm", double)
    double.aligned = aligned
    return double


def run(a, b, bias=None, out_dtype=torch.bfloat16):
    return rows_e4m3.matmul(late.late(parts(a), -1), late.late(parts(b), -2), bias, out_dtype)


def problem(m=128, n=256, k=512, b="mxfp4", capability=(9, 0), **changes):
    first = late.describe((m, k), ms.find_format("fp8_row").for_row(k), -1, -1, "strided", None)
    second = late.describe((k, n), ms.find_format(b).for_row(k), -2, -2, "strided", None)
    second = dataclasses.replace(second, **changes)
    return dispatch.Problem("matmul", (first, second), "cuda", capability, None, "bfloat16")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("k", [64, 72, 96, 100])
def test_activations_go_as_they_lie(name, k, on_cpu):
    """Odd K is padded; leading dimensions; the only rows that are re-encoded are those of an MX weight."""
    a, b = ms.quantize(3 * torch.randn(2, 9, k), "fp8_row"), ms.quantize(torch.randn(32, k), name)
    got = run(a, b.t())
    assert got.shape == (2, 9, 32) and on_cpu.calls == ["rowwise"]
    assert on_cpu.aligned == ([] if name == "fp8_row" else [name])
    if name not in ("mxfp8", "mxfp8_e5m2"):  # whose rows lose bits
        assert noted(b).meta.exact_rows is not False
        exact = a.dequantize().double().reshape(18, k) @ b.dequantize().double().t()
        size = a.dequantize().double().abs().reshape(18, k) @ b.dequantize().double().abs().t()
        error = (got.double().reshape(18, 32) - exact).abs()
        assert bool((error <= (1.25 * k + 8) * 2.0**-23 * size + 1.01 * 2.0**-8 * exact.abs()).all())


def test_exact_with_exact_weights(on_cpu):
    """What the kernel is given decodes to the values themselves, so only sums differ from the product."""
    x, w = torch.randn(7, 128) * torch.exp(3 * torch.randn(7, 1)), torch.randn(16, 128)
    a, b = ms.quantize(x, "fp8_row"), ms.quantize(w, "mxfp4")
    assert noted(b).meta.exact_rows
    check(run(a, b.t()), a, b.t())
    bias = torch.randn(16).bfloat16()
    check(run(a, b.t(), bias), a, b.t(), bias)
    assert run(a, b.t(), bias, torch.float32).dtype == torch.float32  # a residual will follow
    check(run(a, b.t(), bias, torch.float32), a, b.t(), bias)


def test_odd_places_and_views(on_cpu):
    """Rows cut from a larger tensor, rows not on 16 bytes, blocks longer than the row, one row, none."""
    a, b = ms.quantize(torch.randn(9, 72), "fp8_row"), ms.quantize(torch.randn(16, 72), "mxfp4")
    check(run(a[1:4], b.t()), a[1:4], b.t())
    check(run(a[4:5], b.t()), a[4:5], b.t())
    assert run(a[:0], b.t()).shape == (0, 16)
    long = ms.quantize(torch.randn(3, 72), "fp8_block128")  # a row is less than a block
    check(run(long, b.t()), long, b.t())
    storage = torch.zeros(9 * 96 + 1, dtype=torch.uint8)
    c, d = ms.quantize(torch.randn(9, 96), "fp8_row"), ms.quantize(torch.randn(16, 96), "mxfp4")
    moved = storage[1:].view(9, 96).copy_(c.qdata)
    check(run(c.replace(qdata=moved), d.t()), c, d.t())


def test_rows_that_are_nothing(on_cpu):
    x = torch.randn(5, 64)
    x[1, 3], x[2], x[3, 40] = torch.nan, 0, torch.inf
    a, b = ms.quantize(x, "fp8_row"), ms.quantize(torch.randn(16, 64), "mxfp4")
    got = run(a, b.t())
    assert got.isnan().all(1).tolist() == [False, True, False, True, False] and not got[2].any()


# -- what runs where ---------------------------------------------------------------------------------------------------


def chosen(p):
    return dispatch.explain_problem(p).chosen


def test_the_pair_takes_fp8_tensor_cores():
    for name, capability in itertools.product(WEIGHTS, ((8, 9), (9, 0))):
        assert chosen(problem(b=name, capability=capability)) == KERNEL
    assert chosen(problem(m=1, k=8192)) == chosen(problem(m=7, k=100)) == KERNEL


def test_elsewhere_it_takes_bfloat16_in_one_piece():
    """Its elements without their scale are bfloat16 numbers: no matrix is split."""
    for p in (problem(b="nvfp4"), problem(b="mxint8"), problem(capability=(8, 0)), problem(exact_rows=False)):
        assert chosen(p) == "cublas.two_pass"
    with dispatch.exact_products():
        assert chosen(problem()) == chosen(problem(b="fp8_row")) == "cublas.two_pass"
    plain = dispatch.Operand((16, 512), "bfloat16")
    weight_only = dispatch.Problem(
        "matmul", (plain, problem(b="fp8_row").operands[1]), "cuda", (9, 0), None, "bfloat16"
    )
    assert chosen(weight_only) == "cublas.two_pass"


def test_swizzled_rows_of_any_length_are_not_taken():
    p = problem(k=3000)
    first = dataclasses.replace(p.operands[0], layout="swizzle_32_4_4")
    assert chosen(p) == KERNEL and chosen(dataclasses.replace(p, operands=(first, p.operands[1]))) != KERNEL


def test_a_residual_keeps_it():
    """The kernel gives FP32 where cuBLAS can, for a result that is bfloat16 in the end."""
    p = dataclasses.replace(problem(), out_dtype="float32", rounded="bfloat16")
    assert chosen(p) == KERNEL
    assert chosen(dataclasses.replace(p, rounded="float16")) == chosen(dataclasses.replace(p, rounded=None))
    assert chosen(dataclasses.replace(p, rounded=None)) == "cublas.two_pass"
    assert chosen(dataclasses.replace(p, capability=(8, 9))) == "cublas.two_pass"  # CUTLASS writes no FP32


@pytest.mark.gpu
def test_on_a_gpu(record_property):
    """Within the bound of exact operands and 13 bits in each step of FP8 sums; the same bits twice; two passes too."""
    if torch.cuda.get_device_capability() not in ((8, 9), (9, 0)):
        pytest.skip("needs sm_89 or sm_90")
    for m, n, k in ((128, 256, 4096), (17, 1024, 1000), (1, 64, 8192), (64, 512, 28672)):
        a = ms.quantize(torch.randn(m, k, device="cuda").bfloat16(), "fp8_row")
        b = noted(ms.quantize(torch.randn(n, k, device="cuda").bfloat16(), "mxfp4"))
        bias = torch.randn(n, device="cuda").bfloat16()
        residual = torch.randn(m, n, device="cuda").bfloat16()
        assert b.meta.exact_rows and ms.explain("matmul", a, b, torch.bfloat16).chosen == KERNEL
        a64, b64 = (t.dequantize(torch.float32).double() for t in (a, b))
        exact, size = a64 @ b64.t() + bias.double(), a64.abs() @ b64.abs().t()
        with dispatch.strict():
            got = ms.matmul(a, b.t(), bias)
            assert torch.equal(got, ms.matmul(a, b.t(), bias))
            also = ms.matmul(a, b.t(), bias, residual=residual)
            with dispatch.exact_products():
                check(ms.matmul(a, b.t(), bias), a, b.t(), bias)
        for made, want in ((got, exact), (also, exact + residual.double())):
            error = (made.double() - want).abs() - 1.01 * 2.0**-8 * want.abs()
            record_property(f"{m}x{n}x{k} over sum|a||b|", float((error / size).max()))
            assert bool((error <= 2.0**-10 * size).all())


def test_facts_tell_rows_from_blocks(monkeypatch):
    """Eager selections are remembered under facts that tell one block a row from several."""
    monkeypatch.setattr(dispatch, "_by_facts", {})
    a = ms.quantize(torch.randn(4, 64), "fp8_row")
    joined = torch.cat([a, a], 1)[:, :64]
    assert joined.format is a.format and library._facts(parts(a), -1) == library._facts(parts(joined), -1)
    assert library._facts(late.late(parts(a), -1), -1) != library._facts(parts(torch.cat([a, a], 1)), -1)
