"""Selection by requirements and priority, explanations, backends, strict mode."""

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.dispatch import Problem, Requires
from microscale.errors import NoKernelError, UnknownNameError


@pytest.fixture
def registry(monkeypatch):
    """Two made-up kernels beside the reference; everything is undone afterwards."""
    dispatch.kernels()
    monkeypatch.setattr(dispatch, "_kernels", {op: list(rows) for op, rows in dispatch._kernels.items()})
    dispatch._cache.clear()
    marked = {}

    def fast(x, *args):
        marked["ran"] = "fast"
        return reference(x, *args)

    reference = next(k.run for k in dispatch.kernels("quantize") if k.name == "reference.quantize")
    dispatch.kernel("quantize", "made.fast", priority=30, requires=Requires(devices=("cpu",), dtypes=("bfloat16",)))(
        fast
    )
    wide = Requires(devices=("cuda",), min_capability=(10, 0))
    dispatch.kernel("quantize", "made.blackwell", priority=40, requires=wide)(fast)
    yield marked
    dispatch._cache.clear()


def test_priority_and_requirements(registry):
    x = torch.randn(4, 64)
    ms.quantize(x, "mxfp8")
    assert "ran" not in registry
    ms.quantize(x.bfloat16(), "mxfp8")
    assert registry["ran"] == "fast"


def test_explain_gives_every_reason(registry):
    got = ms.explain("quantize", torch.randn(4, 64), "mxfp8")
    assert got.chosen == "reference.quantize" and not got.fallback
    reasons = {r.kernel: r.reason for r in got.refused if r.kernel.startswith("made.")}
    assert reasons == {
        "made.blackwell": "needs a cuda device, not cpu",
        "made.fast": "needs bfloat16, not float32",
    }
    assert "made.fast" in str(got) and "refused: needs bfloat16" in str(got)
    taken = ms.explain("quantize", torch.randn(4, 64).bfloat16(), "mxfp8")
    assert taken.chosen == "made.fast" and taken.passed_over == ("reference.quantize",)


def test_explain_without_data():
    """A problem can be asked about for a device that is not here; the reference there is a fallback, and says so."""
    operand = dispatch.Operand((64, 4096), "bfloat16")
    problem = Problem("quantize", (operand,), "cuda", (9, 0), ms.find_quantizer("nvfp4"))
    got = ms.explain("quantize", problem)
    assert got.chosen is not None
    if got.chosen == "reference.quantize":
        assert got.fallback and "(fallback)" in str(got)
        with dispatch.strict(), pytest.raises(NoKernelError, match="strict"):
            dispatch.select(problem)


def test_use_backend(registry):
    x = torch.randn(4, 64).bfloat16()
    with ms.use_backend("reference"):
        ms.quantize(x, "mxfp8")
        assert "ran" not in registry
    with ms.use_backend("made"), pytest.raises(NoKernelError) as caught:
        ms.quantize(x.float(), "mxfp8")
    assert "reference.quantize" in caught.value.message and "use_backend" in caught.value.message
    assert caught.value.hint == "leave use_backend('made')"
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"), ms.use_backend("referense"):
        pass


def test_strict_on_cpu_allows_the_reference():
    with ms.strict():
        assert ms.quantize(torch.randn(2, 64), "nvfp4").dequantize().shape == (2, 64)


def test_selection_is_cached_by_shape_class(registry):
    dispatch._cache.clear()
    for rows in (33, 40, 48):
        ms.quantize(torch.randn(rows, 64), "mxfp8")
    assert len(dispatch._cache) <= 3
    before = len(dispatch._cache)
    ms.quantize(torch.randn(35, 64), "mxfp8")  # odd, between 33 and 64: the class of 33
    assert len(dispatch._cache) == before


def test_unknown_op():
    with pytest.raises(UnknownNameError, match="unknown op"):
        ms.explain("convolve", torch.randn(2, 32))
