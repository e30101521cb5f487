"""The quantize suite: every format, along K, to and from, against the copy bandwidth of the same run.

Bytes are what must move: the input read once (twice where the amax of the outer scale comes from the tensor itself),
codes and scales written once; the reverse for dequantize. Codes and scales are compared with the reference bit for bit
before a row is timed; a row that differs has no time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from microscale import dispatch
from microscale.bench.timing import BenchReport, Row, Timer, environment
from microscale.errors import InputError
from microscale.numerics import layout
from microscale.ops import explain, quantize, quantize_both, rms_norm_quantize, silu_mul_quantize
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_quantizer, list_formats
from microscale.tensor import BlockScaledTensor
from microscale.testing import assert_same_bits, assert_same_quantized

EPS = 1e-5
SHAPES = {"cuda": ((16384, 8192), (8192, 28672), (4096, 4096)), "cpu": ((512, 1024),)}
CEILING_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
Shape = tuple[int, ...]


def bench_quantize(
    device: str = "cuda",
    formats: Sequence[QuantizerLike] | None = None,
    shapes: Sequence[Shape] | None = None,
    *,
    samples: int = 21,
    progress: Callable[[int, int, str], None] | None = None,
    jobs: int = 0,
    save: Callable[[BenchReport], None] | None = None,
) -> BenchReport:
    """Time quantize and dequantize of bfloat16 for formats (default all) and shapes (rows, columns).

    Raises InputError if there is no such device. What training and fused producers ask for is measured at the first
    shape only. `progress` is called as (done, total, what), `save` with what there is after every format. `jobs`:
    processes that first compile the kernels side by side, each for a format; alone that takes many minutes.
    """
    place = _device(device)
    wanted = tuple(shapes or SHAPES[place.type])
    specs = [find_quantizer(f) for f in (formats or list_formats())]
    if jobs:
        _compile(place, [spec.key for spec in specs], wanted, jobs)
    timer = Timer(place, samples)
    top = timer.copy_gb_per_s(CEILING_BYTES[place.type])
    ceilings = {f"copy_{CEILING_BYTES[place.type] >> 20}MiB": top}
    rows: list[Row] = []
    found = environment(place)
    try:
        for shape in wanted:
            x = _input(shape, place)
            small = x.numel() * 2 < CEILING_BYTES[place.type] // 2
            ceiling = top
            if small:  # a small tensor is held against a copy of its own size
                ceiling = ceilings[f"copy_{x.numel() * 2 >> 10}KiB"] = timer.copy_gb_per_s(x.numel() * 2)
            for spec in specs:
                if progress is not None:
                    progress(len(rows), len(wanted) * len(specs) * 9, f"{spec.name} {shape[0]}x{shape[1]}")
                for case in _cases(x, spec, full=shape == wanted[0]):
                    rows.append(_row(case, spec, tuple(x.shape), timer, ceiling))
                if save is not None:
                    save(BenchReport(found, ceilings, tuple(rows)))
    except KeyboardInterrupt:  # half an hour of measurements is worth keeping
        found["interrupted"] = True
    return BenchReport(found, ceilings, tuple(rows))


def _compile(place: torch.device, keys: Sequence[str], shapes: Sequence[Shape], jobs: int) -> None:
    """Call everything once in processes of their own, which leave their kernels in Triton's cache."""
    import concurrent.futures
    import multiprocessing

    fresh = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, fresh) as pool:
        for done in [pool.submit(_call_once, str(place), key, shapes) for key in keys]:
            done.result()


def _call_once(place: str, key: str, shapes: Sequence[Shape]) -> None:
    spec = QuantizerSpec.from_key(key)
    for shape in shapes:
        x = _input(shape, torch.device(place))
        for case in _cases(x, spec, full=shape == shapes[0]):
            case.call()


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type not in SHAPES:
        raise InputError(f"no benchmark for device {name!r}", f"use {' or '.join(SHAPES)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is here to measure", "use --device cpu for the reference on this machine")
    return device


def _input(shape: Shape, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Case:
    """One row: what is called, which kernel that is, and the bytes that it must move."""

    op: str
    mode: str
    chosen: dispatch.Explanation
    call: Callable[[], Any]
    size: int

    def check(self) -> None:
        """Compare with the reference, bit for bit. Raises AssertionError."""
        with dispatch.use_backend("reference"):
            wanted = self.call()
        got = self.call()
        for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, wanted)), strict=True):
            if isinstance(one, BlockScaledTensor):
                assert_same_quantized(one, other, self.mode)
            else:
                assert_same_bits(one, other, self.op)


def _cases(x: torch.Tensor, spec: QuantizerSpec, *, full: bool) -> Iterator[_Case]:
    """What is measured for one format and shape; `full`: also what training and fused producers ask for."""
    outer = spec.format.outer_scale
    given = None if outer is None or outer.per != "tensor" else x.abs().amax().float()
    plain = "given outer scale" if given is not None else "along K"
    bytes_in, bytes_out = x.numel() * x.element_size(), _stored(x, spec)
    whole = bytes_in + bytes_out
    key = torch.zeros(2, dtype=torch.int64, device=x.device)  # there already: a graph copies nothing from the host
    swizzled: dict[str, Any] = {"layout": layout.SWIZZLED}

    def case(mode: str, size: int = whole, quantizer: QuantizerSpec = spec, **arguments: Any) -> _Case:
        seed: dict[str, Any] = {"generator": key} if quantizer.rounding == "stochastic" else {}
        chosen = explain("quantize", x, quantizer, **arguments)
        return _Case("quantize", mode, chosen, lambda: quantize(x, quantizer, **arguments, **seed), size)

    yield case(plain, amax=given)
    yield case(f"{plain}, swizzled", amax=given, **swizzled)
    if given is not None:
        yield case("dynamic", size=whole + bytes_in)
    if full:
        yield from _full_cases(x, spec, given, case)
    q = quantize(x, spec, amax=given)
    yield _Case("dequantize", "along K", explain("dequantize", q), q.dequantize, whole)
    swizzled_q = quantize(x, spec, amax=given, **swizzled)
    explained = explain("dequantize", swizzled_q)
    yield _Case("dequantize", "along K, swizzled", explained, swizzled_q.dequantize, whole)


def _full_cases(
    x: torch.Tensor, spec: QuantizerSpec, given: torch.Tensor | None, case: Callable[..., _Case]
) -> Iterator[_Case]:
    bytes_in, bytes_out = x.numel() * x.element_size(), _stored(x, spec)
    whole = bytes_in + bytes_out
    yield case("along M", amax=given, axis=-2)
    chosen = explain("quantize_both", x, spec)
    both = functools.partial(quantize_both, x, spec, amax=given, column_amax=given)
    yield _Case("quantize", "both axes", chosen, both, whole + bytes_out)
    if spec.format.element.width == 4 and spec.format.element.kind == "float":  # what training recipes add
        block = spec.format.block
        if spec.format.outer_scale is None or spec.format.outer_scale.per != "row":
            yield case(f"2D {block}x{block}", quantizer=find_quantizer(spec, scale_tile=block), amax=given)
        yield case("Hadamard 16", quantizer=find_quantizer(spec, hadamard=16), amax=given)
        yield case("stochastic", quantizer=find_quantizer(spec, rounding="stochastic"), amax=given)
    yield from _producer_cases(x, spec, given, whole)


def _producer_cases(x: torch.Tensor, spec: QuantizerSpec, given: torch.Tensor | None, whole: int) -> Iterator[_Case]:
    up, weight = x.flip(-1), torch.linspace(0.5, 1.5, x.shape[-1], device=x.device).to(x.dtype)
    mode = "given outer scale" if given is not None else "along K"
    silu = functools.partial(silu_mul_quantize, x, up, spec, amax=given)
    chosen = explain("silu_mul_quantize", x, up, spec, amax=given)
    yield _Case("silu_mul_quantize", mode, chosen, silu, whole + x.numel() * x.element_size())
    norm = functools.partial(rms_norm_quantize, x, weight, EPS, spec, amax=given)
    chosen = explain("rms_norm_quantize", x, weight, EPS, spec, amax=given)
    yield _Case("rms_norm_quantize", mode, chosen, norm, whole)


def _stored(x: torch.Tensor, spec: QuantizerSpec) -> int:
    """Bytes of x's codes and scales."""
    fmt = spec.format.for_row(x.shape[-1])
    blocks = x.numel() // fmt.block if x.shape[-1] % fmt.block == 0 else x.shape[0] * -(-x.shape[-1] // fmt.block)
    return blocks * (fmt.block_bytes + fmt.scale.width // 8)


def _row(case: _Case, spec: QuantizerSpec, shape: Shape, timer: Timer, ceiling: float) -> Row:
    kernel = case.chosen.chosen or "none"
    untimed = functools.partial(Row, case.op, spec.name, case.mode, shape, None, None, None, None, kernel, False)
    if case.chosen.fallback:  # minutes for what no one waits for; and the reference is no kernel to measure
        return untimed("; ".join(f"{r.kernel}: {r.reason}" for r in case.chosen.refused))
    try:
        case.check()
    except AssertionError as error:
        return untimed(f"differs: {error}")
    timing = timer.time(case.call)
    rate = case.size / timing.us / 1e3
    return Row(
        case.op, spec.name, case.mode, shape, timing.us, timing.us_spread, rate, rate / ceiling, kernel, True
    )  # fmt: skip
