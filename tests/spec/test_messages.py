"""What errors say of one value: the guilty key's position, our words, the value seen, a way out."""

import numpy as np
import pydantic
import pytest

import microscale as ms
from microscale.errors import UnknownNameError
from microscale.spec.fields import FieldError

from .conftest import INLINE, RULE, parts, python_error


class TestKeys:
    """An unknown key is told first, at its own place, with the keys of its own mapping in the hint."""

    @pytest.mark.parametrize(
        ("rule", "position", "key", "hint"),
        [
            ('{mach: "*", fprop: {weight: w}}', "5:6", "mach", "did you mean 'match'?"),
            ('{match: "*", fprob: {weight: w}}', "5:18", "fprob", "did you mean 'fprop'?"),
            ('{match: "*", fprop: {weigth: w}}', "5:26", "weigth", "did you mean 'weight'?"),
            ('{match: "*", fprop: {block: w}}', "5:26", "block", "known keys: input, weight, grad_output"),
            ('{1: "*"}', "5:6", "1", "known keys: match, types"),
            ('{types: [conv], mach: "*"}', "5:21", "mach", "did you mean 'match'?"),
        ],
    )
    def test_in_a_rule(self, recipe_error, rule, position, key, hint):
        found = recipe_error(rule=rule)
        assert found[:2] == (position, f"unknown key {key!r}")
        assert hint in found[2]

    @pytest.mark.parametrize(
        ("quantizer", "position", "key", "hint"),
        [
            ("{format: mxfp4, hadamard: {sze: 16}}", "3:33", "sze", "did you mean 'size'?"),
            ("{format: nvfp4, outer_scale: {pr: row}}", "3:36", "pr", "did you mean 'per'?"),
            ("{format: mxfp4, scale_rule: {bas: floor}}", "3:35", "bas", "did you mean 'base'?"),
            ("{format: mxfp4, element: {exponnt: 3}}", "3:32", "exponnt", "did you mean 'exponent'?"),
            ("{format: mxfp4, scale_rle: floor}", "3:22", "scale_rle", "did you mean 'scale_rule'"),
            ("{formt: mxfp4, block: 16}", "3:7", "formt", "did you mean 'format'?"),
            (
                "{format: {name: z, element: e2m1, blok: 32, scale: e8m0, scale_rule: floor}}",
                "3:40",
                "blok",
                "did you mean 'block'?",
            ),
            (
                "{name: z, element: e2m1, block: 32, scale: e8m0, scale_rule: floor, rounding: stochastic}",
                "3:74",
                "rounding",
                "{format: NAME, rounding: ...}",
            ),
        ],
    )
    def test_in_a_quantizer(self, recipe_error, quantizer, position, key, hint):
        found = recipe_error(quantizer)
        assert found[:2] == (position, f"unknown key {key!r}")
        assert hint in found[2]

    def test_before_the_required_key_that_it_meant(self, format_error):
        assert format_error(block=None, blok="32")[:2] == ("5:1", "unknown key 'blok'")

    def test_the_first_of_several(self, recipe_error):
        assert recipe_error(rule='{match: "*", fprop: {x: w}, y: 1}')[1] == "unknown key 'x'"
        assert recipe_error(rule='{match: "*", y: 1, fprop: {x: w}}')[1] == "unknown key 'y'"

    def test_missing_keys_name_what_is_needed(self, format_error, recipe_error):
        assert format_error(block=None) == (
            "1:1",
            "missing key 'block'",
            "a format needs name, element, block, scale, scale_rule",
        )
        assert recipe_error(rule="{keep: high_precision}") == ("5:5", "missing key 'match'", "a rule needs match")
        assert recipe_error("{block: 16}") == ("3:3", "missing key 'format'", "a quantizer needs format")

    def test_a_variant_is_no_format(self):
        message, hint = python_error(lambda: ms.find_format({"format": "mxfp4", "block": 16}))
        assert message == "format: unknown key 'format'"
        assert "a variant is a quantizer" in hint


class TestWords:
    """A value of the wrong kind: what was seen, what is expected."""

    @pytest.mark.parametrize(
        ("changes", "position", "message", "hint"),
        [
            ({"element": "5"}, "2:1", "element must be a name or a mapping, not 5", "its keys are name"),
            ({"element": "null"}, "2:1", "element must be a name or a mapping, not null", "its keys are"),
            (
                {"element": "{values: [1, 2, 3, x]}"},
                "2:29",
                "values[3] must be a number, not 'x'",
                "value of each code",
            ),
            ({"element": "{values: 5}"}, "2:11", "values must be a list, not 5", "[5]"),
            ({"element": "{values: {a: 1}}"}, "2:11", "values must be a list, not a mapping", "`- `"),
            ({"element": "{exponent: 9, mantissa: 1}"}, "2:11", "exponent must be at most 8, not 9", "exponent bits"),
            ({"element": "{kind: it, bits: 4}"}, "2:11", "kind 'it' is not one of float, int, codebook", "'int'"),
            (
                {"element": "{exponent: 3, mantissa: 1, sign: off}"},
                "2:37",
                "sign must be true or false, not 'off'",
                "off",
            ),
            ({"element": "{exponent: 3, mantissa: 1, inf: 1}"}, "2:37", "inf must be true or false, not 1", "0 and 1"),
            ({"block": "abc"}, "3:1", "block must be an integer, not 'abc'", "elements that share one scale"),
            ({"block": "'32'"}, "3:1", "block must be an integer, not '32'", "write 32 without quotes"),
            ({"block": "true"}, "3:1", "block must be an integer, not true", "elements that share one scale"),
            ({"block": "16.0"}, "3:1", "block must be an integer, not 16.0", "write 16"),
            ({"block": "32.5"}, "3:1", "block must be an integer, not 32.5", "elements that share"),
            ({"block": ""}, "3:1", "block must be an integer, not null", "elements that share"),
            ({"block": "[32]"}, "3:1", "block must be an integer, not [32]", "elements that share"),
            ({"block": "0"}, "3:1", "block must be at least 1, not 0", "elements that share"),
            ({"block": "-32"}, "3:1", "block must be at least 1, not -32", "elements that share"),
            ({"block": "65538"}, "3:1", "block must be at most 65536, not 65538", "elements that share"),
            ({"scale_rule": "5"}, "5:1", "scale_rule must be a name or a mapping, not 5", "base, candidates"),
            ({"outer_scale": "5"}, "6:1", "outer_scale must be a name or a mapping, not 5", "dtype, per, scale_max"),
            ({"outer_scale": "row"}, "6:1", "outer_scale 'row' is not one of fp32, or a mapping", "write {per: row}"),
            ({"outer_scale": "{scale_max: -1}"}, "6:15", "scale_max must be above 0, not -1", "largest block"),
            ({"description": "5"}, "6:1", "description must be text, not 5", "put it in quotes: '5'"),
            ({"references": "abc"}, "6:1", "references must be a list, not 'abc'", "put it in brackets: [abc]"),
            ({"name": "5"}, "1:1", "name must be text, not 5", "put it in quotes: '5'"),
        ],
        ids=str,
    )
    def test_in_a_format(self, format_error, changes, position, message, hint):
        found = format_error(**changes)
        assert found[:2] == (position, message)
        assert hint in found[2]

    @pytest.mark.parametrize(
        ("quantizer", "position", "message", "hint"),
        [
            ("{format: mxfp4, scale_tile: [16]}", "3:22", "scale_tile must be rows and columns, not [16]", "[16, 16]"),
            (
                "{format: mxfp4, scale_tile: 16:16}",
                "3:22",
                "scale_tile must be rows and columns, not '16:16'",
                "[16, 16]",
            ),
            ("{format: mxfp4, scale_tile: true}", "3:22", "scale_tile must be rows and columns, not true", "[16, 16]"),
            ("{format: mxfp4, scale_tile: [1.0, 32]}", "3:35", "scale_tile[0] must be an integer, not 1.0", "write 1"),
            (
                "{format: mxfp4, scale_tile: [0, 32]}",
                "3:22",
                "scale_tile 0x32: rows and columns are from 1",
                "[16, 16]",
            ),
            ("{format: mxfp4, hadamard: true}", "3:22", "hadamard must be a size, or a mapping", "2, 4, 8"),
            ("{format: mxfp4, hadamard: {size: 4.0}}", "3:33", "size must be an integer, not 4.0", "write 4"),
            (
                "{format: mxfp4, hadamard: {size: 2, sign: [1, 0]}}",
                "3:42",
                "sign needs 2 entries of +1 or -1",
                "all +1",
            ),
            ("{format: mxfp4, rounding: null}", "3:22", "rounding null is not one of nearest_even", "leave it out"),
            ("{format: mxfp4, block: null}", "3:22", "block must be an integer, not null", "share one scale"),
            ("null", "3:3", "a format is a name, a path or a mapping, not null", "mxfp4"),
        ],
    )
    def test_in_a_quantizer(self, recipe_error, quantizer, position, message, hint):
        found = recipe_error(quantizer)
        assert found[0] == position
        assert found[1].startswith(message)
        assert hint in found[2]

    @pytest.mark.parametrize(
        ("rule", "position", "message", "hint"),
        [
            ("5", "5:5", "rules[0] must be a mapping, not 5", "its keys are match, types"),
            ("{match: 5, fprop: {weight: w}}", "5:6", "match must be a list, not 5", "[5]"),
            ("{match: '*', fprop: w}", "5:18", "fprop must be a mapping, not 'w'", "input, weight, grad_output"),
            ("{match: '*', fprop: {weight: 5}}", "5:26", "weight must be text, not 5", "'5'"),
            ("{match: '*', optional: off, keep: high_precision}", "5:18", "optional must be true or false", "YAML 1.2"),
            ("{match: '*', keep: high}", "5:18", "keep 'high' is not one of high_precision", "high_precision"),
            (
                "{match: '*', types: [linear, conv], keep: high_precision}",
                "5:34",
                "types[1] 'conv' is not one of",
                "linear",
            ),
        ],
    )
    def test_in_a_rule(self, recipe_error, rule, position, message, hint):
        found = recipe_error(rule=rule)
        assert found[0] == position
        assert found[1].startswith(message)
        assert hint in found[2]

    def test_lists_that_are_empty_or_none(self, write):
        for text, message in [
            ("rules: []", "rules is empty"),
            ("rules: 5", "rules must be a list, not 5"),
            ("rules: {match: a}", "rules must be a list, not a mapping"),
        ]:
            path = write("r.yaml", f"name: r\nquantizers: {{w: mxfp4}}\n{text}\n")
            assert parts(lambda path=path: ms.find_recipe(path))[:2] == ("3:1", message)
        path = write("r.yaml", "name: r\nquantizers: [mxfp4]\nrules: []\n")
        assert parts(lambda: ms.find_recipe(path))[:2] == ("2:1", "quantizers must be a mapping, not ['mxfp4']")

    def test_a_failed_item_is_no_second_problem(self, recipe_error):
        """Pydantic also finds that the list, without the item that failed, is too short."""
        assert recipe_error(rule="5")[2] == "its keys are match, types, keep, optional, fprop, dgrad, wgrad, last, save"


class TestPythonData:
    """No lines there: a colon after the origin, then where in the data."""

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: ms.find_quantizer("mxfp4", scale_rle="floor"), "quantizer: unknown key 'scale_rle'"),
            (lambda: ms.find_quantizer("mxfp4", block=True), "quantizer: block must be an integer, not true"),
            (lambda: ms.find_quantizer("mxfp4", block=32.0), "quantizer: block must be an integer, not 32.0"),
            (lambda: ms.find_quantizer("mxfp4", scale_rule="amx"), "quantizer: scale_rule: unknown scale rule 'amx'"),
            (lambda: ms.find_format({**INLINE, "scale": "e8m1"}), "format: scale: unknown element 'e8m1'"),
            (lambda: ms.find_format({1: 2}), "format: key 1 is no string"),
            (lambda: ms.find_format("mxfp5"), "unknown format 'mxfp5'"),
            (lambda: ms.find_format(5), "a format is a name, a path or a mapping, not 5"),
            (lambda: ms.find_element(5), "an element must be a name or a mapping, not 5"),
            (lambda: ms.find_element({"values": [1, 2, "x", 4]}), "element: values[2] must be a number, not 'x'"),
            (lambda: ms.find_element({}), "element: a float element needs 'exponent' and 'mantissa'"),
            (lambda: ms.find_recipe([]), "a recipe is a name, a path or a mapping, not []"),
            (lambda: ms.find_recipe({}), "recipe: missing key 'name'"),
        ],
    )
    def test_of_one_thing(self, call, message):
        assert python_error(call)[0] == message

    @pytest.mark.parametrize(
        ("quantizer", "rule", "message"),
        [
            ("mxfp5", {}, "quantizers.w: unknown format 'mxfp5'"),
            ({"format": "mxfp4", "blok": 16}, {}, "quantizers.w: unknown key 'blok'"),
            ({"format": "mxfp4", "block": 5}, {}, "quantizers.w: block 5 is no multiple of 2"),
            ({"format": "mxfp4", "element": {"exponent": 3}}, {}, "quantizers.w.element: a float element needs"),
            ({"format": {"name": "z"}}, {}, "quantizers.w.format: missing key 'element'"),
            ({"format": "./nowhere.yaml"}, {}, "quantizers.w.format: cannot read nowhere.yaml: no such file"),
            ("mxfp4", {"fprop": {"weigth": "w"}}, "rules[0].fprop: unknown key 'weigth'"),
            ("mxfp4", {"fprop": {"weight": "v"}}, "rules[0].fprop.weight: no quantizer 'v'"),
            ("mxfp4", {"match": ["a", 5]}, "rules[0]: match[1] must be text, not 5"),
            ("mxfp4", {"optional": 1}, "rules[0]: optional must be true or false, not 1"),
        ],
    )
    def test_of_a_recipe(self, quantizer, rule, message):
        data = {
            "name": "r",
            "quantizers": {"w": quantizer},
            "rules": [{"match": "*", "fprop": {"weight": "w"}, **rule}],
        }
        assert python_error(lambda: ms.find_recipe(data))[0].startswith(f"recipe: {message}")

    def test_unknown_names_keep_their_class(self, recipe_error, write):
        with pytest.raises(UnknownNameError):
            ms.find_quantizer("mxfp4", element="e9m9")
        path = write("r.yaml", f"name: r\nquantizers:\n  w: mxfp5\nrules:\n  - {RULE}\n")
        with pytest.raises(UnknownNameError, match=r"r\.yaml:3:3 unknown format 'mxfp5'"):
            ms.find_recipe(path)

    def test_numbers_of_numpy_are_numbers(self):
        assert ms.find_quantizer("mxfp4", block=np.int64(16)) == ms.find_quantizer("mxfp4", block=16)
        values = np.array([0, 1, 2, 3], dtype=np.float32)
        assert ms.find_element({"values": list(values)}) == ms.find_element({"values": [0, 1, 2, 3]})

    def test_built_by_hand_pydantic_shows_message_and_hint(self):
        with pytest.raises(pydantic.ValidationError, match=r"block 5 is no multiple of 2.* \(use 4 or 6\)"):
            ms.FormatSpec(**{k: getattr(ms.find_format("mxfp4"), k) for k in ms.FormatSpec.model_fields} | {"block": 5})
        assert FieldError("m").paths == ((),)
