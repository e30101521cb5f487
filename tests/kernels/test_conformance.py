"""Every registered kernel against the reference, over every format it accepts; a new kernel brings no test code."""

import itertools

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.kernels.reference.matmul import Parts
from microscale.ops import library
from microscale.testing import assert_same_bits

FORMATS = ms.list_formats()
OTHERS = {
    op: [k for k in dispatch.kernels(op) if k.backend != "reference"] for op in ("quantize", "dequantize", "matmul")
}
REFERENCE = {k.op: k for k in dispatch.kernels() if k.backend == "reference"}


def test_the_reference_accepts_everything():
    others = {"quantize_both", "group_amax", "grouped_wgrad", "silu_mul_quantize", "rms_norm_quantize"}
    assert set(REFERENCE) == {"quantize", "dequantize", "matmul", "grouped_matmul", "quantize_rows", *others}
    some = {"quantize_rows"}  # of formats that fit such rows; who asks for it looks first
    assert all(k.requires == dispatch.Requires() for op, k in REFERENCE.items() if op not in some)


@pytest.mark.parametrize(("fmt", "layout"), list(itertools.product(FORMATS, ("strided", "swizzle_32_4_4"))))
def test_quantize_kernels(fmt, layout, device):
    spec = ms.find_quantizer(fmt)
    for shape, dtype in (((64, 256), torch.bfloat16), ((3, 100), torch.float32), ((2, 5, 72), torch.float16)):
        x = torch.randn(shape, device=device).to(dtype)
        expected = REFERENCE["quantize"].run(x, spec, None, None, None, layout)
        for kernel in OTHERS["quantize"]:
            if kernel.requires.refusal(library.quantize_problem(x, spec, False, layout)) is None:
                for got, want in zip(kernel.run(x, spec, None, None, None, layout), expected, strict=True):
                    assert (got is None) == (want is None)
                    if want is not None:
                        assert_same_bits(got, want, f"{kernel.name} {fmt}")
        # and the public door gives what the reference gives
        q = ms.quantize(x, fmt, layout=layout)
        assert_same_bits(q.qdata, expected[0]), assert_same_bits(q.scale, expected[1])


@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantize_kernels(fmt, device):
    q = ms.quantize(torch.randn(70, 200, device=device), fmt)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = (q.qdata, q.scale, q.outer_scale, q.format, 200, "strided", dtype)
        expected = REFERENCE["dequantize"].run(*args)
        problem = library.dequantize_problem(q.qdata, q.format, 200, "strided", dtype)
        for kernel in OTHERS["dequantize"]:
            if kernel.requires.refusal(problem) is None:
                assert_same_bits(kernel.run(*args), expected, f"{kernel.name} {fmt}")
        assert_same_bits(q.dequantize(dtype), expected)


def bound(a, b):
    """FP32 accumulation over K exact products, then one rounding to the output dtype (added by the caller)."""
    k = a.shape[-1]
    return (k + 3) * 2.0**-24 * (a.abs().double() @ b.abs().double())


@pytest.mark.parametrize(("left", "right"), [(f, g) for f in [None, *FORMATS] for g in FORMATS])
def test_matmul_against_float64(left, right, device):
    """Every pair of formats: error within the derived bound, odd sizes, both orientations."""
    m, n, k = 5, 7, 72
    x = torch.randn(m, k, device=device)
    w = torch.randn(n, k, device=device)
    a = x if left is None else ms.quantize(x, left)
    b = ms.quantize(w, right).t()
    a64, b64 = (t.dequantize() if hasattr(t, "qdata") else t for t in (a, b))
    exact = a64.double() @ b64.double()
    for dtype in (torch.float32, torch.bfloat16):
        got = ms.matmul(a, b, out_dtype=dtype).double()
        limit = bound(a64, b64) + exact.abs() * torch.finfo(dtype).eps + 1e-30
        assert bool(((got - exact).abs() <= limit).all())
    other = ms.matmul(b.t(), a.t(), out_dtype=torch.float32)
    torch.testing.assert_close(other.t(), ms.matmul(a, b, out_dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_matmul_rounds_once(device):
    """Bias and outer scales join in FP32: the bf16 result is the rounding of the FP32 one."""
    q = ms.quantize(torch.randn(33, 64, device=device).bfloat16(), "nvfp4")
    x, bias = torch.randn(9, 64, device=device).bfloat16(), torch.randn(33, device=device).bfloat16()
    wide = ms.matmul(x, q.t(), bias, torch.float32)
    assert_same_bits(ms.matmul(x, q.t(), bias), wide.bfloat16())
    assert_same_bits(torch.nn.functional.linear(x, q, bias), wide.bfloat16())


def test_matmul_broadcasts_like_torch(device):
    q = ms.quantize(torch.randn(6, 64, device=device), "mxfp8")
    for shape in ((64,), (3, 64), (2, 3, 64), (4, 2, 3, 64)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(x @ q.t(), x @ q.dequantize().t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q @ torch.randn(64, device=device) * 0, torch.zeros(6, device=device))
    stack = ms.quantize(torch.randn(3, 6, 64, device=device), "nvfp4")
    x = torch.randn(3, 5, 64, device=device)
    torch.testing.assert_close(torch.bmm(x, stack.mT), torch.bmm(x, stack.dequantize().mT), rtol=1e-5, atol=1e-5)
    bias = torch.randn(5, 6, device=device)
    y = torch.addmm(bias, x[0], q.t(), beta=0.5, alpha=2)
    torch.testing.assert_close(y, torch.addmm(bias, x[0], q.dequantize().t(), beta=0.5, alpha=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_grouped_matmul(fmt, device):
    """Ragged and empty groups; rows after the last end are zero; either operand quantized, or both."""
    w = torch.randn(4, 48, 64, device=device)
    x = torch.randn(13, 64, device=device)
    ends = torch.tensor([3, 3, 9, 12], dtype=torch.int32, device=device)
    q, qx = ms.quantize(w, fmt), ms.quantize(x, fmt)
    for a, b in ((x, q.mT), (qx, q.mT), (qx, w.mT)):
        got = ms.grouped_matmul(a, b, ends)
        a0, b0 = (t.dequantize() if hasattr(t, "qdata") else t for t in (a, b))
        assert bool((got[12:] == 0).all())
        start = 0
        for expert, stop in enumerate(ends.tolist()):
            torch.testing.assert_close(got[start:stop], a0[start:stop] @ b0[expert], rtol=1e-5, atol=1e-5)
            start = stop


def test_parts_accept_a_blocked_axis_anywhere(device):
    q = ms.quantize(torch.randn(3, 64, 5, device=device), "nvfp4_row", axis=1)
    parts = Parts(q.qdata, q.scale, q.outer_scale, q.format, q.block_axis, 64, "strided")
    assert_same_bits(parts.dequantize(torch.float32), q.dequantize())
