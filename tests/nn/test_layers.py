"""The quantized modules: what forward computes, gradients, compile, state dicts, copies, moves."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import microscale as ms
from microscale.errors import InputError
from microscale.nn import QuantizedEmbedding, QuantizedLinear, to_quantized_
from microscale.testing import assert_same_bits, assert_same_quantized

FORMATS = ms.list_formats()
NVFP4, MXFP8 = ms.find_quantizer("nvfp4"), ms.find_quantizer("mxfp8")
STATIC = ms.find_quantizer("nvfp4", outer_scale_mode="static")


def layer(weight="nvfp4", inputs=None, amax=None, *, k=72, n=40, bias=True, dtype=torch.float32) -> QuantizedLinear:
    """A quantized linear with ragged K."""
    made = nn.Linear(k, n, bias=bias, dtype=dtype)
    to_quantized_(made, ms.quantize(made.weight, weight), inputs, amax)
    return made


# -- forward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_weight_only_is_linear_on_the_dequantized_weight(fmt, device):
    module, x = layer(fmt).to(device), torch.randn(3, 5, 72, device=device)
    expected = nn.functional.linear(x.double(), module.weight.dequantize().double(), module.bias.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_dynamic_is_quantizing_both(fmt, device):
    quantizer = ms.find_quantizer(fmt)
    module, x = layer(fmt, quantizer).to(device), torch.randn(3, 5, 72, device=device)
    q = ms.quantize(x, quantizer).dequantize().double()
    expected = nn.functional.linear(q, module.weight.dequantize().double(), module.bias.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(module(x), ms.linear(x, module.weight, module.bias, input_quantizer=quantizer))


def test_formats_of_input_and_weight_may_differ_and_bias_may_be_absent():
    module, x = layer("mxfp6", MXFP8, bias=False), torch.randn(4, 72)
    expected = ms.quantize(x, "mxfp8").dequantize() @ module.weight.dequantize().T
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_only_the_input_may_be_quantized(recipe):
    module, x = nn.Linear(72, 40), torch.randn(4, 72)
    ms.quantize_(module, recipe({"match": "*", "fprop": {"input": "x"}}))
    assert not isinstance(module.weight, ms.BlockScaledTensor) and not module.weight.requires_grad
    expected = nn.functional.linear(ms.quantize(x, "nvfp4").dequantize(), module.weight, module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_static_uses_the_calibrated_amax():
    x = torch.randn(4, 72)
    module = layer("nvfp4", STATIC, torch.tensor(9.0))
    q = ms.quantize(x, "nvfp4", amax=torch.tensor(9.0)).dequantize()
    expected = nn.functional.linear(q, module.weight.dequantize(), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(module(x), layer("nvfp4", NVFP4)(x))


def test_uncalibrated_static_layer_names_the_way_out():
    module = layer("nvfp4", STATIC)
    assert "input=nvfp4(static), uncalibrated" in repr(module)
    with pytest.raises(InputError) as caught:
        module(torch.randn(4, 72))
    assert "never calibrated: QuantizedLinear(in_features=72" in str(caught.value)
    assert "calibrate=batches" in caught.value.hint and "dynamic" in caught.value.hint
    module.input_amax = torch.tensor(3.0)
    module(torch.randn(4, 72))


def test_hadamard_on_both_operands_cancels(recipe):
    module, x = nn.Linear(64, 40), torch.randn(6, 64)
    expected = module(x)
    h = {"format": "mxfp8", "hadamard": {"size": 16, "sign": [1, -1] * 8}}
    ms.quantize_(module, recipe({"match": "*", "fprop": {"weight": "h", "input": "h"}}, h=h))
    assert (module(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("fmt", FORMATS)
def test_embedding_decodes_the_rows_it_looks_up(fmt):
    module, indices = nn.Embedding(30, 72, padding_idx=0), torch.tensor([[1, 7], [29, 0]])
    to_quantized_(module, ms.quantize(module.weight, fmt))
    assert isinstance(module, QuantizedEmbedding) and f"weight={fmt}" in repr(module)
    assert_same_bits(module(indices), module.weight.dequantize()[indices])


@pytest.mark.parametrize("shape", [(72,), (0, 72), (1, 72), (2, 0, 72), (2, 1, 3, 72)])
@pytest.mark.parametrize("inputs", [None, NVFP4, MXFP8])
def test_inputs_of_any_rank_and_empty(shape, inputs):
    module, x = layer("nvfp4", inputs), torch.randn(shape)
    assert module(x).shape == (*shape[:-1], 40)
    if x.numel():
        assert_same_bits(module(x).reshape(-1, 40), module(x.reshape(-1, 72)))


@pytest.mark.parametrize("inputs", [None, NVFP4, MXFP8])
def test_zero_input_gives_the_bias_and_nan_stays_in_its_row(inputs):
    module, x = layer("nvfp4", inputs), torch.zeros(3, 72)
    assert_same_bits(module(x), module.bias.detach().expand(3, 40).clone())
    x[1, 5] = float("nan")
    out = module(x)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("inputs", [None, MXFP8])
def test_autocast_computes_in_its_dtype(inputs):
    module, x = layer("mxfp8", inputs), torch.randn(4, 72)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16 and module.weight.dtype == torch.float32
    torch.testing.assert_close(out.float(), module(x), rtol=3e-2, atol=3e-2)


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(module, x, dy):
    x = x.clone().requires_grad_()
    module(x).backward(dy)
    bias = module.bias.grad
    module.bias.grad = None
    return x.grad, bias


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("quantized_input", [False, True])
def test_gradients_to_activation_and_bias(fmt, quantized_input):
    module = layer(fmt, ms.find_quantizer(fmt) if quantized_input else None)
    x, dy = torch.randn(2, 3, 72), torch.randn(2, 3, 40)
    dx, db = gradients(module, x, dy)
    torch.testing.assert_close(dx, dy @ module.weight.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert module.weight.grad is None


@pytest.mark.parametrize("inputs", [None, NVFP4])
def test_gradient_of_a_vector(inputs):
    module, dy = layer("nvfp4", inputs), torch.randn(40)
    dx, db = gradients(module, torch.randn(72), dy)
    torch.testing.assert_close(dx, dy @ module.weight.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, dy)


def test_gradient_of_an_input_only_layer(recipe):
    module = nn.Linear(72, 40)
    ms.quantize_(module, recipe({"match": "*", "fprop": {"input": "x"}}))
    dy = torch.randn(3, 40)
    dx, _ = gradients(module, torch.randn(3, 72), dy)
    torch.testing.assert_close(dx, dy @ module.weight, rtol=1e-5, atol=1e-5)


def test_gradient_goes_back_through_the_hadamard(recipe):
    module, h = nn.Linear(64, 40), {"format": "mxfp8", "hadamard": {"size": 16, "sign": [1, -1] * 8}}
    ms.quantize_(module, recipe({"match": "*", "fprop": {"weight": "h", "input": "h"}}, h=h))
    dy = torch.randn(3, 40)
    dx, _ = gradients(module, torch.randn(3, 64), dy)
    weight = ms.hadamard(module.weight.dequantize(), 16, [1, -1] * 8, inverse=True)
    torch.testing.assert_close(dx, dy @ weight, rtol=1e-5, atol=1e-5)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "amax"), [(None, None), (NVFP4, None), (STATIC, torch.tensor(4.0))], ids=["weight", "dynamic", "static"]
)
def test_compiles_as_one_graph(inputs, amax):
    torch.compiler.reset()
    model = nn.Sequential(layer("nvfp4", inputs, amax, n=48), nn.ReLU(), layer("nvfp4", inputs, amax, k=48))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(5, 72), torch.randn(5, 40)
    with torch.no_grad():
        assert_same_bits(compiled(x), model(x))
    grads = []
    for run in (compiled, model):
        leaf = x.clone().requires_grad_()
        run(leaf).backward(dy)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_compiled_embedding_is_one_graph():
    torch.compiler.reset()
    module = nn.Embedding(30, 72)
    to_quantized_(module, ms.quantize(module.weight, "mxfp4"))
    indices = torch.tensor([3, 1, 29])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(indices), module(indices))


# -- state, copies, moves ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["nvfp4_static", "mxfp6_dynamic", "mxfp4_weight_only"])
def model(request, tiny, tokens):
    ms.quantize_(tiny, request.param, calibrate=[tokens])
    return tiny


def test_state_dict_round_trip_through_a_file(model, tokens):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert isinstance(state["blocks.0.up.weight"], ms.BlockScaledTensor)
    for assign in (False, True):
        fresh = copy.deepcopy(model)
        for parameter in fresh.parameters():
            if isinstance(parameter, ms.BlockScaledTensor):
                parameter.qdata.zero_()
            else:
                nn.init.zeros_(parameter)
        fresh.load_state_dict(state, assign=assign)
        assert_same_bits(fresh(tokens), model(tokens), f"assign={assign}")


def test_calibration_loads_into_an_uncalibrated_layer():
    calibrated, fresh = layer("nvfp4", STATIC, torch.tensor(3.5)), layer("nvfp4", STATIC)
    assert "input_amax" in calibrated.state_dict() and "input_amax" not in fresh.state_dict()
    fresh.load_state_dict(calibrated.state_dict())
    assert_same_bits(fresh.input_amax, torch.tensor(3.5))
    with pytest.raises(RuntimeError, match="input_amax"):
        calibrated.load_state_dict(layer("nvfp4", STATIC).state_dict())


def test_plain_weights_do_not_load_into_a_quantized_layer():
    with pytest.raises(RuntimeError, match="quantize it first"):
        layer().load_state_dict(nn.Linear(72, 40).state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(model, tokens, copier):
    made = copier(model)
    assert_same_bits(made(tokens), model(tokens))
    ours, theirs = model.blocks[0]["up"], made.blocks[0]["up"]
    assert type(theirs) is QuantizedLinear and isinstance(theirs.weight, nn.Parameter)
    assert theirs.weight.qdata.data_ptr() != ours.weight.qdata.data_ptr()
    assert theirs.input_quantizer == ours.input_quantizer and not theirs.weight.requires_grad


def test_copies_keep_tied_weights_tied(tied, recipe):
    ms.quantize_(tied, recipe({"match": "*", "types": ["linear", "embedding"], "fprop": {"weight": "w"}}))
    for made in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        assert made.embed.weight is made.lm_head.weight is not tied.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_moves_keep_the_bytes_and_the_amax(dtype):
    module = layer("nvfp4", STATIC, torch.tensor(1.0 + 2**-20))
    before, amax = copy.deepcopy(module.weight), module.input_amax.clone()
    assert module.to(dtype) is module
    assert module.weight.dtype == module.bias.dtype == dtype and module(torch.randn(2, 72, dtype=dtype)).dtype == dtype
    assert_same_quantized(module.weight.detach(), before.as_dtype(dtype))
    module.float()
    assert_same_quantized(module.weight.detach(), before.detach())
    assert_same_bits(module.input_amax, amax)


def test_float64_is_refused_with_the_module_intact():
    module = layer()
    with pytest.raises(NotImplementedError, match="float64"):
        module.double()
    assert module.weight.dtype == torch.float32 and module(torch.randn(2, 72)).dtype == torch.float32


def test_device_moves(device):
    model = nn.Sequential(layer("nvfp4", STATIC, torch.tensor(4.0)))
    weight = model[0].weight
    model.to(device)
    assert {t.device.type for t in (weight.qdata, weight.scale, weight.outer_scale, model[0].input_amax)} == {
        device.type
    }
    assert model[0].weight is weight and model(torch.randn(2, 72, device=device)).device.type == device.type
    assert all(p.device.type == "meta" for p in model.to("meta").parameters())


def test_to_quantized_refuses_what_does_not_fit():
    q = ms.quantize(torch.randn(40, 72), "nvfp4")
    for module, weight, inputs, message in (
        (nn.Conv1d(2, 2, 1), q, None, "cannot quantize a Conv1d"),
        (nn.Linear(70, 40), q, None, r"weight of shape \[40, 72\] for a module of \[40, 70\]"),
        (nn.Embedding(40, 72), q, NVFP4, "an embedding's input"),
    ):
        with pytest.raises(InputError, match=message):
            to_quantized_(module, weight, inputs)
        assert not isinstance(module, QuantizedLinear | QuantizedEmbedding)


def test_repr_shows_formats():
    text = repr(layer("mxfp6", MXFP8))
    assert text == "QuantizedLinear(in_features=72, out_features=40, bias=True, weight=mxfp6, input=mxfp8)"
