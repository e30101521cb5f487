"""`quantize_` on GroupedLinear: every expert's own bytes, products, gradients, calibration, moves, files, QAT."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import microscale as ms
from microscale.errors import InputError, RecipeError
from microscale.nn import GroupedLinear, TokenGroups, quantize_experts
from microscale.nn.layers import QuantizedGroupedLinear, quantized_class, to_quantized_
from microscale.testing import assert_same_bits, assert_same_quantized

RECIPES = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]
QAT = [name for name in ms.list_recipes() if ms.find_recipe(name).inference is not None]
ENDS = (17, 17, 40)  # of three experts, out of 53 rows: one is empty, and rows are left over


class Experts(nn.Module):
    """A router, experts, and a head, as names of recipes have them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.lm_head = nn.Linear(48, 3, bias=False), nn.Linear(48, 10)
        self.up_proj, self.down_proj = GroupedLinear(3, 48, 64), GroupedLinear(3, 64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, chosen = self.router(x).topk(2)
        groups = TokenGroups.of(chosen, 3, self.up_proj.alignment)
        rows = torch.nn.functional.silu(self.up_proj(groups.permute(x), groups.offsets))
        rows = self.down_proj(rows, groups.offsets, self.down_proj.alignment)
        return self.lm_head(x + groups.combine(rows, logits.softmax(-1)))


@pytest.fixture
def model(device) -> Experts:
    torch.manual_seed(0)
    return Experts().to(device)


@pytest.fixture
def tokens(device) -> torch.Tensor:
    return torch.randn(24, 48, generator=torch.Generator().manual_seed(1)).to(device)


def offsets(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(ENDS, dtype=torch.int32, device=device)


def layer(recipe, size=64, dtype=torch.float32, **changes) -> GroupedLinear:
    torch.manual_seed(2)
    made = GroupedLinear(3, size, 40, dtype=dtype)
    ms.quantize_(made, recipe, **changes)
    return made


def exactly(t):
    return t.as_dtype(torch.float32).dequantize() if isinstance(t, ms.BlockScaledTensor) else t


def expert_of(weight, expert):
    """One expert's matrix, with an outer scale as a matrix alone has it."""
    found = weight.detach()[expert]
    outer = found.outer_scale
    return found if outer is None or outer.numel() > 1 else found.replace(outer_scale=outer.reshape(()))


def one_by_one(made, x, quantize_x=None):
    """Each expert as a linear layer of its own, on its own tokens."""
    out, start = torch.zeros(x.shape[0], made.out_features, dtype=x.dtype), 0
    weight = exactly(made.weight)
    for expert, stop in enumerate(ENDS):
        rows = x[start:stop] if quantize_x is None or start == stop else exactly(quantize_x(x[start:stop]))
        out[start:stop] = (rows.double() @ weight[expert].double().t()).to(x.dtype)
        start = stop
    return out


# -- the bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_reach_experts(name, model, tokens):
    original, spec, wanted = copy.deepcopy(model), ms.find_recipe(name), model(tokens)
    plan = ms.quantize_(model, name, calibrate=[tokens])
    assert [row.layer.name for row in plan.quantized] == ["up_proj", "down_proj"]
    for row in plan.quantized:
        module, before = model.get_submodule(row.layer.name), original.get_submodule(row.layer.name).weight
        assert isinstance(module, QuantizedGroupedLinear) and not isinstance(module, nn.Linear)
        for expert in range(3):
            direct = ms.quantize(before[expert], spec.quantizers["w"])
            assert_same_quantized(expert_of(module.weight, expert), direct, f"{row.layer.name} {expert}")
        assert module.weight.stored_bytes == row.bytes_after < row.bytes_before
        assert module.input_quantizer == spec.quantizers.get("x")
    assert type(model.router) is type(model.lm_head) is nn.Linear
    out = model(tokens)
    assert out.shape == wanted.shape and out.dtype == wanted.dtype
    assert torch.nn.functional.cosine_similarity(out.flatten(), wanted.flatten(), dim=0) > 0.95


def test_every_format_reaches_experts_through_a_recipe(recipe):
    for fmt in ms.list_formats():
        made = layer(recipe({"match": "*", "fprop": {"weight": "f"}}, f={"format": fmt}), size=72)
        torch.manual_seed(2)
        assert_same_quantized(made.weight.detach(), quantize_experts(GroupedLinear(3, 72, 40).weight.detach(),
                                                                     ms.find_quantizer(fmt)), fmt)  # fmt: skip
        x = torch.randn(53, 72)
        torch.testing.assert_close(made(x, offsets()), one_by_one(made, x), rtol=1e-5, atol=1e-5)


def test_an_expert_of_large_weights_does_not_change_the_others():
    torch.manual_seed(0)
    plain = GroupedLinear(3, 64, 40)
    with torch.no_grad():
        plain.weight[1] *= 1000
    alone = ms.quantize(plain.weight[2].detach(), "nvfp4")
    plan = ms.quantize_(plain, "nvfp4_weight_only")
    assert plain.weight.outer_scale.shape == (3, 1, 1)
    assert_same_quantized(expert_of(plain.weight, 2), alone)
    assert plan.layers[0].bytes_after == 3 * 40 * (32 + 4) + 3 * 4


# -- products and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nvfp4_weight_only", "mxfp8_dynamic", "nvfp4_dynamic", "mxfp4_mxfp8"])
def test_products_are_those_of_each_expert(name, dtype):
    made, x = layer(name, dtype=dtype), torch.randn(53, 64).to(dtype)
    x[20:30] *= 100  # of the last expert; no other's outer scale sees them
    spec = made.input_quantizer
    got = made(x, offsets())
    wanted = one_by_one(made, x, None if spec is None else lambda rows: ms.quantize(rows, spec))
    assert got.dtype == dtype and not got[40:].any()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert_same_bits(got, made(x, offsets(), 1))


@pytest.mark.parametrize("transform", [None, {"size": 16, "sign": [1, -1] * 8}])
@pytest.mark.parametrize("quantizes_tokens", [False, True])
def test_gradients(transform, quantizes_tokens, recipe):
    """Exact without a quantizer of the tokens, straight-through with one; in the basis of the tokens."""
    q = {"format": "mxfp8"} | ({} if transform is None else {"hadamard": transform})
    if transform is not None and not quantizes_tokens:
        return  # which changes the product, and is refused
    rule = {"match": "*", "fprop": {"weight": "q", **({"input": "q"} if quantizes_tokens else {})}}
    made, x = layer(recipe(rule, q=q)), torch.randn(53, 64, requires_grad=True)
    weight = made.weight.dequantize()
    if transform is not None:
        weight = ms.hadamard(weight, 16, transform["sign"], inverse=True)
    dy, start = torch.randn(53, 40), 0
    made(x, offsets()).backward(dy)
    for expert, stop in enumerate(ENDS):
        torch.testing.assert_close(x.grad[start:stop], dy[start:stop] @ weight[expert], rtol=1e-5, atol=1e-5)
        start = stop
    assert not x.grad[40:].any() and made.weight.grad is None


def test_autocast_and_moves_keep_the_bytes():
    made, x = layer("nvfp4_static", calibrate=lambda m: m(torch.randn(53, 64), offsets())), torch.randn(53, 64)
    codes, amax = made.weight.qdata.clone(), made.input_amax.clone()
    with torch.autocast("cpu", torch.bfloat16):
        first = made(x, offsets())
    made.to(torch.bfloat16)
    second = made(x.bfloat16(), offsets())
    assert first.dtype == second.dtype == torch.bfloat16
    assert_same_bits(first, second)
    assert torch.equal(made.weight.qdata, codes)
    assert_same_bits(made.input_amax, amax)
    with pytest.raises(InputError, match=r"input of torch\.float32, weight of torch\.bfloat16"):
        made(x, offsets())


@pytest.mark.parametrize("name", ["nvfp4_weight_only", "nvfp4_dynamic", "nvfp4_static", "mxfp8_dynamic"])
def test_compiled(name, model, tokens):
    """One graph, the same bits."""
    torch._dynamo.reset()
    ms.quantize_(model, name, calibrate=[tokens])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(tokens).detach(), model(tokens).detach())
    torch._dynamo.reset()


def test_no_tokens_and_wrong_arguments():
    made = layer("nvfp4_dynamic")
    assert made(torch.zeros(0, 64), torch.zeros(3, dtype=torch.int32)).shape == (0, 40)
    for x, ends in ((torch.zeros(5, 63), offsets()), (torch.zeros(5, 64), offsets().long())):
        with pytest.raises(InputError):
            made(x, ends)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_is_of_all_experts():
    model = nn.ModuleList([GroupedLinear(3, 64, 40)])
    batches = [torch.randn(53, 64) for _ in range(2)]
    ms.quantize_(model, "nvfp4_static", calibrate=lambda m: [m[0](x, offsets()) for x in batches])
    made = model[0]
    assert_same_bits(made.input_amax, torch.stack(batches).abs().max())
    x = torch.randn(53, 64)
    wanted = one_by_one(made, x, lambda rows: ms.quantize(rows, made.input_quantizer, amax=made.input_amax))
    torch.testing.assert_close(made(x, offsets()), wanted, rtol=1e-5, atol=1e-5)


def test_uncalibrated_layers_say_so():
    made = layer("nvfp4_static")
    assert "input=nvfp4" in repr(made) and "uncalibrated" in repr(made) and "experts=3" in repr(made)
    with pytest.raises(InputError, match="was never calibrated"):
        made(torch.randn(53, 64), offsets())


# -- modules -----------------------------------------------------------------------------------------------------------


class Named(GroupedLinear):
    def label(self) -> str:
        return f"{self.experts} experts"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", [GroupedLinear, Named])
def test_copies(kind, clone):
    model = nn.ModuleList([kind(3, 64, 40)])
    x = torch.randn(53, 64)
    ms.quantize_(model, "nvfp4_static", calibrate=lambda m: m[0](x, offsets()))
    other = clone(model)[0]
    assert type(other) is type(model[0]) is quantized_class(kind)
    assert kind is GroupedLinear or other.label() == "3 experts"
    assert other.input_quantizer == model[0].input_quantizer
    assert_same_bits(other(x, offsets()), model[0](x, offsets()))


def test_state_dicts_carry_bytes_and_calibration(model, tokens):
    other = copy.deepcopy(model)
    ms.quantize_(model, "nvfp4_static", calibrate=[tokens])
    ms.quantize_(other, "nvfp4_static")
    assert set(model.state_dict()) - set(other.state_dict()) == {"up_proj.input_amax", "down_proj.input_amax"}
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(tokens), model(tokens))


def test_identity_names_and_hooks_stay(model, tokens):
    modules, keys, seen = dict(model.named_modules()), list(model.state_dict()), []
    model.up_proj.register_forward_hook(lambda module, args, out: seen.append(module))
    ms.quantize_(model, "mxfp8_dynamic")
    assert all(module is modules[name] for name, module in model.named_modules())
    assert list(model.state_dict()) == keys
    model(tokens)
    assert seen == [model.up_proj] and not model.up_proj.weight.requires_grad


def test_what_is_left_alone(recipe):
    class Own(GroupedLinear):
        def forward(self, x, ends):
            return x

    replaced, computed = GroupedLinear(2, 32, 32), nn.utils.parametrizations.weight_norm(GroupedLinear(2, 32, 32))
    replaced.forward = lambda x, ends: x
    with torch.device("meta"):
        bare = nn.ModuleList([GroupedLinear(2, 32, 32)])
    model = nn.ModuleList([GroupedLinear(2, 32, 32), Own(2, 32, 32), computed, replaced])
    plan = ms.quantize_(model, "mxfp8_weight_only")
    reasons = [row.reason for row in plan.layers]
    found = [part in reason for part, reason in zip(("", "not GroupedLinear's", "computed", "replaced"), reasons)]  # noqa: B905
    assert found == [True] * 4 and len(plan.quantized) == 1
    with pytest.raises(RecipeError, match="already quantized"):
        ms.quantize_(model, "mxfp8_weight_only")
    with pytest.raises(InputError, match="meta device"):
        ms.quantize_(bare, "mxfp8_weight_only")
    assert ms.plan(bare, "nvfp4_weight_only").layers[0].bytes_after == 2 * 32 * (16 + 2) + 2 * 4
    with pytest.raises(InputError, match="a GroupedLinear or"):
        to_quantized_(nn.Conv1d(4, 4, 1), torch.zeros(4, 4, 1))


def test_shared_experts_stay_shared(recipe):
    model = nn.ModuleList([GroupedLinear(3, 64, 40), GroupedLinear(3, 64, 40)])
    model[1].weight = model[0].weight
    plan = ms.quantize_(model, "nvfp4_weight_only")
    assert model[0].weight is model[1].weight and len(plan.layers) == 1
    assert all(isinstance(module, QuantizedGroupedLinear) for module in model)


def test_only_tokens_quantized(recipe):
    """The weight stays as it is; the tokens of each expert are quantized by themselves."""
    made, x = layer(recipe({"match": "*", "fprop": {"input": "x"}})), torch.randn(53, 64)
    assert type(made.weight) is nn.Parameter
    wanted = one_by_one(made, x, lambda rows: ms.quantize(rows, "nvfp4"))
    torch.testing.assert_close(made(x, offsets()), wanted, rtol=1e-5, atol=1e-5)


# -- from training, and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QAT)
def test_aware_training_becomes_inference_with_the_same_bytes(name, model, tokens):
    ms.prepare_training_(model, name)
    model(tokens).square().mean().backward()
    trained = {n: m for n, m in model.named_modules() if isinstance(m, GroupedLinear)}
    bytes_of = {n: next(iter(m.cache._made.values())) for n, m in trained.items()}
    before = model(tokens).detach()
    plan = ms.finish_training_(model)
    assert {row.layer.name for row in plan.quantized} == set(trained)
    for n, module in trained.items():
        assert type(module) is QuantizedGroupedLinear
        assert_same_quantized(module.weight.detach(), bytes_of[n], n)
    assert_same_bits(model(tokens).detach(), before)


def test_back_to_high_precision_and_on_to_another_recipe(model, tokens):
    ms.prepare_training_(model, "qat_nvfp4")
    ms.finish_training_(model, "high_precision")
    assert type(model.down_proj) is GroupedLinear
    ms.prepare_training_(model, "mxfp8_train")
    ms.finish_training_(model, "mxfp8_weight_only")
    assert isinstance(model.down_proj, QuantizedGroupedLinear) and model(tokens).shape == (24, 10)


def test_training_leaves_quantized_experts_alone(model):
    ms.quantize_(model, "nvfp4_weight_only")
    with pytest.raises(RecipeError, match=r"already quantized \(2 layers\)"):
        ms.prepare_training_(model, "mxfp8_train")


@pytest.mark.parametrize(("name", "fresh"), [*itertools.product(["nvfp4_weight_only", "mxfp8_weight_only"], (0, 1))])
def test_weight_only_files_round_trip(name, fresh, model, tokens, tmp_path):
    other = copy.deepcopy(model)
    plan = ms.quantize_(model, name)
    if fresh:  # into a model that is quantized already, by something else
        ms.quantize_(other, "mxfp4_weight_only")
    ms.save(model, tmp_path / "out", plan=plan)
    ms.load(tmp_path / "out", other)
    for part in ("up_proj", "down_proj"):
        assert_same_quantized(other.get_submodule(part).weight.detach(), model.get_submodule(part).weight.detach())
    assert_same_bits(other(tokens), model(tokens))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["fresh", "quantized", "meta"])
def test_files_round_trip(name, kind, model, tokens, tmp_path):
    other = copy.deepcopy(model)
    plan = ms.quantize_(model, name, calibrate=[tokens])
    if kind == "quantized":
        ms.quantize_(other, "nvfp4_static", calibrate=[tokens * 2])
    ms.save(model, tmp_path / "out", plan=plan)
    ms.load(tmp_path / "out", other if kind != "meta" else (other := other.to("meta")), device=tokens.device)
    for part in ("up_proj", "down_proj"):
        made, saved = other.get_submodule(part), model.get_submodule(part)
        assert isinstance(made, QuantizedGroupedLinear) and made.input_quantizer == saved.input_quantizer
        assert_same_quantized(made.weight.detach(), saved.weight.detach())
    assert_same_bits(other(tokens), model(tokens))


@pytest.mark.parametrize("name", ["nvfp4_weight_only", "mxfp8_dynamic"])
def test_prepare_leaves_experts_and_says_why(name):
    model = Experts()
    ms.quantize_(model, name)
    weights = [model.up_proj.weight, model.down_proj.weight]
    told = ms.prepare_(model)
    assert list(told) == ["up_proj", "down_proj"]
    why = "prepare takes experts on a GPU of compute capability 9.0, got [3, "
    for said in told.values():
        assert said == "strided" if name == "mxfp8_dynamic" else why in said and "leave them as they are" in said
    assert model.up_proj.weight is weights[0] and model.down_proj.weight is weights[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4_weight_only", "mxfp8_dynamic", "nvfp4_static"])
def test_products_on_the_device(name):
    x = torch.randn(53, 128).bfloat16()
    made = layer(name, size=128, dtype=torch.bfloat16, calibrate=lambda m: m(x, offsets()))
    wanted = made(x, offsets())
    got = made.cuda()(x.cuda(), offsets("cuda"))
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-2, atol=1e-2)
