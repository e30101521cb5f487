"""The torch.library ops: opcheck, torch.compile, autograd, inference mode, serialization."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

import microscale as ms
from microscale.testing import assert_same_bits, assert_same_quantized

FORMATS = ms.list_formats()


@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp6", "nvfp4", "nvfp4_row", "fp8_block128", "nf4"])
def test_opcheck(fmt, layout, device):
    x = torch.randn(5, 200, device=device)
    q = ms.quantize(x, fmt, layout=layout)
    ops, spec = torch.ops.microscale, ms.find_quantizer(fmt)
    torch.library.opcheck(ops.quantize.default, (x, spec.key, None, None, None, layout))
    amax = None if spec.format.outer_scale is None else torch.ones((), device=device)
    seed = torch.tensor([3, 1], device=device)
    stochastic = ms.find_quantizer(fmt, rounding="stochastic")
    torch.library.opcheck(ops.quantize.default, (x, stochastic.key, amax, None, seed, layout))
    args = (q.qdata, q.scale, q.outer_scale, q.format.key, 200, layout, torch.bfloat16)
    torch.library.opcheck(ops.dequantize.default, args)
    a = (q.qdata, q.scale, q.outer_scale, q.meta.pack(), 200)
    w = torch.randn(200, 3, device=device)
    torch.library.opcheck(ops.matmul.default, (*a, w, None, None, "", 0, torch.randn(3, device=device), torch.float32))
    experts = torch.randn(2, 200, 3, device=device)
    ends = torch.tensor([2, 5], dtype=torch.int32, device=device)
    torch.library.opcheck(ops.grouped_matmul.default, (*a, experts, None, None, "", 0, ends, torch.float32))


@pytest.mark.parametrize("fmt", FORMATS)
def test_autograd_through_linear(fmt, device):
    """The gradient to the activation is that of the dequantized weight; the weight gets none."""
    q = ms.quantize(torch.randn(9, 70, device=device), fmt)
    x = torch.randn(2, 4, 70, device=device, requires_grad=True)
    y = torch.nn.functional.linear(x, q, torch.zeros(9, device=device))
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(got, g @ q.dequantize(), rtol=1e-5, atol=1e-5)


def test_straight_through_linear(device):
    spec = ms.find_quantizer("mxfp8")
    q = ms.quantize(torch.randn(9, 64, device=device), "mxfp8")
    x = torch.randn(5, 64, device=device, requires_grad=True)
    bias = torch.randn(9, device=device, requires_grad=True)
    y = ms.linear(x, q, bias, input_quantizer=spec)
    y.sum().backward()
    with torch.no_grad():
        assert_same_bits(ms.linear(x, q, bias, input_quantizer=spec), y)
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 5.0))


def test_inference_mode_and_embedding(device):
    q = ms.quantize(torch.randn(11, 64, device=device), "nvfp4")
    x = torch.randn(3, 64, device=device)
    expected = torch.nn.functional.linear(x, q)
    with torch.inference_mode():
        assert_same_bits(torch.nn.functional.linear(x, q), expected)
        spec = ms.find_quantizer("nvfp4")
        dynamic = ms.linear(x, q, input_quantizer=spec)
        assert torch.equal(q.t().dequantize(), q.dequantize().t()) and q[1:].shape == (10, 64)
        assert ms.quantize(x, spec).t().shape == (64, 3)
    assert_same_bits(ms.linear(x, q, input_quantizer=spec), dynamic)
    ids = torch.tensor([[0, 5], [10, 5]], device=device)
    assert_same_bits(torch.nn.functional.embedding(ids, q), q.dequantize()[ids])


@pytest.mark.parametrize("fmt", FORMATS)
def test_pickle_save_and_deepcopy(fmt):
    q = ms.quantize(torch.randn(5, 100).bfloat16(), fmt, layout="swizzle_32_4_4")
    parameter = torch.nn.Parameter(q, requires_grad=False)
    file = io.BytesIO()
    torch.save({"q": q, "p": parameter}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for other in (loaded["q"], loaded["p"], pickle.loads(pickle.dumps(q)), copy.deepcopy(parameter)):
        assert_same_quantized(other, q)
        assert other.meta == q.meta and other.dtype == q.dtype
    assert isinstance(loaded["p"], torch.nn.Parameter) and isinstance(copy.deepcopy(parameter), torch.nn.Parameter)


def test_a_fresh_process_loads_saved_weights(tmp_path):
    """`import torch, microscale` is all that torch.load(weights_only=True) needs."""
    path = tmp_path / "q.pt"
    torch.save(ms.quantize(torch.randn(3, 40), "nvfp4"), path)
    code = f"import torch, microscale; print(torch.load({str(path)!r}, weights_only=True).format.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "nvfp4", done.stderr


def test_flatten_round_trip_and_repr():
    q = ms.quantize(torch.randn(5, 100), "nvfp4")
    names, context = q.__tensor_flatten__()
    again = type(q).__tensor_unflatten__({n: getattr(q, n) for n in names}, context, q.shape, q.stride())
    assert_same_quantized(again, q)
    text = repr(q)
    assert "nvfp4" in text and "[5, 100]" in text and "4.5" in text and "strided" in text and "tensor(" not in text


class _Mlp(torch.nn.Module):
    def __init__(self, fmt):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)
        for layer in (self.up, self.down):
            layer.weight = torch.nn.Parameter(ms.quantize(layer.weight, fmt), requires_grad=False)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "mxfp6"])
def test_compile_fullgraph_equals_eager(fmt):
    torch.compiler.reset()
    model, x = _Mlp(fmt), torch.randn(4, 64)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_compile_quantize_and_dynamic_linear():
    torch.compiler.reset()
    q, spec = ms.quantize(torch.randn(32, 64), "mxfp8"), ms.find_quantizer("mxfp8")

    def f(x):
        return ms.linear(x, q, input_quantizer=spec), ms.quantize(x, "nvfp4").dequantize()

    x = torch.randn(4, 64)
    for got, want in zip(torch.compile(f, fullgraph=True)(x), f(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_cpu_and_cuda_give_the_same_bytes():
    x = torch.randn(64, 300)
    for fmt in FORMATS:
        on_gpu = ms.quantize(x.cuda(), fmt)
        assert_same_quantized(on_gpu.to("cpu"), ms.quantize(x, fmt), fmt)
        assert_same_bits(on_gpu.dequantize(), ms.quantize(x, fmt).dequantize(), fmt)


def test_explain_takes_the_weight_as_layers_have_it():
    """What does not fit is refused, and not described as a product that nobody can make."""
    x, w = torch.randn(3, 64), ms.quantize(torch.randn(32, 64), "mxfp8")
    assert "[64, 32]" in ms.explain("matmul", x, w).problem
    for op, wrong in (("matmul", w.t()), ("grouped_matmul", ms.quantize(torch.randn(2, 32, 48), "mxfp8"))):
        with pytest.raises(ms.MicroscaleError, match="a weight") as caught:
            ms.explain(op, x, wrong)
        assert "w.t()" in caught.value.hint
