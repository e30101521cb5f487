"""Recipes: what ships, rules and the matcher, and what is refused at load with its position."""

import pytest

import microscale as ms
from microscale.errors import SpecError, UnknownNameError
from microscale.spec.match import matches

FAMILIES = ("mxfp8", "mxfp6", "mxfp4", "nvfp4")
SHIPPED = {f"{f}_{mode}" for f in FAMILIES for mode in ("weight_only", "dynamic")} | {"nvfp4_static"}
RULE = '{match: "*", fprop: {weight: w}}'


@pytest.fixture
def write_recipe(write):
    """Write r.yaml: quantizer `w` on line 3, the one rule on line 5."""

    def write_recipe(quantizer="mxfp4", rule=RULE, extra=""):
        return write("r.yaml", f"name: r\nquantizers:\n  w: {quantizer}\nrules:\n  - {rule}\n{extra}")

    return write_recipe


def error_of(source):
    with pytest.raises(SpecError) as caught:
        ms.find_recipe(source)
    return caught.value


class TestShipped:
    def test_all_are_there(self):
        assert set(ms.list_recipes()) >= SHIPPED

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    def test_keep_the_sensitive_layers(self, name):
        recipe = ms.find_recipe(name)
        assert recipe.rule_for("lm_head", "linear").keep == "high_precision"
        assert recipe.rule_for("model.layers.0.mlp.gate", "linear").keep == "high_precision"
        assert recipe.rule_for("model.layers.0.mlp.gate_proj", "linear").keep is None
        assert recipe.rule_for("model.embed_tokens", "embedding") is None
        assert not recipe.is_training

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    def test_quantize_what_the_name_says(self, name):
        recipe = ms.find_recipe(name)
        family, mode = name.split("_", 1)
        rule = recipe.rule_for("model.layers.0.mlp.up_proj", "linear")
        weight, inputs = recipe.quantizer(rule.fprop, "weight"), recipe.quantizer(rule.fprop, "input")
        assert weight == ms.find_quantizer(family)
        assert (inputs is None) == (mode == "weight_only")
        assert inputs is None or inputs.outer_scale_mode == ("static" if mode == "static" else "dynamic")


class TestMatch:
    @pytest.mark.parametrize(
        ("pattern", "name", "expected"),
        [
            ("*", "model.layers.0.q_proj", True),
            ("*lm_head", "model.lm_head", True),
            ("*lm_head", "lm_head.extra", False),
            ("model.layers.0.*", "model.layers.0.mlp.up_proj", True),
            ("model.layers.?.*", "model.layers.10.q", False),
            ("*.[qk]_proj", "a.q_proj", True),
            (r"re:.*layers\.\d+\.q", "model.layers.12.q", True),
            (r"re:layers", "model.layers.12.q", False),  # a regular expression matches the full name
            ("Q", "q", False),
        ],
    )
    def test_patterns(self, pattern, name, expected):
        assert matches((pattern,), name) is expected

    def test_a_list_matches_when_one_does(self):
        assert matches(("a", "b"), "b")
        assert not matches((), "b")

    def test_the_first_rule_wins(self, write):
        path = write(
            "r.yaml",
            "name: r\nquantizers: {w: mxfp4, v: mxfp8}\nrules:\n"
            "  - {match: a.*, fprop: {weight: v}}\n  - {match: '*', fprop: {weight: w}}\n",
        )
        recipe = ms.find_recipe(path)
        chosen = [recipe.quantizer(recipe.rule_for(n, "linear").fprop, "weight").format.name for n in ("a.b", "b.a")]
        assert chosen == ["mxfp8", "mxfp4"]

    def test_types(self, write_recipe):
        recipe = ms.find_recipe(write_recipe(rule="{match: '*', types: embedding, fprop: {weight: w}}"))
        assert recipe.rule_for("a", "linear") is None
        assert recipe.rule_for("a", "embedding") is not None


class TestSources:
    def test_registered(self, write_recipe, monkeypatch):
        ms.register_recipe(write_recipe())
        assert "r" in ms.list_recipes()
        assert ms.find_recipe("r").quantizers["w"].format.name == "mxfp4"

    def test_a_taken_name_needs_replace(self, write_recipe):
        ms.register_recipe(write_recipe())
        other = write_recipe("mxfp8")
        with pytest.raises(SpecError, match="exists with another definition"):
            ms.register_recipe(other)
        ms.register_recipe(other, replace=True)
        assert ms.find_recipe("r").quantizers["w"].format.name == "mxfp8"

    @pytest.mark.parametrize(
        ("quantizer", "name"),
        [
            ("mxfp4", "mxfp4"),
            ("{format: mxfp4}", "mxfp4"),
            ("{format: mxfp4, scale_rule: floor, block: 16}", "mxfp4[block=16,scale_rule=floor]"),
            ("{format: nvfp4, scale_tile: [16, 16], rounding: stochastic}", "nvfp4(tile=16x16, stochastic)"),
            ("{format: nvfp4, hadamard: 16}", "nvfp4(hadamard=16)"),
            ("{format: nvfp4, element: {exponent: 3, mantissa: 0}}", "nvfp4[element=e3m0]"),
            ("{name: z, element: e2m1, block: 16, scale: e8m0, scale_rule: floor}", "z"),
            ("{format: {name: z, element: e2m1, block: 16, scale: e8m0, scale_rule: floor}, block: 8}", "z[block=8]"),
        ],
    )
    def test_a_quantizer_is_a_name_a_variant_or_a_format(self, write_recipe, quantizer, name):
        assert ms.find_recipe(write_recipe(quantizer)).quantizers["w"].name == name

    def test_paths_are_relative_to_the_recipe(self, write, write_recipe):
        write("z.yaml", "name: z\nelement: e2m1\nblock: 32\nscale: e8m0\nscale_rule: rceil\n")
        assert ms.find_recipe(write_recipe("./z.yaml")).quantizers["w"].name == "z"
        assert ms.find_recipe(write_recipe("{format: z.yaml, block: 64}")).quantizers["w"].format.block == 64

    def test_key_round_trip(self):
        recipe = ms.find_recipe("nvfp4_static")
        assert ms.RecipeSpec.from_key(recipe.key) == recipe


class TestErrors:
    @pytest.mark.parametrize(
        ("quantizer", "what", "hint"),
        [
            ("mxfp5", "unknown format 'mxfp5'", "did you mean"),
            ("{format: mxfp5}", "unknown format 'mxfp5'", "did you mean"),
            ("{format: mxfp4, scale_rule: amx}", "unknown scale rule 'amx'", "known scale rules"),
            ("{format: mxfp4, blok: 16}", "unknown key 'blok'", "did you mean 'block'?"),
            ("{format: mxfp4, block: 5}", "no multiple of 2", ""),
            ("{format: mxfp4, rounding: off}", "'off' is not one of", ""),
            ("{format: mxfp4, scale_tile: 16:16}", "scale_tile", ""),
            ("{format: mxfp4, scale_tile: [16, 16]}", "multiple of the block", ""),
            ("{format: mxfp4, hadamard: 3}", "Hadamard size 3", ""),
            ("{format: mxfp4, scale: e4m3}", "scale_rule", ""),
            ("{format: mxfp4, outer_scale_mode: static}", "no outer scale", ""),
            ("{format: nowhere.yaml}", "cannot read", ""),
            ("5", "a name, a path or a mapping", ""),
            ("{}", "missing key", ""),
        ],
    )
    def test_in_a_quantizer(self, write_recipe, quantizer, what, hint):
        path = write_recipe(quantizer)
        error = error_of(path)
        assert what in error.message
        assert hint in error.hint
        assert error.message.startswith(f"{path}:3:") or "cannot read" in error.message

    @pytest.mark.parametrize(
        ("rule", "what"),
        [
            ("{match: '*', fprop: {weigth: w}}", "unknown key 'weigth'"),
            ("{match: '*', fprop: {grad_output: w}}", "no operand 'grad_output'"),
            ("{match: '*', fprop: {}}", "names no quantizer"),
            ("{match: 're:(', fprop: {weight: w}}", "bad pattern"),
            ("{match: [], fprop: {weight: w}}", "at least one pattern"),
            ("{match: '*', keep: off}", "'off' is not one of"),
            ("{match: '*', keep: high_precision, fprop: {weight: w}}", "either keeps high_precision or"),
            ("{match: '*'}", "either keeps high_precision or"),
            ("{match: '*', types: [conv], fprop: {weight: w}}", "'conv' is not one of"),
            ("{fprop: {weight: w}}", "missing key 'match'"),
            ("5", "rules[0] must be a mapping, not 5"),
        ],
    )
    def test_in_a_rule(self, write_recipe, rule, what):
        path = write_recipe(rule=rule)
        error = error_of(path)
        assert error.message.startswith(f"{path}:5:")
        assert what in error.message

    def test_a_quantizer_that_is_not_there(self, write_recipe):
        assert "no quantizer 'v'" in error_of(write_recipe(rule="{match: '*', fprop: {weight: v}}")).message

    def test_a_quantizer_that_no_rule_uses(self, write_recipe):
        rule = "{match: '*', keep: high_precision}"
        assert "'w' is used by no rule" in error_of(write_recipe(rule=rule)).message

    def test_an_unknown_key(self, write_recipe):
        error = error_of(path := write_recipe(extra="quantisers: 1\n"))
        assert error.message.startswith(f"{path}:6:1 unknown key 'quantisers'")
        assert "did you mean 'quantizers'?" in error.hint

    @pytest.mark.parametrize("text", ["name: r\n", "- a\n", "name: r\nquantizers: {}\nrules: []\n"])
    def test_not_a_recipe(self, write, text):
        path = write("r.yaml", text)
        assert error_of(path).message.startswith(f"{path}:")

    def test_unknown_names_suggest(self):
        with pytest.raises(UnknownNameError) as caught:
            ms.find_recipe("nvfp4_dinamic")
        assert "did you mean 'nvfp4_dynamic'" in caught.value.hint

    @pytest.mark.parametrize("source", [5, None, ["mxfp4"], {}], ids=str)
    def test_other_types(self, source):
        error_of(source)
