"""Rows that are one block each and no power of two long: every byte, and what the code has for every architecture."""

import pytest
import torch

import microscale as ms
from microscale.kernels.triton import long_rows
from microscale.kernels.triton.matrices import as_matrices
from microscale.testing import assert_same_bits
from tests.kernels.processes import architectures, lines


def test_every_byte_by_the_interpreter():
    found = lines("tests.kernels.long_rows_cases", "interpret", TRITON_INTERPRET="1")
    assert len(found) == 24 and all(f["took"] and f["same"] for f in found), found


@pytest.mark.slow
@pytest.mark.parametrize("capability", architectures("triton.quantize"))
def test_it_compiles(capability):
    """Nothing is spilled where two programs share an SM; FP8 by the hardware from sm_90 on."""
    found = lines("tests.kernels.long_rows_cases", "compile", str(capability))
    assert len(found) == 8
    for f in found:
        assert f["registers"] <= (64 if f["fp8"] else 80) and f["local"] == 0 and f["fp8"] == (capability >= 90), f


def test_what_it_takes():
    """Dense rows of 8-bit codes, too long to be padded, of a length that a large power of two divides."""
    spec = ms.find_quantizer("fp8_row")

    def takes(x, **changes):
        asked = ms.find_quantizer("fp8_row", **changes) if changes else spec
        return long_rows.takes(asked.for_row(x.shape[-1]), as_matrices(x), True)

    rows = torch.zeros(4, 6144)
    assert takes(rows) and takes(torch.zeros(2, 3, 28672)) and takes(torch.zeros(6144))
    for other in (torch.zeros(4, 8192), torch.zeros(4, 3072), torch.zeros(4, 6144 + 16)):
        assert not takes(other)
    assert not takes(torch.zeros(4, 12288)[:, :6144]) and not takes(torch.zeros(6144, 4).t())
    assert not takes(rows, rounding="stochastic") and not takes(rows, element="e2m1")
    assert not long_rows.takes(spec.for_row(6144), as_matrices(rows), False)
    assert not long_rows.takes(ms.find_quantizer("mxfp8"), as_matrices(rows), True)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [4608, 6144, 12800, 28672, 28160])
@pytest.mark.parametrize("rows", [1, 200])
def test_on_a_gpu(rows, columns):
    """The bytes that the CPU's reference gives."""
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(rows, columns, device="cuda") * torch.rand(rows, 1, device="cuda") * 9).to(dtype)
        x[rows // 2, columns - 1] = torch.inf
        x[rows // 3, : columns // 2] = 0
        made, wanted = ms.quantize(x, "fp8_row"), ms.quantize(x.cpu(), "fp8_row")
        assert_same_bits(made.qdata.cpu(), wanted.qdata)
        assert_same_bits(made.scale.cpu(), wanted.scale)
