"""`explain` asks the dispatcher about exactly the problem that the library would build from tensors."""

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.dispatch import Requires

OPS = {"quantize": "48x64", "dequantize": "48x64", "matmul": "8x64x48", "grouped_matmul": "3x8x64x48"}


@pytest.fixture
def asked(monkeypatch):
    """The problems that explain was asked about."""
    problems = []
    real = dispatch.explain_problem

    def spy(problem):
        problems.append(problem)
        return real(problem)

    monkeypatch.setattr(dispatch, "explain_problem", spy)
    return problems


@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
@pytest.mark.parametrize("format", ms.list_formats())
def test_the_problem_is_that_of_the_library(run, asked, format, layout):
    x, w = torch.zeros(8, 64, dtype=torch.bfloat16), torch.ones(48, 64, dtype=torch.bfloat16)
    q, experts = (
        ms.quantize(w, format, layout=layout),
        ms.quantize(torch.ones(3, 48, 64).bfloat16(), format, layout=layout),
    )
    ms.explain("quantize", w, format, layout=layout)
    ms.explain("dequantize", q)
    ms.explain("matmul", x, q)
    for op in ("quantize", "dequantize", "matmul"):
        run("explain", op, "-f", format, "--shape", OPS[op], "--layout", layout)
    ms.explain("grouped_matmul", x, experts)
    run("explain", "grouped_matmul", "-f", format, "--shape", OPS["grouped_matmul"], "--layout", layout)
    library, cli = [*asked[:3], asked[6]], [*asked[3:6], asked[7]]
    for ours, theirs in zip(cli, library, strict=True):
        assert ours.key() == theirs.key()
        assert str(ours) == str(theirs)


def test_both_operands_quantized(run, asked):
    x, w = ms.quantize(torch.ones(8, 64), "mxfp8"), ms.quantize(torch.ones(48, 64), "mxfp4")
    ms.explain("matmul", x, w)
    run("explain", "matmul", "-f", "mxfp4", "--input-format", "mxfp8", "--shape", "8x64x48", "--dtype", "fp32")
    assert asked[0].key() == asked[1].key()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_an_answer(run, run_json, op):
    data = run_json("explain", op, "--format", "nvfp4")
    assert data["chosen"] == f"reference.{op}"
    assert run("explain", op, "--format", "nvfp4").stdout.startswith(f"{op}(")


@pytest.fixture
def demanding(monkeypatch):
    """Two kernels beside the reference: one needs a newer GPU, one a package that does not exist."""
    reference = [k for k in dispatch.kernels("matmul") if k.backend == "reference"]
    monkeypatch.setattr(dispatch, "_kernels", {**dispatch._kernels, "matmul": reference})
    monkeypatch.setattr(dispatch, "_cache", {})
    for name, requires in {
        "fast.matmul_new": Requires(devices=("cuda",), min_capability=(10, 0)),
        "fast.matmul_lib": Requires(devices=("cuda",), packages=("no_such_package",)),
    }.items():
        dispatch.kernel("matmul", name, requires=requires, priority=9)(lambda *_: None)


def test_every_refusal_has_its_reason(run, demanding):
    text = run("explain", "matmul", "-f", "mxfp4").stdout
    assert "fast.matmul_new   refused: needs a cuda device, not cpu" in text
    assert "reference.matmul  runs" in text


def test_a_gpu_that_is_not_here(run_json, demanding):
    asked = ("explain", "matmul", "-f", "mxfp4", "--device", "cuda", "--capability")
    reasons = {r["kernel"]: r["reason"] for r in run_json(*asked, "9.0")["refused"]}
    assert reasons["fast.matmul_new"] == "needs compute capability 10.0, the device is 9.0"
    assert reasons["fast.matmul_lib"] == "needs the package no_such_package, which is not installed"
    assert run_json(*asked, "10.0")["chosen"] == "fast.matmul_new"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not here")
def test_a_gpu_without_saying_which(run):
    assert "--capability 9.0" in run("explain", "matmul", "-f", "mxfp4", "--device", "cuda", code=2).stderr


def test_strict_and_backend(run, run_json, demanding):
    asked = ("explain", "matmul", "-f", "mxfp4", "--device", "cuda", "--capability", "9.0")
    assert run_json(*asked)["fallback"] is True
    data = run_json(*asked, "--strict")
    assert data["chosen"] is None
    assert "strict() is in force" in str(data["refused"])
    assert "use_backend('reference') is in force" in run(*asked, "--backend", "reference").stdout
