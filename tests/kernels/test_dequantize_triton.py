"""Triton's dequantize: bit for bit the reference, by the kernel meant for each call, in few instructions."""

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale.kernels.triton import dequantize, jit_dequantize
from microscale.numerics import layout
from tests.kernels.processes import architectures, fast, lines

FORMATS = ms.list_formats()
RUNS, ROWS = jit_dequantize.dequantize_runs, jit_dequantize.dequantize_rows


@pytest.mark.parametrize("part", fast(range(3), 0))
def test_every_format_equals_the_reference(part, device):
    """Every code with every scale, layouts, row lengths, outer scales, dtypes; nothing else is written."""
    formats = FORMATS[part::3]
    rows = lines("tests.kernels.dequantize_cases", device.type, *formats)
    assert [r for r in rows if "error" in r] == []
    ways = [f"dequantize_runs {way}" for way in (dequantize.WHOLE_ROWS, dequantize.PARTS_OF_ROWS)]
    assert all({"dequantize_rows", *ways} <= set(ran) for ran in rows[-1]["kernels"].values())
    assert set(rows[-1]["kernels"]) == set(formats)


@pytest.mark.slow
def test_formats_that_no_shipped_one_is_like_equal_the_reference(device):
    """Odd widths and blocks, unusual biases, NaN policies, scales and codebooks, by whichever kernel takes them."""
    rows = lines("tests.kernels.dequantize_cases", device.type, "user")
    assert [r for r in rows if "error" in r] == []
    assert rows[-1]["checked"] > 200


def plan(fmt, shape, columns, scale_layout=layout.STRIDED, outer=dequantize.NONE, aligned=True):
    return dequantize._plan(ms.find_format(fmt).for_row(128), shape, columns, scale_layout, outer, aligned)


@pytest.mark.parametrize("fmt", FORMATS)
def test_dense_rows_take_the_fast_kernel(fmt):
    spec = ms.find_format(fmt)
    outer = {None: dequantize.NONE, "row": dequantize.BY_ROW}.get(
        spec.outer_scale and spec.outer_scale.per, dequantize.SCALAR
    )
    for shape in ((16384, 8192), (8192, 28672), (4096, 4096), (4, 2048, 5120), (1, 128), (300, 100_000 * 128)):
        for scale_layout in layout.LAYOUTS:
            made = plan(fmt, shape[:-1], shape[-1], scale_layout, outer)
            assert made.kernel is RUNS
            assert made.grid * dequantize.THREADS * dequantize.RUNS * 8 >= torch.Size(shape).numel()
    assert plan(fmt, (16384,), 8192, layout.SWIZZLED, outer).constants["ROWS"] == dequantize.WHOLE_ROWS


def test_everything_else_takes_the_general_kernel():
    assert plan("mxfp8", (16,), 8191).kernel is ROWS
    assert plan("mxfp8", (16,), 8192, aligned=False).kernel is ROWS
    assert plan("nvfp4", (16,), 8192, outer=dequantize.BY_BLOCK).kernel is ROWS
    assert plan("mxfp8", (1, 2, 1), 64, layout.SWIZZLED).kernel is ROWS  # a program would span many small matrices
    assert plan("mxfp8", (2**21,), 2**14).kernel is ROWS  # 2**32 runs


def test_indices_are_wide_where_they_have_to_be():
    assert plan("mxfp8", (2**21,), 2**14).constants["WIDE"]
    assert not plan("mxfp8", (2**10,), 2**14 - 1).constants["WIDE"]
    # few blocks, but each matrix of one row takes a whole tile of scales
    assert plan("mxfp8", (2**23, 1), 32, layout.SWIZZLED).constants["WIDE"]


def test_a_plan_is_made_once_and_constants_are_shared_by_shapes():
    """`launch` knows constants by their identity."""
    assert plan("nvfp4", (64,), 4096) is plan("nvfp4", (64,), 4096)
    assert plan("nvfp4", (64,), 4096).constants is plan("nvfp4", (128,), 8192).constants
    assert plan("nvfp4", (64,), 4095).constants is plan("nvfp4", (128,), 8191).constants


def test_scales_are_lifted_in_the_place_of_codes_only_where_that_is_exact():
    e8m0, e4m3 = ms.find_format("mxfp4").scale, ms.find_format("nvfp4").scale
    assert dequantize._folds(e4m3, 14) and dequantize._folds(e8m0, -6) and dequantize._folds(e8m0, -22)
    assert not dequantize._folds(e8m0, 1) and not dequantize._folds(e8m0, -23) and not dequantize._folds(e4m3, 120)
    assert not dequantize._folds(ms.find_format("nf4").scale, -1)


# Instructions of sm_90 for each element of full programs: dense, with swizzled scales, and those in parts of rows; a
# copy at full speed leaves time for 18 (4-bit codes to bf16) to 22 (8-bit).
BUDGET = {
    "fp4_ue5m3": (6.3, 7.7, 10.0), "fp8_block128": (7.6, 9.1, 11.3), "mxfp4": (6.7, 8.1, 10.4),
    "fp8_row": (7.6, 9.1, 11.3),
    "mxfp6": (8.0, 9.4, 11.6), "mxfp6_e3m2": (8.0, 9.4, 11.6), "mxfp8": (8.1, 9.5, 11.8), "mxfp8_e5m2": (5.1, 6.5, 8.8),
    "mxint4": (6.2, 7.6, 9.9), "mxint8": (6.1, 7.5, 9.8), "nf4": (4.9, 6.3, 8.6), "nvfp4": (7.9, 9.3, 11.6),
    "nvfp4_1level": (6.8, 8.2, 10.5), "nvfp4_4over6": (7.9, 9.3, 11.6), "nvfp4_row": (9.0, 9.4, 12.0),
    "nvint4": (7.8, 9.2, 11.5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", architectures("triton.dequantize"))
def test_dense_rows_compile_to_few_instructions(capability, tmp_path):
    """Stores of 16 bytes only, no shared and no local memory, and on sm_90 no more than 5 % above the budget."""
    rows = lines("tests.kernels.compiled_dequantize", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert {r["format"] for r in rows} == set(FORMATS) == set(BUDGET)
    assert [r for r in rows if r["shared"] or r["local"]] == []
    assert [r for r in rows if set(r["stores"]) != {"STG.E.128"}] == []
    if capability == 90:
        for r in rows:
            dense, whole, parts = BUDGET[r["format"]]
            limit = dense if not r["swizzle"] else whole if r["way"] == dequantize.WHOLE_ROWS else parts
            assert r["per_element"] <= 1.05 * limit + (not r["even"]), r
