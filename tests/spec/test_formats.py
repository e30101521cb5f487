"""Formats: what ships, what is derived, every door a user's format comes in by, and what is refused at load."""

import importlib.metadata
import pickle
from typing import ClassVar

import pytest

import microscale as ms
from microscale.errors import MicroscaleError, SpecError, UnknownNameError
from microscale.spec import document, registry

SHIPPED = {
    "mxfp8": ("e4m3", 32, "e8m0", 8.25),
    "mxfp8_e5m2": ("e5m2", 32, "e8m0", 8.25),
    "mxfp6": ("e2m3", 32, "e8m0", 6.25),
    "mxfp6_e3m2": ("e3m2", 32, "e8m0", 6.25),
    "mxfp4": ("e2m1", 32, "e8m0", 4.25),
    "mxint8": ("mxint8", 32, "e8m0", 8.25),
    "mxint4": ("mxint4", 32, "e8m0", 4.25),
    "nvfp4": ("e2m1", 16, "e4m3", 4.5),
    "nvfp4_1level": ("e2m1", 16, "e4m3", 4.5),
    "nvfp4_4over6": ("e2m1", 16, "e4m3", 4.5),
    "nvfp4_row": ("e2m1", 16, "e4m3", 4.5),
    "nvint4": ("int4", 16, "e4m3", 4.5),
    "fp4_ue5m3": ("e2m1", 16, "ue5m3", 4.5),
    "fp8_block128": ("e4m3", 128, "fp32", 8.25),
    "nf4": ("nf4", 64, "fp32", 4.5),
}
E3M1 = {"exponent": 3, "mantissa": 1, "bias": 3, "nan": "none", "inf": False}


def error_of(source):
    with pytest.raises(SpecError) as caught:
        ms.find_format(source)
    return caught.value


class TestShipped:
    def test_all_are_there(self):
        assert set(SHIPPED) <= set(ms.list_formats())

    @pytest.mark.parametrize("name", SHIPPED)
    def test_fields(self, name):
        spec = ms.find_format(name)
        assert (spec.element.name, spec.block, spec.scale.name, spec.bits_per_value) == SHIPPED[name]
        assert spec.description

    @pytest.mark.parametrize("name", SHIPPED)
    def test_key_and_pickle_are_inverses(self, name):
        spec = ms.find_format(name)
        assert ms.FormatSpec.from_key(spec.key) == spec
        copy = pickle.loads(pickle.dumps(spec))
        assert copy == spec
        assert hash(copy) == hash(spec)

    def test_prose_does_not_count(self):
        spec = ms.find_format("mxfp4")
        assert spec.model_copy(update={"description": "other words"}) == spec

    def test_scale_max(self):
        assert ms.find_format("nvfp4").scale_max == 448
        assert ms.find_format("nvfp4_4over6").scale_max == 256


class TestUserFormats:
    def test_by_path(self, write_format):
        path = write_format(element="{exponent: 3, mantissa: 1, bias: 3, nan: none, inf: false}", block="16")
        for source in (path, str(path)):
            spec = ms.find_format(source)
            assert (spec.element.width, spec.element.max_value, spec.block) == (5, 24.0, 16)
        assert "x" not in ms.list_formats()

    def test_by_mapping(self):
        spec = ms.find_format({"name": "x", "element": E3M1, "block": 16, "scale": "e8m0", "scale_rule": "floor"})
        assert spec.element == ms.find_element(E3M1)
        assert spec.element.name == "e3m1"

    def test_by_registration(self, write_format):
        path = write_format()
        assert [s.name for s in ms.register_format(path)] == ["x"]
        assert ms.list_formats()[-1] == "x"
        assert ms.find_format("x") == ms.find_format(path)

    def test_by_folder(self, write):
        body = "element: e2m1\nblock: 32\nscale: e8m0\nscale_rule: rceil\n"
        folder = write("formats/a.yaml", "name: a\n" + body).parent
        write("formats/b.yaml", "name: b\n" + body)
        assert [s.name for s in ms.register_format(folder)] == ["a", "b"]
        assert ms.find_format("b").name == "b"

    def test_by_entry_point(self, monkeypatch, write_format):
        path = write_format()

        class Point:
            name = "x"

            def load(self):
                return path

        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: [Point()] if group == "microscale.formats" else []
        )
        registry._entry_point_formats.cache_clear()
        try:
            assert "x" in ms.list_formats()
            assert ms.find_format("x").block == 32
        finally:
            monkeypatch.undo()
            registry._entry_point_formats.cache_clear()

    def test_registering_the_same_twice_is_fine(self, write_format):
        path = write_format()
        assert ms.register_format(path) == ms.register_format(path)

    def test_registering_another_under_a_taken_name_needs_replace(self, write_format):
        ms.register_format(write_format())
        other = write_format(block="64")
        with pytest.raises(SpecError, match="exists with another definition") as caught:
            ms.register_format(other)
        assert "replace=True" in caught.value.hint
        ms.register_format(other, replace=True)
        assert ms.find_format("x").block == 64

    def test_a_shipped_name_is_taken_too(self, write_format):
        with pytest.raises(SpecError, match="exists with another definition"):
            ms.register_format(write_format(name="nvfp4"))

    def test_one_bad_file_in_a_folder_registers_nothing(self, write):
        body = "element: e2m1\nblock: 32\nscale: e8m0\nscale_rule: rceil\n"
        folder = write("formats/a.yaml", "name: a\n" + body).parent
        write("formats/b.yaml", "name: b\n")
        with pytest.raises(SpecError, match=r"b\.yaml:1:1"):
            ms.register_format(folder)
        assert "a" not in ms.list_formats()


class TestVariants:
    """An inline variant works wherever a format name does."""

    VARIANT: ClassVar = {"format": "mxfp4", "scale_rule": "floor", "block": 16}

    def test_mapping_and_keywords_agree(self):
        assert ms.find_quantizer(self.VARIANT) == ms.find_quantizer("mxfp4", scale_rule="floor", block=16)

    def test_the_name_says_what_changed(self):
        assert ms.find_quantizer(self.VARIANT).format.name == "mxfp4[block=16,scale_rule=floor]"

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"block": 32}, "nvfp4[block=32]"),
            ({"outer_scale": {"per": "row"}}, "nvfp4[outer_scale=row]"),
            ({"outer_scale": {"scale_max": 256}}, "nvfp4[outer_scale=tensor:256]"),
            ({"scale_rule": "four_over_six"}, "nvfp4[scale_rule=four_over_six]"),
            ({"scale_rule": {"candidates": [1, 2], "metric": "mae"}}, "nvfp4[scale_rule=best_of_2_by_mae]"),
            ({"scale": "ue5m3", "element": E3M1, "block": 8}, "nvfp4[block=8,element=e3m1,scale=ue5m3]"),
        ],
        ids=str,
    )
    def test_names_are_short(self, changes, name):
        assert ms.find_quantizer("nvfp4", **changes).format.name == name

    def test_null_takes_the_outer_scale_away(self):
        spec = ms.find_quantizer({"format": "nvfp4", "outer_scale": None}).format
        assert (spec.name, spec.outer_scale) == ("nvfp4[outer_scale=none]", None)

    def test_of_a_variant_is_named_after_the_first_format(self):
        first = ms.find_quantizer("nvfp4", block=32)
        second = ms.find_quantizer(first, scale_rule="four_over_six")
        assert second.format.name == "nvfp4[block=32,scale_rule=four_over_six]"
        assert ms.find_quantizer(second, block=16).format.name == "nvfp4[scale_rule=four_over_six]"
        assert ms.find_quantizer(pickle.loads(pickle.dumps(first)), block=8).format.name == "nvfp4[block=8]"

    def test_back_to_the_first_format_is_that_format(self):
        assert ms.find_quantizer(ms.find_quantizer("nvfp4", block=32), block=16).format is ms.find_format("nvfp4")

    @pytest.mark.parametrize("name", SHIPPED)
    def test_a_format_s_own_values_change_nothing(self, name):
        spec = ms.find_format(name)
        own = {k: getattr(spec, k) for k in ("element", "block", "scale", "scale_rule", "outer_scale")}
        assert ms.find_quantizer(name, **own).format is spec
        assert ms.find_quantizer({"format": name, **own}).format is spec

    def test_a_rule_by_name_is_the_same_rule(self):
        """The format fills in the rule's base, which the name leaves open."""
        spec = ms.find_format("nvfp4_4over6")
        assert ms.find_quantizer("nvfp4_4over6", scale_rule="four_over_six").format is spec

    def test_what_is_the_same_changes_nothing(self):
        assert ms.find_quantizer("mxfp4", block=32, scale_rule="rceil").format is ms.find_format("mxfp4")

    def test_none_is_unchanged(self):
        assert ms.find_quantizer("mxfp4", block=None, rounding=None) == ms.find_quantizer("mxfp4")

    def test_of_a_path(self, write_format):
        assert ms.find_quantizer({"format": str(write_format()), "block": 64}).format.block == 64

    def test_of_an_inline_format(self):
        inline = {"name": "z", "element": E3M1, "block": 16, "scale": "e8m0", "scale_rule": "floor"}
        assert ms.find_quantizer({"format": inline, "block": 8}).format.block == 8

    def test_with_an_inline_element_and_rule(self):
        spec = ms.find_quantizer(
            "nvfp4", element=E3M1, block=8, scale_rule={"candidates": [1, 0.75], "metric": "mae"}
        ).format
        assert (spec.element.name, spec.scale_rule.candidates) == ("e3m1", (1.0, 0.75))

    def test_of_a_quantizer(self):
        base = ms.find_quantizer("nvfp4", rounding="stochastic")
        changed = ms.find_quantizer(base, scale_tile=(16, 16))
        assert (changed.rounding, changed.scale_tile) == ("stochastic", (16, 16))

    def test_another_kind_of_scale_needs_a_rule(self):
        with pytest.raises(SpecError, match="scale_rule"):
            ms.find_quantizer("mxfp4", scale="e4m3")
        assert ms.find_quantizer("mxfp4", scale="e4m3", scale_rule="nearest").format.scale.name == "e4m3"

    @pytest.mark.parametrize(
        "changes",
        [
            {"blok": 16},
            {"block": 5},
            {"block": 0},
            {"block": "16:16"},
            {"scale_rule": "amx"},
            {"scale_rule": "nearest"},
            {"element": {"exponent": 3}},
            {"element": "e9m9"},
            {"rounding": "up"},
            {"scale_tile": (16, 16)},
            {"scale_tile": (16,)},
            {"hadamard": 3},
            {"hadamard": {"size": 4, "sign": [1, -1, 1]}},
            {"outer_scale_mode": "static"},
        ],
        ids=str,
    )
    def test_impossible_changes(self, changes):
        with pytest.raises(SpecError):
            ms.find_quantizer("mxfp4", **changes)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "line", "what", "hint"),
        [
            ({"element": "e2m2"}, 2, "unknown element 'e2m2'", "did you mean"),
            ({"element": "5"}, 2, "element", ""),
            ({"element": "{exponent: 3, mantisa: 1}"}, 2, "unknown key 'mantisa'", "did you mean 'mantissa'?"),
            ({"element": "{exponent: 4, mantissa: 3, nan: some}"}, 2, "'some' is not one of", ""),
            ({"element": "{exponent: 3}"}, 2, "needs 'exponent' and 'mantissa'", ""),
            ({"element": "{bits: 9}"}, 2, "from 2 to 8", ""),
            (
                {"element": "{bits: 4, mantissa: 1}"},
                2,
                "mantissa does not belong to an int element",
                "a float has exponent",
            ),
            ({"element": "{values: [0, 1, 2]}"}, 2, "2**bits values", ""),
            ({"element": "{values: [0, 0, 0, 0]}"}, 2, "no maximum", ""),
            ({"element": "{exponent: 2, mantissa: 1, max: 5}"}, 2, "not a finite value", ""),
            ({"element": "{exponent: 5, mantissa: 2, bias: 200}"}, 2, "outside FP32", ""),
            ({"element": "{exponent: 4, mantissa: 3, inf: true}"}, 2, "nan: ieee", ""),
            ({"element": "{exponent: 4, mantissa: 0, nan: ieee}"}, 2, "needs a mantissa", ""),
            ({"block": "16:16"}, 3, "block", ""),
            ({"block": "off"}, 3, "block", ""),
            ({"block": "0"}, 3, "block", ""),
            ({"block": "1.5"}, 3, "block", ""),
            ({"scale": "e8m1"}, 4, "unknown element 'e8m1'", "did you mean"),
            ({"scale_rule": "rciel"}, 5, "unknown scale rule 'rciel'", "did you mean 'rceil'"),
            ({"scale_rule": "off"}, 5, "unknown scale rule 'off'", "known scale rules"),
            ({"scale_rule": "{candidates: [1]}"}, 5, "candidates and metric go together", ""),
            ({"scale_rule": "{candidates: [1, 1], metric: mse}"}, 5, "listed twice", ""),
            ({"scale_rule": "{base: mse}"}, 5, "'mse' is not one of", ""),
            ({"blok": "16"}, 6, "unknown key 'blok'", "did you mean 'block'?"),
            ({"outer_scale": "fp16"}, 6, "'fp16' is not one of", ""),
            ({"outer_scale": "{per: rows}"}, 6, "'rows' is not one of", ""),
        ],
        ids=str,
    )
    def test_point_at_the_key(self, write_format, changes, line, what, hint):
        path = write_format(**changes)
        error = error_of(path)
        assert error.message.startswith(f"{path}:{line}:")
        assert what in error.message
        assert hint in error.hint
        assert "\n" not in error.message

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"element": "e2m3", "block": "6"}, "no multiple of 4"),
            ({"element": "e2m1", "block": "5"}, "no multiple of 2"),
            ({"element": "e8m0"}, "no sign"),
            ({"element": "fp32"}, "32 bits wide"),
            ({"scale_rule": "nearest"}, "does not fit scale e8m0"),
            ({"scale": "e4m3"}, "does not fit scale e4m3"),
            ({"scale": "mxint8"}, "scales are floats"),
            ({"scale": "e2m1", "scale_rule": "nearest"}, "no NaN code"),
            ({"element": "nf4", "scale_rule": "even"}, "codebook"),
            ({"outer_scale": "fp32"}, "only an exponent"),
            ({"scale": "fp32", "scale_rule": "nearest", "outer_scale": "fp32"}, "adds nothing"),
            ({"scale": "e4m3", "scale_rule": "nearest", "outer_scale": "{scale_max: 500}"}, "above the largest"),
            ({"block": None}, "missing key 'block'"),
            ({"scale_rule": None}, "missing key 'scale_rule'"),
        ],
        ids=str,
    )
    def test_impossible_combinations_fail_at_load(self, write_format, changes, what):
        path = write_format(**changes)
        error = error_of(path)
        assert error.message.startswith(f"{path}:")
        assert what in error.message

    def test_name_and_file_agree(self, write):
        path = write("y.yaml", "name: x\nelement: e2m1\nblock: 32\nscale: e8m0\nscale_rule: rceil\n")
        error = error_of(path)
        assert error.message.startswith(f"{path}:1:1")
        assert error.hint == "rename one: x.yaml"

    @pytest.mark.parametrize("name", ["a/b", "", " x", "x.yaml"])
    def test_impossible_names(self, name):
        error_of({"name": name, "element": "e2m1", "block": 32, "scale": "e8m0", "scale_rule": "rceil"})

    def test_a_list_is_no_format(self, write):
        assert "mapping" in error_of(write("x.yaml", "- a\n")).message

    def test_a_missing_file(self):
        assert "cannot read" in error_of("nowhere/x.yaml").message

    def test_unknown_names_suggest(self):
        with pytest.raises(UnknownNameError) as caught:
            ms.find_format("nvfp5")
        assert "did you mean 'nvfp4'" in caught.value.hint
        assert isinstance(caught.value, LookupError)
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize("source", [5, None, ["mxfp4"], {}], ids=str)
    def test_other_types(self, source):
        error_of(source)

    def test_survive_pickling(self):
        error = error_of({"name": "x"})
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.message, copy.hint, str(copy)) == (type(error), error.message, error.hint, str(error))

    def test_of_several_problems_the_first_is_told(self, write_format):
        error = error_of(path := write_format(blok="16", descriptoin="x"))
        assert (error.message, error.hint) == (f"{path}:6:1 unknown key 'blok'", "did you mean 'block'?")

    def test_the_base_class_catches_all(self):
        with pytest.raises(MicroscaleError):
            ms.find_format("nowhere")


def test_the_registry_never_writes_to_what_it_was_given():
    data = {"name": "x", "element": dict(E3M1), "block": 16, "scale": "e8m0", "scale_rule": "floor"}
    before = {**data, "element": dict(E3M1)}
    ms.find_format(data)
    assert data == before


def test_shipped_files_hold_what_they_are_called():
    folder = registry.data_folder("formats")
    for path in folder.glob("*.yaml"):
        data = document.read(path).data
        assert path.stem in ("elements", "scale_rules") or data["name"] == path.stem
