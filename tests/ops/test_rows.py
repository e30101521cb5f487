"""`align_rows` and kept rows: the same weight as FP8 tensor cores take it, used where that is faster, never stale."""

import copy
import importlib

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.kernels.cublas import rows_e4m3
from microscale.kernels.reference import align_rows as reference
from microscale.nn import quantize_
from microscale.nn.layers import QuantizedLinear
from microscale.ops import library, rows
from microscale.spec.powers import with_powers

FORMATS = [f for f in ms.list_formats() if reference.fits(ms.find_format(f))]
prepare_module = importlib.import_module("microscale.ops.prepare")  # beside a function of the same name


@pytest.fixture
def on_hopper(monkeypatch):
    """Weights here count as those of an H200; what runs is the reference."""
    monkeypatch.setattr(library, "capability", lambda device: (9, 0))
    monkeypatch.setattr(rows.dispatch, "installed", lambda package: False)


def layer(fmt="mxfp8", activations="mxfp8", n=64, k=128, bias=True):
    model = torch.nn.Sequential(torch.nn.Linear(k, n, bias=bias, dtype=torch.bfloat16))
    spec = {"x": {"format": activations}, "w": {"format": fmt}}
    rules = [{"match": "*", "fprop": {"input": "x", "weight": "w"}}]
    quantize_(model, {"name": "test", "quantizers": spec, "rules": rules})
    return model


# -- align_rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(24, 96), (3, 16, 64), (8, 40)])
def test_same_codes_as_the_reference(fmt, shape):
    """One byte an element, one power of two a row; a row's padding is not stored."""
    q = ms.quantize(torch.randn(shape).bfloat16(), fmt)
    made = ms.align_rows(q)
    codes, powers = reference.align_rows(q.qdata, q.scale, q.format, shape[-1], "strided")
    assert made.shape == shape and made.dtype == q.dtype and made.qdata.is_contiguous()
    assert torch.equal(made.qdata, codes.view(torch.uint8)[..., : shape[-1]]) and made.scale.shape == (*shape[:-1], 1)
    assert torch.equal(made.dequantize(torch.float32), codes.float()[..., : shape[-1]] * powers)
    assert rows_e4m3.is_aligned(with_powers(made.format), True)
    error = (made.dequantize(torch.float32) - q.dequantize(torch.float32)).abs()
    assert bool((error <= 2.0**-10 * powers).all())
    if q.format.element.width < 8:
        assert not error.any()


@pytest.mark.parametrize("layout", ["swizzle_32_4_4", "fragments"])
def test_other_layouts(layout):
    q = ms.quantize(torch.randn(64, 128), "mxfp8")
    assert torch.equal(ms.align_rows(q.to_layout(layout)).qdata, ms.align_rows(q).qdata)


def test_nan_stays_nan():
    x = torch.randn(4, 64)
    x[2, 5] = torch.nan
    made = ms.align_rows(ms.quantize(x, "mxfp8")).dequantize()
    assert bool(made[2, :32].isnan().all()) and not bool(made[2, 32:].isnan().any() | made[:2].isnan().any())


def test_what_is_refused():
    with pytest.raises(InputError, match="does not fit rows of E4M3"):
        ms.align_rows(ms.quantize(torch.randn(4, 64), "nvfp4"))
    with pytest.raises(InputError, match="blocks along K"):
        ms.align_rows(ms.quantize(torch.randn(64, 64), "mxfp8").t())
    with pytest.raises(InputError, match="got Tensor"):
        ms.align_rows(torch.randn(4, 64))
    far = ms.quantize(torch.randn(4, 64), "mxfp4")
    far.scale[:, 1], far.scale[:, 0] = 100, 130
    with pytest.raises(InputError, match="too far apart"):
        ms.align_rows(far)
    with pytest.raises(InputError, match="too far apart"):
        ms.align_rows(ms.prepare(ms.quantize(torch.randn(64, 64), "mxfp4")).replace(
            meta=prepare_module.dataclasses.replace(far.meta, exact_rows=False)))  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 64), (4, 40)])
def test_activations_become_the_rows_of_what_quantize_gives(fmt, shape):
    x, spec = 3 * torch.randn(shape).bfloat16(), ms.find_quantizer(fmt)
    made, q = rows.quantize_as_rows(x, spec), ms.quantize(x, spec)
    codes, powers = reference.align_rows(q.qdata, q.scale, q.format, shape[-1], "strided")
    assert made.shape == x.shape and made.dtype == x.dtype
    assert torch.equal(made.qdata, codes.view(torch.uint8)[..., : shape[-1]]) and torch.equal(made.scale, powers)
    assert ms.explain("quantize_rows", x, spec).chosen == "reference.quantize_rows"
    torch.library.opcheck(torch.ops.microscale.quantize_rows, (x, spec.key))


def test_other_activations_stay_what_they_are():
    x = torch.randn(4, 64)
    for spec in (ms.find_quantizer("fp8_row"), ms.find_quantizer("nvfp4")):
        assert rows.quantize_as_rows(x, spec).format.name.startswith(spec.format.name)
    with pytest.raises(InputError, match="needs a seed"):  # as `quantize` says of what a layer cannot give
        rows.quantize_as_rows(x, ms.find_quantizer("mxfp8", rounding="stochastic"))


# -- linear ------------------------------------------------------------------------------------------------------------


def test_many_rows_are_multiplied_by_the_rows_and_few_by_the_weight():
    q = ms.quantize(torch.randn(48, 64).bfloat16(), "mxfp8")
    other = ms.align_rows(ms.quantize(torch.zeros(48, 64).bfloat16(), "mxfp8"))  # to see which one was taken
    spec = ms.find_quantizer("mxfp8")
    for shape, taken in (((128, 64), True), ((2, 64, 64), True), ((127, 64), False), ((64,), False)):
        x = torch.randn(shape).bfloat16()
        y = ms.linear(x, q, input_quantizer=spec, rows=other)
        assert bool(y.any()) is not taken, shape
        with ms.exact_products():
            assert torch.equal(ms.linear(x, q, input_quantizer=spec, rows=other), ms.linear(x, q, input_quantizer=spec))
        assert torch.equal(ms.linear(x, q, rows=other), ms.linear(x, q))


def test_the_product_is_that_of_the_rows_and_the_gradient_that_of_the_weight():
    w, x = torch.randn(48, 64).bfloat16(), torch.randn(130, 64).bfloat16()
    q, spec, bias = ms.quantize(w, "mxfp8"), ms.find_quantizer("mxfp8"), torch.randn(48).bfloat16()
    kept = ms.align_rows(q)
    expected = ms.matmul(ms.quantize(x, spec), kept.t(), bias)
    assert torch.equal(ms.linear(x, q, bias, input_quantizer=spec, rows=kept), expected)
    first, second = (x.clone().requires_grad_() for _ in range(2))
    y = ms.linear(first, q, bias.requires_grad_(), input_quantizer=spec, rows=kept)
    assert torch.equal(y, expected)
    y.sum().backward()
    ms.linear(second, q, bias, input_quantizer=spec).sum().backward()
    assert torch.equal(first.grad, second.grad)


# -- modules -----------------------------------------------------------------------------------------------------------


def test_prepare_keeps_rows_where_they_serve(on_hopper):
    model = layer()
    assert ms.prepare_(model, keep_rows=True) == {"0": "fragments, rows kept"}
    kept = model[0].kept_rows()
    assert torch.equal(kept.qdata, ms.align_rows(model[0].weight).qdata)
    assert ms.prepare_(layer("mxfp4"), keep_rows=True) == {"0": "fragments, rows exact in E4M3, rows kept"}
    assert ms.prepare_(layer("mxfp4", "fp8_row"), keep_rows=True)["0"].endswith("rows kept")
    for weight, activations, why in (
        ("mxfp8", "nvfp4", "activations in nvfp4"),
        ("nvfp4", "mxfp8", "nvfp4 does not fit"),
        ("mxfp8", "fp8_block128", "activations in fp8_block128"),
    ):
        made = layer(weight, activations)
        assert f", rows not kept: {why}" in ms.prepare_(made, keep_rows=True)["0"]
        assert made[0].kept_rows() is None
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    quantize_(plain, "mxfp8_weight_only")
    assert ms.prepare_(plain, keep_rows=True) == {"0": "fragments, rows not kept: its activations are not quantized"}


@pytest.mark.parametrize("capability", [None, (8, 0), (10, 0), (12, 0)])
def test_only_where_fp8_tensor_cores_lack_block_scales(monkeypatch, capability):
    monkeypatch.setattr(library, "capability", lambda device: capability)
    model = layer()
    assert "rows not kept: only sm_89 and sm_90" in ms.prepare_(model, keep_rows=True)["0"]
    assert model[0].kept_rows() is None


def test_experts_with_small_matrices_stay_as_they_are(on_hopper):
    """There torch's grouped FP8 product took longer on an H200 than decoding did."""
    spec = ms.find_quantizer("mxfp8")
    for sizes, kept in (
        ((2, 4096, 4096), True),
        ((2, 2064, 4096), True),
        ((2, 1536, 4096), False),
        ((2, 64, 64), False),
    ):
        reason = rows.why_not(torch.empty(sizes, device="meta", dtype=torch.bfloat16), spec)
        assert (reason is None) is kept and (kept or "multiplied faster as they are" in reason)


def kept_layer(**changes):
    model = layer(**changes)
    model[0].keep_rows(ms.align_rows(model[0].weight))
    return model


def test_a_module_multiplies_by_them():
    model, x = kept_layer(), torch.randn(2, 100, 128).bfloat16()
    module, spec = model[0], ms.find_quantizer("mxfp8")
    expected = ms.matmul(ms.quantize(x, spec), ms.align_rows(module.weight).t(), module.bias)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_they_are_not_saved_and_go_when_a_weight_is_loaded():
    model, fresh = kept_layer(), layer()
    assert "0.weight_rows" not in model.state_dict()
    x = torch.randn(128, 128).bfloat16()
    expected = fresh(x)
    model.load_state_dict(fresh.state_dict())
    assert model[0].kept_rows() is None and torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["copy", "byte", "set", "swap"])
def test_they_go_when_the_weight_changes(how):
    model, fresh = kept_layer(), layer()
    module, x = model[0], torch.randn(128, 128).bfloat16()
    with torch.no_grad():
        if how == "copy":
            module.weight.copy_(fresh[0].weight)
        elif how == "byte":
            module.weight.qdata[0, 0] ^= 1
        elif how == "set":
            module.weight = fresh[0].weight
        else:
            torch.utils.swap_tensors(module.weight, torch.nn.Parameter(fresh[0].weight.clone(), requires_grad=False))
    expected = ms.linear(x, module.weight, module.bias, input_quantizer=module.input_quantizer)
    assert torch.equal(model(x), expected) and module.kept_rows() is None


def test_moves_keep_them_and_copies_do_not():
    model = kept_layer()
    module, x = model[0], torch.randn(128, 128)
    before = module.kept_rows()
    model.half()
    after = module.kept_rows()
    assert after.dtype == torch.float16 and torch.equal(after.qdata, before.qdata)
    assert torch.equal(model(x.half()), ms.matmul(ms.quantize(x.half(), "mxfp8"), after.t(), module.bias))
    model.to("cpu").float()
    assert module.kept_rows() is not None
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), ms.linear(x, module.weight, module.bias, input_quantizer=module.input_quantizer))
    assert copied[0].kept_rows() is None and module.kept_rows() is not None


def test_under_autocast():
    model = kept_layer()
    x = torch.randn(128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert torch.equal(y, model(x.bfloat16()))


def test_compiled_whole():
    model, x = kept_layer(), torch.randn(128, 128).bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x)) and torch.equal(compiled(x[:3]), model(x[:3]))
    few = layer()
    assert few[0].kept_rows() is None


def test_experts():
    """As many tokens as 128 for each expert; below, the weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(ms.nn.GroupedLinear(2, 64, 48, dtype=torch.bfloat16))
    rules = [{"match": "*", "fprop": {"input": "x", "weight": "x"}}]
    quantize_(model, {"name": "test", "quantizers": {"x": {"format": "mxfp8"}}, "rules": rules})
    module = model[0]
    kept = ms.align_rows(module.weight)
    plain = {}
    for tokens in (256, 255):
        x = torch.randn(tokens, 64).bfloat16()
        ends = torch.tensor([100, tokens], dtype=torch.int32)
        plain[tokens] = x, ends, module(x, ends)
    module.keep_rows(kept)
    x, ends, before = plain[255]
    assert torch.equal(module(x, ends), before)
    x, ends, before = plain[256]
    expected = ms.grouped_matmul(ms.quantize(x, "mxfp8"), kept.transpose(-1, -2), ends)
    assert torch.equal(module(x, ends), expected)
    assert torch.allclose(expected.float(), before.float(), rtol=2**-6, atol=2**-6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ends), expected)


# -- what must not go wrong --------------------------------------------------------------------------------------------


def test_layers_that_no_kernel_would_serve(on_hopper, monkeypatch):
    spec = ms.find_quantizer("mxfp8")
    for shape, dtype, why in (
        ((72, 64), torch.bfloat16, "multiple of 16 outputs"), ((64, 64), torch.float16, "layers in bfloat16"),
    ):  # fmt: skip
        assert why in rows.why_not(torch.empty(shape, dtype=dtype, device="meta"), spec)
    stochastic = ms.find_quantizer("mxfp8", rounding="stochastic")
    assert "rounded to nearest" in rows.why_not(torch.empty(64, 64, dtype=torch.bfloat16), stochastic)
    monkeypatch.setattr(library, "capability", lambda device: (8, 9))
    weight = torch.empty(64, 64, dtype=torch.bfloat16)
    assert rows.why_not(weight, spec) is None and "only sm_90" in rows.why_not(weight[None], spec)


def test_activations_that_rows_have_no_place_for():
    """FP32 and FP16 ones, and outer scales: calibrated, or of one expert's tokens."""
    q = ms.quantize(torch.randn(48, 64).bfloat16(), "mxfp8")
    kept, x = ms.align_rows(q), torch.randn(130, 64).bfloat16()
    static = ms.find_quantizer("nvfp4", outer_scale_mode="static")
    amax = torch.tensor(7.0)
    got = ms.linear(x, q, input_quantizer=static, amax=amax, rows=kept)
    assert torch.equal(got, ms.linear(x, q, input_quantizer=static, amax=amax))
    spec = ms.find_quantizer("mxfp8")
    wide = q.as_dtype(torch.float32)
    got = ms.linear(x.float(), wide, input_quantizer=spec, rows=kept)
    assert torch.equal(got, ms.linear(x.float(), wide, input_quantizer=spec))
    with pytest.raises(InputError, match=r"rows \[47, 64\] of a weight"):
        ms.linear(x, q, input_quantizer=spec, rows=kept[:47])
    with pytest.raises(InputError):
        ms.linear(x[0, 0], q, input_quantizer=spec, rows=kept)


def test_tied_layers_move_together():
    first, second = layer()[0], layer()[0]
    second.weight = first.weight
    for module in (first, second):
        module.keep_rows(ms.align_rows(module.weight))
    model, x = torch.nn.ModuleList([first, second]).half().bfloat16(), torch.randn(130, 128).bfloat16()
    for module in model:  # for all that one can tell, its weight changes when the other moves
        factor = module.weight if module.kept_rows() is None else ms.align_rows(module.weight)
        assert torch.equal(module(x), ms.matmul(ms.quantize(x, "mxfp8"), factor.t(), module.bias))


def test_a_whole_model_is_saved_without_them(tmp_path):
    model, x = kept_layer(), torch.randn(130, 128).bfloat16()
    expected = layer_without(model)(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert "weight_rows" not in loaded[0]._buffers and loaded[0].kept_rows() is None
    assert torch.equal(loaded(x), expected) and model[0].kept_rows() is not None
    loaded[0].keep_rows(ms.align_rows(loaded[0].weight))
    assert torch.equal(loaded(x), model(x))


def layer_without(model):
    """A copy, which has no kept rows."""
    return copy.deepcopy(model)


def test_weights_of_inference_mode_and_other_parameters():
    model, x = kept_layer(), torch.randn(130, 128).bfloat16()
    other = {"0.weight": layer()[0].weight, "0.bias": model[0].bias}
    with torch.no_grad():
        expected = ms.linear(x, other["0.weight"], model[0].bias, input_quantizer=model[0].input_quantizer)
        assert torch.equal(torch.func.functional_call(model, other, (x,)), expected)
    assert model[0].kept_rows() is not None  # its own weight is back
    with torch.inference_mode():
        made = layer()
        made[0].keep_rows(ms.align_rows(made[0].weight))
        assert made[0].kept_rows() is None  # such weights do not say when they are written to


def test_nothing_is_current_on_meta():
    model = kept_layer().to("meta").to_empty(device="cpu")
    assert model[0].kept_rows() is None


def test_compiled_with_any_sizes():
    model = kept_layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for n in (128, 131, 40):
            x = torch.randn(n, 128).bfloat16()
            assert torch.equal(compiled(x), model(x))


def test_a_new_weight_reaches_compiled_layers():
    model, fresh, x = kept_layer(), layer(), torch.randn(128, 128).bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        model[0].weight = fresh[0].weight
        assert model[0].kept_rows() is None
        expected = ms.linear(x, fresh[0].weight, model[0].bias, input_quantizer=model[0].input_quantizer)
        assert torch.equal(compiled(x), expected)


def test_experts_under_autocast():
    module = torch.nn.Sequential(ms.nn.GroupedLinear(2, 64, 48))
    rules = [{"match": "*", "fprop": {"input": "x", "weight": "x"}}]
    quantize_(module, {"name": "test", "quantizers": {"x": {"format": "mxfp8"}}, "rules": rules})
    module[0].keep_rows(ms.align_rows(module[0].weight))
    x, ends = torch.randn(256, 64), torch.tensor([100, 256], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            y = module[0](x, ends)
        except InputError as error:  # experts in FP32 do not take part in autocast
            pytest.skip(str(error))
    assert y.dtype == torch.bfloat16


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "mxfp6"])
def test_gpu_products_by_kept_rows(fmt):
    """The same bits as from rows made at every call, which other tests hold against the reference."""
    model = layer(fmt, n=256, k=512).cuda()
    said = ms.prepare_(model, keep_rows=True)["0"]
    assert said.endswith(", rows kept"), said
    module, x = model[0], torch.randn(300, 512, device="cuda").bfloat16()
    kept = module.kept_rows()
    a = ms.quantize(x, "mxfp8")
    assert ms.explain("matmul", a, kept).chosen == "cublas.rows_e4m3"
    with torch.no_grad():
        y = model(x)
        plain = module.weight.to_layout("strided")
        with dispatch.use_backend("cublas"):
            expected = ms.matmul(a, plain.t(), module.bias)
        assert torch.equal(y, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = model(x)
        graph.replay()
        assert torch.equal(again, y)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(8, 2064, 2112), (3, 4096, 2112)])
def test_gpu_experts_by_kept_rows(sizes):
    experts, _, k = sizes
    w = ms.quantize(torch.randn(sizes, device="cuda").bfloat16(), "mxfp8")
    x = torch.randn(experts * 128, k, device="cuda").bfloat16()
    counts = torch.randint(0, 256, (experts,))
    ends = counts.cumsum(0).clamp(max=len(x)).to("cuda", torch.int32)
    a, kept = ms.quantize(x, "mxfp8"), ms.align_rows(w).transpose(-1, -2)
    assert ms.explain("grouped_matmul", a, ms.align_rows(w)).chosen == "cublas.grouped_rows_e4m3"
    y = ms.grouped_matmul(a, kept, ends)
    with dispatch.use_backend("reference"):
        expected = ms.grouped_matmul(a, kept, ends, torch.float32)
        size = ms.grouped_matmul(
            ms.quantize(x.abs(), "mxfp8"), ms.align_rows(ms.quantize(w.dequantize().abs(), "mxfp8")).transpose(-1, -2),
            ends, torch.float32,
        )  # fmt: skip
    assert bool(((y.float() - expected).abs() <= 2**-8 * expected.abs() + 2**-12 * size).all())


def test_an_ordinary_module_has_none():
    assert isinstance(layer()[0], QuantizedLinear) and layer()[0].kept_rows() is None
