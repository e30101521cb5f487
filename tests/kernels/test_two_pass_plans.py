"""Which dense products go to cuBLAS in two passes, and how they are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import microscale as ms
from microscale import dispatch
from microscale.dispatch import Operand, Problem
from microscale.kernels.cublas import exact, two_pass

FORMATS = ms.list_formats()
EXACT = [f for f in FORMATS if exact.significant_bits(ms.find_format(f)) <= 8]

# -- who takes what ----------------------------------------------------------------------------------------------------


def chosen(a, b, capability=(9, 0), bias=None):
    problem = Problem("matmul", (a, b), "cuda", capability, None, "bfloat16")
    return dispatch.explain_problem(problem)


def weight(fmt, outer=None, layout="strided", axis=-2):
    spec = ms.find_format(fmt)
    outer = outer or (None if spec.outer_scale is None else "scalar" if spec.outer_scale.per == "tensor" else "vector")
    return Operand((4096, 14336), "uint8", spec, axis, layout, outer)


@pytest.mark.parametrize("fmt", FORMATS)
def test_kernels_for_every_format(fmt):
    x = Operand((4096, 4096), "bfloat16")
    names = {True: "cublas.two_pass", False: "cublas.split_two_pass"}
    for layout in ("strided", "swizzle_32_4_4"):
        on_ampere, on_hopper = (chosen(x, weight(fmt, layout=layout), c).chosen for c in ((8, 0), (9, 0)))
        assert on_ampere == names[fmt in EXACT]
        assert on_hopper == (on_ampere if fmt in EXACT or fmt == "fp8_row" else "triton.wgmma")
    half = chosen(Operand((4096, 4096), "float16"), weight(fmt)).chosen
    assert half == names[exact.fits_float16(ms.find_format(fmt))]
    assert chosen(Operand((4096, 4096), "float32"), weight(fmt)).chosen == names[False]
    if ms.find_format(fmt).outer_scale is not None:
        assert chosen(x, weight(fmt, "mixed")).chosen == names[False]
    old = {r.kernel: r.reason for r in chosen(x, weight(fmt), (7, 5)).refused}
    assert "8.0" in old["cublas.two_pass"]


def test_exact_formats():
    assert set(EXACT) == set(FORMATS) - {"nf4", "fp8_block128", "fp8_row"}
    assert exact.fits_float16(ms.find_format("nvfp4")) and not exact.fits_float16(ms.find_format("mxfp4"))


def test_refusals():
    x = Operand((3, 64, 64), "bfloat16")
    stack = Operand((3, 64, 64), "uint8", ms.find_format("mxfp8"), -3)
    explained = chosen(x, stack)
    assert {r.reason for r in explained.refused} >= {"needs blocks along rows or columns of matrices"}
    odd = ms.find_format("nvfp4").variant(
        scale={"exponent": 4, "mantissa": 3, "nan": "all_ones", "sign": False, "subnormals": False}
    )
    explained = chosen(Operand((64, 64), "bfloat16"), Operand((64, 64), "uint8", odd, -2, "strided", "scalar"))
    assert "needs formats that triton.dequantize takes" in {r.reason for r in explained.refused}


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40000), st.integers(1, 40000)),
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)),
    st.tuples(st.sampled_from([1, 16, 32, 128, 4096]), st.sampled_from([1, 16, 32, 128, 4096])),
    st.sampled_from([0, 4]),
)
def test_plans(shape, row_bytes, steps, sum_bytes):
    space = 1 << 26
    plan = two_pass.plan_of(shape, row_bytes, steps, sum_bytes, space)
    assert 1 <= plan.matrices <= shape[0]
    assert 1 <= plan.rows <= shape[1] and 1 <= plan.columns <= shape[2]
    assert plan.rows == shape[1] or plan.rows % steps[0] == 0
    assert plan.columns == shape[2] or plan.columns % steps[1] == 0
    smallest = [min(n, s) for n, s in zip(shape[1:], steps, strict=True)]
    if (plan.rows, plan.columns) > tuple(smallest) and plan.rows > smallest[0] and plan.columns > smallest[1]:
        assert plan.matrices * (plan.rows * row_bytes[0] + plan.columns * row_bytes[1]) <= space
        assert plan.matrices * plan.rows * plan.columns * sum_bytes <= space


def test_plans_of_large_layers():
    """Even cuts in whole tiles, the decoded weight once for each."""
    made = two_pass.plan_of((1, 8192, 28672), (0, 2 * 8192), (1, 1), 0, 128 << 20)
    assert made == (1, 8192, 7168, False)
    assert two_pass.plan_of((1, 8192, 8192), (0, 2 * 28672), (1, 128), 0, 128 << 20) == (1, 8192, 2048, False)
    both = two_pass.plan_of((1, 8192, 28672), (2 * 8192, 2 * 8192), (1, 1), 0, 128 << 20)
    assert both.rows * 2 * 8192 <= 64 << 20 and both.columns * 2 * 8192 <= 64 << 20 and both.rows_outside


def test_the_workspace_follows_the_device(monkeypatch):
    """A 64th of its memory, between the bounds; on an H200 4096 rows of 28672 stay while b passes once."""
    cpu = torch.device("cpu")
    for memory, space in ((4 << 30, 128 << 20), (16 << 30, 256 << 20), (141 << 30, 512 << 20)):
        monkeypatch.setattr(two_pass, "_memory", lambda device, memory=memory: memory)
        assert two_pass.workspace(cpu) == space
    plan = two_pass.plan_of((1, 4096, 8192), (2 * 28672, 2 * 28672), (1, 1), 0, two_pass.workspace(cpu))
    assert plan.rows == 4096 and plan.columns == 4096
