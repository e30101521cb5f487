"""`block: row`: how it is written, what it becomes for rows of a length, and where it cannot be."""

import pytest

import microscale as ms
from microscale.cli import describe
from microscale.errors import InputError, SpecError
from microscale.spec.format import MAX_BLOCK, ROW, FormatSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.schema import schema

FP8 = ms.find_format("fp8_row")
INT4 = {"name": "int4_row", "element": "int4", "block": "row", "scale": "fp32", "scale_rule": "nearest"}


def test_written_as_a_word_and_kept_as_a_number():
    assert (FP8.block, FP8.block_text, FP8.identity()["block"]) == (ROW, "row", "row")
    assert FormatSpec.from_key(FP8.key) is FP8 and FormatSpec.model_validate_json(FP8.model_dump_json()) == FP8
    assert ms.find_format({**FP8.identity(), "name": "other"}).block == ROW
    assert ms.find_quantizer("fp8_block128", block="row").format.name == "fp8_block128[block=row]"
    assert ms.find_quantizer("fp8_row", block="row").format is FP8


@pytest.mark.parametrize("columns", [1, 7, 128, 4096, 28672, MAX_BLOCK])
def test_rows_of_a_length(columns):
    """One block, the same object every time, and nothing left of the word."""
    made = FP8.for_row(columns)
    assert made is FP8.for_row(columns) and made.for_row(5) is made
    assert made.block == made.block_bytes == columns and made.name == f"fp8_row[block={columns}]"
    assert made == ms.find_quantizer("fp8_row", block=columns).format
    spec = ms.find_quantizer("fp8_row", rounding="stochastic").for_row(columns)
    assert spec.format is made and spec.rounding == "stochastic" and spec is QuantizerSpec.from_key(spec.key)


def test_numbers_stay_as_they_are():
    for name in ("mxfp4", "nvfp4"):
        spec = ms.find_quantizer(name)
        assert spec.for_row(64) is spec and spec.format.for_row(64) is spec.format


def test_rows_fill_whole_bytes():
    fmt = ms.find_format(INT4)
    assert [fmt.for_row(n).block for n in (0, 1, 2, 33)] == [2, 2, 2, 34]


def test_a_variant_of_a_row_is_named_after_the_first_format():
    by_row = ms.find_quantizer("fp8_block128", block="row").format
    assert by_row.for_row(64).name == "fp8_block128[block=64]"
    assert by_row.for_row(128) is ms.find_format("fp8_block128")


def test_what_cannot_be():
    with pytest.raises(InputError, match="one scale a row") as caught:
        FP8.for_row(MAX_BLOCK + 1)
    assert "fp8_block128" in caught.value.hint
    with pytest.raises(SpecError, match="one scale for a whole row"):
        ms.find_quantizer("fp8_row", scale_tile=(16, 16))
    for word in ("rows", "Row", "-1"):
        with pytest.raises(SpecError, match="block must be an integer"):
            ms.find_quantizer("fp8_row", block=word)
    with pytest.raises(SpecError, match="block must be at least 1, not 0"):
        ms.find_quantizer("fp8_row", block=0)


def test_descriptions_say_row():
    assert describe.format_row(FP8)[2] == "row" and describe.format_data(FP8)["block"] == "row"
    assert any("row along one axis, however long" in line for line in describe.format_text(FP8))
    assert FP8.bits_per_value == 8
    block = schema("format")["$defs"]["format"]["properties"]["block"]
    assert {"const": "row"} in block["anyOf"] and block["anyOf"][0]["maximum"] == MAX_BLOCK


def test_the_recipe_is_there():
    recipe = ms.find_recipe("mxfp4_fp8")
    assert {k: q.format.name for k, q in recipe.quantizers.items()} == {"w": "mxfp4", "x": "fp8_row"}
    assert not recipe.is_training
