"""Dense products in two passes: splitting, cutting and scaling, with a stand-in for cuBLAS; which kernel takes what."""

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import microscale as ms
from microscale.kernels.cublas import exact, library, operands, two_pass
from microscale.ops.late import late
from microscale.testing import assert_same_bits
from tests.kernels.processes import lines
from tests.kernels.products import check, parts

FORMATS = ms.list_formats()

# -- a stand-in for the GEMM -------------------------------------------------------------------------------------------


class Calls(list):
    """The calls of `library.gemm`, which computes here in FP64 and rounds to FP32 and then to the result's dtype."""

    def gemm(self, a, b, out, alpha=1.0, accumulate=False):
        assert a.dtype == b.dtype and out.dtype in library.OUT_DTYPES[a.dtype]
        assert out.shape[0] in (max(a.shape[0], b.shape[0]),) and min(*out.shape, a.shape[-1]) > 0
        assert {a.shape[0], b.shape[0]} <= {1, out.shape[0]} and a.shape[-1] == b.shape[-2]
        assert out.shape[-2:] == (a.shape[-2], b.shape[-1])
        assert library.matrix(a) is not None and library.matrix(b) is not None
        assert library.matrix(out).operation == library.NO_TRANSPOSE
        if isinstance(alpha, torch.Tensor):
            assert alpha.dtype == torch.float32 and alpha.dim() == 0
            alpha = alpha.double()
        self.append((a, b, out, alpha, accumulate))
        made = alpha * (a.double() @ b.double()) + (out.double() if accumulate else 0)
        out.copy_(made.float().to(out.dtype))


@pytest.fixture
def calls(monkeypatch):
    made = Calls()
    monkeypatch.setattr(library, "gemm", made.gemm)
    return made


def product(a, b, bias=None, out_dtype=None, run=two_pass.two_pass):
    return run(parts(a), parts(b), bias, a.dtype if out_dtype is None else out_dtype)


# -- exactness ---------------------------------------------------------------------------------------------------------


def from_bits(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30))
def test_three_pieces_are_any_fp32_number(bits):
    x = from_bits(bits)
    found = exact.split(x, 3)
    assert all(t.dtype == torch.bfloat16 for t in found)
    total = sum(t.double() * exact.PIECE_SCALE**-i for i, t in enumerate(found))
    finite = x.isfinite()
    assert_same_bits(total.float()[finite] + 0.0, x[finite] + 0.0)
    assert bool((total == x.double())[finite].all())
    assert_same_bits(found[0].float()[~finite].nan_to_num(1, 2, 3), x[~finite].nan_to_num(1, 2, 3))
    assert not any(t[~finite].any() for t in found[1:])
    # magnitudes add up: no piece has another sign
    assert bool(
        (sum(t.double().abs() * exact.PIECE_SCALE**-i for i, t in enumerate(found)) == x.double().abs())[finite].all()
    )


def test_pieces_at_the_ends_of_the_range():
    ends = [
        0.0,
        -0.0,
        2.0**-149,
        -(2.0**-149),
        2.0**-126,
        2.0**-126 - 2.0**-149,
        2.0**-133,
        torch.finfo(torch.float32).max,
    ]
    for x in (torch.tensor(ends), torch.tensor([math.inf, -math.inf, math.nan])):
        found = exact.split(x, 3)
        total = sum(t.double() * exact.PIECE_SCALE**-i for i, t in enumerate(found))
        assert torch.equal(total.nan_to_num(7, 8, 9), x.double().nan_to_num(7, 8, 9))


def test_two_pieces_are_any_float16_number():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    first, second = exact.split(x, 2)
    total = first.double() + second.double() / exact.PIECE_SCALE
    assert torch.equal(total.nan_to_num(1, 2, 3), x.double().nan_to_num(1, 2, 3))


def test_split_of_other_layouts():
    x = torch.randn(6, 10).t()[::2]
    assert torch.equal(sum(t.double() * exact.PIECE_SCALE**-i for i, t in enumerate(exact.split(x, 3))), x.double())
    assert [t.shape for t in exact.split(torch.empty(0, 3), 3)] == [(0, 3)] * 3


def every_value(fmt):
    """All finite code * scale, in FP64; scales of more than 8 bits are represented by one with all their bits."""
    scale = fmt.scale.table if fmt.scale.width <= 8 else (1 + 2.0**-23,)
    values = torch.tensor(fmt.element.table).double()[:, None] * torch.tensor(scale).double()
    return values[values.isfinite() & (values.abs() < 2.0**128)]


@pytest.mark.parametrize("name", FORMATS)
def test_significant_bits(name):
    fmt = ms.find_format(name)
    values, bits = every_value(fmt), exact.significant_bits(fmt)
    mantissa = torch.frexp(values).mantissa
    if fmt.scale.width <= 8:
        assert bool((torch.ldexp(mantissa, torch.tensor(bits)).frac() == 0).all())
        in_range = values.abs() >= 2.0**-126
        assert bool((values.bfloat16().double() == values)[in_range].all()) == (bits <= 8)
        assert exact.fits_float16(fmt) == bool((values.half().double() == values).all())
    else:
        assert bits == 24 and not exact.fits_float16(fmt)


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_of_every_format(calls, fmt, dtype):
    x, q = torch.randn(5, 72).to(dtype), ms.quantize(torch.randn(37, 72).to(dtype), fmt)
    for out_dtype in (torch.bfloat16, torch.float16, torch.float32):
        for bias in (None, torch.randn(37).to(out_dtype), torch.randn(37)):
            check(product(x, q.t(), bias, out_dtype), x, q.t(), bias)
    check(product(q, x.t()), q, x.t())


@pytest.mark.parametrize("left", FORMATS)
@pytest.mark.parametrize("right", FORMATS)
def test_every_pair(calls, left, right):
    a, b = ms.quantize(torch.randn(5, 72), left), ms.quantize(torch.randn(7, 72), right)
    check(product(a, b.t()), a, b.t())
    check(product(a, b.t(), None, torch.bfloat16), a, b.t())


@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "nvfp4_row", "mxfp6", "nf4", "fp8_block128"])
@pytest.mark.parametrize("space", [1 << 17, 1 << 30])
def test_cuts_and_layouts(calls, monkeypatch, fmt, layout, space):
    """Blocks along either dimension of either operand, in any chunks: the same bits."""
    monkeypatch.setattr(two_pass, "WORKSPACE", space)
    k = 136
    for axis_a, axis_b in itertools.product((-1, 0, None), (-1, 0, None)):
        if axis_a is None and axis_b is None:
            continue
        a, b = torch.randn(290, k).bfloat16(), torch.randn(k, 270).bfloat16()
        a = a if axis_a is None else ms.quantize(a, fmt, axis=axis_a, layout=layout)
        b = b if axis_b is None else ms.quantize(b, fmt, axis=axis_b, layout=layout)
        calls.clear()
        got = product(a, b)
        check(got, a, b)
        if space > 1 << 20:
            assert len(calls) <= 9
        monkeypatch.setattr(two_pass, "WORKSPACE", 1 << 30)
        assert_same_bits(got, product(a, b))
        monkeypatch.setattr(two_pass, "WORKSPACE", space)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("space", [1 << 16, 1 << 30])
def test_prepared_weights(calls, monkeypatch, fmt, space):
    """Layout fragments: in the product of a layer, and in that of its input's gradient, where it cuts K."""
    monkeypatch.setattr(two_pass, "WORKSPACE", space)
    q = ms.quantize(torch.randn(320, 192).bfloat16(), fmt)
    prepared, x, dy = q.to_layout("fragments"), torch.randn(70, 192).bfloat16(), torch.randn(300, 320).bfloat16()
    for a, b, plain in ((x, prepared.t(), q.t()), (dy, prepared, q)):
        calls.clear()
        assert_same_bits(product(a, b), product(a, plain))
        check(product(a, b), a, plain)
        assert (len(calls) > 3) == (space < 1 << 20)


def test_a_workspace_is_bounded(monkeypatch):
    """What is decoded and not yet forgotten, as far as the cuts can be that small."""
    monkeypatch.setattr(two_pass, "WORKSPACE", 1 << 16)
    monkeypatch.setattr(library, "gemm", lambda a, b, out, *_: out.copy_(a.float() @ b.float()))  # keeps nothing
    alive, most, decode = {}, [], operands.decode

    def noted(*args):
        made = decode(*args)
        number = len(most)
        alive[number] = made.numel() * made.element_size()
        weakref.finalize(made, alive.pop, number)
        most.append(sum(alive.values()))
        return made

    monkeypatch.setattr(operands, "decode", noted)
    for fmt in ("mxfp4", "nvfp4"):
        x, q = torch.randn(1000, 64).bfloat16(), ms.quantize(torch.randn(2000, 64).bfloat16(), fmt)
        product(x, q.t()), product(ms.quantize(x, fmt), q.t())
    assert len(most) > 8 and max(most) <= 1 << 16 and not alive


def test_leading_dimensions(calls):
    fmt = "nvfp4_row"
    q, stack = ms.quantize(torch.randn(6, 64), fmt), ms.quantize(torch.randn(3, 6, 64), fmt)
    for x in (torch.randn(4, 64), torch.randn(2, 3, 4, 64), torch.randn(3, 2, 64).transpose(0, 1)):
        for a in (
            x,
            ms.quantize(x, fmt),
            ms.quantize(x, fmt, layout="swizzle_32_4_4"),
            ms.quantize(x, "mxfp8", axis=-2),
        ):
            check(product(a, q.t()), a, q.t())
    for x in (
        torch.randn(3, 5, 64),
        torch.randn(5, 64),
        torch.randn(1, 5, 64),
        torch.randn(2, 1, 5, 64),
        torch.randn(2, 3, 5, 64),
    ):
        for a in (x, ms.quantize(x, fmt), ms.quantize(x, "nvfp4", layout="swizzle_32_4_4")):
            check(product(a, stack.mT), a, stack.mT)
    for bias in (torch.randn(6), torch.randn(5, 6), torch.randn(3, 5, 6), torch.randn(3, 1, 6)):
        a = torch.randn(3, 5, 64)
        check(product(a, stack.mT, bias), a, stack.mT, bias)


def test_outer_scales(calls, monkeypatch):
    """Per tensor they are the GEMM's factor, per row and expert they multiply FP32 sums, along K they are decoded."""
    x = torch.randn(5, 64).bfloat16()
    q = ms.quantize(torch.randn(6, 64), "nvfp4").as_dtype(torch.bfloat16)
    product(x, q.t())
    assert [float(c[3]) for c in calls] == [float(q.outer_scale)] and calls[0][2].dtype == torch.bfloat16
    calls.clear()
    row = ms.quantize(torch.randn(6, 64), "nvfp4_row").as_dtype(torch.bfloat16)
    check(product(x, row.t()), x, row.t())
    assert [c[3] for c in calls] == [1.0] and calls[0][2].dtype == torch.float32
    expert = ms.quantize(torch.randn(3, 6, 64), ms.find_format("nvfp4").variant(outer_scale={"per": "expert"}))
    check(product(x.float(), expert.mT), x.float(), expert.mT)
    calls.clear()
    joined = torch.cat([ms.quantize(torch.randn(6, 64) * s, "nvfp4") for s in (1, 100)], dim=1)
    wide_x = torch.randn(5, 128)
    check(product(wide_x, joined.t()), wide_x, joined.t())
    assert len(calls) == 8 + 0
    for side in (joined.t(), joined):
        monkeypatch.setattr(two_pass, "WORKSPACE", 1)
        other = torch.randn(5, side.shape[0])
        check(product(other, side), other, side)


@pytest.mark.parametrize(
    ("first", "second"), [(2e-19, 3e-18), (1e-30, 1e-6), (3e18, 5e17), (1.0, 1e-37), (1e-38, 1e18)]
)
def test_outer_scales_of_tiny_and_huge_tensors(calls, first, second):
    a, b = ms.quantize(torch.randn(5, 64) * first, "nvfp4"), ms.quantize(torch.randn(7, 64) * second, "nvfp4")
    for out_dtype in (torch.float32, torch.bfloat16):
        check(product(a, b.t(), None, out_dtype), a, b.t())
    alpha, power = two_pass.combined(a.outer_scale, b.outer_scale)
    assert math.frexp(float(power))[0] == 0.5
    exact_product = float(a.outer_scale.double() * b.outer_scale.double())
    assert abs(float(alpha.double() * power.double()) / exact_product - 1) < 2**-23


def test_float16_operands_with_outer_scales(calls):
    """Eleven bits are exact in float16 only; the outer scales of both then multiply FP32 sums, however tiny."""
    fmt = ms.find_format("nvint4").variant(element=ms.find_element("int8"))
    assert exact.significant_bits(fmt) == 11 and exact.fits_float16(fmt)
    for size in (1.0, 1e-18):
        a, b = ms.quantize(torch.randn(5, 64) * size, fmt), ms.quantize(torch.randn(7, 64) * size, fmt)
        calls.clear()
        check(product(a, b.t()), a, b.t())
        assert [c[0].dtype for c in calls] == [torch.float16]
    x = torch.randn(5, 64).bfloat16()
    check(product(x, b.as_dtype(torch.bfloat16).t()), x, b.t())
    assert [c[0].dtype for c in calls[1:]] == [torch.bfloat16] * 2


def test_outer_scales_that_are_zero_or_no_number():
    for value in (0.0, math.inf, math.nan):
        alpha, power = two_pass.combined(torch.tensor(value), torch.tensor(2.0))
        assert_same_bits(alpha * power, torch.tensor(value) * 2)


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "fp8_block128", "nf4", "mxint8"])
def test_empty_products(calls, fmt):
    for m, n, k in ((0, 4, 64), (3, 0, 64), (3, 4, 0), (0, 0, 0)):
        x, q = torch.randn(m, k), ms.quantize(torch.randn(n, k), fmt)
        bias = torch.randn(n)
        assert torch.equal(product(x, q.t(), bias), torch.zeros(m, n) + bias)
        assert torch.equal(product(ms.quantize(x, fmt), q.t(), None, torch.bfloat16), torch.zeros(m, n).bfloat16())
        assert product(x.expand(2, m, k), q.t()).shape == (2, m, n)
    q = ms.quantize(torch.randn(0, 4, 64), fmt)
    assert product(torch.randn(0, 3, 64), q.mT).shape == (0, 3, 4)
    assert not calls


@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_infinity(calls, fmt):
    """What is infinite or NaN in an operand is so in the products it takes part in, and in no others."""
    w = torch.randn(7, 128).abs() + 0.5
    w[2, 70] = math.nan
    q = ms.quantize(w, fmt)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (torch.randn(5, 128).abs() + 0.5).to(dtype)
        x[1, 3], x[3, 5] = math.inf, math.nan
        got, values = product(x, q.t(), None, torch.float32), q.dequantize(torch.float32)
        expected = x.double() @ values.double().t()
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def test_no_copies_of_transposed_operands(calls):
    """Weights as a linear layer has them, and operands of the other two GEMMs of training, are read as they lie."""
    x, q = torch.randn(32, 64).bfloat16(), ms.quantize(torch.randn(48, 64).bfloat16(), "mxfp8")
    product(x, q.t())
    a, b = calls.pop()[:2]
    assert a.data_ptr() == x.data_ptr() and b.mT.is_contiguous()
    dy = torch.randn(32, 48).bfloat16()
    down = ms.quantize(dy, "mxfp8", axis=0)  # as dy.T of wgrad
    product(down.t(), x)
    a, b = calls.pop()[:2]
    assert a.is_contiguous() and b.data_ptr() == x.data_ptr()
    product(dy, ms.quantize(q.dequantize(), "mxfp8", axis=0))
    assert calls.pop()[1].mT.is_contiguous()
    product(x.t().contiguous().t(), q.t())
    assert calls.pop()[0].mT.is_contiguous()


# -- what Triton does around the GEMM ----------------------------------------------------------------------------------


def test_kernels_around_the_product_interpreted():
    assert lines("tests.kernels.epilogue_cases") == [{"cases": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 103, 120])
def test_kernels_around_the_product_compile(capability):
    found = lines("tests.kernels.epilogue_cases", str(capability))
    assert len(found) == 4 and not any(row["fma"] for row in found)  # every operation rounds as in torch


def test_it_takes_prepared_rows_of_one_scale(calls):
    """Decoded as codes, whole or in pieces, contracted along rows or across them."""
    q = ms.quantize(torch.randn(192, 256).bfloat16(), "fp8_row")
    made = ms.prepare(q)
    x, y = torch.randn(5, 256).bfloat16(), torch.randn(5, 192).bfloat16()
    check(two_pass.two_pass(x, late(parts(made.t()), -2), None, torch.float32), x, q.t())
    assert len(calls) == 1
    check(two_pass.two_pass(y, late(parts(made), -2), None, torch.float32), y, q)
    _, side, _ = operands.sides(y, late(parts(made), -2))
    assert side.step == 256  # which is all of it
    (term,) = side.terms(operands.Cut(0, 1, 0, 256), torch.float32, 1)
    assert_same_bits(term.values[0], q.dequantize(torch.float32).t())
