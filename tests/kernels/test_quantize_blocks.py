"""Quantize kernels whose threads own blocks: bit for bit the reference, inside their buffers, in few instructions."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.triton import blocks_fit, ptx
from tests.kernels.processes import COVERAGE, architectures, fast, lines

FORMATS = ms.list_formats()
BUDGET = json.loads(Path(__file__).with_name("budget_sm90.json").read_text())
NATIVE = (
    "rows mxfp4",
    "rows nvfp4",
    "rows mxfp6",
    "rows mxfp8",
    "rows nvfp4 stochastic",
    "columns nvfp4",
    "both mxfp8",
)
LATER = (
    "columns mxfp4",
    "both nvfp4",
    "swizzled nvfp4",
    "rows nvfp4_4over6",
    "rows nvfp4 16x16",
    "rows nvfp4 hadamard",
)


@pytest.mark.parametrize("part", fast(range(8), 3, 6))  # mxfp4 and nvfp4, mxfp8
def test_kernels_equal_the_reference(part, device):
    """Every format, axis, layout and mode that the kernels take; inputs amid NaN, outputs between guards."""
    names = [*FORMATS, "user"][part::8]
    rows = lines("tests.kernels.blocks_cases", device.type, *names)
    assert [r for r in rows if "error" in r] == []
    assert rows[-1]["checked"] >= 7 and {"rows", "columns"} <= set(rows[-1]["ran"])


@pytest.mark.slow
def test_instructions_stay_within_their_budget(tmp_path):
    """sm_90, instructions per element as stored: 5 % more fails; half as many says that the budget is out of date."""
    rows = {r["case"]: r for r in lines("tests.kernels.compiled_blocks", "90", TRITON_CACHE_DIR=str(tmp_path))}
    assert set(rows) == set(BUDGET)
    over = {c: (r["instructions_per_element"], BUDGET[c]) for c, r in rows.items()}
    assert {c: n for c, n in over.items() if not n[1] * 0.5 < n[0] <= n[1] * 1.05} == {}
    assert [c for c, r in rows.items() if r["local"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", [n for n in architectures("triton.quantize_blocks") if n != 90])
def test_kernels_compile_with_the_instructions_meant_for_them(capability, tmp_path):
    cases = NATIVE if capability in (89, 103) else (*NATIVE, *LATER)
    rows = lines("tests.kernels.compiled_blocks", str(capability), *cases, TRITON_CACHE_DIR=str(tmp_path))
    made = {r["case"]: set(r["conversions"]) for r in rows}
    assert set(made) == set(cases) and [r for r in rows if r["local"]] == []
    assert all(str(r["target"]).startswith(f"sm_{capability}") for r in rows)
    assert ("cvt.rn.satfinite.e2m1x2.f32" in made["rows nvfp4"]) == (capability >= 100)
    assert ("cvt.rn.satfinite.e2m1x2.f32" in made["rows mxfp4"]) == (capability >= 100)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in made["rows mxfp8"]) == (capability >= 89)
    assert "fma.rn.bf16x2" in made["rows mxfp6"]


def test_the_table_of_kernels_is_complete():
    """Every Triton kernel has its line, those that only put others together apart."""
    composed = {
        "triton.quantize_turned",
        "triton.quantize_twice",
        "triton.quantize_then_align",
        "triton.silu_mul_then_quantize",
        "triton.rms_norm_then_quantize",
    }
    assert set(COVERAGE) == {k.name for k in dispatch.kernels() if k.backend == "triton"} - composed


@pytest.mark.parametrize("fmt", FORMATS)
def test_dense_bf16_is_theirs(fmt):
    """The dispatcher gives them what they were made for, and the rest to the generic kernel."""
    spec = ms.find_quantizer(fmt).for_row(128)

    def chosen(shape, order="rows", dtype="bfloat16", layout="strided"):
        operand = dispatch.Operand(shape, dtype, order=order)
        problem = dispatch.Problem("quantize", (operand,), "cuda", (9, 0), spec, None, layout)
        return dispatch.explain_problem(problem).chosen

    octets = spec.format.element.width == 8 and spec.format.element.kind == "float"
    assert chosen((256, 1024)) == ("triton.quantize" if octets else "triton.quantize_blocks")
    assert chosen((256, 1024), layout="swizzle_32_4_4") == "triton.quantize_blocks"
    down = blocks_fit.down_fits(spec) and spec.format.element.width != 6
    turned = "triton.quantize_turned" if spec.format.element.width == 6 else "triton.quantize"
    assert chosen((256, 1024), "columns") == ("triton.quantize_columns" if down else turned)
    for shape, order, dtype in (
        ((3, 100), "rows", "bfloat16"),
        ((256, 1024), "rows", "float32"),
        ((256, 1024), "strided", "bfloat16"),
    ):
        assert chosen(shape, order, dtype) == "triton.quantize"


def test_problems_of_one_shape_class_are_treated_alike():
    """Selections are cached by class: a requirement must not tell 1.1 from 2.4 thousand million elements within one."""
    spec = ms.find_quantizer("mxfp4")
    problems = [
        dispatch.Problem("quantize", (dispatch.Operand(shape, "bfloat16"),), "cuda", (9, 0), spec)
        for shape in ((32 * 1025, 32 * 1025), (32 * 1255, 32 * 1875))
    ]
    assert problems[0].key() == problems[1].key()
    assert [dispatch.explain_problem(p).chosen for p in problems] == ["triton.quantize"] * 2
    whole = dispatch.Problem("quantize", (dispatch.Operand((2**15, 2**15), "bfloat16"),), "cuda", (9, 0), spec)
    assert dispatch.explain_problem(whole).chosen == "triton.quantize_blocks"


def test_which_elements_have_lines():
    """The encoder by lines takes the elements for which it is exact, and no others."""
    good = {"e2m1", "e2m3", "e3m2", "int4", "mxint4"}
    assert {name for name in ms.list_elements() if ptx.has_lines(ms.find_element(name))} == good
    for other in ({"exponent": 3, "mantissa": 0}, {"exponent": 2, "mantissa": 1, "bias": -118}):
        assert not ptx.has_lines(ms.find_element(other))


def e2m1(x):
    """Codes of |x| in FP64 by the lines of ptx.py, each rounded half to even, and the same by the library's encoder."""
    lines_ = torch.stack([(x * slope).round() + offset for slope, offset in ((2.0, 0), (1.0, 2), (0.5, 4))])
    return lines_.amin(0).clamp(max=7).to(torch.uint8), ms.encode(x.float(), "e2m1")


def test_lines_are_the_codes():
    """All bf16 below 64: the smallest rounded line is the code."""
    x = torch.arange(0x4280, dtype=torch.int16).view(torch.bfloat16).double()
    ours, wanted = e2m1(x)
    assert torch.equal(ours, wanted)
