"""Triton's producers: bit for bit the reference, by the kernel meant for each call, in few instructions."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.ops.producers import problem
from tests.kernels.processes import architectures, fast, lines

FORMATS = ms.list_formats()
FUSED = {"silu_mul_quantize", "rms_norm_quantize"}


@pytest.mark.parametrize(
    "cases", fast([FORMATS[::3], FORMATS[1::3], FORMATS[2::3], ["user"], ["shapes"], ["values"]], 0, 4, 5)
)
def test_producers_equal_the_reference(cases, device):
    """Formats x rounding x layout x outer scale x weight; shapes, strides, dtypes; SiLU of every bf16."""
    rows = lines("tests.kernels.producers_cases", device.type, *cases)
    assert [r for r in rows if "error" in r] == []
    ran = rows[-1]["ran"]
    if cases != ["values"]:
        assert set(ran) == FUSED | {f"{name.removesuffix('_quantize')}_then_quantize" for name in FUSED}


def chosen(op, fmt, shape=(64, 8192), given=False, dtype=torch.bfloat16, capability=(9, 0), order="rows", **changes):
    """The kernel that runs an op on a GPU that need not be here."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    operands = (x, x) if op == "silu_mul_quantize" else (x,)
    spec = ms.find_quantizer(fmt, **changes).for_row(128)
    described = problem(op, operands, spec, given, "strided")
    rows = tuple(dataclasses.replace(o, order=order) for o in described.operands)
    described = dataclasses.replace(described, operands=rows, device="cuda", capability=capability)
    return dispatch.explain_problem(described).chosen


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", sorted(FUSED))
def test_the_fused_kernels_take_every_format_where_the_outer_scale_is_known(op, fmt):
    for shape in ((64, 8192), (1, 256), (3, 5, 28672)):
        assert chosen(op, fmt, shape, given=True) == f"triton.{op}"
    assert chosen(op, fmt, given=True, rounding=None if fmt == "nf4" else "stochastic") == f"triton.{op}"


def test_the_long_way_is_taken_for_the_rest():
    silu, rms = "silu_mul_quantize", "rms_norm_quantize"
    assert chosen(silu, "nvfp4") == "triton.silu_mul_then_quantize"
    assert chosen(rms, "nvfp4") == "triton.rms_norm_quantize"
    assert chosen(rms, "nvfp4_row") == "triton.rms_norm_then_quantize"
    for op in (silu, rms):
        long = f"triton.{op.removesuffix('_quantize')}_then_quantize"
        assert chosen(op, "mxfp8", (4, 8190)) == long
        assert chosen(op, "mxfp8", dtype=torch.float32) == long
        assert chosen(op, "mxfp8", order="columns") == long
        assert chosen(op, "mxfp8", capability=(7, 5)) == long
        assert chosen(op, "nvfp4_1level", hadamard=16) == long
        assert chosen(op, "mxfp8", (64, 64), scale_tile=(32, 32)) == long
    assert chosen(rms, "mxfp8", (4, 131072)) == "triton.rms_norm_then_quantize"
    assert chosen(silu, "mxfp8", (4, 131072)) == "triton.silu_mul_quantize"


def test_no_gpu_falls_to_the_reference():
    """The kernels that take everything do so under strict() too."""
    for op in FUSED:
        with dispatch.strict():
            for fmt in FORMATS:
                assert str(chosen(op, fmt, (3, 100), dtype=torch.float16)).startswith("triton.")


@pytest.mark.slow
@pytest.mark.parametrize("capability", architectures("triton.silu_mul_quantize"))
def test_producers_compile(capability, tmp_path):
    """No local memory; no multiply-add, and no approximation, that is not written; on sm_90 within budget."""
    rows = lines("tests.kernels.compiled_producers", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert all(str(r["target"]).startswith(f"sm_{capability}") for r in rows)
    assert [r for r in rows if r["local"]] == []
    assert {str(r["approximate"]) for r in rows} <= {"[]", "['rcp.approx.ftz.f32']"}
    assert {r["fused"] for r in rows if r["kernel"] == "silu_mul_rows"} == {11 * 16}
    silu = {r["format"]: r for r in rows if r["kernel"] == "silu_mul_quantize_runs" and r["flat"]}
    rms = {r["format"]: r for r in rows if r["kernel"] == "rms_norm_quantize_runs" and r["columns"] == 8192}
    assert silu["mxfp8"]["fused"] == 11 * 32
    assert rms["mxfp8"]["fused"] == (64 if capability < 100 else 32)  # there by pairs
    if capability == 90:  # SASS instructions an element, that of the branches for rare divisors included
        for fmt, silu_budget, rms_budget in (("mxfp8", 28.3, 16.2), ("mxfp4", 30.2, 17.8), ("nvfp4", 38.4, 24.7)):
            assert silu[fmt]["per_element"] < 1.05 * silu_budget, fmt
            assert rms[fmt]["per_element"] < 1.05 * rms_budget, fmt
            assert not silu[fmt]["shared"]
