"""What does not go together: the guilty key and a way out, wherever the two were written."""

import pytest

import microscale as ms
from microscale.errors import SpecError

from .conftest import python_error


class TestCrossField:
    """What does not go together: the guilty key and a way out."""

    CASES = (
        ({"element": "e8m0"}, "element", "element e8m0 has no sign", "sign"),
        ({"element": "fp32"}, "element", "element fp32 is 32 bits wide", "only be a scale"),
        ({"block": 5}, "block", "block 5 is no multiple of 2", "use 4 or 6"),
        ({"block": 1}, "block", "block 1 is no multiple of 2", "use 2"),
        ({"element": "e2m3", "block": 2}, "block", "block 2 is no multiple of 4", "use 4"),
        ({"scale_rule": "nearest"}, "scale_rule", "scale_rule nearest does not fit scale e8m0", "floor, ceil, rceil"),
        ({"scale": "e4m3"}, "scale", "scale_rule rceil does not fit scale e4m3", "scale_rule nearest"),
        ({"scale": "mxint8"}, "scale", "scale mxint8 is an int element", "e8m0"),
        ({"scale": "nf4"}, "scale", "scale nf4 is a codebook element", "e8m0"),
        ({"scale": "e2m1"}, "scale", "scale e2m1 has no NaN code", "all_ones"),
        ({"element": "nf4", "scale_rule": "even"}, "scale_rule", "scale_rule even needs", "floor, ceil or rceil"),
        ({"outer_scale": "fp32"}, "outer_scale", "outer_scale needs a scale with a mantissa", "e4m3"),
    )

    @pytest.mark.parametrize(("changes", "key", "message", "hint"), CASES, ids=str)
    def test_in_a_variant(self, recipe_error, changes, key, message, hint):
        body = "{format: mxfp4, " + ", ".join(f"{k}: {v}" for k, v in changes.items()) + "}"
        position, found, way_out = recipe_error(body)
        assert position == f"3:{6 + body.index(key + ':')}"
        assert found.startswith(message)
        assert hint in way_out
        assert python_error(lambda: ms.find_quantizer("mxfp4", **changes)) == (f"quantizer: {found}", way_out)

    @pytest.mark.parametrize(("changes", "key", "message", "hint"), CASES, ids=str)
    def test_in_a_file(self, format_error, changes, key, message, hint):
        position, found, way_out = format_error(**changes)
        lines = ["name", "element", "block", "scale", "scale_rule", "outer_scale"]
        guilty = "scale_rule" if message.startswith("scale_rule") else key  # a file has both: the rule comes first
        assert position == f"{lines.index(guilty) + 1}:1"
        assert found.startswith(message)
        assert hint in way_out

    def test_the_other_key_if_the_guilty_one_was_not_written(self, recipe_error):
        assert recipe_error("{format: nvfp4, scale: e8m0, scale_rule: floor}")[0] == "3:22"
        assert recipe_error("{format: mxfp4, scale_tile: [1, 32], block: 64}")[0] == "3:22"

    @pytest.mark.parametrize(
        ("quantizer", "position", "message", "hint"),
        [
            (
                "{format: mxfp4, scale_tile: [16, 16]}",
                "3:22",
                "columns must be a multiple of the block, 32",
                "[16, 32]",
            ),
            ("{format: nvfp4_row, scale_tile: 16}", "3:26", "outer scale per row", "{per: tensor}"),
            ("{format: mxfp4, outer_scale_mode: static}", "3:22", "mxfp4 has no outer scale", "leave it out"),
            (
                "{format: nvfp4, outer_scale: {scale_max: 500}}",
                "3:36",
                "scale_max 500 is above the largest e4m3, 448",
                "leave scale_max out",
            ),
            (
                "{format: mxfp4, scale_rule: {candidates: [1]}}",
                "3:35",
                "candidates and metric go together",
                "metric: mse",
            ),
            (
                "{format: mxfp4, scale_rule: {metric: mse}}",
                "3:35",
                "candidates and metric go together",
                "candidates: [",
            ),
            (
                "{format: mxfp4, scale_rule: {candidates: [1, 2, 1], metric: mse}}",
                "3:54",
                "candidates[2], 1, is listed twice",
                "delete",
            ),
            (
                "{format: mxfp4, scale_rule: {candidates: [1, .nan], metric: mse}}",
                "3:51",
                "candidates[1] is nan",
                "between 0 and 16",
            ),
            (
                "{format: mxfp4, element: {bits: 4, mantissa: 1}}",
                "3:41",
                "mantissa does not belong to an int",
                "fraction",
            ),
            ("{format: mxfp4, element: {bits: 4, nan: ieee}}", "3:41", "an int element has no NaN", "leave nan"),
            ("{format: mxfp4, element: {values: [0, .nan, 1, 2]}}", "3:44", "values[1] is nan", "finite"),
            ("{format: mxfp4, element: {values: [0, 1, 2, .inf]}}", "3:50", "values[3] is inf", "finite"),
            ("{format: mxfp4, element: {values: [0, 1, 2, 1e39]}}", "3:50", "values[3] is 1e+39", "FP32"),
            ("{format: mxfp4, element: {values: [0, 1, 2]}}", "3:32", "a codebook needs 2**bits values", "4, 8, 16"),
            (
                "{format: mxfp4, element: {exponent: 2, mantissa: 1, max: 5}}",
                "3:58",
                "max 5 is not a finite",
                "4 and 6",
            ),
            (
                "{format: mxfp4, element: {exponent: 2, mantissa: 1, max: .inf}}",
                "3:58",
                "max inf is not a finite",
                "4 and 6",
            ),
            ("{format: mxfp4, element: {exponent: 2, mantissa: 1, max: .nan}}", "3:58", "max must be above 0", "max:"),
            ("{format: mxfp4, element: {exponent: 5, mantissa: 2, bias: -500}}", "3:58", "outside FP32", "15"),
            (
                "{format: mxfp4, element: {exponent: 5, mantissa: 2, bias: -9999}}",
                "3:58",
                "bias must be at least",
                "bias",
            ),
            (
                "{format: mxfp4, element: {bits: 4, fraction: 2000}}",
                "3:41",
                "fraction must be at most 126",
                "binary point",
            ),
            ("{format: mxfp4, element: {exponent: 4, mantissa: 4}}", "3:45", "9 bits; elements have 2 to 8", "fp32"),
        ],
    )
    def test_in_a_quantizer(self, recipe_error, quantizer, position, message, hint):
        found = recipe_error(quantizer)
        assert found[0] == position
        assert message in found[1]
        assert hint in found[2]

    @pytest.mark.parametrize(
        ("rule", "position", "message", "hint"),
        [
            ("{match: '*', fprop: {weight: v}}", "5:26", "no quantizer 'v' in this recipe", "it has w"),
            ("{match: '*', fprop: {grad_output: w}}", "5:26", "fprop has no operand 'grad_output'", "input and weight"),
            ("{match: '*', fprop: {}}", "5:18", "fprop names no quantizer", "leave it out"),
            ("{match: '*', fprop: {weight: w}, keep: high_precision}", "5:38", "a rule either keeps", "delete"),
            ("{match: '*'}", "5:5", "a rule either keeps", "write keep: high_precision"),
            ("{match: [a, 're:('], fprop: {weight: w}}", "5:17", "bad pattern 're:('", "regular expression"),
            ("{match: 're:a{99999999999}', fprop: {weight: w}}", "5:6", "bad pattern", "regular expression"),
            ("{match: [], fprop: {weight: w}}", "5:6", "match needs at least one pattern", "'*'"),
            ("{match: '*', keep: high_precision}", "3:3", "quantizer 'w' is used by no rule", "delete it"),
        ],
    )
    def test_in_a_rule(self, recipe_error, rule, position, message, hint):
        found = recipe_error(rule=rule)
        assert found[0] == position
        assert found[1].startswith(message)
        assert hint in found[2]

    def test_in_a_file_that_a_recipe_names(self, write_format, recipe_error):
        path = write_format(block="5")
        with pytest.raises(SpecError) as caught:
            ms.find_format(path)
        for quantizer in ("./x.yaml", "{format: ./x.yaml, rounding: stochastic}"):
            assert recipe_error(quantizer)[:2] == ("3:1", caught.value.message.split(" ", 1)[1])
