"""Training recipes: what ships, what a layer gets from one, and what is refused at load with its position."""

import pytest

import microscale as ms
from microscale.spec.training import last_blocks

from .conftest import parts

SHIPPED = {
    "mxfp8_train", "mxfp8_train_wgrad_hp", "mxfp8_train_2d", "nvfp4_train", "nvfp4_train_4over6", "mxfp4_train",
    "nvfp4_fwd_mxfp8_bwd", "nvfp4_then_bf16", "qat_nvfp4", "qat_mxfp4",
}  # fmt: skip
QAT = {"qat_nvfp4": "nvfp4_dynamic", "qat_mxfp4": "mxfp4_dynamic"}
LAYER = "model.layers.0.mlp.up_proj"


def gemms_of(name, layer=LAYER, signs=None):
    recipe = ms.find_recipe(name)
    recipe = recipe.resolved(f"model.layers.{i}.mlp.up_proj" for i in range(8))
    return recipe.gemms_of(recipe.rule_for(layer, "linear"), signs)


class TestShipped:
    def test_all_are_there_and_train(self):
        assert {name for name in ms.list_recipes() if ms.find_recipe(name).is_training} == SHIPPED

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    def test_keep_the_sensitive_layers(self, name):
        recipe = ms.find_recipe(name)
        assert recipe.rule_for("lm_head", "linear").keep == "high_precision"
        assert recipe.rule_for("model.layers.0.mlp.gate", "linear").keep == "high_precision"
        assert recipe.rule_for("model.embed_tokens", "embedding") is None

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    def test_survive_their_own_key(self, name):
        recipe = ms.find_recipe(name)
        assert ms.RecipeSpec.from_key(recipe.key) == recipe
        assert ms.RecipeSpec.model_validate(recipe.identity()) == recipe

    @pytest.mark.parametrize("name", sorted(QAT))
    def test_qat_is_its_inference_recipe_in_fprop(self, name):
        recipe, inference = ms.find_recipe(name), ms.find_recipe(QAT[name])
        assert recipe.inference == inference.name
        for layer in (LAYER, "lm_head", "router", "a.gate"):
            first, second = recipe.rule_for(layer, "linear"), inference.rule_for(layer, "linear")
            assert first.keep == second.keep
            for operand in ("input", "weight"):
                assert recipe.quantizer(first.fprop, operand) == inference.quantizer(second.fprop, operand)

    @pytest.mark.parametrize("name", sorted(QAT))
    def test_qat_has_straight_through_gradients(self, name):
        gemms = gemms_of(name)
        assert gemms.dgrad_weight_is_fprops and gemms.wgrad_input_is_fprops
        assert gemms.dgrad_grad_output is None and gemms.wgrad_grad_output is None

    @pytest.mark.parametrize("name", ["nvfp4_train", "nvfp4_then_bf16", "mxfp4_train", "nvfp4_train_4over6"])
    def test_four_bit_policy(self, name):
        gemms = gemms_of(name, signs=lambda size: (1, -1) * (size // 2))
        assert gemms.fprop_weight == gemms.dgrad_weight
        assert gemms.fprop_weight.scale_tile == (gemms.fprop_weight.format.block,) * 2
        assert gemms.dgrad_grad_output.rounding == gemms.wgrad_grad_output.rounding == "stochastic"
        assert gemms.fprop_input.rounding == gemms.wgrad_input.rounding == "nearest_even"
        assert gemms.fprop_input.hadamard is None and gemms.dgrad_grad_output.hadamard is None
        assert gemms.wgrad_input.hadamard == gemms.wgrad_grad_output.hadamard
        assert gemms.wgrad_input.hadamard.sign[:2] == (1, -1)
        recipe = ms.find_recipe(name).resolved(f"model.layers.{i}.mlp.up_proj" for i in range(8))
        kept = [i for i in range(8) if recipe.rule_for(f"model.layers.{i}.mlp.up_proj", "linear").keep]
        assert kept == [6, 7]

    def test_the_rest(self):
        assert gemms_of("mxfp8_train").dgrad_weight.format.scale_rule.name == "rceil"
        assert gemms_of("mxfp8_train_2d").dgrad_weight.scale_tile == (32, 32)
        assert gemms_of("mxfp8_train_wgrad_hp").wgrad_input is None
        mixed = gemms_of("nvfp4_fwd_mxfp8_bwd")
        assert (mixed.fprop_weight.format.name, mixed.dgrad_weight.format.name) == ("nvfp4", "mxfp8")
        assert ms.find_recipe("nvfp4_then_bf16").schedule.high_precision_from == 0.9


class TestLastBlocks:
    def kept(self, share, names):
        pattern = last_blocks(share, names, names)
        return [name for name in names if ms.spec.match.matches(pattern, name)]

    def test_counts_blocks_not_layers(self):
        names = [f"layers.{i}.{part}" for i in range(10) for part in ("q", "up")]
        assert self.kept(0.15, names) == [f"layers.{i}.{part}" for i in (8, 9) for part in ("q", "up")]

    @pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 1), (7, 2), (20, 3)])
    def test_never_all(self, count, expected):
        assert len(self.kept(0.15, [f"l.{i}.up" for i in range(count)])) == expected

    def test_numbers_order_as_numbers_and_groups_are_apart(self):
        names = [f"enc.{i}.q" for i in range(12)] + [f"dec.{i}.q" for i in range(2)]
        assert self.kept(0.1, names) == ["enc.10.q", "enc.11.q", "dec.1.q"]

    def test_no_blocks_no_match(self):
        assert self.kept(0.5, ["0", "2", "head"]) == []  # a Sequential's members are no blocks of layers

    def test_only_what_the_rule_matches(self):
        names = [f"l.{i}.{part}" for i in range(4) for part in ("q", "up")]
        pattern = last_blocks(0.25, names, [n for n in names if n.endswith("q")])
        assert [n for n in names if ms.spec.match.matches(pattern, n)] == ["l.3.q"]


HEAD = "name: r\nquantizers:\n"
ALL = (
    "    fprop: {input: a, weight: a}\n    dgrad: {grad_output: a, weight: a}\n    wgrad: {grad_output: b, input: c}\n"
)
RULES = 'rules:\n  - match: "*"\n'


def quantizers(a="nvfp4", b="nvfp4", c="nvfp4"):
    return f"  a: {a}\n  b: {b}\n  c: {c}\n"


REFUSED = {
    "hadamards of other sizes": (
        quantizers(b="{format: nvfp4, hadamard: 16}", c="{format: nvfp4, hadamard: 32}") + RULES + ALL,
        "4:22", "Hadamard transforms of wgrad's input and grad_output disagree",
    ),
    "a hadamard on one operand": (
        quantizers(b="{format: nvfp4, hadamard: 16}") + RULES + ALL,
        "4:22", "Hadamard transforms of wgrad's input and grad_output disagree",
    ),
    "other signs": (
        quantizers(
            b="{format: nvfp4, hadamard: {size: 2, sign: [1, -1]}}",
            c="{format: nvfp4, hadamard: {size: 2, sign: [1, 1]}}",
        ) + RULES + ALL,
        "4:22", "Hadamard signs of wgrad's input and grad_output disagree",
    ),
    "one random sign": (
        quantizers(b="{format: nvfp4, hadamard: {size: 2, sign: random}}", c="{format: nvfp4, hadamard: 2}")
        + RULES + ALL,
        "4:22", "Hadamard signs of wgrad's input and grad_output disagree",
    ),
    "a tile that is no multiple of the block": (
        quantizers(a="{format: nvfp4, scale_tile: [16, 24]}") + RULES + ALL,
        "3:22", "scale_tile 16x24: columns must be a multiple of the block, 16",
    ),
    "a weight's tile that is not square": (
        quantizers(a="{format: nvfp4, scale_tile: [16, 32]}") + RULES + ALL,
        "3:22", "scale_tile 16x32 is not square",
    ),
    "a missing quantizer": (
        quantizers() + RULES
        + ALL.replace("{grad_output: b, input: c}", "{grad_output: b}").replace("input: a", "input: c"),
        "10:5", "wgrad names no quantizer for input",
    ),
    "a missing quantizer of fprop": (
        quantizers() + RULES + ALL.replace("{input: a, weight: a}", "{weight: a}"),
        "8:5", "fprop names no quantizer for input",
    ),
    "stochastic rounding of an input": (
        quantizers(c="{format: nvfp4, rounding: stochastic}") + RULES + ALL,
        "5:22", "wgrad's input is rounded stochastically; only gradients are",
    ),
    "a static outer scale": (
        quantizers(a="{format: nvfp4, outer_scale_mode: static}") + RULES + ALL,
        "3:22", "has a static outer scale; training calibrates nothing",
    ),
    "fprop reusing itself": (
        quantizers() + RULES + ALL.replace("input: a", "input: fprop"),
        "8:13", "fprop cannot reuse its own operand",
    ),
    "reuse of what fprop does not quantize": (
        quantizers() + RULES + ALL.replace("input: a", "input: high_precision").replace("input: c", "input: fprop")
        .replace("weight: a}\n    w", "weight: c}\n    w"),
        "10:29", "fprop does not quantize the input that wgrad reuses",
    ),
    "reuse of a transformed operand": (
        quantizers(a="{format: nvfp4, hadamard: 16}") + RULES + ALL.replace("input: c", "input: fprop")
        .replace("grad_output: a", "grad_output: c").replace("weight: a}\n    w", "weight: c}\n    w"),
        "10:29", "is Hadamard transformed along an axis that wgrad does not contract",
    ),
    "embeddings": (
        quantizers() + RULES + "    types: [linear, embedding]\n" + ALL,
        "8:5", "only linear layers have three GEMMs",
    ),
    "a share of all blocks": (
        quantizers() + RULES + "    last: 1.0\n" + ALL,
        "8:5", "last must be below 1",
    ),
    "another thing to save": (
        quantizers() + "save: everything\n" + RULES + ALL,
        "6:1", "save 'everything' is not one of quantized, recompute",
    ),
    "a schedule past the end": (
        quantizers() + "schedule: {high_precision_from: 1.5}\n" + RULES + ALL,
        "6:12", "must be",
    ),
    "signs twice": (
        quantizers(b="{format: nvfp4, hadamard: {size: 2, sign: [1, -1]}}", c="{format: nvfp4, hadamard: 2}")
        + "random_signs: [b]\n" + RULES + ALL,
        "4:42", "the signs of 'b' are given and random",
    ),
    "signs of nothing": (
        quantizers() + "random_signs: [z]\n" + RULES + ALL,
        "6:1", "no quantizer 'z' in this recipe",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_load_with_its_position(write, case):
    body, position, message = REFUSED[case]
    path = write("r.yaml", HEAD + body)
    where, text, _ = parts(lambda: ms.find_recipe(path))
    assert message in text
    assert where == position


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("save: recompute", "save"),
        ("main_grad: fp32", "main_grad"),
        ("schedule: {high_precision_from: 0.5}", "schedule"),
        ("inference: nvfp4_dynamic", "inference"),
    ],
)
def test_an_inference_recipe_has_no_training_fields(write, line, field):
    path = write("r.yaml", f"{HEAD}  a: nvfp4\n{line}\n{RULES}    fprop: {{input: a, weight: a}}\n")
    assert parts(lambda: ms.find_recipe(path))[:2] == (
        "4:1", f"{field} is for training, and this recipe has no backward GEMM"
    )  # fmt: skip


@pytest.mark.parametrize("extra", ["last: 0.5", "save: recompute"])
def test_an_inference_rule_has_no_training_fields(write, extra):
    path = write("r.yaml", f"{HEAD}  a: nvfp4\n{RULES}    {extra}\n    fprop: {{input: a, weight: a}}\n")
    assert parts(lambda: ms.find_recipe(path))[0] == "6:5"


def test_random_signs_need_a_backward(write):
    quantizer = "{format: nvfp4, hadamard: {size: 16, sign: random}}"
    path = write("r.yaml", f"{HEAD}  a: {quantizer}\n{RULES}    fprop: {{input: a, weight: a}}\n")
    where, text, _ = parts(lambda: ms.find_recipe(path))
    assert (where, text) == ("3:43", "random_signs is for training, and this recipe has no backward GEMM")


@pytest.mark.parametrize("name", ["high_precision", "fprop"])
def test_reserved_names(write, name):
    path = write("r.yaml", f"{HEAD}  {name}: nvfp4\n  a: nvfp4\n{RULES}    fprop: {{weight: a}}\n")
    where, text, _ = parts(lambda: ms.find_recipe(path))
    assert where == "3:3"
    assert f"cannot be called {name!r}" in text


def test_high_precision_in_words(write):
    text = HEAD + quantizers() + RULES + ALL.replace("grad_output: a", "grad_output: high_precision")
    recipe = ms.find_recipe(write("r.yaml", text))
    assert recipe.gemms_of(recipe.rules[0]).dgrad_grad_output is None
    rule = recipe.rules[0].dgrad
    assert rule.operands() == {"weight": "a", "grad_output": "high_precision"}
    assert rule.quantizers() == {"weight": "a"}


def test_a_rule_saves_instead_of_the_recipe(write):
    text = HEAD + quantizers() + "save: recompute\n" + RULES + ALL
    recipe = ms.find_recipe(write("r.yaml", text + '  - match: "b"\n    save: quantized\n' + ALL))
    assert [recipe.gemms_of(rule).save for rule in recipe.rules] == ["recompute", "quantized"]


def test_random_signs_come_from_the_drawer_and_only_they():
    recipe = ms.find_recipe("nvfp4_train")
    rule = recipe.rules[-1]
    drawn = recipe.gemms_of(rule, lambda size: (-1,) * size)
    assert drawn.wgrad_input.hadamard.sign == drawn.wgrad_grad_output.hadamard.sign == (-1,) * 16
    assert drawn.fprop_input == recipe.gemms_of(rule).fprop_input
    assert recipe.gemms_of(rule).wgrad_input.hadamard.sign is None


def test_a_quantizer_by_itself_cannot_draw():
    with pytest.raises(ms.MicroscaleError, match="sign"):
        ms.find_quantizer({"format": "nvfp4", "hadamard": {"size": 16, "sign": "random"}})


@pytest.mark.parametrize("change", [{"hadamard": None}, {"rounding": "nearest_even"}, {"scale_tile": None}])
def test_ablations_by_model_copy(change):
    recipe = ms.find_recipe("nvfp4_train")
    changed = {name: q.model_copy(update=change) for name, q in recipe.quantizers.items()}
    made = recipe.model_copy(update={"quantizers": changed})
    assert made.gemms_of(made.rules[-1], lambda size: (1,) * size) != recipe.gemms_of(recipe.rules[-1])
