"""The quantize kernels in every mode, interpreted against the reference, to which no quantizer is left on a GPU."""

import importlib.util

import pytest

import microscale as ms
from microscale import dispatch
from tests.kernels.processes import architectures, lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_interpreted_modes_equal_the_reference(part):
    """Formats x rules and searches x rounding x tiles x Hadamard x layout x dtype x strides x outer scale, pairwise."""
    rows = lines("tests.kernels.interpreted_modes", str(part), "2")
    assert [r for r in rows if "error" in r] == []
    assert rows[-1]["checked"] >= 120 and rows[-1]["pairs"] > 1500
    assert rows[-1]["launches"] == {
        "mxfp8": ["quantize_rows"],
        "nvfp4": ["partial_amax", "quantize_rows"],
        "nvfp4 small": ["quantize_rows"],
        "nvfp4 amax given": ["quantize_rows"],
        "nvfp4_row": ["row_amax", "quantize_rows"],
        "nvfp4_4over6": ["partial_amax", "quantize_rows"],
    }


@pytest.mark.parametrize(
    ("fmt", "changes"),
    [
        ("nvfp4_4over6", {}),
        ("mxfp4", {"scale_rule": "mse", "scale_tile": (3, 64)}),
        ("nvfp4", {"scale_tile": (16, 16), "hadamard": 16, "rounding": "stochastic"}),
        ("nf4", {"rounding": "stochastic"}),
        ("mxfp8", {"element": {"exponent": 4, "mantissa": 3, "subnormals": False}}),
        ("mxfp8", {"scale": "bf16", "scale_rule": "nearest"}),
    ],
)
def test_no_quantizer_is_left_to_the_reference(fmt, changes):
    operand = dispatch.Operand((64, 4096), "bfloat16")
    problem = dispatch.Problem("quantize", (operand,), "cuda", (9, 0), ms.find_quantizer(fmt, **changes))
    with dispatch.strict():
        assert dispatch.select(problem).backend == "triton"


@pytest.mark.slow
@pytest.mark.parametrize("capability", architectures("triton.quantize"))
def test_modes_compile(capability, tmp_path):
    """Every format and every mode, without local memory; fp8 conversions and packed arithmetic where there are any."""
    rows = lines("tests.kernels.compiled_modes", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert {r["case"] for r in rows} >= set(ms.list_formats())
    assert [r for r in rows if r["local"]] == []
    assert all(str(r["target"]).startswith(f"sm_{capability}") for r in rows)
    native = {e for r in rows for e in r["conversions"]}
    assert any("e4m3x2" in c for c in native) == ("max.u16x2" in native) == (capability >= 90)
    kernels = {r["kernel"] for r in rows}
    assert kernels >= {
        "quantize_rows",
        "hadamard",
        "partial_amax",
        "row_amax",
        "tile_amax",
        "tile_errors",
        "tile_choice",
    }
