"""`plan` and `make_plan`: which rule decides what, sizes, tied weights, and every error's text."""

import copy
import json

import pytest
import torch
from torch import nn

import microscale as ms
from microscale.errors import InputError, RecipeError, UnknownNameError
from microscale.nn.plan import Layer, Plan, make_plan, quantized_bytes

LAYERS = [
    Layer("model.up", "linear", "model.up.weight", (64, 40), "bfloat16"),
    Layer("model.down", "linear", "model.down.weight", (40, 64), "bfloat16"),
    Layer("embed", "embedding", "embed.weight", (100, 40), "bfloat16"),
    Layer("lm_head", "linear", "lm_head.weight", (100, 40), "bfloat16"),
]
W, X = {"fprop": {"weight": "w"}}, {"fprop": {"weight": "w", "input": "x"}}
INFERENCE = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]


def by_name(plan: Plan) -> dict:
    return {row.layer.name: row for row in plan.layers}


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INFERENCE)
def test_every_shipped_recipe_plans(name, tiny):
    plan = ms.plan(tiny, name)
    rows = by_name(plan)
    assert set(rows) == {"embed", "lm_head"} | {f"blocks.{i}.{n}" for i in range(2) for n in ("up", "down")}
    assert rows["lm_head"].weight is None and rows["lm_head"].reason == "kept in high precision"
    assert rows["lm_head"].rule == 0
    assert rows["embed"].rule is None and rows["embed"].reason == "no rule names it"
    spec = ms.find_recipe(name)
    for row in plan.quantized:
        assert (row.rule, row.reason) == (1, "")
        assert row.weight == spec.quantizers["w"] and row.input == spec.quantizers.get("x")
        assert row.bytes_after < row.bytes_before
    assert len(plan.quantized) == 4


def test_first_matching_rule_wins(recipe):
    up = {"match": "*.up", "fprop": {"weight": "m"}}
    rows = by_name(make_plan(LAYERS, recipe(up, {"match": "*", **W})))
    assert rows["model.up"].weight.name == "mxfp8" and rows["model.up"].rule == 0
    assert rows["model.down"].weight.name == "nvfp4" and rows["model.down"].rule == 1
    shadowed = make_plan(LAYERS, recipe({"match": "*", **W}, up))
    assert by_name(shadowed)["model.up"].weight.name == "nvfp4"
    assert shadowed.notes == ("rules[1] '*.up' decides no layer: earlier rules take all that it matches",)
    assert "note: rules[1]" in str(shadowed) and not make_plan(LAYERS, recipe(up, {"match": "*", **W})).notes


def test_unnamed_layers_stay_in_high_precision(recipe):
    plan = make_plan(LAYERS, recipe({"match": "re:model\\.(up|down)", **W}))
    assert [row.layer.name for row in plan.quantized] == ["model.up", "model.down"]
    assert by_name(plan)["lm_head"].reason == "no rule names it"


def test_embeddings_need_the_type_and_have_no_input(recipe):
    row = by_name(make_plan(LAYERS, recipe({"match": "*", "types": ["linear", "embedding"], **X})))["embed"]
    assert row.weight is not None and row.input is None
    only_input = recipe({"match": "*", "types": ["linear", "embedding"], "fprop": {"input": "x"}})
    assert "no operand" in by_name(make_plan(LAYERS, only_input))["embed"].reason


# -- errors ------------------------------------------------------------------------------------------------------------


def error_text(layers, recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        make_plan(layers, recipe)
    return str(caught.value)


def test_unmatched_rule_is_an_error_that_names_it(recipe):
    text = error_text(LAYERS, recipe({"match": "*lm_hed", "keep": "high_precision"}, {"match": "*", **W}))
    assert text == (
        "recipe 'test': rules[0] '*lm_hed' matches none of the model's 4 layers\n"
        "  hint: did you mean 'lm_head'? write `optional: true` if it need not match"
    )
    text = error_text(LAYERS, recipe({"match": ["zzz", "yyy"], **W}))
    assert "rules[0] 'zzz' 'yyy'" in text and "layers are model.up, model.down" in text


def test_unmatched_rule_of_the_wrong_type_says_so(recipe):
    text = error_text(LAYERS, recipe({"match": "embed", **W}))
    assert "layers of type embedding have such names: write `types: [embedding]`" in text


def test_optional_rule_may_match_nothing(recipe):
    plan = make_plan(LAYERS, recipe({"match": "zzz", "keep": "high_precision", "optional": True}, {"match": "*", **W}))
    assert len(plan.quantized) == 3 and not plan.notes


def test_recipe_without_effect_is_an_error_that_counts_the_reasons(recipe):
    text = error_text(LAYERS, recipe({"match": "zzz", "optional": True, **W}))
    assert "recipe 'test' quantizes nothing here: no rule names it (4 layers)" in text and "hint" in text
    keep = recipe({"match": "*", "keep": "high_precision"}, {"match": "zzz", "optional": True, **W})
    assert "kept in high precision (3 layers)" in error_text(LAYERS, keep)
    assert "no linear and no embedding layer" in error_text([], recipe({"match": "*", "optional": True, **W}))


def test_training_recipe_is_refused_with_the_ones_for_inference(recipe):
    text = error_text(LAYERS, recipe({"match": "*", **X, "dgrad": {"grad_output": "w", "weight": "w"}}))
    assert "is for training" in text and "nvfp4_dynamic" in text


@pytest.mark.parametrize(
    ("rule", "quantizer", "message"),
    [
        ({"fprop": {"weight": "q"}}, {"format": "nvfp4", "outer_scale_mode": "static"}, "needs no calibration"),
        ({"fprop": {"weight": "q"}}, {"format": "mxfp4", "rounding": "stochastic"}, "stochastic rounding"),
        ({"fprop": {"weight": "q"}}, {"format": "mxfp4", "hadamard": 8}, "hadamard on one operand"),
        ({"fprop": {"weight": "w", "input": "q"}}, {"format": "mxfp4", "hadamard": 8}, "hadamard on one operand"),
        (
            {"fprop": {"weight": "q", "input": "q"}, "types": ["linear", "embedding"]},
            {"format": "mxfp4", "hadamard": 8},
            "an embedding looks rows up",
        ),
    ],
)
def test_quantizers_that_mean_nothing_in_inference(recipe, rule, quantizer, message):
    text = error_text(LAYERS, recipe({"match": "*", **rule}, q=quantizer))
    assert message in text and "rules[0] '*'" in text and "hint" in text


def test_other_inputs_are_refused(recipe):
    with pytest.raises(InputError, match=r"cannot plan a int"):
        ms.plan(3, "nvfp4_dynamic")
    with pytest.raises(UnknownNameError, match=r"did you mean 'nvfp4_dynamic'"):
        make_plan(LAYERS, "nvfp4_dynamik")
    with pytest.raises(InputError, match=r"'bf16' is no torch dtype"):
        make_plan([Layer("a", "linear", "a.weight", (2, 2), "bf16")], "nvfp4_dynamic")


# -- what cannot be quantized ------------------------------------------------------------------------------------------


def test_dtype_and_shape_obstacles_keep_high_precision(recipe):
    double = Layer("a", "linear", "a.weight", (4, 40), "float64")
    rows = by_name(make_plan([*LAYERS, double], "mxfp8_weight_only"))
    assert rows["a"].reason.startswith("its dtype is float64") and rows["a"].bytes_after == 4 * 40 * 8
    both = recipe({"match": "*", "fprop": {"weight": "h", "input": "h"}}, h={"format": "mxfp4", "hadamard": 16})
    rows = by_name(make_plan(LAYERS, both))
    assert "Hadamard size 16" in rows["model.up"].reason and rows["model.down"].weight.hadamard.size == 16


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_modules_that_compute_something_else_stay_and_say_why():
    patched = nn.Linear(16, 16)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 16),
            "own": Doubling(16, 16),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            "lazy": nn.LazyLinear(4),
            "patched": patched,
            "attention": nn.MultiheadAttention(16, 2),
            "renorm": nn.Embedding(4, 16, max_norm=1.0),
        }
    )
    rows = by_name(ms.plan(model, "nvfp4_dynamic"))
    assert [name for name, row in rows.items() if row.is_quantized] == ["plain"]
    assert rows["own"].reason == "Doubling has a forward of its own, not nn.Linear's"
    assert "computed" in rows["normed"].reason and "not initialized" in rows["lazy"].reason
    assert "replaced on the instance" in rows["patched"].reason and "max_norm" in rows["renorm"].reason
    assert "nn.MultiheadAttention reads its weight" in rows["attention.out_proj"].reason


# -- tied weights ------------------------------------------------------------------------------------------------------


def test_tied_weight_is_one_row_and_kept_unless_all_uses_agree(tied, recipe):
    plan = ms.plan(tied, "nvfp4_dynamic")
    row = by_name(plan)["embed"]
    assert "lm_head" not in by_name(plan) and row.layer.sharers == (("lm_head", "linear"),)
    assert not row.is_quantized and "shared with lm_head" not in row.reason

    row = by_name(ms.plan(tied, recipe({"match": "*", **X})))["embed"]
    assert (
        not row.is_quantized and row.reason == "shares its weight with lm_head, which rules[0] '*' treats differently"
    )

    first = {"match": "embed", "types": ["embedding"], **W}
    keep = {"match": "*lm_head", "keep": "high_precision"}
    row = by_name(ms.plan(tied, recipe(first, keep, {"match": "*", **W})))["embed"]
    assert row.reason == "shares its weight with lm_head, which rules[1] '*lm_head' keeps in high precision"

    plan = ms.plan(tied, recipe({"match": "*", "types": ["linear", "embedding"], **X}))
    row = by_name(plan)["embed"]
    assert row.is_quantized and row.input is not None and "shared with lm_head" in str(plan)


def test_weight_used_outside_of_layers_is_kept(recipe):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.register_parameter("copy", model[0].weight)
    rows = by_name(ms.plan(model, recipe({"match": "*", **W})))
    assert rows["0"].reason == "shares its weight with copy, which is no layer's weight" and rows["1"].is_quantized


def test_module_with_two_names_is_one_row(recipe):
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared})
    (row,) = ms.plan(model, recipe({"match": "*", **W})).layers
    assert row.is_quantized and row.layer.uses == (("a", "linear"), ("b", "linear"))
    with pytest.raises(RecipeError, match=r"shares its weight with b, which no rule names"):
        ms.plan(model, recipe({"match": "a", **W}))


# -- sizes, text, JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ms.list_formats())
@pytest.mark.parametrize("shape", [(5, 100), (3, 256), (7, 1), (0, 64), (2, 3, 48)])
def test_bytes_after_are_the_bytes_stored(name, shape):
    assert quantized_bytes(shape, ms.find_quantizer(name)) == ms.quantize(torch.randn(shape), name).stored_bytes


def test_totals_add_up_to_the_models_bytes(tiny):
    held = sum(p.numel() * p.element_size() for p in tiny.parameters())
    plan = ms.plan(tiny, "nvfp4_weight_only")
    assert plan.bytes_before == held
    assert plan.other_bytes == 4 * (2 * 72 + 2 * 40)
    assert plan.bytes_after == plan.bytes_before - sum(row.bytes_before - row.bytes_after for row in plan.quantized)


def test_meta_model_plans_like_the_real_one(tiny):
    with torch.device("meta"):
        meta = type(tiny)()
    assert ms.plan(meta, "nvfp4_dynamic").to_dict() == ms.plan(tiny, "nvfp4_dynamic").to_dict()


def test_plan_touches_nothing(tiny):
    before, names = copy.deepcopy(tiny.state_dict()), [(n, type(m)) for n, m in tiny.named_modules()]
    ms.plan(tiny, "nvfp4_static")
    assert names == [(n, type(m)) for n, m in tiny.named_modules()]
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())
    assert not any(m._forward_pre_hooks for m in tiny.modules())


def test_table_is_aligned_and_complete(tiny):
    plan = ms.plan(tiny, "nvfp4_dynamic")
    lines = str(plan).splitlines()
    assert len(lines) == 1 + 6 + 1
    column = lines[0].index("weight")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines[:-1])
    assert "blocks.0.up" in lines[2] and "72x40" in lines[2] and "rules[1] '*'" in lines[2] and "nvfp4" in lines[2]
    assert "11.52 kB -> 1.95 kB" in lines[2]
    assert lines[-1].startswith("nvfp4_dynamic: 4 of 6 layers quantized; ") and "smaller" in lines[-1]
    summary = plan.summary().splitlines()
    assert len(summary) == 1 + 3 + 1 and summary[-1] == lines[-1]
    assert {group.layers for group in plan.groups()} >= {("embed",), ("lm_head",)}


def test_root_module_may_be_the_layer():
    plan = ms.plan(nn.Linear(32, 32), "mxfp8_weight_only")
    assert plan.layers[0].layer.parameter == "weight" and "(the model)" in str(plan)


def test_json_round_trip(tied, recipe):
    for chosen in ("nvfp4_static", recipe({"match": "*", "types": ["linear", "embedding"], **X})):
        plan = ms.plan(tied, chosen)
        data = json.loads(json.dumps(plan.to_dict()))
        again = Plan.from_dict(data)
        assert again.to_dict() == plan.to_dict() and again.recipe == plan.recipe
        assert [(r.weight, r.input, r.rule) for r in again.layers] == [(r.weight, r.input, r.rule) for r in plan.layers]
        assert data["bytes_after"] == plan.bytes_after and data["layers_quantized"] == len(plan.quantized)


def test_large_plans_are_quick():
    layers = [
        Layer(f"layers.{i}.{n}", "linear", f"layers.{i}.{n}.weight", (8, 8), "bfloat16")
        for i in range(500)
        for n in "abcdefg"
    ]
    assert len(make_plan(layers, "nvfp4_dynamic").quantized) == 3500
