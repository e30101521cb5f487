"""Calls into `F.scaled_mm` on Blackwell keep its contract, and the double that says so refuses those that do not."""

import itertools

import pytest
import torch
from torch.nn.functional import ScalingType, SwizzleType

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.dispatch import Operand, Problem
from microscale.errors import InputError
from microscale.kernels.cublas import scaled_mm
from microscale.kernels.reference.matmul import Parts
from microscale.numerics import layout
from microscale.testing import assert_same_bits
from tests.kernels.scaled_mm_double import ContractError, Double

KERNEL, B200, B300, RTX = "cublas.scaled_mm", (10, 0), (10, 3), (12, 0)
FORMATS = ms.list_formats()
REFERENCE = next(k for k in dispatch.kernels("matmul") if k.backend == "reference")


def parts(q):
    """A tensor as a kernel gets it."""
    return Parts(q.qdata, q.scale, q.outer_scale, q.format, q.block_axis, q.shape[q.block_axis], q.scale_layout)


def operand(fmt, shape, axis):
    outer = ms.find_format(fmt).outer_scale
    kind = None if outer is None else "scalar" if outer.per == "tensor" else "vector"
    return Operand(shape, "uint8", ms.find_format(fmt), axis, "strided", kind)


def problem(a, b, capability=B200, m=128, n=256, k=512, out="bfloat16", bias=None):
    operands = (operand(a, (m, k), -1), operand(b, (k, n), -2))
    return Problem("matmul", operands, "cuda", capability, None, out, bias=bias)


def takes(p):
    return next(k for k in dispatch.kernels("matmul") if k.name == KERNEL).requires.refusal(p) is None


PAIRS = [pair for pair in itertools.product(FORMATS, FORMATS) if takes(problem(*pair))]


@pytest.fixture
def on_cpu(monkeypatch):
    """The kernel on the CPU, with the double in torch's place."""
    double = Double(major=10)
    monkeypatch.setattr(scaled_mm, "scaled_mm", double)
    return double


def test_which_pairs_it_takes():
    nv = ("nvfp4", "nvfp4_1level", "nvfp4_4over6")
    assert set(PAIRS) == {("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), *itertools.product(nv, nv)}
    for pair in PAIRS:
        for capability in (B200, B300, RTX):
            ours = takes(problem(*pair, capability=capability))
            assert ours == (capability != RTX or pair != ("mxfp4", "mxfp4"))
            assert (dispatch.select(problem(*pair, capability=capability)).name == KERNEL) == ours
        assert not takes(problem(*pair, capability=(9, 0)))
        assert not takes(problem(*pair, n=264)) and not takes(problem(*pair, k=528)) and takes(problem(*pair, m=7))
        assert not takes(problem(*pair, out="float32"))
        assert takes(problem(*pair, bias=Operand((256,), "bfloat16"))) == (pair != ("mxfp4", "mxfp4"))
        assert not takes(problem(*pair, bias=Operand((256,), "float32")))


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_every_pair_keeps_the_contract(left, right, on_cpu):
    """Both layouts, rows beyond a tile, leading dimensions, and what the reference gives."""
    b = ms.quantize(torch.randn(144, 160), right)
    for a_layout, b_layout, lead in itertools.product(layout.LAYOUTS, layout.LAYOUTS, ((), (3,), (2, 2))):
        a = ms.quantize(torch.randn(*lead, 9, 160), left, layout=a_layout)
        first, second = parts(a), parts(b.to_layout(b_layout).t())
        bias = None if left == "mxfp4" else torch.randn(144).bfloat16()
        got = scaled_mm.matmul(first, second, bias, torch.bfloat16)
        expected = REFERENCE.run(first, second, bias, torch.bfloat16)
        assert got.shape == expected.shape
        torch.testing.assert_close(got.float(), expected.float(), rtol=2.0**-7, atol=1e-5)
    levels = {left, right} & {"nvfp4", "nvfp4_4over6"}
    assert set(on_cpu.calls) == {"nvfp4 in two levels" if levels else left.removesuffix("_1level")}
    assert len(on_cpu.calls) == 12


def test_many_rows_of_swizzled_scales(on_cpu):
    """Matrices of whole tiles follow each other as they are."""
    a, b = (
        ms.quantize(torch.randn(2, 128, 64), "mxfp8", layout="swizzle_32_4_4"),
        ms.quantize(torch.randn(16, 64), "mxfp8"),
    )
    got = scaled_mm.matmul(parts(a), parts(b.t()), None, torch.float32)
    torch.testing.assert_close(got, a.dequantize(torch.float32) @ b.dequantize(torch.float32).t(), rtol=1e-5, atol=1e-5)


def test_views_are_made_dense(on_cpu):
    """Slices of rows, and codes that do not start on 16 bytes."""
    a, b = ms.quantize(torch.randn(8, 64), "mxfp4"), ms.quantize(torch.randn(48, 64), "mxfp4")
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), a.qdata.flatten()])[1:].view(a.qdata.shape)
    first = Parts(moved, a.scale, None, a.format, -1, 64, "strided")
    second = Parts(b.qdata[16:].t(), b.scale[16:].t(), None, b.format, -2, 64, "strided")
    got = scaled_mm.matmul(first, second, None, torch.bfloat16)
    assert_same_bits(got, REFERENCE.run(first, second, None, torch.bfloat16))


def test_what_torch_cannot_add_is_an_error(on_cpu):
    a, b = ms.quantize(torch.randn(8, 64), "mxfp8"), ms.quantize(torch.randn(16, 64), "mxfp8")
    with pytest.raises(InputError, match="cannot add a bias"):
        scaled_mm.matmul(parts(a), parts(b.t()), torch.randn(16), torch.bfloat16)
    a, b = ms.quantize(torch.randn(8, 64), "mxfp4"), ms.quantize(torch.randn(16, 64), "mxfp4")
    with pytest.raises(InputError, match="use_backend"):
        scaled_mm.matmul(parts(a), parts(b.t()), torch.randn(16).bfloat16(), torch.bfloat16)


def test_empty(on_cpu):
    b = parts(ms.quantize(torch.randn(16, 64), "nvfp4").t())
    assert scaled_mm.matmul(parts(ms.quantize(torch.randn(0, 64), "nvfp4")), b, None, torch.bfloat16).shape == (0, 16)


# -- the double --------------------------------------------------------------------------------------------------------


def call(double, a=None, b=None, **changes):
    """A good MXFP8 call of 128 x 64 by 64 x 48, with changes."""
    e8, swizzle = torch.float8_e8m0fnu, SwizzleType.SWIZZLE_32_4_4
    good = {
        "mat_a": torch.zeros(128, 64, dtype=torch.float8_e4m3fn) if a is None else a,
        "mat_b": torch.zeros(48, 64, dtype=torch.float8_e4m3fn).t() if b is None else b,
        "scale_a": torch.zeros(512, dtype=torch.uint8).view(e8), "scale_recipe_a": ScalingType.BlockWise1x32,
        "scale_b": torch.zeros(512, dtype=torch.uint8).view(e8), "scale_recipe_b": ScalingType.BlockWise1x32,
        "swizzle_a": swizzle, "swizzle_b": swizzle,
    }  # fmt: skip
    return double(**{**good, **changes})


def test_the_double_refuses_what_cuda_refuses():
    assert call(Double(10)).shape == (128, 48) and call(Double(12)).dtype == torch.bfloat16
    e4m3, blob = torch.float8_e4m3fn, torch.zeros(512, dtype=torch.uint8)
    fp4 = torch.zeros(128, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    fp4_b = torch.zeros(48, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).t()
    bad = (
        {"b": torch.zeros(64, 48, dtype=e4m3)},
        {"a": torch.zeros(64, 128, dtype=e4m3).t()},
        {"b": torch.zeros(40, 64, dtype=e4m3).t()},
        {"swizzle_a": SwizzleType.NO_SWIZZLE},
        {"scale_a": torch.zeros(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
        {"scale_a": blob},
        {"scale_b": torch.zeros(1024, dtype=torch.uint8).view(torch.float8_e8m0fnu)[::2]},
        {"scale_recipe_a": ScalingType.RowWise},
        {"scale_recipe_b": ScalingType.BlockWise1x16},
        {"bias": torch.zeros(48)},
        {"bias": torch.zeros(48).bfloat16(), "output_dtype": torch.float32},
        {"use_fast_accum": True},
        {"a": fp4},
    )
    for changes in bad:
        with pytest.raises(ContractError):
            call(Double(10), **changes)
    with pytest.raises(ContractError):
        call(Double(9))
    assert call(Double(10), fp4, fp4_b).shape == (128, 48)
    for double, changes in ((Double(12), {}), (Double(10), {"bias": torch.zeros(48).bfloat16()})):
        with pytest.raises(ContractError, match="MXFP4"):
            call(double, fp4, fp4_b, **changes)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_on_a_gpu(left, right):
    """The only test here of torch's own function; it has not run yet."""
    capability = torch.cuda.get_device_capability()
    if not takes(problem(left, right, capability=capability)):
        pytest.skip("needs sm_100 or later")
    a = ms.quantize(torch.randn(200, 512, device="cuda").bfloat16(), left)
    b = ms.quantize(torch.randn(256, 512, device="cuda").bfloat16(), right)
    got = scaled_mm.matmul(parts(a), parts(b.t()), None, torch.bfloat16)
    exact = a.dequantize(torch.float32) @ b.dequantize(torch.float32).t()
    torch.testing.assert_close(got.float(), exact, rtol=2.0**-7, atol=1e-3)
