"""DESIGN law 7: zero, tiny, huge, NaN, Inf, ragged, empty and strided inputs are ordinary, for every format."""

import pytest
import torch

import microscale as ms
from microscale.errors import InputError
from microscale.spec.format import ROW
from microscale.testing import assert_same_bits, assert_same_quantized

FORMATS = ms.list_formats()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=FORMATS)
def fmt(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_is_exactly_zero(fmt, dtype, device):
    q = ms.quantize(torch.zeros(3, 300, dtype=dtype, device=device), fmt)
    assert torch.equal(q.dequantize(), torch.zeros(3, 300, dtype=dtype, device=device))
    assert q.outer_scale is None or bool(torch.isfinite(q.outer_scale).all())


def test_zero_rows_and_zero_blocks(fmt, device):
    x = torch.randn(4, 512, device=device)
    x[1] = 0
    x[:, 128:256] = 0
    y = ms.quantize(x, fmt).dequantize()
    assert bool((y[1] == 0).all()) and bool((y[:, 128:256] == 0).all()) and bool((y[0, :128] != 0).any())


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-44])
def test_tiny_inputs_stay_finite_and_no_larger_than_twice(fmt, size, device):
    x = torch.full((2, 256), size, device=device)
    y = ms.quantize(x, fmt).dequantize()
    assert bool(torch.isfinite(y).all()) and bool((y >= 0).all()) and bool((y <= 2 * x).all())


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_inputs_stay_numbers(fmt, size, device):
    x = torch.randn(2, 256, device=device).sign() * size
    q = ms.quantize(x, fmt)
    y = q.dequantize()
    # A code times its scale may exceed FP32's maximum (OCP v1.0 section 5.1): infinity there, never NaN.
    assert not bool(torch.isnan(y).any()) and bool((y.sign() == x.sign()).all())
    assert size > 1e38 or bool(torch.isfinite(y).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_poison_their_block_and_nothing_else(fmt, bad, device):
    block = ms.find_format(fmt).for_row(64).block
    x = torch.randn(4, 3 * block, device=device)
    x[2, block + 1] = 0
    clean = ms.quantize(x, fmt)
    expected = clean.dequantize()
    x[2, block + 1] = bad
    y = ms.quantize(x, fmt).dequantize()
    first = block if clean.format.block == block else 0  # or the row is the block
    expected[2, first : first + clean.format.block] = torch.nan
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_nan_does_not_touch_the_outer_scale(fmt, device):
    x = torch.randn(4, 512, device=device)
    x[0, 0] = 0.0
    expected = ms.quantize(x, fmt).outer_scale
    x[0, 0] = torch.nan
    actual = ms.quantize(x, fmt).outer_scale
    assert (actual is None) == (expected is None)
    if expected is not None:
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("columns", [1, 5, 31, 33, 100, 257])
def test_ragged_columns_equal_zero_padding(fmt, columns, device):
    block = ms.find_format(fmt).for_row(columns).block
    x = torch.randn(3, columns, device=device)
    padded = torch.nn.functional.pad(x, (0, -columns % block))
    q, p = ms.quantize(x, fmt), ms.quantize(padded, fmt)
    assert q.shape == (3, columns) and q.scales().shape == (3, -(-columns // block))
    assert_same_bits(q.qdata, p.qdata)
    assert_same_bits(q.dequantize(), p.dequantize()[:, :columns].contiguous())


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (2, 0, 64), (0, 0)])
@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
def test_empty(fmt, shape, layout, device):
    q = ms.quantize(torch.empty(shape, device=device), fmt, layout=layout)
    assert q.dequantize().shape == shape and q.codes().shape == shape


@pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 3, 96), (2, 1, 3, 96)])
def test_rank_does_not_matter(fmt, shape, device):
    x = torch.randn(shape, device=device)
    q, flat = ms.quantize(x, fmt), ms.quantize(x.reshape(-1, 96), fmt)
    assert_same_bits(q.dequantize().reshape(-1, 96), flat.dequantize())


def test_strides_do_not_matter(fmt, device):
    base = torch.randn(96, 2, 40, device=device)
    for x in (
        base.permute(1, 2, 0),
        base.transpose(0, 2)[::2],
        base[:, 0],
        base[:, :1].expand(96, 5, 40),
        base.flip(0),
    ):
        assert_same_quantized(ms.quantize(x, fmt), ms.quantize(x.contiguous(), fmt))


@pytest.mark.parametrize("axis", [0, 1, -2, -3])
def test_axis_is_transpose(fmt, axis, device):
    x = torch.randn(70, 40, 50, device=device)
    q = ms.quantize(x, fmt, axis=axis)
    spec = ms.find_format(fmt)
    if spec.outer_scale is None or spec.outer_scale.per == "tensor":
        moved = ms.quantize(x.movedim(axis, -1).contiguous(), fmt)
        assert_same_bits(q.dequantize(), moved.dequantize().movedim(-1, axis).contiguous())
    assert q.shape == x.shape and q.codes().shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_their_fp32_values(fmt, dtype, device):
    x = torch.randn(4, 160, device=device).to(dtype)
    assert_same_quantized(ms.quantize(x, fmt), ms.quantize(x.float(), fmt))


def test_swizzled_is_the_same_tensor(fmt, device):
    x = torch.randn(2, 130, 200, device=device)
    assert_same_quantized(ms.quantize(x, fmt, layout="swizzle_32_4_4"), ms.quantize(x, fmt))


def test_chunking_changes_nothing(fmt, monkeypatch):
    """The reference works in row chunks; their size must not show, tiles and random bits included."""
    from microscale.kernels.reference import dequantize, quantize

    x = torch.randn(3, 70, 256)
    variants = [{}, {"rounding": "stochastic", "generator": 7}]
    spec = ms.find_format(fmt)
    if spec.block != ROW and (spec.outer_scale is None or spec.outer_scale.per == "tensor"):
        variants.append({"scale_tile": (16, spec.block)})
    for changes in variants:
        expected = ms.quantize(x, fmt, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "CHUNK", 700)
            patch.setattr(dequantize, "CHUNK", 700)
            actual = ms.quantize(x, fmt, **changes)
            assert_same_bits(actual.dequantize(), expected.dequantize())
        assert_same_quantized(actual, expected)


def test_wrong_inputs_name_the_way_out():
    x = torch.randn(4, 64)
    for call in (
        lambda: ms.quantize(x.double(), "mxfp8"),
        lambda: ms.quantize(torch.arange(4), "mxfp8"),
        lambda: ms.quantize(torch.tensor(1.0), "mxfp8"),
        lambda: ms.quantize(ms.quantize(x, "mxfp8"), "mxfp8"),
        lambda: ms.quantize(x, "mxfp8", amax=1.0),
        lambda: ms.quantize(x, "nvfp4", amax=1.0, outer_scale=1.0),
        lambda: ms.quantize(x, "nvfp4", amax=torch.ones(3, 1)),
        lambda: ms.quantize(x, "nvfp4", outer_scale_mode="static"),
        lambda: ms.quantize(x, "mxfp8", rounding="stochastic"),
        lambda: ms.quantize(x[:, :50], "mxfp8", hadamard=16),
        lambda: ms.dequantize(x),
        lambda: ms.matmul(x, x.t()),
        lambda: ms.matmul(ms.quantize(x, "mxfp8"), x),
        lambda: ms.matmul(ms.quantize(x, "mxfp8"), x.t().bfloat16()),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.hint
