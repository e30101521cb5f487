"""The short way of eager calls: who must see an op does, what is remembered stays true, and how much Python runs."""

import dataclasses
import json
import sys
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import microscale as ms
from microscale import dispatch
from microscale.bench import bench_overhead, overhead
from microscale.cli.app import app
from microscale.dispatch import Requires
from microscale.errors import MicroscaleError, NoKernelError
from microscale.ops import api, direct, library
from microscale.spec import registry
from microscale.testing import assert_same_bits, assert_same_quantized


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


def both(x, fmt="nvfp4"):
    return ms.quantize(x, fmt).dequantize()


# -- who must see the op -----------------------------------------------------------------------------------------------


@pytest.fixture
def through_torch(monkeypatch):
    """The ops that went through torch's dispatcher."""
    seen = []
    implementations = {}
    for name in ("quantize", "dequantize"):
        implementations[name] = getattr(library, name)

        def noted(*args, name=name):
            # The implementation registered with torch.library calls the same function, from library.py.
            if sys._getframe(1).f_code.co_filename == library.__file__:
                seen.append(name)
            return implementations[name](*args)

        monkeypatch.setattr(library, name, noted)
    return seen


def test_plain_tensors_go_the_short_way(through_torch):
    for x in (torch.randn(3, 64), torch.nn.Parameter(torch.randn(3, 64)), torch.randn(64, 3).t()):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            both(x)
        both(x)
    ms.quantize(torch.randn(3, 64), "nvfp4", amax=torch.ones(()), rounding="stochastic", generator=1)
    assert through_torch == []


@pytest.mark.parametrize("mode", [DispatchedOps, CalledFunctions])
def test_modes_see_the_ops(mode, through_torch):
    x = torch.randn(3, 64)
    expected = both(x)
    with mode() as active:
        got = both(x)
    assert through_torch == ["quantize", "dequantize"]
    assert [sum(f"microscale.{name}" in s for s in active.seen) for name in ("quantize", "dequantize")] == [1, 1]
    assert_same_bits(got, expected)


def test_a_profiler_sees_the_ops(through_torch):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        both(torch.randn(3, 64))
    names = {event.name for event in profile.events()}
    assert {"microscale::quantize", "microscale::dequantize"} <= names


def test_a_trace_keeps_the_ops(through_torch):
    x = torch.randn(3, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda t: torch.ops.microscale.quantize(*parts(t))[0], x, check_trace=False)
        ms.quantize(x, "mxfp8")
        assert "microscale::quantize" in str(traced.graph)
    through_torch.clear()
    assert direct.is_direct(x)


def parts(x):
    return x, ms.find_quantizer("mxfp8").key, None, None, None, "strided"


def test_what_must_take_the_long_way():
    x = torch.randn(3, 64)
    assert direct.is_direct(x, None, x)
    complex_ = torch.randn(3, 64, dtype=torch.complex64)
    assert not direct.is_direct(complex_.conj().imag)
    assert not direct.is_direct(x, torch._efficientzerotensor((3,)))
    assert not direct.is_direct(ms.quantize(x, "mxfp8"))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not direct.is_direct(mode.from_tensor(x))
    assert torch.func.vmap(lambda t: t * int(direct.is_direct(t)))(x).abs().sum() == 0
    with torch.device("cpu"):
        assert not direct.is_direct(x)
    assert direct.is_direct(x)


def test_an_unknown_torch_always_takes_the_long_way(monkeypatch):
    monkeypatch.delattr(torch._C, "_len_torch_function_stack")
    assert [f() for f in direct._observers()] == [True] * 6


def test_lazily_negated_input():
    imaginary = torch.randn(3, 64, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    assert_same_quantized(ms.quantize(imaginary, "nvfp4"), ms.quantize(imaginary.clone(), "nvfp4"))


def test_nothing_carries_gradients():
    x, amax = torch.randn(3, 64, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    q = ms.quantize(x, "nvfp4", amax=amax)
    assert not any(t.requires_grad for t in (q, q.qdata, q.scale, q.outer_scale, q.dequantize()))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        got = both(dual)
        assert torch.autograd.forward_ad.unpack_dual(got).tangent is None
    assert_same_bits(got, both(x))


def test_fake_tensors_and_compiled_graphs():
    with torch._subclasses.FakeTensorMode():
        q = ms.quantize(torch.empty(3, 64), "nvfp4", axis=0)
        assert q.shape == (3, 64) and q.dequantize().shape == (3, 64)
    torch.compiler.reset()
    x = torch.randn(5, 96)
    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for rows in (5, 3, 7):
        assert_same_bits(compiled(x[:1].expand(rows, 96).clone()), both(x[:1].expand(rows, 96).clone()))


# -- what is remembered ------------------------------------------------------------------------------------------------


@pytest.fixture
def formats(monkeypatch):
    """Registrations are undone."""
    monkeypatch.setattr(registry, "_user_formats", dict(registry._user_formats))


def mine(**changes):
    return {"name": "mine", "element": "e2m1", "block": 32, "scale": "e8m0", "scale_rule": "floor", **changes}


def test_a_name_means_what_was_registered_last(formats):
    x = torch.randn(3, 64)
    with pytest.raises(MicroscaleError, match="unknown format 'mine'"):
        ms.quantize(x, "mine")
    for block in (32, 16, 8):
        ms.register_format(mine(block=block), replace=True)
        for _ in range(2):
            assert ms.quantize(x, "mine").format.block == block
            assert ms.quantize(x, "mine", scale_rule="ceil").format.scale_rule.base == "ceil"
            assert ms.quantize(x, ms.find_format("mine")).scale.shape == (3, 64 // block)
    registry._user_formats.pop("mine")
    with pytest.raises(MicroscaleError, match="unknown format 'mine'"):
        ms.quantize(x, "mine")
    ms.register_format({**mine(), "name": "mxfp8"}, replace=True)
    assert ms.quantize(x, "mxfp8").format.element.name == "e2m1"


def test_remembered_quantizers_equal_those_looked_up():
    cases = [
        ("mxfp8", {}), ("mxfp8", {"scale_rule": "floor"}), ("mxfp8", {"block": 16}), ("mxfp8", {"element": "e5m2"}),
        ("nvfp4", {"scale_tile": 16}), ("nvfp4", {"scale_tile": (16, 16)}), ("nvfp4", {"outer_scale_mode": "static"}),
        ("nvfp4", {"hadamard": 16}), ("nvfp4", {"hadamard": {"size": 16}}), ("mxfp8", {"rounding": "stochastic"}),
        ({"format": "mxfp8", "block": 16}, {}), (ms.find_format("mxfp6"), {}), (ms.find_format("mxfp6"), {"block": 16}),
        (ms.find_quantizer("mxfp6"), {"block": 64}), ("formats/mxfp4.yaml", {}),
    ]  # fmt: skip
    for _ in range(2):
        for source, changes in cases:
            assert api.cached_quantizer(source, changes) == ms.find_quantizer(source, **changes)


def test_equal_values_of_other_types_are_not_mixed_up():
    x = torch.randn(4, 64)
    for good, bad in (({"hadamard": 2}, {"hadamard": 2.5}), ({"block": 1}, {"block": True})):
        ms.quantize(x, "nf4" if "block" in good else "nvfp4", **({"block": 2} if "block" in good else good))
        with pytest.raises(MicroscaleError):
            ms.quantize(x, "nvfp4", **bad)


def test_memories_are_bounded(monkeypatch):
    monkeypatch.setattr(api, "_LIMIT", 8)
    monkeypatch.setattr(dispatch, "_LIMIT", 8)
    for memory in (api._found, api._metas, dispatch._by_facts):
        memory.clear()
    for n in range(1, 30):
        x = torch.randn(n, 64)
        fmt = ms.find_format("mxfp8").variant(block=8 * n)
        assert ms.quantize(x, fmt).format.block == 8 * n
        assert max(len(m) for m in (api._found, api._metas, dispatch._by_facts)) <= 8


def test_contexts_and_registrations_are_seen(monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {op: list(rows) for op, rows in dispatch._kernels.items()})
    x, ran = torch.randn(4, 64), []
    reference = next(k.run for k in dispatch.kernels("quantize") if k.name == "reference.quantize")

    def noted(*args):
        ran.append(1)
        return reference(*args)

    ms.quantize(x, "mxfp8")
    dispatch.kernel("quantize", "made.fast", priority=90, requires=Requires(devices=("cpu",)))(noted)
    ms.quantize(x, "mxfp8")
    assert len(ran) == 1
    with ms.use_backend("reference"):
        ms.quantize(x, "mxfp8")
    assert len(ran) == 1
    for _ in range(2):
        with ms.use_backend("made"), pytest.raises(NoKernelError):
            ms.quantize(x, "mxfp8").dequantize()
    with ms.strict():
        ms.quantize(x, "mxfp8")
    ms.quantize(x, "mxfp8")
    assert len(ran) == 5
    monkeypatch.undo()
    dispatch._cache.clear()
    ms.quantize(x, "mxfp8")
    assert len(ran) == 5


def test_how_a_tensor_lies_is_seen(monkeypatch):
    """Same shape, other strides or start: another class of problem."""
    seen = []
    describe = library.quantize_problem
    monkeypatch.setattr(library, "quantize_problem", lambda *a: seen.append(describe(*a)) or seen[-1])
    monkeypatch.setattr(dispatch, "_by_facts", {})
    base = torch.randn(64 * 64 + 1)
    for x in (base[:-1].view(64, 64), base[:-1].view(64, 64).t(), base[1:].view(64, 64)) * 2:
        ms.quantize(x, "mxfp8")
    assert [p.operands[0].order for p in seen] == ["rows", "columns", "strided"]


def test_stand_in():
    x = torch.randn(4, 64)
    q = ms.quantize(x, "mxfp8")
    with dispatch.stand_in("quantize", lambda *args: (q.qdata, q.scale, None)):
        assert ms.quantize(x + 1, "mxfp8").qdata is q.qdata
        assert ms.explain("quantize", x, "mxfp8").chosen == "stand_in"
    assert not torch.equal(ms.quantize(x + 1, "mxfp8").qdata, q.qdata)


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
    x = torch.randn(1, 4096).bfloat16()
    q, values = ms.quantize(x, fmt), ms.quantize(x, fmt).dequantize()
    with dispatch.stand_in("quantize", lambda *a: (q.qdata, q.scale, q.outer_scale)):
        assert calls_of(lambda: ms.quantize(x, fmt)) <= 48
        assert calls_of(lambda: ms.quantize(x, fmt, scale_tile=(16, 32))) <= 58
    with dispatch.stand_in("dequantize", lambda *a: values):
        assert calls_of(lambda: ms.dequantize(q)) <= 31


# -- the suite ---------------------------------------------------------------------------------------------------------


def test_overhead_suite():
    report = bench_overhead("cpu", ["mxfp8", "nvfp4", "fp8_row"], samples=3)
    parts = {(r.op, r.format): [] for r in report.rows}
    for row in report.rows:
        parts[row.op, row.format].append(row.mode)
        assert row.checked and row.us_spread >= 0 and (row.us > 0 or row.mode == "checks")
    assert parts["torch", ""] == ["zero_ of one element"]
    for fmt in ("mxfp8", "nvfp4", "fp8_row"):
        around = ["around the kernel", "selection", "spec look-up", "wrapper", "checks"]
        assert parts["quantize", fmt] == around
        assert parts["dequantize", fmt] == ["around the kernel", "selection", "checks"]
        assert parts["linear", fmt] == parts["module", fmt] == ["around the kernel"]
    assert report.environment["torch"] == torch.__version__ and "host" in report.environment


def test_calls_are_timed_in_turns(monkeypatch):
    """A host that becomes slower changes what a call takes, and not how much longer than another."""
    clock, calls = overhead._Clock(torch.device("cpu"), 5), []
    monkeypatch.setattr(clock, "_sample", lambda call: call() + 100.0 * len(calls))
    timing, over = clock.beside(lambda: calls.append(1) or 8.0, lambda: 5.0)
    assert over == 3.0 and timing.us == 8.0 + 100 * 6 and len(calls) == 3 + 5


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_row"])
def test_parts_of_a_layers_kernel(fmt):
    """The kernel is called as the layer calls it; what a GPU's rows have is timed here without launches."""
    x, weight = torch.randn(2, 64).bfloat16(), ms.quantize(torch.randn(48, 64).bfloat16(), fmt)
    expected = torch.nn.functional.linear(x, weight)
    op, launches = overhead._linear_kernel("reference.matmul", lambda: torch.nn.functional.linear(x, weight))
    assert_same_bits(op.run(*op.args), expected)
    assert launches == [] and op.args[0] is x and op.args[2:] == (None, torch.bfloat16)
    parts = overhead._kernel(op, launches, expected, overhead._Clock(x.device, 3))
    assert list(parts) == ["kernel", "allocation", "plan"] and parts["kernel"].us > parts["allocation"].us > 0


def test_overhead_command(tmp_path):
    out = tmp_path / "overhead.json"
    command = ["bench", "overhead", "--device", "cpu", "--formats", "mxfp8", "--shapes", "2x64", "--samples", "3"]
    done = CliRunner().invoke(app, [*command, "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) == {"environment", "ceilings", "rows"} == set(json.loads(out.read_text()))
    assert "around the kernel" in CliRunner().invoke(app, command).stdout


def test_a_wrong_kernel_gets_no_overhead(monkeypatch):
    entry = next(k for k in dispatch.kernels("dequantize") if k.name == "reference.dequantize")
    calls = []

    def sometimes_wrong(*args):
        calls.append(1)
        return entry.run(*args) * (1 + len(calls) % 2)

    dispatch._cache.clear()
    monkeypatch.setitem(dispatch._kernels, "dequantize", [dataclasses.replace(entry, run=sometimes_wrong)])
    report = bench_overhead("cpu", ["mxfp8"], [(2, 64)], samples=3)
    dispatch._cache.clear()
    row = next(r for r in report.rows if r.op == "dequantize")
    assert row.us is None and not row.checked and "differ" in row.note
