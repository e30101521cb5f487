"""`quantize_`: the bytes, what it leaves alone, tied weights, memory, calibration, and errors before any change."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import microscale as ms
from microscale.errors import InputError, RecipeError
from microscale.nn import QuantizedEmbedding, QuantizedLinear
from microscale.testing import assert_same_bits, assert_same_quantized

INFERENCE = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]
W, X = {"fprop": {"weight": "w"}}, {"fprop": {"weight": "w", "input": "x"}}
EVERYTHING = {"match": "*", "types": ["linear", "embedding"]}


def snapshot(model: nn.Module) -> list:
    """Everything that an error must leave as it was."""
    modules = [(n, m, type(m), m.training, dict(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return [modules, [(n, p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]]


def same(a: list, b: list) -> bool:
    modules = all(x[0] == y[0] and x[1] is y[1] and x[2:] == y[2:] for x, y in zip(a[0], b[0], strict=True))
    return modules and all(x[1] is y[1] and x[2] == y[2] for x, y in zip(a[1], b[1], strict=True))


# -- the bytes and the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INFERENCE)
def test_shipped_recipes_quantize_to_the_bytes_of_the_api(name, tiny, tokens, device):
    tiny.to(device)
    tokens = tokens.to(device)
    original, spec, expected = copy.deepcopy(tiny), ms.find_recipe(name), tiny(tokens)
    plan = ms.quantize_(tiny, name, calibrate=[tokens])
    assert [r.layer.name for r in plan.quantized] == [f"blocks.{i}.{n}" for i in range(2) for n in ("up", "down")]
    for row in plan.quantized:
        module = tiny.get_submodule(row.layer.name)
        direct = ms.quantize(original.get_submodule(row.layer.name).weight, spec.quantizers["w"])
        assert_same_quantized(module.weight.detach(), direct, row.layer.name)
        assert module.weight.stored_bytes == row.bytes_after
        assert module.input_quantizer == spec.quantizers.get("x")
    assert type(tiny.lm_head) is nn.Linear and type(tiny.embed) is nn.Embedding
    out = tiny(tokens)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    assert torch.nn.functional.cosine_similarity(out.flatten(), expected.flatten(), dim=0) > 0.95
    held = {id(p): p for p in tiny.parameters()}.values()
    assert plan.bytes_after == sum(
        p.stored_bytes if isinstance(p, ms.BlockScaledTensor) else p.numel() * p.element_size() for p in held
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format_reaches_modules_through_a_recipe(dtype, recipe):
    for fmt in ms.list_formats():
        layer = nn.Linear(72, 24, dtype=dtype)
        direct = ms.quantize(layer.weight, fmt)
        ms.quantize_(layer, recipe({"match": "*", "fprop": {"weight": "f"}}, f={"format": fmt}))
        assert_same_quantized(layer.weight.detach(), direct, fmt)
        x = torch.randn(3, 72, dtype=dtype)
        assert layer(x).dtype == dtype


def test_identity_names_hooks_and_training_flag_survive(tiny, tokens):
    seen, modules = [], dict(tiny.named_modules())
    tiny.blocks[0]["up"].register_forward_hook(lambda module, args, out: seen.append(module))
    keys, bias = list(tiny.state_dict()), tiny.blocks[0]["up"].bias
    ms.quantize_(tiny.eval(), "nvfp4_dynamic")
    assert all(module is modules[name] for name, module in tiny.named_modules())
    assert list(tiny.state_dict()) == keys and not tiny.blocks[0]["up"].training
    assert tiny.blocks[0]["up"].bias is bias and bias.requires_grad
    assert isinstance(tiny.blocks[0]["up"], nn.Linear) and not tiny.blocks[0]["up"].weight.requires_grad
    tiny(tokens)
    assert seen == [tiny.blocks[0]["up"]]


def test_progress_and_one_weight_at_a_time(tiny):
    weights = {n: weakref.ref(m.weight) for n, m in tiny.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    order, alive = list(weights), []

    def progress(done, total, name):
        gc.collect()
        assert (total, name) == (4, order[done - 1])
        alive.append([n for n, ref in weights.items() if ref() is not None])

    ms.quantize_(tiny, "mxfp4_weight_only", progress=progress)
    assert alive == [order[1:], order[2:], order[3:], []]


def test_subclass_keeps_its_methods_and_copies():
    model = nn.Sequential(Named(32, 8))
    ms.quantize_(model, "mxfp8_dynamic")
    x = torch.randn(2, 32)
    assert isinstance(model[0], Named) and isinstance(model[0], QuantizedLinear) and model[0].label() == "named 32"
    assert_same_bits(copy.deepcopy(model)(x), model(x))


class Named(nn.Linear):
    def label(self) -> str:
        return f"named {self.in_features}"


# -- tied and shared weights -------------------------------------------------------------------------------------------


def test_tied_weight_stays_tied(tied, tokens, recipe):
    original = copy.deepcopy(tied.embed.weight)
    plan = ms.quantize_(tied, recipe({**EVERYTHING, **X}))
    assert tied.embed.weight is tied.lm_head.weight and isinstance(tied.embed, QuantizedEmbedding)
    assert tied.lm_head.input_quantizer == ms.find_quantizer("nvfp4")
    assert_same_quantized(tied.embed.weight.detach(), ms.quantize(original, "nvfp4"))
    assert len(plan.quantized) == 5
    assert_same_bits(tied.embed(tokens), tied.embed.weight.dequantize()[tokens])
    tied(tokens)
    tied.to(torch.bfloat16)
    assert tied.embed.weight is tied.lm_head.weight and tied(tokens).dtype == torch.bfloat16


def test_tied_weight_in_disagreement_is_left_alone(tied):
    weight = tied.embed.weight
    ms.quantize_(tied, "nvfp4_weight_only")
    assert tied.embed.weight is weight and tied.lm_head.weight is weight and type(tied.lm_head) is nn.Linear


def test_module_with_two_names_is_converted_once():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 32)
    ms.quantize_(model, "nvfp4_static", calibrate=[x])
    assert model[0] is model[2] and isinstance(shared, QuantizedLinear)
    assert shared.input_amax >= x.abs().max()
    model(x)


# -- torch's fused encoder path ----------------------------------------------------------------------------------------


def test_transformer_encoder_layers_leave_their_fused_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    expected = encoder(x)
    ms.quantize_(encoder, "mxfp8_dynamic")
    with torch.no_grad():
        out = encoder(x)
        assert (out - expected).norm() < 0.1 * expected.norm()
        assert encoder(x, src_key_padding_mask=mask).shape == x.shape


# -- calibration -------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16)
        self.drop = nn.Dropout(0.9)

    def forward(self, x, scale=1.0):
        return self.second(self.drop(self.first(x) * scale))


def test_calibration_records_the_largest_finite_magnitude():
    model, batches = Two(), [torch.randn(4, 32) for _ in range(3)]
    batches[1][0, 0] = float("inf")
    original = copy.deepcopy(model).eval()
    ms.quantize_(model, "nvfp4_static", calibrate=[batches[0], (batches[1], 2.0), {"x": batches[2], "scale": 3.0}])
    finite = torch.cat(batches).nan_to_num(0, 0, 0).abs().max()
    hidden = [original.first(b) * s for b, s in zip(batches, (1.0, 2.0, 3.0), strict=True)]
    expected = torch.cat(hidden).nan_to_num(0, 0, 0).abs().max()
    assert_same_bits(model.first.input_amax, finite)
    assert_same_bits(model.second.input_amax, expected.detach())
    assert model.training and model.drop.training and not any(m._forward_pre_hooks for m in model.modules())


def test_calibration_by_a_function_sees_eval_mode_without_gradients():
    model, x, seen = Two(), torch.randn(4, 32), []

    def run(m):
        seen.append((m is model, m.training, torch.is_grad_enabled()))
        m(x=x)

    ms.quantize_(model, "nvfp4_static", calibrate=run)
    assert seen == [(True, False, False)] and model.training
    assert_same_bits(model.first.input_amax, x.abs().max())


def test_calibration_measures_after_the_hadamard(recipe):
    layer, x = nn.Linear(32, 8), torch.randn(4, 32)
    h = {"format": "nvfp4", "hadamard": 16}
    rule = {"match": "*", "fprop": {"weight": "h", "input": "hs"}}
    ms.quantize_(layer, recipe(rule, h=h, hs={**h, "outer_scale_mode": "static"}), calibrate=[x])
    assert_same_bits(layer.input_amax, ms.hadamard(x, 16).abs().max())


def test_recipes_without_static_scales_ignore_calibration():
    def never():
        raise AssertionError("consumed")
        yield

    ms.quantize_(Two(), "nvfp4_dynamic", calibrate=never())


def test_unreached_layers_are_named_and_nothing_changed():
    model = Two()
    before = snapshot(model)
    with pytest.raises(RecipeError, match=r"did not reach 1 of 2 layers: second\n  hint: "):
        ms.quantize_(model, "nvfp4_static", calibrate=lambda m: m.first(torch.randn(1, 32)))
    assert same(before, snapshot(model))


def test_failing_calibration_leaves_the_model_untouched():
    model = Two()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        ms.quantize_(model, "nvfp4_static", calibrate=[torch.randn(4, 32), torch.randn(4, 31)])
    assert same(before, snapshot(model))


@pytest.mark.parametrize("wrong", [torch.randn(4, 32), {"x": torch.randn(4, 32)}, 3])
def test_calibrate_takes_a_collection(wrong):
    with pytest.raises(InputError, match=r"calibrate.*\n  hint: pass"):
        ms.quantize_(Two(), "nvfp4_static", calibrate=wrong)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_come_before_any_change(tiny, recipe):
    before = snapshot(tiny)
    with pytest.raises(RecipeError, match=r"matches none"):
        ms.quantize_(tiny, recipe({"match": "*", **W}, {"match": "nothing", **W}))
    with pytest.raises(RecipeError, match=r"quantizes nothing"):
        ms.quantize_(tiny, recipe({"match": "nothing", "optional": True, **W}))
    assert same(before, snapshot(tiny))


def test_second_call_says_that_it_is_quantized_already(tiny, recipe):
    ms.quantize_(tiny, recipe({**EVERYTHING, **W}))
    with pytest.raises(RecipeError, match=r"already quantized \(6 layers\)\n  hint: start again"):
        ms.quantize_(tiny, "mxfp8_weight_only")


def test_what_was_left_can_be_quantized_later(tiny, recipe):
    ms.quantize_(tiny, "nvfp4_weight_only")
    weight = tiny.blocks[0]["up"].weight
    plan = ms.quantize_(tiny, recipe({"match": "*lm_head", **W}))
    assert [row.layer.name for row in plan.quantized] == ["lm_head"] and tiny.blocks[0]["up"].weight is weight
    rows = {row.layer.name: row for row in plan.layers}
    assert rows["blocks.0.up"].reason == "already quantized"
    assert rows["blocks.0.up"].bytes_before == rows["blocks.0.up"].bytes_after == weight.stored_bytes


def test_meta_model_has_no_data():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(InputError, match=r"0\.weight is on the meta device.*\n  hint: load the weights first"):
        ms.quantize_(model, "nvfp4_dynamic")
    assert type(model[0]) is nn.Linear


def test_only_modules_are_taken():
    with pytest.raises(InputError, match=r"takes an nn\.Module, got str"):
        ms.quantize_("folder", "nvfp4_dynamic")
