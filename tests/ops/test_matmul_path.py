"""The short way of a product: who must see the op does, autograd and modes are as before, and how much Python runs."""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.nn.layers import to_quantized_
from microscale.ops import compute, library, structure
from microscale.testing import assert_same_bits, assert_same_quantized

FORMATS = ("mxfp8", "nvfp4", "nvfp4_row", "nf4")


class DispatchedOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class CalledFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def through_torch(monkeypatch):
    """The products that went through torch's dispatcher."""
    seen, matmul = [], library.matmul

    def noted(*args):
        if sys._getframe(1).f_code.co_filename == library.__file__:  # from the implementation of torch.ops
            seen.append("matmul")
        return matmul(*args)

    monkeypatch.setattr(library, "matmul", noted)
    return seen


def layer(fmt="nvfp4", bias=True):
    made = torch.nn.Linear(64, 48, bias=bias)
    to_quantized_(made, ms.quantize(made.weight.detach(), fmt))
    return made


# -- the same as the long way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4", "fragments"])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("fmt", FORMATS)
def test_transposed_is_what_structure_gives(fmt, axis, layout):
    if layout == "fragments" and (axis == 0 or fmt in ("nf4", "nvfp4_row")):
        pytest.skip("has no such layout")
    q = ms.quantize(torch.randn(64, 128).bfloat16(), fmt, axis=axis).to_layout(layout)
    got, want = compute.transposed(q), structure.transpose(q, 0, 1)
    assert got.meta == want.meta and got.shape == want.shape and got.stride() == want.stride()
    assert_same_quantized(got, want)
    assert_same_bits(q.t().dequantize(), q.dequantize().t())
    assert got.t().qdata.data_ptr() == q.qdata.data_ptr() and q.t().t().meta == q.meta


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_door_gives_the_same(fmt, through_torch):
    q, bias = ms.quantize(torch.randn(48, 64), fmt), torch.randn(48)
    for x in (torch.randn(64), torch.randn(3, 64), torch.randn(2, 3, 64), torch.randn(0, 64)):
        for b in (None, bias):
            expected = ms.matmul(x, q.t(), b)
            assert_same_bits(torch.nn.functional.linear(x, q, b), expected)
            assert_same_bits(ms.linear(x, q, b), expected)
            with torch.inference_mode():
                assert_same_bits(torch.nn.functional.linear(x, q, b), expected)
                assert_same_bits(ms.linear(x, q, b), expected)
            arguments = (*compute._flat(x if x.dim() > 1 else x[None]), *compute._flat(q.t()), b, torch.float32)
            assert_same_bits(torch.ops.microscale.matmul(*arguments).reshape(expected.shape), expected)
    assert len(through_torch) == 8


def test_quantized_inputs_and_grouped(through_torch):
    q, x = ms.quantize(torch.randn(48, 64), "nvfp4"), ms.quantize(torch.randn(3, 64), "mxfp8")
    expected = x.dequantize() @ q.dequantize().t()
    for got in (ms.linear(x, q), torch.nn.functional.linear(x, q), torch.mm(x, q.t()), x @ q.t()):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    stack = ms.quantize(torch.randn(2, 48, 64), "nvfp4")
    torch.testing.assert_close(
        ms.grouped_matmul(x, stack.mT, ends)[1:], x.dequantize()[1:] @ stack[1].dequantize().t(), rtol=1e-5, atol=1e-5
    )
    assert not through_torch


# -- who must see the op -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [DispatchedOps, CalledFunctions])
def test_modes_see_layers_and_products(mode, through_torch):
    x, q, module = torch.randn(3, 64), ms.quantize(torch.randn(48, 64), "mxfp8"), layer()
    expected = module(x), ms.matmul(x, q.t())
    assert not through_torch
    with mode() as active:
        got = module(x), ms.matmul(x, q.t())
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)
    assert len(through_torch) == 1  # the layer's is seen as torch's own op
    assert any("linear" in name or "addmm" in name for name in active.seen)
    assert any("microscale.matmul" in name for name in active.seen)


def test_a_profiler_sees_the_products(through_torch):
    module, x = layer(), torch.randn(3, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    assert {"aten::linear", "microscale::matmul"} <= {event.name for event in profile.events()}


def test_gradients_are_as_before(through_torch):
    module, q = layer(), ms.quantize(torch.randn(48, 64), "nvfp4")
    module.bias.requires_grad_(True)
    x = torch.randn(3, 64, requires_grad=True)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, module.weight.dequantize().sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, torch.full((48,), 3.0))
    assert not through_torch  # below autograd nothing is between
    with torch.no_grad():
        assert not module(x).requires_grad
    # The function has no gradient of its own: its result carries none, whichever way it took.
    x = x.detach().requires_grad_()
    ms.matmul(x, q.t())
    assert through_torch == ["matmul"]
    assert not ms.matmul(x.detach(), q.t()).requires_grad


def test_autocast_is_as_before():
    module, x = layer("mxfp8"), torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    narrow = module.weight.as_dtype(torch.bfloat16)
    with torch.no_grad():
        want = torch.nn.functional.linear(x.bfloat16(), narrow, module.bias.bfloat16())
    assert_same_bits(got, want)


def test_compiled_layers_and_fake_tensors():
    torch.compiler.reset()
    module, x = layer(), torch.randn(5, 64)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 3, 8):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    with torch._subclasses.FakeTensorMode():
        q = ms.quantize(torch.empty(48, 64), "nvfp4")
        assert ms.linear(torch.empty(2, 3, 64), q).shape == (2, 3, 48)
        assert ms.matmul(torch.empty(3, 64), q.t()).shape == (3, 48)


def test_errors_are_the_same():
    q = ms.quantize(torch.randn(48, 64), "nvfp4")
    for call in (ms.linear, torch.nn.functional.linear):
        with pytest.raises(InputError, match=r"cannot multiply \[3, 32\] by \[64, 48\]"):
            call(torch.randn(3, 32), q)
        with pytest.raises(InputError, match=r"bfloat16 and torch\.float32"):
            call(torch.randn(3, 64).bfloat16(), q)


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_what_a_product_is_selected_by(monkeypatch):
    """Everything that the problem says is among the facts."""
    seen, describe = [], library.product_problem
    monkeypatch.setattr(library, "product_problem", lambda *args: seen.append(describe(*args)) or seen[-1])
    monkeypatch.setattr(dispatch, "_by_facts", {})
    q = ms.quantize(torch.randn(48, 64), "nvfp4")
    row, swizzled = ms.quantize(torch.randn(48, 64), "nvfp4_row"), q.to_layout("swizzle_32_4_4")
    across = ms.quantize(torch.randn(48, 64), "nvfp4", axis=0)
    joined = torch.cat([q[:, :32], ms.quantize(torch.randn(48, 32), "nvfp4")], dim=1)
    x = torch.randn(3, 64)
    for weight in (q, row, swizzled, across, joined) * 2:
        ms.linear(x, weight)
    assert [p.operands[1].outer for p in seen] == ["scalar", "vector", "scalar", "scalar", "mixed"]
    assert [p.operands[1].layout for p in seen] == ["strided"] * 2 + ["swizzle_32_4_4"] + ["strided"] * 2
    assert [p.operands[1].axis for p in seen] == [-2, -2, -2, -1, -2]
    assert all(p.operands[1].shape == (64, 48) and p.bias is None for p in seen)
    ms.linear(x, q, torch.zeros(48))
    ms.linear(x, q, torch.zeros(48).bfloat16())
    assert [p.bias.dtype for p in seen[5:]] == ["float32", "bfloat16"] and seen[5].bias.shape == (48,)
    ms.matmul(x, q.t(), out_dtype=torch.bfloat16)
    assert len(seen) == 8 and seen[-1].out_dtype == "bfloat16"


def test_outer_scales_along_the_blocked_dimension_are_late_only_if_constant():
    per_block, per_row, one = torch.ones(1, 4), torch.ones(3, 1), torch.ones(1, 1)
    assert library.outer_kind(None, -1, -1) is None and library.outer_kind(one, -1, -2) == "scalar"
    assert library.outer_kind(per_row, -1, -1) == "vector" and library.outer_kind(per_row, -1, -2) == "mixed"
    assert library.outer_kind(per_block, -1, -1) == "mixed" and library.outer_kind(per_block, -1, -2) == "mixed"


# -- how much runs -----------------------------------------------------------------------------------------------------


def calls_of(call):
    """How many functions run, in Python and in C."""
    count = 0

    def profiler(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    call()
    call()
    sys.setprofile(profiler)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4"])
def test_calls_around_a_kernel(fmt):
    """A budget that does not depend on the machine and on what else it does. Most calls cost 0.05 to 0.1 us."""
    x, module = torch.randn(1, 64), layer(fmt, bias=False)
    y = module(x)
    with dispatch.stand_in("matmul", lambda *args: y):
        assert calls_of(lambda: module(x)) <= 53
        assert calls_of(lambda: torch.nn.functional.linear(x, module.weight)) <= 48
        turned = module.weight.t()
        assert calls_of(lambda: ms.matmul(x, turned)) <= 58
        assert calls_of(lambda: ms.matmul(x, module.weight.t())) <= 95
