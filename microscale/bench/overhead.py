"""The overhead suite: host time of a small quantize and dequantize, and where it goes.

A sample is the mean of 50 calls that nothing synchronises in between; the device is idle before each sample, so that
its queue never fills. The median and the spread of the samples are reported, one row for each part:

    total               the public function; quantize by the format's name
    around the kernel   the same with a kernel that gives ready outputs. Of that:
      selection           describing the call and finding its kernel
      spec look-up        from the name to the quantizer
      wrapper             making the BlockScaledTensor
      checks              the rest: arguments, modes of torch, Python's own calls
    kernel              host code of the kernel alone. Of that:
      allocation          of its outputs
      launch NAME         of each jitted kernel
      plan                the rest: choosing and preparing what is launched

`linear` is `F.linear` of x and a quantized weight as wide as it is long, prepared where there is such a thing, and
`module` a `QuantizedLinear` of that weight; the row of op `torch` and mode `linear` is `F.linear` of a bf16 weight.
Notes say how much is over that: the median difference of samples taken in turns, since hosts are faster at times than
at others.

`ratio` is the share of the total. Parts are timed one by one; `checks` and `plan` are what is left over, and have the
noise of all. A reference kernel's own time is no overhead, nor is torch's on a CPU: there, only what is around it is
reported. The first row of op `torch` is the floor: its simplest operation on that device, setting one element to zero.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from microscale import dispatch
from microscale.bench import product
from microscale.bench.matmul import Weights
from microscale.bench.quantize import Shape, _device, _input
from microscale.bench.timing import BenchReport, Row, Timing, environment
from microscale.kernels.triton.launch import Launch, launch, recorded
from microscale.nn.layers import to_quantized_
from microscale.numerics import layout
from microscale.ops import dequantize, explain, library, quantize
from microscale.ops.api import cached_quantizer
from microscale.spec.format import FormatSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_quantizer, list_formats
from microscale.tensor import BlockScaledTensor
from microscale.testing import assert_same_bits, assert_same_quantized

SHAPE = (1, 4096)
CPU_ROWS = 64  # of a weight: more would only take longer to make
CALLS = 50  # of a sample: with a few launches each, far fewer than a queue holds
CPU_FACTS = Path("/proc/cpuinfo")

Call = Callable[[], Any]


class _Op(NamedTuple):
    """The ways to call one op: `public` as users do, its kernel's `run` and, with selection, `selected` with `args`."""

    name: str
    public: Call
    run: Callable[..., Any]
    selected: Callable[..., Any]
    args: tuple[Any, ...]
    parts: dict[str, Call]  # others of what is around the kernel


def bench_overhead(
    device: str = "cuda",
    formats: Sequence[QuantizerLike] | None = None,
    shapes: Sequence[Shape] | None = None,
    *,
    samples: int = 21,
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchReport:
    """Time the host code of quantize, dequantize and a linear layer for formats (default all) and shapes (1x4096).

    Raises InputError if there is no such device. `progress` is called as (done, total, what).
    """
    place = _device(device)
    clock = _Clock(place, samples)
    one = torch.empty(1, device=place)
    rows = [_row("torch", "", "zero_ of one element", (1,), clock(one.zero_), None, "")]
    if place.type == "cuda":
        rows.extend(_torch_linear(shape, clock) for shape in shapes or [SHAPE])
    jobs = [(shape, source) for shape in shapes or [SHAPE] for source in formats or list_formats()]
    for done, (shape, source) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), f"{find_quantizer(source).name} {'x'.join(map(str, shape))}")
        x = _input(shape, place)
        rows.extend(_quantize_rows(x, source, clock))
        rows.extend(_dequantize_rows(quantize(x, source), clock))
        rows.extend(_linear_rows(x, find_quantizer(source), clock))
    return BenchReport({**environment(place), "host": _host()}, {}, tuple(rows))


class _Clock:
    """Times host code on one device; see the module for the method."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device, self.samples = device, samples

    def __call__(self, call: Call) -> Timing:
        _warm(call)
        return _timing([self._sample(call) for _ in range(self.samples)])

    def beside(self, call: Call, other: Call) -> tuple[Timing, float]:
        """Return the timing of a call, and the median of how much longer it takes than another, sample by sample."""
        _warm(call)
        _warm(other)
        pairs = [(self._sample(call), self._sample(other)) for _ in range(self.samples)]
        return _timing([one for one, _ in pairs]), statistics.median(one - two for one, two in pairs)

    def _sample(self, call: Call) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) * 1e6 / CALLS


def _warm(call: Call) -> None:
    """Compile and fill caches."""
    for _ in range(3):
        call()


def _timing(samples: list[float]) -> Timing:
    times = sorted(samples)
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return Timing(statistics.median(times), high - low)


def _quantize_rows(x: torch.Tensor, source: QuantizerLike, clock: _Clock) -> Iterator[Row]:
    spec = find_quantizer(source).for_row(x.shape[-1])
    chosen = explain("quantize", x, spec)
    q = quantize(x, spec)
    with dispatch.use_backend("reference"):
        expected = quantize(x, spec)
    args = (x, spec, None, None, None, layout.STRIDED)
    entry = dispatch.select(library.quantize_problem(x, spec, False, layout.STRIDED))
    made = (q.qdata, q.scale, q.outer_scale)

    def wrap() -> BlockScaledTensor:
        return BlockScaledTensor(*made, q.meta, x.shape, x.dtype)

    parts = {"spec look-up": lambda: cached_quantizer(source, {}), "wrapper": wrap}
    op = _Op("quantize", lambda: quantize(x, source), entry.run, library.quantize, args, parts)
    check = functools.partial(assert_same_quantized, q, expected)
    yield from _rows(op, made, _short(spec.name), tuple(x.shape), chosen, check, clock)


def _dequantize_rows(q: BlockScaledTensor, clock: _Clock) -> Iterator[Row]:
    chosen = explain("dequantize", q)
    fmt: FormatSpec = q.format
    values = dequantize(q)
    with dispatch.use_backend("reference"):
        expected = dequantize(q)
    args = (q.qdata, q.scale, q.outer_scale, fmt, q.shape[-1], q.scale_layout, q.dtype)
    entry = dispatch.select(library.dequantize_problem(q.qdata, fmt, q.shape[-1], q.scale_layout, q.dtype))
    op = _Op("dequantize", lambda: dequantize(q), entry.run, library.dequantize, args, {})
    check = functools.partial(assert_same_bits, values, expected)
    yield from _rows(op, values, _short(fmt.name), tuple(q.shape), chosen, check, clock)


def _short(name: str) -> str:
    """A format's name as it was asked for, without how long a row was."""
    return name.partition("[")[0]


def _weight(shape: Shape, device: torch.device) -> torch.Tensor:
    rows = CPU_ROWS if device.type == "cpu" else shape[-1]
    return product.normal((rows, shape[-1]), device, seed=1)


def _torch_linear(shape: Shape, clock: _Clock) -> Row:
    x, weight = _input(shape, clock.device), _weight(shape, clock.device)
    timing = clock(lambda: functional.linear(x, weight))
    return _row("torch", product.PLAIN, "linear", (*shape[:-1], *weight.shape), timing, None, "")


def _linear_rows(x: torch.Tensor, spec: QuantizerSpec, clock: _Clock) -> Iterator[Row]:
    weights = Weights(_weight(tuple(x.shape), x.device), spec)
    weight, case = weights.for_rows(x.shape[:-1].numel())
    shape = (*x.shape[:-1], *weight.shape)
    chosen = explain("matmul", x, weight)
    kernel = chosen.chosen or "none"
    row = functools.partial(_row, name=spec.name, shape=shape, kernel=kernel)

    def call() -> torch.Tensor:
        return functional.linear(x, weight)

    y = call()
    try:
        weights.sample.check(y.flatten(0, -2), x.flatten(0, -2), product.extra_error("matmul", (chosen,)))
    except AssertionError as error:
        yield Row("linear", spec.name, "total", shape, None, None, None, None, kernel, False, str(error))
        return
    module = torch.nn.Linear(shape[-1], shape[-2], bias=False, device="meta")
    to_quantized_(module, weight)
    for op, public in (("linear", call), ("module", lambda: module(x))):
        timed: dict[str, Timing] = {}
        over = 0.0
        if x.is_cuda and not chosen.fallback:
            timed["total"], over = clock.beside(public, lambda: functional.linear(x, weights.plain))
        with dispatch.stand_in("matmul", lambda *args: y):
            timed["around the kernel"] = clock(public)
        if op == "linear" and "total" in timed:
            timed |= _kernel(*_linear_kernel(kernel, public), y, clock)
        for part, timing in timed.items():
            made = row(op, part=part, timing=timing, ratio=timing.us / next(iter(timed.values())).us)
            note = f"{over:.1f} us over torch's in bf16, {case} weight" if part == "total" else ""
            yield dataclasses.replace(made, note=note)


def _linear_kernel(name: str, public: Call) -> tuple[_Op, list[Launch]]:
    """The kernel of this name as a linear layer calls it, and what it launches."""
    run = next(k.run for k in dispatch.kernels("matmul") if k.name == name)
    called: list[tuple[Any, ...]] = []

    def noted(*args: Any) -> Any:
        called.append(args)
        return run(*args)

    with dispatch.stand_in("matmul", noted), recorded() as launches:
        public()
    return _Op("matmul", public, run, library.matmul, called[0], {}), launches


def _rows(
    op: _Op, made: Any, name: str, shape: Shape, chosen: dispatch.Explanation, check: Call, clock: _Clock
) -> Iterator[Row]:
    kernel = chosen.chosen or "none"
    try:
        check()
    except AssertionError as error:
        yield Row(op.name, name, "total", shape, None, None, None, None, kernel, False, f"differs: {error}")
        return
    with recorded() as launches:
        op.run(*op.args)
    timed: dict[str, Timing] = {}
    if launches:  # host code that a device waits for
        timed["total"] = clock(op.public)
    timed |= _around(op, made, clock)
    if launches:
        timed |= _kernel(op, launches, made, clock)
    whole = timed.get("total", timed["around the kernel"]).us
    for part, timing in timed.items():
        yield _row(op.name, name, part, shape, timing, timing.us / whole, kernel)


def _around(op: _Op, made: Any, clock: _Clock) -> dict[str, Timing]:
    """The op with its kernel replaced, and what that consists of."""
    with dispatch.stand_in(op.name, lambda *args: made):
        whole = clock(op.public)
        parts = {"selection": clock(lambda: op.selected(*op.args))}
    parts |= {name: clock(call) for name, call in op.parts.items()}
    return {"around the kernel": whole, **parts, "checks": _left(whole, parts)}


def _kernel(op: _Op, launches: list[Launch], made: Any, clock: _Clock) -> dict[str, Timing]:
    """The kernel's host code, and what that consists of."""
    whole = clock(lambda: op.run(*op.args))
    facts = [(t.shape, t.dtype, t.device) for t in (made if isinstance(made, tuple) else (made,)) if t is not None]

    def allocate() -> None:
        for size, dtype, device in facts:
            torch.empty(size, dtype=dtype, device=device)

    parts = {"allocation": clock(allocate)}
    for each in launches:
        name = f"launch {each.kernel.__name__}"
        parts[name if name not in parts else f"{name} {len(parts)}"] = clock(functools.partial(launch, *each))
    return {"kernel": whole, **parts, "plan": _left(whole, parts)}


def _left(whole: Timing, parts: dict[str, Timing]) -> Timing:
    """What is left of a whole; the spreads add up."""
    return Timing(
        whole.us - sum(p.us for p in parts.values()), whole.us_spread + sum(p.us_spread for p in parts.values())
    )


def _row(op: str, name: str, part: str, shape: Shape, timing: Timing, ratio: float | None, kernel: str) -> Row:
    return Row(op, name, part, shape, timing.us, timing.us_spread, None, ratio, kernel, True)


def _host() -> str:
    """Return the model of the CPU, "" where it is not known."""
    lines = CPU_FACTS.read_text().splitlines() if CPU_FACTS.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
