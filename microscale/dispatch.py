"""One dispatcher for every op: kernels say as data what they require, and the first that fits, by priority, runs.

    @kernel("quantize", "triton.quantize", priority=10, requires=Requires(devices=("cuda",), packages=("triton",)))
    def quantize(...): ...

A `Problem` describes a call without its data: specs, shapes, dtypes, layouts, device. Requirements look only at a
problem, so that `explain` can answer before anything runs, and selections can be cached per problem class. A fallback
is never silent: `explain` gives each refusal's reason, under `strict()` it is an error. Nor is an approximation: a
kernel that does not compute what the reference defines says so (`exact=False`); `exact_products()` keeps it out.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from microscale.errors import NoKernelError, unknown_name
from microscale.spec.format import FormatSpec
from microscale.spec.quantizer import QuantizerSpec


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor of a problem: plain (format None) or block-scaled. `axis` is the blocked dimension, negative.

    `order` says how a plain tensor lies: "rows" (dense, starting on 16 bytes), "columns" (the same of its transpose),
    or "strided". `one_block`: one block is all of its blocked dimension. `exact_rows`: as of a tensor's `Meta`.
    """

    shape: tuple[int, ...]
    dtype: str
    format: FormatSpec | None = None
    axis: int = -1
    layout: str = "strided"
    outer: str | None = None
    order: str = "rows"
    one_block: bool = False
    exact_rows: bool | None = None

    def __str__(self) -> str:
        """Render as `nvfp4[11008, 4112]` or `bf16[64, 4112]`."""
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        name = self.format.name if self.format is not None else short.get(self.dtype, self.dtype)
        return f"{name}[{', '.join(map(str, self.shape))}]"

    def shape_class(self) -> tuple[tuple[int, int], ...]:
        """Each size by magnitude (ceil log2) and alignment (largest power of two that divides it, up to 256)."""
        return tuple(((n - 1).bit_length() if n else -1, min(n & -n, 256)) for n in self.shape)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of an op without its data."""

    op: str
    operands: tuple[Operand, ...]
    device: str
    capability: tuple[int, int] | None = None
    quantizer: QuantizerSpec | None = None
    out_dtype: str | None = None
    layout: str = "strided"
    second: QuantizerSpec | None = None  # of quantize_both: the one along columns
    bias: Operand | None = None  # of matmul: None also stands for "not known"
    rounded: str | None = None  # what FP32 results of a matmul are rounded to once a residual has been added

    def __str__(self) -> str:
        """Render as `matmul(bf16[64, 4112], nvfp4[11008, 4112])`."""
        parts = [str(o) for o in self.operands]
        parts += [q.name for q in (self.quantizer, self.second) if q is not None]
        return f"{self.op}({', '.join(parts)})"

    def key(self) -> tuple[Any, ...]:
        """What selection may depend on; shapes count by class, so batch sizes do not fill the cache."""
        operands = tuple(
            (o.shape_class(), o.dtype, o.format, o.axis, o.layout, o.outer, o.order, o.one_block, o.exact_rows)
            for o in self.operands
        )
        specs = (self.quantizer, self.second)
        bias = None if self.bias is None else (self.bias.shape_class(), self.bias.dtype)
        return (self.op, operands, self.device, self.capability, specs, self.out_dtype, self.layout, bias, self.rounded)


Check = Callable[[Problem], str | None]


@dataclasses.dataclass(frozen=True)
class Requires:
    """What a kernel needs, as data. `checks` are (text, predicate) pairs for what no other field can say.

    Thresholds on shapes must be powers of two, because selection is cached per shape class.
    """

    devices: tuple[str, ...] | None = None
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    dtypes: tuple[str, ...] | None = None
    layouts: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()
    checks: tuple[tuple[str, Callable[[Problem], bool]], ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        """Return why the problem is refused, in words, or None if it is accepted."""
        if self.devices is not None and problem.device not in self.devices:
            return f"needs a {' or '.join(self.devices)} device, not {problem.device}"
        for package in self.packages:
            if not installed(package):
                return f"needs the package {package}, which is not installed"
        have = problem.capability
        if self.min_capability is not None and (have is None or have < self.min_capability):
            return f"needs compute capability {_version(self.min_capability)}, the device is {_version(have)}"
        if self.max_capability is not None and (have is None or have > self.max_capability):
            return f"needs compute capability {_version(self.max_capability)} or lower, the device is {_version(have)}"
        for operand in problem.operands:
            if self.dtypes is not None and operand.format is None and operand.dtype not in self.dtypes:
                return f"needs {' or '.join(self.dtypes)}, not {operand.dtype}"
            if self.layouts is not None and operand.layout not in self.layouts:
                return f"needs scales in layout {' or '.join(self.layouts)}, not {operand.layout}"
        return next((text for text, accepts in self.checks if not accepts(problem)), None)

    def rows(self) -> dict[str, str]:
        """Return the set fields as text, for the docs table."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "checks"}
        rows = {k: str(v) for k, v in shown.items() if v not in (None, ())}
        return rows | ({"checks": "; ".join(text for text, _ in self.checks)} if self.checks else {})


def _version(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"


_packages: dict[str, bool] = {}


def installed(package: str) -> bool:
    """Return True if a package can be imported; found out once."""
    if package not in _packages:
        _packages[package] = importlib.util.find_spec(package) is not None
    return _packages[package]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    `native`: devices where choosing it is no fallback; `bound`: how near it is to the reference, in words; `exact`:
    its operands have the values that the reference multiplies, and sums are FP32. False under a wider bound.
    """

    op: str
    name: str
    run: Callable[..., Any]
    requires: Requires
    priority: int = 0
    native: tuple[str, ...] | None = None
    bound: str = "bit-equal to the reference"
    exact: bool = True

    @property
    def backend(self) -> str:
        """First part of the name: reference, triton, cublas."""
        return self.name.split(".")[0]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a kernel does not run a problem."""

    kernel: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which kernel runs a problem (None: nothing can), whether it is a fallback, and why each other one does not."""

    problem: str
    chosen: str | None
    fallback: bool
    bound: str
    refused: tuple[Refusal, ...]
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        """Render as aligned lines, the choice first."""
        width = max(
            (len(n) for n in (self.chosen or "", *(r.kernel for r in self.refused), *self.passed_over)), default=0
        )
        lines = [self.problem]
        if self.chosen is not None:
            lines.append(
                f"  {self.chosen:<{width}}  runs" + (" (fallback)" if self.fallback else "") + f"; {self.bound}"
            )
        lines += [f"  {r.kernel:<{width}}  refused: {r.reason}" for r in self.refused]
        lines += [f"  {name:<{width}}  accepted, lower priority" for name in self.passed_over]
        return "\n".join(lines)


_kernels: dict[str, list[Kernel]] = {}
_cache: dict[tuple[Any, ...], Kernel] = {}
_by_facts: dict[tuple[Any, ...], tuple[list[Kernel], Kernel]] = {}  # with the kernels it was selected from
_LIMIT = 4096  # entries of _by_facts, which holds shapes as they are; past it all are forgotten
_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("microscale_backend", default=None)
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("microscale_strict", default=False)
_exact: contextvars.ContextVar[bool] = contextvars.ContextVar("microscale_exact", default=False)


class _Wishes(NamedTuple):
    """What is in force around a call, beyond the problem itself; part of every cache key."""

    backend: str | None
    strict: bool
    exact: bool


def _wishes() -> _Wishes:
    return _Wishes(_backend.get(), _strict.get(), wants_exact())


def kernel(
    op: str,
    name: str,
    *,
    requires: Requires,
    priority: int = 0,
    native: tuple[str, ...] | None = None,
    bound: str = "bit-equal to the reference",
    exact: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a kernel of `op`. Higher priority is tried first."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        entry = Kernel(op, name, run, requires, priority, native, bound, exact)
        rows = [k for k in _kernels.get(op, []) if k.name != name]
        _kernels[op] = sorted([*rows, entry], key=lambda k: -k.priority)
        _cache.clear()
        return run

    return register


def kernels(op: str | None = None) -> list[Kernel]:
    """Return the registered kernels of an op, or of all ops, by priority."""
    _load()
    if op is None:
        return [k for rows in _kernels.values() for k in rows]
    if op not in _kernels:
        raise unknown_name("op", op, _kernels)
    return list(_kernels[op])


def backends() -> list[str]:
    """Return the names that `use_backend` takes."""
    return sorted({k.backend for k in kernels()})


def _load() -> None:
    """Import the kernel files once; they register themselves."""
    if not _kernels:
        import importlib

        importlib.import_module("microscale.kernels")


@contextlib.contextmanager
def _within(wish: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = wish.set(value)
    try:
        yield
    finally:
        wish.reset(token)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block only kernels of this backend run ("reference", "triton", "cublas"); no other is a substitute.
    Raises UnknownNameError for a name no kernel has."""
    if name not in backends():
        raise unknown_name("backend", name, backends())
    with _within(_backend, name):
        yield


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within the block a fallback raises NoKernelError instead of running."""
    with _within(_strict, enabled):
        yield


@contextlib.contextmanager
def exact_products(enabled: bool = True) -> Iterator[None]:
    """Within the block only kernels run whose products are those of the dequantized operands, summed in FP32: none with
    a wider bound of its own, as FP8 tensor cores have on operands re-encoded row by row."""
    with _within(_exact, enabled):
        yield


def wants_exact() -> bool:
    """Return True within `exact_products()`."""
    return _exact.get()


def is_fallback(entry: Kernel, problem: Problem) -> bool:
    """Return True if a kernel runs where it is only a substitute (the reference on a GPU)."""
    return entry.native is not None and problem.device not in entry.native


def select(problem: Problem) -> Kernel:
    """Return the kernel that runs a problem. Raises NoKernelError with every refusal if there is none."""
    wishes = _wishes()
    key = (problem.key(), wishes)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _select(problem, wishes)
    return found


def select_by(op: str, facts: tuple[Any, ...], describe: Callable[..., Problem], *args: Any) -> Kernel:
    """Return `select(describe(*args))`, remembered under `facts`, which must determine the problem of this op.

    For small calls, where describing the problem costs more than all the rest: facts are what is at hand, as a shape.
    """
    key = (op, _backend.get(), _strict.get(), _exact.get(), facts)
    found, rows = _by_facts.get(key), _kernels.get(op)
    if found is not None and found[0] is rows:  # a registration makes a new list
        return found[1]
    entry = select(describe(*args))
    if rows is not None:
        if len(_by_facts) >= _LIMIT:
            _by_facts.clear()
        _by_facts[key] = (rows, entry)
    return entry


@contextlib.contextmanager
def stand_in(op: str, run: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `run` is called in the place of every kernel of an op, in all threads.

    To measure what surrounds a kernel. Raises UnknownNameError for an unknown op.
    """
    kernels(op)
    before, _kernels[op] = _kernels[op], [Kernel(op, "stand_in", run, Requires())]
    _cache.clear()
    try:
        yield
    finally:
        _kernels[op] = before
        _cache.clear()


def _select(problem: Problem, wishes: _Wishes) -> Kernel:
    for entry in kernels(problem.op):
        if _reason(entry, problem, wishes) is None:
            return entry
    refused = [Refusal(k.name, _reason(k, problem, wishes) or "") for k in kernels(problem.op)]
    width = max(len(r.kernel) for r in refused)
    lines = [f"no kernel for {problem}", *(f"  {r.kernel:<{width}}  refused: {r.reason}" for r in refused)]
    if wishes.backend is not None:
        hint = f"leave use_backend({wishes.backend!r})"
    elif wishes.strict:
        hint = "leave strict() to allow the reference"
    elif wishes.exact:
        hint = "leave exact_products() to allow kernels with a wider bound"
    else:
        hint = "see microscale.explain for what each kernel needs"
    raise NoKernelError("\n".join(lines), hint)


def _reason(entry: Kernel, problem: Problem, wishes: _Wishes) -> str | None:
    if wishes.backend is not None and entry.backend != wishes.backend:
        return f"use_backend({wishes.backend!r}) is in force"
    reason = entry.requires.refusal(problem)
    if reason is None and wishes.strict and is_fallback(entry, problem):
        return f"a fallback on {problem.device}, and strict() is in force"
    if reason is None and wishes.exact and not entry.exact:
        return f"its products are not exact ({entry.bound}), and exact_products() is in force"
    return reason


def explain_problem(problem: Problem) -> Explanation:
    """Return the choice for a problem and the reason of every refusal; never raises for want of a kernel."""
    wishes = _wishes()
    chosen: Kernel | None = None
    refused, passed = [], []
    for entry in kernels(problem.op):
        reason = _reason(entry, problem, wishes)
        if reason is not None:
            refused.append(Refusal(entry.name, reason))
        elif chosen is None:
            chosen = entry
        else:
            passed.append(entry.name)
    fallback = chosen is not None and is_fallback(chosen, problem)
    name, bound = (chosen.name, chosen.bound) if chosen is not None else (None, "")
    return Explanation(str(problem), name, fallback, bound, tuple(refused), tuple(passed))
