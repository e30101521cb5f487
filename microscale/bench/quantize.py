"""The quantize suite: every format, along K, to and from, against the copy bandwidth of the same run.

Bytes are what must move: the input read once (twice where the amax of the outer scale comes from the tensor itself),
codes and scales written once; the reverse for dequantize. Codes and scales are compared with the reference bit for bit
before a row is timed; a row that differs has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from microscale import dispatch
from microscale.bench.timing import BenchReport, Row, Timer, environment
from microscale.errors import InputError
from microscale.numerics import layout
from microscale.ops import explain, quantize
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import QuantizerLike, find_quantizer, list_formats
from microscale.tensor import BlockScaledTensor
from microscale.testing import assert_same_bits, assert_same_quantized

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
) -> BenchReport:
    """Time quantize and dequantize of bfloat16 for formats (default all) and shapes (rows, columns).

    Raises InputError if there is no such device. `progress` is called as (done, total, what).
    """
    place = _device(device)
    timer = Timer(place, samples)
    wanted = tuple(shapes or SHAPES[place.type])
    top = timer.copy_gb_per_s(CEILING_BYTES[place.type])
    ceilings = {f"copy_{CEILING_BYTES[place.type] >> 20}MiB": top}
    specs = [find_quantizer(f) for f in (formats or list_formats())]
    rows: list[Row] = []
    for shape in wanted:
        x = _input(shape, place)
        small = x.numel() * 2 < CEILING_BYTES[place.type] // 2
        ceiling = top
        if small:  # a small tensor is held against a copy of its own size
            ceiling = ceilings[f"copy_{x.numel() * 2 >> 10}KiB"] = timer.copy_gb_per_s(x.numel() * 2)
        for spec in specs:
            if progress is not None:
                progress(len(rows), len(wanted) * len(specs) * 4, f"{spec.name} {shape[0]}x{shape[1]}")
            rows.extend(_rows(x, spec, timer, ceiling))
    return BenchReport(environment(place), ceilings, tuple(rows))


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


def _rows(x: torch.Tensor, spec: QuantizerSpec, timer: Timer, ceiling: float) -> Iterator[Row]:
    outer = spec.format.outer_scale
    given = None if outer is None or outer.per != "tensor" else x.abs().amax().float()
    bytes_in = x.numel() * x.element_size()
    plain = "given outer scale" if given is not None else "along K"
    with dispatch.use_backend("reference"):
        expected = quantize(x, spec, amax=given)
    bytes_out = expected.stored_bytes
    modes: list[tuple[str, dict[str, object], int]] = [
        (plain, {"amax": given}, bytes_in + bytes_out),
        (f"{plain}, swizzled", {"amax": given, "layout": layout.SWIZZLED}, bytes_in + bytes_out),
    ]
    if given is not None:
        modes.append(("dynamic", {}, 2 * bytes_in + bytes_out))
    for mode, arguments, size in modes:
        yield _quantize_row(x, spec, mode, arguments, expected, size, timer, ceiling)
    yield _dequantize_row(expected, spec, bytes_in + bytes_out, timer, ceiling)


def _quantize_row(
    x: torch.Tensor, spec: QuantizerSpec, mode: str, arguments: dict[str, object], expected: BlockScaledTensor,
    size: int, timer: Timer, ceiling: float,
) -> Row:  # fmt: skip
    chosen = explain("quantize", x, spec, **arguments)

    def call() -> BlockScaledTensor:
        return quantize(x, spec, **arguments)  # type: ignore[arg-type]

    def check() -> None:
        assert_same_quantized(call(), expected, mode)

    return _row("quantize", spec, mode, tuple(x.shape), chosen, check, call, size, timer, ceiling)


def _dequantize_row(q: BlockScaledTensor, spec: QuantizerSpec, size: int, timer: Timer, ceiling: float) -> Row:
    def check() -> None:
        with dispatch.use_backend("reference"):
            wanted = q.dequantize()
        assert_same_bits(q.dequantize(), wanted, "dequantize")

    chosen = explain("dequantize", q)
    return _row("dequantize", spec, "along K", tuple(q.shape), chosen, check, q.dequantize, size, timer, ceiling)


def _row(
    op: str, spec: QuantizerSpec, mode: str, shape: Shape, chosen: dispatch.Explanation,
    check: Callable[[], None], call: Callable[[], object], size: int, timer: Timer, ceiling: float,
) -> Row:  # fmt: skip
    kernel = chosen.chosen or "none"
    if chosen.fallback:  # minutes for what no one waits for; and the reference is no kernel to measure
        note = "; ".join(f"{r.kernel}: {r.reason}" for r in chosen.refused)
        return Row(op, spec.name, mode, shape, None, None, None, None, kernel, False, note)
    try:
        check()
    except AssertionError as error:
        return Row(op, spec.name, mode, shape, None, None, None, None, kernel, False, f"differs: {error}")
    timing = timer.time(call)
    rate = size / timing.us / 1e3
    return Row(op, spec.name, mode, shape, timing.us, timing.us_spread, rate, rate / ceiling, kernel, True)
