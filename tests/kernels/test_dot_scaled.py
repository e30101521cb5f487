"""`tl.dot_scaled` where cuBLAS has no name for a pair: interpreted but for the MMA, compiled for Blackwell, not run."""

import itertools

import pytest

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.dispatch import Operand, Problem
from microscale.kernels.triton import dot_scaled
from tests.kernels.dot_scaled_cases import MX, NV, PAIRS
from tests.kernels.processes import lines

KERNEL, FORMATS = "triton.dot_scaled", ms.list_formats()
BLOCK_SCALED = {100: "tcgen05.mma", 103: "tcgen05.mma", 120: "mma.sync"}


def problem(a, b, capability=(10, 0), m=128, n=250, k=512, out="bfloat16", **changes):
    def operand(fmt, shape, axis):
        outer = None if fmt.outer_scale is None else "scalar" if fmt.outer_scale.per == "tensor" else "vector"
        return Operand(shape, "uint8", fmt, axis, **{"outer": outer, **changes})

    operands = (operand(ms.find_format(a), (m, k), -1), operand(ms.find_format(b), (k, n), -2))
    return Problem("matmul", operands, "cuda", capability, None, out)


def refusal(p):
    return next(k for k in dispatch.kernels("matmul") if k.name == KERNEL).requires.refusal(p)


def test_which_pairs_it_takes():
    nv = (*NV, "nvfp4_4over6")
    taken = {pair for pair in itertools.product(FORMATS, FORMATS) if refusal(problem(*pair)) is None}
    assert taken == {*itertools.product(MX, MX), *itertools.product(nv, nv)}
    assert "K in multiples" in refusal(problem("mxfp4", "mxfp4", k=528)) and "10.0" in refusal(
        problem("mxfp4", "mxfp8", (9, 0))
    )
    assert "layout" in refusal(problem("mxfp4", "mxfp4", layout="fragments"))
    assert "outer" in refusal(problem("nvfp4", "nvfp4", outer="mixed"))


def test_cublas_comes_first_where_it_can():
    def chosen(*args, **kwargs):
        return dispatch.select(problem(*args, **kwargs)).name

    assert chosen("mxfp8", "mxfp8", n=256) == "cublas.scaled_mm"
    assert chosen("mxfp8", "mxfp8") == KERNEL  # N is no multiple of 16
    for capability in ((10, 0), (10, 3), (12, 0)):
        assert chosen("mxfp8", "mxfp4", capability, n=256) == KERNEL
        assert chosen("nvfp4_row", "nvfp4", capability, n=256) == KERNEL
        assert chosen("nvfp4", "nvfp4", capability, n=256, out="float32") == KERNEL
    assert chosen("mxfp4", "mxfp4", (12, 0), n=256) == KERNEL


def test_constants_are_shared():
    """`launch` knows constants by their identity."""
    a, b = ms.find_format("mxfp8"), ms.find_format("mxfp4")
    assert dot_scaled.constants_of(a, b, (True, False), (0, 0), True) is dot_scaled.constants_of(
        a, b, (True, False), (0, 0), True
    )


def test_interpreted_within_fp32_sums_and_one_rounding():
    """Layouts, outer scales of tensors and rows, biases of every shape, NaN, sizes that fill no tile."""
    rows = lines("tests.kernels.dot_scaled_cases", "cpu")
    assert [r for r in rows if "error" in r] == []
    assert rows[-1] == {"checked": 3 * len(PAIRS)}


@pytest.mark.gpu
def test_on_a_gpu():
    """The MMA instructions themselves; this has not run yet."""
    import torch

    if torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs sm_100 or later")
    assert [r for r in lines("tests.kernels.dot_scaled_cases", "cuda") if "error" in r] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", BLOCK_SCALED)
def test_compiles_to_block_scaled_instructions(capability, tmp_path):
    """Except where E4M3 or E5M2 meets E2M1 on sm_120: Triton decodes those to bfloat16, which is exact."""
    rows = lines("tests.kernels.compiled_dot_scaled", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert len(rows) == 22
    for r in rows:
        mixed = len({ms.find_format(f).element.width for f in r["pair"]}) == 2
        assert len(r["mma"]) == 1, r
        name = r["mma"][0]
        assert name.startswith(BLOCK_SCALED[capability])
        if mixed and capability == 120:
            assert "bf16.bf16.f32" in name and "block_scale" not in name, r
        else:
            vector = "4X" if r["pair"][0] in NV else "1X" if mixed or "mxfp4" not in r["pair"] else "2X"
            assert f"block_scale.scale_vec::{vector}" in name, r
