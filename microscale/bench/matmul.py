"""The matmul suite: products with quantized weights against torch's bf16 products of the same run.

Cases, each a name that `Plan.cases` may hold:

    weight_only   bf16 activations; up to 2048 rows with the weight prepared, where there is such a thing; then both
                  prepared and plain
    both_scaled   both operands quantized, the weight prepared for that: the cast of the activations included ("cast
                  included"), and without it; with many rows also by kept rows of the weight ("rows kept")
    grouped       mixtures of experts: see `microscale.bench.grouped`
    mlp           the MLP of Llama-3 70B in one CUDA graph: see `microscale.bench.mlp`

Rows, floors and the check of every row are those of `microscale.bench.product`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

import microscale
from microscale import dispatch
from microscale.bench import product, reading
from microscale.bench.product import PLAIN, Bench, Product, Sample, normal, stored
from microscale.bench.quantize import _device
from microscale.bench.timing import BenchReport, Timer, environment
from microscale.errors import InputError, MicroscaleError, unknown_name
from microscale.ops import align_rows, explain, linear, matmul, quantize
from microscale.ops.rows import MANY, why_not
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_quantizer, list_formats
from microscale.tensor import BlockScaledTensor

CASES = ("weight_only", "both_scaled", "grouped", "mlp")
FORMATS = ("mxfp4", "nvfp4", "mxfp8", "mxfp6", "mxint8")  # the whole grid; all others are measured at a few sizes
PAIRS = (  # of a weight's and the activations' formats
    ("mxfp8", "mxfp8"), ("mxfp4", "mxfp8"), ("mxfp4", "fp8_row"), ("nvfp4", "nvfp4"),
)  # fmt: skip
FEW = 2048  # rows up to which a weight is prepared; for more a single product is measured with the plain one too
PREPARED_ON = ("cuda",)  # devices with a kernel for prepared weights


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured. Shapes are (N, K) of a weight, `experts` (E, N, K), `mlp` (K, N) as 8192 -> 28672 -> 8192."""

    cases: tuple[str, ...] = CASES
    shapes: tuple[tuple[int, int], ...] = ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 14336))
    rows: tuple[int, ...] = (1, 16, 64, 256, 4096)  # M
    few_rows: tuple[int, ...] = (1, 256, 4096)  # of formats outside FORMATS, at the first shape
    pair_shapes: tuple[tuple[int, int], ...] = ((28672, 8192), (8192, 28672))
    pair_rows: tuple[int, ...] = (1, 64, 256, 4096)
    experts: tuple[tuple[int, int, int], ...] = ((8, 14336, 4096), (64, 1536, 2048))
    tokens: int = 4096
    mlp: tuple[int, int] = (8192, 28672)
    mlp_rows: tuple[int, ...] = (1, 16, 256, 2048, 8192)
    pairs: tuple[tuple[str, str], ...] = PAIRS
    mlp_pairs: tuple[tuple[str, str], ...] = PAIRS[:3]

    def changed(
        self,
        cases: Sequence[str] | None = None,
        shapes: Sequence[tuple[int, ...]] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Plan:
        """Return the plan with other cases, other shapes (N, K) of single weights, other M everywhere.

        Raises UnknownNameError for an unknown case, InputError for a shape that has not two sizes.
        """
        changes: dict[str, Any] = {}
        for case in cases or ():
            if case not in CASES:
                raise unknown_name("case", case, CASES)
        if cases:
            changes["cases"] = tuple(cases)
        if shapes:
            if any(len(s) != 2 for s in shapes):
                raise InputError("a weight has two sizes, N and K", "for example 28672x8192,4096x4096")
            changes |= dict.fromkeys(("shapes", "pair_shapes"), tuple(shapes))
        if rows:
            changes |= dict.fromkeys(("rows", "few_rows", "pair_rows", "mlp_rows"), tuple(rows))
        return dataclasses.replace(self, **changes)


SMALL = Plan(
    shapes=((96, 64),), rows=(1, 8), few_rows=(8,), pair_shapes=((96, 64),), pair_rows=(8,),
    experts=((4, 48, 64),), tokens=24, mlp=(64, 96), mlp_rows=(1, 8),
)  # fmt: skip
PLANS = {"cuda": Plan(), "cpu": SMALL}


def default_plan(device: str) -> Plan:
    """Return what is measured on a device unless told otherwise. Raises InputError if there is no such device."""
    return PLANS[_device(device).type]


class Group(NamedTuple):
    """Rows that share a weight: they are measured together, and the weight is freed after them."""

    label: str
    products: Callable[[], Iterator[Product]]


def bench_matmul(
    device: str = "cuda",
    formats: Sequence[QuantizerLike] | None = None,
    plan: Plan | None = None,
    *,
    samples: int = 21,
    progress: Callable[[int, int, str], None] | None = None,
    jobs: int = 0,
    save: Callable[[BenchReport], None] | None = None,
) -> BenchReport:
    """Time products with weights of `formats` (default: FORMATS in full, all others at a few sizes).

    Raises InputError if there is no such device. `progress` is called as (done, total, what), `save` with what there is
    after every group of rows. `jobs`: processes that first compile the kernels side by side, each for a format. An
    interrupt ends the run and keeps the rows.
    """
    place = _device(device)
    plan = default_plan(device) if plan is None else plan
    full, few = _specs(formats)
    if jobs:
        _compile(place, plan, (full, few), jobs)
    groups = _groups(place, plan, full, few)
    found, rows = environment(place), []
    bench = Bench(place, samples)
    if place.type == "cuda" and dispatch.installed("triton") and "weight_only" in plan.cases:
        bench.ceilings |= reading.ceilings(Timer(place, min(samples, 9)), plan.shapes)
    try:
        for done, group in enumerate(groups):
            if progress is not None:
                progress(done, len(groups), group.label)
            try:
                for each in group.products():
                    rows.append(bench.measure(each))
            except product.failures() as error:  # making the operands failed; a row that fails is a row
                product.raise_if_lost(error)
                found.setdefault("failed", {})[group.label] = f"{type(error).__name__}: {error}"
            if place.type == "cuda":
                torch.cuda.empty_cache()  # the next weights have other sizes
            if save is not None:
                save(BenchReport(found, bench.ceilings, tuple(rows)))
    except KeyboardInterrupt:  # minutes of measurements are worth keeping
        found["interrupted"] = True
    return BenchReport(found, bench.ceilings, tuple(rows))


def _specs(formats: Sequence[QuantizerLike] | None) -> tuple[list[QuantizerSpec], list[QuantizerSpec]]:
    """The formats that are measured in full, and those at a few sizes."""
    if formats:
        return [find_quantizer(f) for f in formats], []
    return [find_quantizer(f) for f in FORMATS], [find_quantizer(f) for f in list_formats() if f not in FORMATS]


def _groups(
    place: torch.device, plan: Plan, full: Sequence[QuantizerSpec], few: Sequence[QuantizerSpec]
) -> list[Group]:
    from microscale.bench.grouped import expert_products
    from microscale.bench.mlp import mlp_products

    groups = []
    for shape in dict.fromkeys((*plan.shapes, *plan.pair_shapes)):
        for spec in full:
            rows = plan.rows if shape in plan.shapes else ()
            products = functools.partial(weight_products, place, plan, spec, shape, rows)
            groups.append(Group(f"{spec.name} {shape[0]}x{shape[1]}", products))
    for spec in few if plan.shapes else ():
        products = functools.partial(weight_products, place, plan, spec, plan.shapes[0], plan.few_rows)
        groups.append(Group(f"{spec.name} {plan.shapes[0][0]}x{plan.shapes[0][1]}", products))
    if "grouped" in plan.cases:
        for sizes in plan.experts:
            for spec in full:
                products = functools.partial(expert_products, place, plan, spec, sizes)
                groups.append(Group(f"{spec.name} {sizes[0]} experts {sizes[1]}x{sizes[2]}", products))
    if "mlp" in plan.cases:
        for spec in (*full, *few):
            groups.append(Group(f"{spec.name} MLP", functools.partial(mlp_products, place, plan, spec)))
    return groups


# -- compiling ---------------------------------------------------------------------------------------------------------


def _compile(place: torch.device, plan: Plan, specs: tuple[Sequence[QuantizerSpec], ...], jobs: int) -> None:
    """Call everything once in processes of their own, which leave their kernels in Triton's cache."""
    import concurrent.futures
    import multiprocessing

    fresh = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, fresh) as pool:
        wanted = [(spec.key, kind == 0) for kind, found in enumerate(specs) for spec in found]
        for done in [pool.submit(_call_once, str(place), plan, key, full) for key, full in wanted]:
            done.result()


def _call_once(place: str, plan: Plan, key: str, full: bool) -> None:
    spec = [QuantizerSpec.from_key(key)]
    for group in _groups(torch.device(place), plan, *((spec, []) if full else ([], spec))):
        for each in group.products():
            if any(e.fallback for e in each.chosen):
                continue
            try:
                each.call()
            except product.failures():
                continue  # the measurement will say so


# -- single weights ----------------------------------------------------------------------------------------------------


def weight_products(
    place: torch.device, plan: Plan, spec: QuantizerSpec, shape: tuple[int, int], rows: Sequence[int]
) -> Iterator[Product]:
    """Yield the products with one weight [N, K] in a format: weight-only for M in `rows`, then with both quantized."""
    partners = partners_of(spec, plan.pairs) if "both_scaled" in plan.cases and shape in plan.pair_shapes else []
    rows = rows if "weight_only" in plan.cases else ()
    if not rows and not partners:
        return
    weights = Weights(normal(shape, place, seed=1), spec)
    for m in rows:
        yield from _weight_only(weights, normal((m, shape[1]), place))
    for partner in partners:
        for m in plan.pair_rows:
            yield from _both_scaled(weights, normal((m, shape[1]), place), partner)


def partners_of(spec: QuantizerSpec, pairs: Sequence[tuple[str, str]]) -> list[QuantizerSpec]:
    """Return the formats of activations that go with a weight's."""
    return [find_quantizer(partner) for weight, partner in pairs if find_quantizer(weight) == spec]


class Weights:
    """A weight [N, K] in bf16, quantized and, from the first time it is asked for, prepared; and a sample of it."""

    def __init__(self, plain: torch.Tensor, spec: QuantizerSpec) -> None:
        self.plain, self.spec = plain, spec
        self.quantized = quantize(plain, spec)

    @functools.cached_property
    def prepared(self) -> BlockScaledTensor | None:
        """The weight as `microscale.prepare` lays it out; None where that changes nothing or cannot be done."""
        prepare = getattr(microscale, "prepare", None)
        if prepare is None or self.plain.device.type not in PREPARED_ON:
            return None
        try:
            made = prepare(self.quantized)
        except MicroscaleError:  # a format or a shape that it does not take
            return None
        return made if made.scale_layout != self.quantized.scale_layout else None

    @functools.cached_property
    def for_both(self) -> BlockScaledTensor:
        """The weight as `microscale.prepare` makes it for quantized activations, however many rows."""
        try:
            return microscale.prepare(self.quantized, quantized_activations=True)
        except MicroscaleError:
            return self.quantized

    def kept_rows(self, m: int, quantizer: QuantizerSpec) -> BlockScaledTensor | None:
        """Return the weight as `microscale.align_rows` makes it, if a layer would multiply m rows by it."""
        return self._rows if m >= MANY and why_not(self.quantized, quantizer) is None else None

    @functools.cached_property
    def _rows(self) -> BlockScaledTensor | None:
        try:
            return align_rows(self.quantized)
        except MicroscaleError:
            return None

    def for_rows(self, m: int) -> tuple[BlockScaledTensor, str]:
        """Return the weight to use for so many rows, and the name of the case: "prepared" or "plain"."""
        made = self.prepared if m <= FEW else None
        return (self.quantized, "plain") if made is None else (made, "prepared")

    @functools.cached_property
    def sample(self) -> Sample:
        """Some of its rows, decoded from the plain layout."""
        return Sample.of(self.quantized)


def _weight_only(weights: Weights, x: torch.Tensor) -> Iterator[Product]:
    found = [weights.for_rows(x.shape[0])]
    if x.shape[0] > FEW and weights.prepared is not None:
        found.append((weights.prepared, "prepared"))
    for weight, case in found:
        call = functools.partial(functional.linear, x, weight)
        yield _product(weights, x, x, call, f"weight-only, {case}", PLAIN, (explain("matmul", x, weight),))


def _both_scaled(weights: Weights, x: torch.Tensor, spec: QuantizerSpec) -> Iterator[Product]:
    weight = weights.for_both.transpose(-1, -2)
    a = quantize(x, spec)
    chosen = (explain("matmul", a, weights.for_both),)
    alone = functools.partial(matmul, a, weight)

    def call() -> torch.Tensor:
        return matmul(quantize(x, spec), weight)

    yield _product(weights, x, a, call, "both scaled, cast included", spec.name, chosen)
    product_alone = _product(weights, x, a, alone, "both scaled, GEMM alone", spec.name, chosen)
    yield dataclasses.replace(product_alone, work=work(a, weights.quantized))
    kept = weights.kept_rows(x.shape[0], spec)
    if kept is not None:
        call = functools.partial(linear, x, weights.for_both, input_quantizer=spec, rows=kept)
        chosen = (explain("matmul", a, kept),)
        yield _product(weights, x, a, call, "both scaled, cast included, rows kept", spec.name, chosen)


def _product(
    weights: Weights,
    x: torch.Tensor,
    operand: torch.Tensor,
    call: Callable[[], torch.Tensor],
    case: str,
    activations: str,
    chosen: tuple[dispatch.Explanation, ...],
) -> Product:
    """Describe one product of x [M, K], which is multiplied as `operand`, with the bytes of x itself."""
    (n, k), m = weights.plain.shape, x.shape[0]

    def check() -> None:
        y = call()
        weights.sample.check(y, operand, product.extra_error("matmul", chosen))
        product.assert_repeats(call, y)

    other = operand.format if isinstance(operand, BlockScaledTensor) else None
    return Product(
        "matmul", case, weights.spec.name, activations, (m, n, k), call,
        functools.partial(functional.linear, x, weights.plain), chosen, work(x, weights.quantized),
        product.is_eighth(other, weights.spec.format), check,
    )  # fmt: skip


def work(x: torch.Tensor, weight: torch.Tensor) -> tuple[tuple[int, int]]:
    """Return the bytes that x [M, K] times a weight [N, K] must move, its bf16 result too, and its operations."""
    m, (n, k) = x.shape[0], weight.shape
    return ((stored(x) + stored(weight) + 2 * m * n, 2 * m * n * k),)
