"""float16 activations in the decode GEMM: exact pieces, one rounding, and what the dispatcher gives it."""

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.triton import fragments_fp16
from microscale.testing import assert_same_bits
from tests.kernels.processes import architectures, lines

KERNEL = "triton.matmul_fragments_fp16"


def test_interpreted():
    """Every float16 is the sum of its pieces; products within the bound, NaN and infinities where they belong."""
    assert lines("tests.kernels.fragments_fp16_cases") == [{"wrong": []}]


@pytest.mark.slow
@pytest.mark.parametrize("capability", architectures(KERNEL))
def test_it_compiles(capability, tmp_path):
    found = lines("tests.kernels.fragments_fp16_cases", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 3 and all(r["bytes"] and not r["fma"] for r in found)


def explained(shape, dtype="float16", scale_layout="fragments", capability=(9, 0), bias=None):
    left = dispatch.Operand(shape, dtype)
    right = dispatch.Operand((8192, 4096), "uint8", ms.find_format("mxfp4"), -2, scale_layout)
    row = None if bias is None else dispatch.Operand(bias, dtype)
    problem = dispatch.Problem("matmul", (left, right), "cuda", capability, None, dtype, bias=row)
    return dispatch.explain_problem(problem)


def test_few_rows_are_its_own():
    for shape in ((1, 8192), (32, 8192), (2, 16, 8192)):
        assert explained(shape).chosen == explained(shape, bias=(4096,)).chosen == KERNEL
    assert explained((33, 8192)).chosen == "cublas.split_two_pass" != explained((1, 8192), "bfloat16").chosen
    for other in (explained((1, 8192), scale_layout="strided"), explained((1, 8192), capability=(7, 5))):
        assert other.chosen != KERNEL
    assert explained((4, 8192), bias=(4, 4096)).chosen != KERNEL
    assert fragments_fp16.MOST_ROWS == 32
    refused = next(r.reason for r in explained((33, 8192)).refused if r.kernel == KERNEL)
    assert "at most 32 rows" in refused
    with dispatch.exact_products(), dispatch.strict():
        assert explained((1, 8192)).chosen == KERNEL


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvfp4_row", "mxfp6", "mxfp8", "mxint8"])
def test_on_a_gpu(name):
    """Against FP64 within the bound of the module; the same bits twice; NaN and infinities; residual and bias."""
    q = ms.quantize(torch.randn(256, 1024, device="cuda").half(), name)
    made = ms.prepare(q)
    wide = q.replace(outer_scale=None).dequantize(torch.float32).double()
    wide = wide if q.outer_scale is None else wide * q.outer_scale.double()
    bias = torch.randn(256, device="cuda").half()
    for rows in (1, 3, 8, 17, 32):
        x = torch.randn(rows, 1024, device="cuda").half()
        x[0, :4] = torch.tensor([6e-8, 1e-6, 0.0, -6e-5]).half()
        assert ms.explain("matmul", x, made).chosen == KERNEL
        got = ms.matmul(x, made.t(), bias, torch.float32)
        want, size = x.double() @ wide.T + bias.double(), x.double().abs() @ wide.abs().T + bias.double().abs()
        assert bool(((got.double() - want).abs() <= (1.25 * 1024 + 8) * 2.0**-23 * size).all())
        assert torch.equal(got, ms.matmul(x, made.t(), bias, torch.float32))
        assert_same_bits(ms.matmul(x, made.t(), bias), got.half())
        residual = torch.randn(rows, 256, device="cuda").half()
        assert_same_bits(ms.matmul(x, made.t(), bias, residual=residual), (got + residual.float()).half())
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    got = ms.matmul(x, made.t())
    assert got[0].isfinite().all() and not got[1].isfinite().any() and got[2].isnan().all()
