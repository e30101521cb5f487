"""`F.linear` of a quantized weight past torch's dispatcher: who must see it does, and what a weight keeps is true."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.nn.layers import to_quantized_
from microscale.ops import compute, direct
from microscale.testing import assert_same_bits, assert_same_quantized

FORMATS = ("mxfp8", "nvfp4", "nvfp4_row", "fp8_row", "nf4")


@pytest.fixture
def kept(monkeypatch):
    """How often a weight's transposed parts were made."""
    made, keep = [], compute._keep_turned
    monkeypatch.setattr(compute, "_keep_turned", lambda *args: made.append(1) or keep(*args))
    return made


@pytest.fixture
def through_torch(monkeypatch):
    """The products and ops that went through torch's dispatcher."""
    seen, dispatch = [], ms.BlockScaledTensor.__torch_dispatch__.__func__

    def noted(cls, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return dispatch(cls, func, types, args, kwargs)

    monkeypatch.setattr(ms.BlockScaledTensor, "__torch_dispatch__", classmethod(noted))
    return seen


def weight(fmt="nvfp4", seed=0):
    return ms.quantize(torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)), fmt)


def layer(fmt="nvfp4", inputs=None):
    made = nn.Linear(64, 48).requires_grad_(False)
    to_quantized_(made, ms.quantize(made.weight, fmt), inputs)
    return made


def right(q, x):
    """What F.linear gives for the same parts in new objects, which keep nothing."""
    parts = [None if t is None else t.clone() for t in (q.qdata, q.scale, q.outer_scale)]
    return functional.linear(x, ms.BlockScaledTensor(*parts, q.meta, q.shape, q.dtype))


X = torch.randn(3, 64)


# -- what a weight keeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_parts_are_transposed_once(fmt, kept):
    q = weight(fmt)
    first = functional.linear(X, q)
    for call in (lambda: functional.linear(X, q), lambda: ms.linear(X, q), lambda: ms.linear(X[None], q)[0]):
        assert_same_bits(call(), first)
    with torch.inference_mode():
        assert_same_bits(functional.linear(X, q), first)
    assert len(kept) == 1
    assert_same_bits(first, ms.matmul(X, q.t()))


@pytest.mark.parametrize("part", ["qdata", "scale", "outer_scale"])
@pytest.mark.parametrize("how", ["assigned", "data", "set_", "swapped", "written"])
def test_a_changed_part_is_seen(part, how, kept):
    q, other = weight(seed=1), weight(seed=2)
    before = functional.linear(X, q)
    mine, new = getattr(q, part), getattr(other, part).clone()
    if how == "assigned":
        setattr(q, part, new)
    elif how == "data":
        mine.data = new
    elif how == "set_":
        mine.set_(new)
    elif how == "swapped":
        torch.utils.swap_tensors(mine, new)
    else:
        mine.copy_(new)
    after = functional.linear(X, q)
    assert not torch.equal(before, after)
    assert_same_bits(after, right(q, X))
    assert sum(kept) - 1 == (1 if how == "written" else 2)  # `right` keeps its own
    assert_same_bits(ms.linear(X, q), after)


def test_memory_given_back_and_taken_again_is_seen():
    """A part's storage is freed and another takes its place: no view of the old one is read."""
    q, other = weight(seed=1), weight(seed=2)
    functional.linear(X, q)
    q.qdata.untyped_storage().resize_(0)
    q.qdata.data = other.qdata
    assert_same_bits(functional.linear(X, q), right(q, X))


def test_a_weight_laid_out_anew_is_seen(kept):
    q, swizzled = weight("mxfp8"), weight("mxfp8").to_layout("swizzle_32_4_4")
    first = functional.linear(X, q)
    q.scale, q.meta = swizzled.scale, swizzled.meta
    assert_same_bits(functional.linear(X, q), first)
    assert len(kept) == 2


def test_moves_and_swaps_of_a_module_are_seen():
    module, x = layer("mxfp8"), X.bfloat16()
    module(X)
    module.to(torch.bfloat16)
    assert module.weight._turned is None or module.weight._turned[3] is module.weight.meta
    assert_same_bits(module(x), functional.linear(x, module.weight, module.bias))
    one, two = weight(seed=1), weight(seed=2)
    first, second = functional.linear(X, one), functional.linear(X, two)
    torch.utils.swap_tensors(one, two)
    assert_same_bits(functional.linear(X, one), second)
    assert_same_bits(functional.linear(X, two), first)
    one.copy_(two)
    assert_same_bits(functional.linear(X, one), first)


def test_nothing_kept_is_copied_or_saved():
    q = weight()
    before = len(pickle.dumps(q))
    functional.linear(X, q)
    assert q._turned is not None and len(pickle.dumps(q)) == before
    file = io.BytesIO()
    torch.save({"w": q}, file)
    file.seek(0)
    others = (
        copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(file, weights_only=True)["w"],
        q.clone(), q.detach(), q.t().t(), nn.Parameter(q, requires_grad=False), q.as_dtype(torch.bfloat16),
    )  # fmt: skip
    for made in others:
        assert made._turned is None
        assert_same_quantized(made.as_dtype(torch.float32), q)
    assert q.__tensor_flatten__()[0] == ["qdata", "scale", "outer_scale"]


def test_nothing_kept_outlives_the_weight():
    q = weight()
    functional.linear(X, q)
    refs = [weakref.ref(t) for t in (q, q.qdata, q.scale, q.outer_scale, q._turned[8].qdata)]
    gc.disable()
    try:
        del q
        assert [r() for r in refs] == [None] * 5  # at once: no cycles
    finally:
        gc.enable()


def test_made_in_inference_mode_used_in_training():
    q = weight()
    with torch.inference_mode():
        first = functional.linear(X, q)
    x = X.clone().requires_grad_()
    y = functional.linear(x, q)
    y.sum().backward()
    assert_same_bits(y.detach(), first)
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
    assert_same_bits(functional.linear(X, q), first)


def test_meta_tensors_keep_nothing():
    q, x = weight().to("meta"), X.to("meta")
    with dispatch.stand_in("matmul", lambda a, b, *args: b):
        parts = [functional.linear(x, q) for _ in range(3)]
    assert q._turned is None and [p.qdata.shape for p in parts] == [(32, 48)] * 3


# -- who must see the function -----------------------------------------------------------------------------------------


def test_it_takes_no_way_through_torch(through_torch):
    q, bias = weight(), torch.randn(48)
    for x in (X, X[None], X[:0]):
        for call in (
            lambda x: functional.linear(x, q),
            lambda x: functional.linear(x, q, bias),
            lambda x: functional.linear(x, weight=q, bias=bias),
            lambda x: functional.linear(input=x, weight=q),
        ):
            assert call(x).shape == (*x.shape[:-1], 48)
    assert through_torch == []
    functional.linear(X[0], q)
    assert through_torch


def test_autograd_in_both_directions(through_torch):
    q, module = weight(), layer()
    x = X.clone().requires_grad_()
    assert functional.linear(x, q).grad_fn is not None and module(x).grad_fn is not None
    assert functional.linear(X, q, torch.zeros(48, requires_grad=True)).grad_fn is not None
    assert functional.linear(X, weight().requires_grad_()).grad_fn is not None
    with torch.no_grad():
        assert functional.linear(x, q).grad_fn is None
    for call, w in ((lambda t: functional.linear(t, q), q), (module, module.weight)):
        through_torch.clear()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
        assert through_torch
        torch.testing.assert_close(tangent, w.dequantize().sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)
    got = torch.func.vmap(lambda t: functional.linear(t, q))(X[:, None])
    torch.testing.assert_close(got[:, 0], functional.linear(X, q), rtol=1e-5, atol=1e-5)


def test_autocast():
    q = weight("mxfp8").as_dtype(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(functional.linear(X, q), functional.linear(X.bfloat16(), q))


def test_a_profiler_sees_it():
    q = weight()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.linear(X, q)
    assert "aten::linear" in {event.name for event in profile.events()}


def test_errors_are_torchs():
    q = weight()
    for bad in ((None, q), (X, q, 3.0), (X,), (X, q, None, None)):
        with pytest.raises(TypeError):
            functional.linear(*bad)
    with pytest.raises(TypeError):
        functional.linear(X, q, scale=1)
    with pytest.raises(InputError, match=r"cannot multiply \[3, 32\] by \[64, 48\]"):
        functional.linear(X[:, :32], q)
    with pytest.raises(InputError, match=r"bfloat16 and torch\.float32"):
        functional.linear(X.bfloat16(), q)


class Plain(torch.Tensor):
    pass


class Deaf(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


class Answers(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "answered" if all(issubclass(kind, cls) for kind in types) else NotImplemented


@pytest.mark.parametrize("first", [True, False])
def test_other_subclasses_have_their_say(first):
    """As before there was a `__torch_function__`: those who know nothing of this class are asked, and heard."""
    q = ms.quantize(torch.randn(64, 64), "nvfp4")

    def product(x):
        return torch.mm(x, q) if first else torch.mm(q, x)

    square = torch.randn(64, 64)
    got = product(square.as_subclass(Plain))
    assert type(got) is Plain
    assert_same_bits(got.as_subclass(torch.Tensor), product(square))
    assert product(square.as_subclass(Answers)) == "answered"
    with pytest.raises(TypeError):
        product(square.as_subclass(Deaf))
    assert type(functional.linear(square.as_subclass(Plain), q)) is Plain
    assert functional.linear(square, q, torch.randn(64).as_subclass(Answers)) == "answered"


# -- modules -----------------------------------------------------------------------------------------------------------


def test_parameters_may_be_anywhere():
    module = layer()
    expected = module(X)
    plain = {"weight": weight(seed=5), "bias": torch.randn(48)}
    got = torch.func.functional_call(module, plain, (X,))
    assert_same_bits(got, functional.linear(X, plain["weight"], plain["bias"]))
    bias = module.bias.detach().clone()
    del module.bias
    module.bias = bias + 1  # an attribute, as FSDP and weight normalisation leave them
    torch.testing.assert_close(module(X), expected + 1)
    other = layer()
    first = other(X)
    nn.utils.parametrize.register_parametrization(other, "bias", Twice())
    torch.testing.assert_close(other(X), first + other.parametrizations.bias.original)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4"])
def test_quantized_inputs_take_the_short_way_too(fmt, through_torch, kept):
    module = layer("mxfp8", ms.find_quantizer(fmt))
    with torch.no_grad():
        for x in (X, X[None], X[:0]):
            through_torch.clear()
            got = module(x)
            assert through_torch == []
            quantized = ms.quantize(x, fmt)
            assert_same_bits(got, ms.matmul(quantized, module.weight.transpose(-1, -2), module.bias, x.dtype))
        assert len(kept) == 1
        row = ms.matmul(ms.quantize(X[:1], fmt), module.weight.t(), module.bias)
        torch.testing.assert_close(module(X[0]), row[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match=r"cannot multiply \[3, 32\] by \[64, 48\]"):
            module(X[:, :32])
        with pytest.raises(InputError, match=r"bfloat16 and torch\.float32"):
            module(X.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert module(X).dtype == torch.bfloat16
    x = X.clone().requires_grad_()
    assert module(x).grad_fn is not None


def test_compiled_after_eager():
    """What a weight keeps changes no graph and no guard."""
    torch.compiler.reset()
    module, quantized = layer(), layer("mxfp8", ms.find_quantizer("mxfp8"))
    expected = module(X), quantized(X)
    both = torch.compile(lambda x: (module(x), quantized(x)), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(both(X), expected, rtol=1e-5, atol=1e-5)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        module(X), quantized(X)
        torch.testing.assert_close(both(X), expected, rtol=1e-5, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_an_unknown_torch_always_takes_the_long_way(monkeypatch, through_torch):
    monkeypatch.setattr(direct, "_autocast", lambda: True)
    functional.linear(X, weight())
    assert through_torch


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True])
def test_on_a_gpu(prepared):
    """What is kept is seen to be stale, and a first call inside of a graph's capture keeps nothing of the graph."""
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    one, two = (ms.quantize(torch.randn(128, 256, device="cuda", dtype=torch.bfloat16), "mxfp4") for _ in range(2))
    one, two = (ms.prepare(q) if prepared else q for q in (one, two))
    first, second = functional.linear(x, one.clone()), functional.linear(x, two.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = functional.linear(x, one)
    assert_same_bits(functional.linear(x, one), first)
    graph.replay()
    assert_same_bits(captured, first)
    del graph, captured
    one.qdata.data, one.scale.data = two.qdata.clone(), two.scale.clone()
    assert_same_bits(functional.linear(x, one), second)
    one.cpu()
    assert_same_bits(functional.linear(x, one), second)
    assert one._turned is not None


def test_a_weight_that_a_class_gives_counts():
    """As wrappers have it that gather a weight: a property, while the parameter is still there."""
    model = torch.nn.Linear(64, 32, bias=False)
    ms.quantize_(model, "mxfp8_weight_only")
    x, kept = torch.randn(2, 64), model.weight
    plain = model(x)
    other = type("Gathered", (type(model),), {"weight": property(lambda self: kept.dequantize() * 2)})
    model.__class__ = other
    torch.testing.assert_close(model(x), 2 * plain)


def test_what_torch_says_of_other_arguments():
    """An argument that F.linear has not, layouts that nothing multiplies, and a tracer before dispatch: as ever."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q = ms.quantize(torch.randn(32, 64), "mxfp8")
    x = torch.randn(2, 64)
    with pytest.raises((TypeError, ms.MicroscaleError)) as caught:
        torch.nn.functional.linear(x, q, out=torch.empty(2, 32))
    assert "short_linear" not in str(caught.value)
    with pytest.raises((ms.MicroscaleError, NotImplementedError, RuntimeError)):
        make_fx(lambda a: torch.nn.functional.linear(a, q), pre_dispatch=True)(x)
