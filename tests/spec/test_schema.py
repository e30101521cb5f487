"""The JSON Schemas accept everything the loader accepts, and catch what an editor should underline."""

import jsonschema
import pytest

import microscale as ms
from microscale.errors import UnknownNameError
from microscale.spec import document, registry
from microscale.spec.schema import KINDS

INLINE = {"name": "z", "element": {"exponent": 3, "mantissa": 1}, "block": 16, "scale": "e8m0", "scale_rule": "floor"}


def validator(kind):
    return jsonschema.Draft202012Validator(ms.schema(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_valid_schema(kind):
    jsonschema.Draft202012Validator.check_schema(ms.schema(kind))


@pytest.mark.parametrize("kind", ["format", "recipe"])
def test_shipped_files_are_valid(kind):
    names = ms.list_formats() if kind == "format" else ms.list_recipes()
    for name in names:
        validator(kind).validate(document.read(registry.data_folder(f"{kind}s") / f"{name}.yaml").data)


@pytest.mark.parametrize("kind", ["element", "scale_rule"])
def test_shipped_entries_are_valid(kind):
    for body in document.read(registry.data_folder("formats") / f"{kind}s.yaml").data.values():
        validator(kind).validate(body)


@pytest.mark.parametrize(
    "quantizer",
    [
        "mxfp4",
        "./my.yaml",
        {"format": "mxfp4"},
        {"format": "mxfp4", "scale_rule": "floor", "block": 16},
        {"format": "nvfp4", "scale_tile": [16, 16], "rounding": "stochastic", "hadamard": 16},
        {"format": "nvfp4", "hadamard": {"size": 4, "sign": [1, -1, 1, 1]}},
        {"format": "nvfp4", "element": {"bits": 4}, "outer_scale": {"per": "row"}},
        {"format": "nvfp4", "scale_rule": {"candidates": [1.0, 1.5], "metric": "mae"}, "outer_scale_mode": "static"},
        {"format": "nvfp4", "outer_scale": None},
        {"format": INLINE, "block": 8},
        INLINE,
    ],
    ids=str,
)
def test_what_the_loader_takes_is_valid(quantizer):
    if quantizer != "./my.yaml":
        ms.find_quantizer(quantizer)
    validator("quantizer").validate(quantizer)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("format", {**INLINE, "blok": 16}),
        ("format", {**INLINE, "scale_rule": "amx"}),
        ("format", {**INLINE, "element": "e9m9"}),
        ("format", {**INLINE, "element": {"exponent": 9, "mantissa": 1}}),
        ("format", {**INLINE, "outer_scale": "fp16"}),
        ("format", {k: v for k, v in INLINE.items() if k != "block"}),
        ("quantizer", {"format": "mxfp4", "rounding": "up"}),
        ("quantizer", {"format": "mxfp4", "hadamard": 3}),
        ("quantizer", {"format": "mxfp4", "name": "other"}),
        ("quantizer", {"format": "mxfp4", "scale_tile": [16]}),
        ("quantizer", 5),
        ("element", {"exponent": 3, "mantisa": 1}),
        ("scale_rule", {"base": "mse"}),
        ("recipe", {"name": "r", "quantizers": {"w": "mxfp4"}, "rules": []}),
        ("recipe", {"name": "r", "quantizers": {"w": "mxfp4"}, "rules": [{"match": "*", "fprop": {"weigth": "w"}}]}),
        ("recipe", {"name": "r", "quantizers": {"w": "mxfp4"}, "rules": [{"match": []}]}),
    ],
    ids=str,
)
def test_mistakes_are_invalid(kind, data):
    assert not validator(kind).is_valid(data)


@pytest.mark.parametrize("match", ["*", ["*lm_head", "*router"]])
def test_one_or_many(match):
    rule = {"match": match, "types": "linear", "keep": "high_precision", "optional": True}
    validator("recipe").validate({"name": "r", "quantizers": {"w": "mxfp4"}, "rules": [rule]})


def test_registered_formats_are_offered():
    ms.register_format(INLINE)
    offered = ms.schema("quantizer")["$defs"]["quantizer"]["anyOf"][0]["enum"]
    assert {"nvfp4", "z"} <= set(offered)


def test_every_call_gives_its_own_data():
    ms.schema("format")["$defs"].clear()
    assert ms.schema("format")["$defs"]


def test_an_unknown_kind_suggests():
    with pytest.raises(UnknownNameError, match="unknown schema 'formt'") as caught:
        ms.schema("formt")
    assert "did you mean 'format'" in caught.value.hint
