"""silu_mul_quantize and rms_norm_quantize: accuracy, what `quantize` gives for the unfused tensor, errors, compile."""

import numpy as np
import pytest
import torch

import microscale as ms
from microscale.errors import InputError, UnknownNameError
from microscale.numerics import activations
from microscale.testing import assert_same_bits, assert_same_quantized

FORMATS = ms.list_formats()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5


def ulps(got, exact):
    """Largest distance from float64 in units of the last place of FP32."""
    return float(((got.double() - exact).abs() / torch.from_numpy(np.spacing(exact.abs().float().numpy()))).max())


def inputs(device, *shape, dtype=torch.bfloat16):
    return (torch.randn(2, *shape, device=device) * 3).to(dtype).unbind(0)


# -- numerics ----------------------------------------------------------------------------------------------------------


def test_fused_multiply_add_rounds_once(device):
    """Against exact integers, where the product lies on, next to and away from a tie of the sum."""
    a = torch.randint(2**23, 2**24, (200_000,))
    b = torch.randint(2**11, 2**12, (200_000,)) * 2 + 1
    shift = torch.randint(0, 40, (200_000,))
    c = torch.randint(-(2**24) + 1, 2**24, (200_000,))
    exact = [x * y + (z << s) for x, y, z, s in zip(*(t.tolist() for t in (a, b, c, shift)), strict=True)]
    wide = c.double() * 2.0 ** shift.double()
    got = activations.fused_multiply_add(*(t.to(device).float() for t in (a, b, wide)))
    assert got.tolist() == [_nearest(n) for n in exact]


def _nearest(n: int) -> float:
    """An integer rounded to 24 bits, ties to even."""
    drop = max(0, abs(n).bit_length() - 24)
    low, rest = divmod(abs(n), 1 << drop)
    up = 2 * rest > 1 << drop or (2 * rest == 1 << drop and low % 2 == 1)
    return float((low + up) << drop) * (-1 if n < 0 else 1)


def test_silu_is_within_three_ulp_of_float64():
    x = torch.cat([torch.randn(500_000) * 4, torch.linspace(-87.3, 30, 500_000), torch.randn(1000) * 1e-30])
    assert ulps(activations.silu(x), torch.nn.functional.silu(x.double())) < 3


def test_the_ends_of_silu_are_those_of_torch(device):
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 3e38, -3e38, -100.0, 25.0, 1e-45, -1e-40], device=device)
    got, torchs = activations.silu(x), torch.nn.functional.silu(x)
    assert_same_bits(got[:8], torchs[:8])
    torch.testing.assert_close(got[8:], torchs[8:], rtol=1e-6, atol=1e-44)
    # one end is our own: where the sigmoid is below 2**-126, it is 0
    assert activations.silu(torch.tensor([-87.33]))[0] < -1e-37
    assert activations.silu(torch.tensor([-87.34]))[0] == 0


@pytest.mark.parametrize("columns", [1, 31, 4096, 5000])
def test_rms_norm_is_close_to_float64(columns):
    x, weight = torch.randn(50, columns) * torch.exp(3 * torch.randn(50, 1)), torch.randn(columns)
    exact = torch.nn.functional.rms_norm(x.double(), [columns], weight.double(), EPS)
    assert ulps(activations.rms_norm(x, weight, EPS), exact) < 5
    total = (x.double() ** 2).sum(-1, keepdim=True)
    assert ulps(activations.sum_of_squares(x), total) < 5


def test_values_round_once_to_the_input_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        gate, up = inputs("cpu", 64, 512, dtype=dtype)
        exact = torch.nn.functional.silu(gate.double()) * up.double()
        wrong = (activations.silu_mul(gate, up) != exact.to(dtype)).float().mean()
        assert wrong < 1e-3  # only where FP32 lies on the other side of a tie


def test_rows_of_nan_inf_and_zero():
    x = torch.randn(4, 64)
    x[0, 3], x[1, 3], x[2] = torch.nan, torch.inf, 0
    y = activations.rms_norm(x, None, EPS)
    assert y[0].isnan().all() and y[1, 3].isnan() and (y[1, 4:] == 0).all() and (y[2] == 0).all()
    assert activations.rms_norm(x[2:3], None, 0.0).isnan().all()  # 0 / 0, as torch
    q = ms.rms_norm_quantize(x.bfloat16(), None, EPS, "mxfp8")
    assert q[0].dequantize().isnan().all() and (q[2].dequantize() == 0).all()


# -- the ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_those_of_the_unfused_tensor(fmt, device):
    for shape, dtype in (((5, 256), DTYPES[0]), ((2, 3, 100), DTYPES[1]), ((33,), DTYPES[2])):
        gate, up = inputs(device, *shape, dtype=dtype)
        weight = torch.rand(shape[-1], device=device)
        for layout in ("strided", "swizzle_32_4_4"):
            got = ms.silu_mul_quantize(gate, up, fmt, layout=layout)
            assert got.scale_layout == layout and got.dtype == dtype and got.shape == gate.shape
            assert_same_quantized(got, ms.quantize(activations.silu_mul(gate, up), fmt, layout=layout), fmt)
        for w in (weight, weight.bfloat16(), None):
            got = ms.rms_norm_quantize(gate, w, EPS, fmt)
            assert_same_quantized(got, ms.quantize(activations.rms_norm(gate, w, EPS), fmt), fmt)


def test_keywords_mean_what_they_mean_to_quantize(device):
    gate, up = inputs(device, 64, 96)
    y, z = activations.silu_mul(gate, up), activations.rms_norm(gate, None, EPS)
    for fmt, changes in (
        ("mxfp8", {"scale_rule": "floor"}), ("mxfp4", {"block": 16}), ("nvfp4", {"scale_tile": (16, 16)}),
        ("nvfp4", {"amax": 3.0}), ("nvfp4", {"outer_scale": torch.tensor(0.01)}), ("nvfp4", {"hadamard": 16}),
        ("nvfp4", {"rounding": "stochastic", "generator": 7}), ("nvfp4_4over6", {}),
        ("nvfp4_row", {"amax": torch.rand(64, 1, device=device) + 1}),
    ):  # fmt: skip
        assert_same_quantized(ms.silu_mul_quantize(gate, up, fmt, **changes), ms.quantize(y, fmt, **changes), fmt)
        assert_same_quantized(
            ms.rms_norm_quantize(gate, None, EPS, fmt, **changes), ms.quantize(z, fmt, **changes), fmt
        )
    for axis in (0, -2, 1):
        got = ms.silu_mul_quantize(gate, up, "nvfp4", axis=axis)
        assert_same_bits(got.dequantize(), ms.quantize(y, "nvfp4", axis=axis).dequantize())
        assert got.block_axis == (-2 if axis in (0, -2) else -1)
    spec = ms.find_quantizer("mxfp8")
    assert_same_quantized(ms.silu_mul_quantize(gate, up, spec), ms.quantize(y, spec))


def test_strides_do_not_matter(device):
    both = inputs(device, 6, 256)[0]
    gate, up = both[:, :128], both[:, 128:]
    expected = ms.silu_mul_quantize(gate.contiguous(), up.contiguous(), "mxfp8")
    assert_same_quantized(ms.silu_mul_quantize(gate, up, "mxfp8"), expected)
    turned = [t.t().contiguous().t() for t in (gate, up)]
    assert_same_quantized(ms.silu_mul_quantize(*turned, "mxfp8"), expected)
    expected = ms.rms_norm_quantize(gate.contiguous(), None, EPS, "nvfp4")
    for x in (gate, turned[0]):
        assert_same_quantized(ms.rms_norm_quantize(x, None, EPS, "nvfp4"), expected)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (2, 0, 64)])
@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4"])
def test_empty_tensors(fmt, shape, device):
    x = torch.empty(shape, device=device)
    for q in (ms.silu_mul_quantize(x, x, fmt), ms.rms_norm_quantize(x, x.new_ones(shape[-1]), EPS, fmt)):
        assert_same_quantized(q, ms.quantize(x, fmt))
        assert q.shape == shape


def test_results_carry_no_gradient(device):
    gate, up = (t.requires_grad_() for t in inputs(device, 4, 64, dtype=torch.float32))
    weight = torch.ones(64, device=device, requires_grad=True)
    for q in (ms.silu_mul_quantize(gate, up, "mxfp8"), ms.rms_norm_quantize(gate, weight, EPS, "mxfp8")):
        assert not q.requires_grad and not q.dequantize().requires_grad


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "nvfp4_row", "mxfp6"])
def test_opcheck(fmt, device):
    gate, up = inputs(device, 5, 96)
    ops, spec = torch.ops.microscale, ms.find_quantizer(fmt)
    amax = None if spec.format.outer_scale is None else torch.ones((), device=device)
    seed = torch.tensor([3, 1], device=device)
    stochastic = ms.find_quantizer(fmt, rounding="stochastic").key
    weight = torch.rand(96, device=device)
    for tail in ((spec.key, None, None, None, "strided"), (stochastic, amax, None, seed, "swizzle_32_4_4")):
        torch.library.opcheck(ops.silu_mul_quantize.default, (gate, up, *tail))
        torch.library.opcheck(ops.rms_norm_quantize.default, (gate, weight, EPS, *tail))
        torch.library.opcheck(ops.rms_norm_quantize.default, (gate, None, EPS, *tail))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph_equals_eager(backend):
    torch.compiler.reset()
    gate, up = inputs("cpu", 4, 64)
    weight = torch.rand(64)

    def f(gate, up, weight):
        q = ms.silu_mul_quantize(gate, up, "nvfp4", rounding="stochastic", generator=3)
        r = ms.rms_norm_quantize(gate, weight, EPS, "mxfp8", layout="swizzle_32_4_4")
        return q.dequantize(), r.dequantize(), ms.silu_mul_quantize(gate, up, "mxfp4", axis=0).dequantize()

    for got, want in zip(
        torch.compile(f, fullgraph=True, backend=backend)(gate, up, weight), f(gate, up, weight), strict=True
    ):
        assert_same_bits(got, want)


def test_explain_says_which_kernel_runs():
    gate, up = inputs("cpu", 4, 64)
    assert ms.explain("silu_mul_quantize", gate, up, "nvfp4", amax=1.0).chosen == "reference.silu_mul_quantize"
    text = str(ms.explain("rms_norm_quantize", gate, None, EPS, "mxfp8", layout="swizzle_32_4_4"))
    assert "reference.rms_norm_quantize" in text
    assert "triton.rms_norm_quantize" in text and "needs a cuda device" in text


def test_errors_name_the_way_out():
    x = torch.randn(4, 64)
    with pytest.raises(InputError, match=r"\[4, 64\].*\[4, 32\]"):
        ms.silu_mul_quantize(x, x[:, :32], "mxfp8")
    with pytest.raises(InputError, match="bfloat16"):
        ms.silu_mul_quantize(x, x.bfloat16(), "mxfp8")
    with pytest.raises(InputError, match="float64"):
        ms.silu_mul_quantize(x.double(), x.double(), "mxfp8")
    with pytest.raises(InputError, match="quantized already: mxfp8"):
        ms.silu_mul_quantize(ms.quantize(x, "mxfp8"), x, "mxfp8")
    with pytest.raises(InputError, match="list"):
        ms.silu_mul_quantize([1.0], x, "mxfp8")
    with pytest.raises(InputError, match="axis 2"):
        ms.silu_mul_quantize(x, x, "mxfp8", axis=2)
    with pytest.raises(InputError, match="rank 0"):
        ms.rms_norm_quantize(x[0, 0], None, EPS, "mxfp8")
    with pytest.raises(InputError, match=r"(?s)weight \[32\].*64 columns"):
        ms.rms_norm_quantize(x, x[0, :32], EPS, "mxfp8")
    for eps in (-1.0, torch.inf, torch.nan):
        with pytest.raises(InputError, match="eps"):
            ms.rms_norm_quantize(x, None, eps, "mxfp8")
    with pytest.raises(InputError, match="no outer scale"):
        ms.rms_norm_quantize(x, None, EPS, "mxfp8", amax=1.0)
    with pytest.raises(InputError, match="seed"):
        ms.silu_mul_quantize(x, x, "mxfp8", rounding="stochastic")
    with pytest.raises(InputError, match="Hadamard"):
        ms.rms_norm_quantize(x[:, :60], None, EPS, "nvfp4", hadamard=16)
    with pytest.raises(UnknownNameError, match="swizzle"):
        ms.silu_mul_quantize(x, x, "mxfp8", layout="swizzle")


@pytest.mark.gpu
def test_cpu_and_cuda_give_the_same_bytes():
    gate, up = inputs("cpu", 64, 4352)
    weight = torch.rand(4352)
    for fmt in FORMATS:
        got = ms.silu_mul_quantize(gate.cuda(), up.cuda(), fmt)
        assert_same_quantized(got.to("cpu"), ms.silu_mul_quantize(gate, up, fmt), fmt)
        got = ms.rms_norm_quantize(gate.cuda(), weight.cuda(), EPS, fmt)
        assert_same_quantized(got.to("cpu"), ms.rms_norm_quantize(gate, weight, EPS, fmt), fmt)
