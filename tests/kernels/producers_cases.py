"""Run the Triton producers against the reference; prints one JSON line per mismatch, then a count.

`python -m tests.kernels.producers_cases cpu FORMAT ...` in the interpreter, `... cuda FORMAT ...` on a GPU. A process
of its own: see `tests.kernels.interpreted`. "shapes" for a format: shapes and strides, with few formats; "values": the
values that are quantized, for every bf16.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator

os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1:2] == ["cuda"] else "1"

import torch

import microscale as ms
from microscale.errors import SpecError
from microscale.kernels.reference import producers as reference
from microscale.kernels.triton import activations, producers
from microscale.numerics import activations as numerics
from microscale.numerics import layout
from microscale.ops.producers import problem
from microscale.spec.quantizer import QuantizerSpec
from microscale.testing import assert_same_bits

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
EPS = 1e-5
USER_FORMATS = (  # shapes of formats that no shipped one has
    {"name": "e3m1", "element": {"exponent": 3, "mantissa": 1}, "block": 64, "scale": "e8m0", "scale_rule": "floor"},
    {"name": "int5", "element": {"bits": 5}, "block": 8, "scale": "e4m3", "outer_scale": "fp32"},
    {"name": "odd", "element": "e2m1", "block": 24, "scale": "e8m0", "scale_rule": "ceil"},
    {"name": "wide", "element": "e4m3", "block": 16, "scale": "fp32", "scale_rule": "nearest"},
    {"name": "four", "element": {"values": [-1, 0, 0.25, 2]}, "block": 32, "scale": "e5m3", "scale_rule": "nearest"},
)
SPECIAL = (torch.nan, torch.inf, -torch.inf, -0.0, 3e38, -3e38, -87.0, -88.0, 89.0, -1e-38, 1e-45, 20.5)
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of every kind: normal, wide range, zero, tiny, special."""
    x = torch.randn(shape)
    rows = x.view(-1, shape[-1])
    for i in range(1, rows.shape[0]):
        if i % 5 == 1:
            rows[i] *= torch.exp(4 * torch.randn(shape[-1]))
        elif i % 5 == 2:
            rows[i] = 0
        elif i % 5 == 3:
            rows[i] *= 1e-30
        elif i % 5 == 4:
            places = torch.randperm(shape[-1])[: len(SPECIAL)]
            rows[i, places] = torch.tensor(SPECIAL)[: len(places)]
    return x.to(dtype)


def fused(requires: object, op: str, operands: tuple[torch.Tensor, ...], spec: QuantizerSpec, given: bool) -> bool:
    """Whether the fused kernel takes a call, on a GPU."""
    described = problem(op, operands, spec, given, layout.STRIDED)
    return requires.refusal(dataclasses.replace(described, device="cuda", capability=(9, 0))) is None


def same(what: str, run: Callable[[], Parts], expected: Parts) -> Iterator[dict[str, str]]:
    try:
        for part, got, wanted in zip(("qdata", "scale", "outer"), run(), expected, strict=True):
            assert (got is None) == (wanted is None), part
            if got is not None and wanted is not None:
                assert_same_bits(got.cpu(), wanted, part)
    except AssertionError as error:
        yield {"case": what, "error": str(error)[:300]}


def check(
    spec: QuantizerSpec,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    scale_layout: str = layout.STRIDED,
    amax: torch.Tensor | None = None,
    outer_scale: torch.Tensor | None = None,
) -> Iterator[dict[str, str]]:
    """Both ops on (x, up, weight) by every kernel that takes them; a line for each kernel that ran."""
    x, up, weight = (None if t is None else _same_strides(t) for t in operands)
    seed = torch.tensor([12345678901234, 3])
    tail = (amax, outer_scale, seed, scale_layout)
    given = amax is not None or outer_scale is not None
    there = tuple(None if t is None else t.to(DEVICE) for t in (amax, outer_scale, seed))
    name = f"{spec.name} {spec.rounding} {x.dtype} {list(x.shape)} {x.stride()} {scale_layout} {given}"
    expected = reference.silu_mul_quantize(operands[0], operands[1], spec, *tail)
    runs = [producers.silu_mul_then_quantize]
    if fused(producers.FUSED_SILU_MUL, "silu_mul_quantize", (x, up), spec, given):
        runs.append(producers.silu_mul_quantize)
    for run in runs:
        yield {"ran": run.__name__}
        yield from same(f"{run.__name__} {name}", lambda r=run: r(x, up, spec, *there, scale_layout), expected)
    expected = reference.rms_norm_quantize(operands[0], operands[2], EPS, spec, *tail)
    runs = [producers.rms_norm_then_quantize]
    if fused(producers.FUSED_RMS_NORM, "rms_norm_quantize", (x,), spec, given):
        runs.append(producers.rms_norm_quantize)
    for run in runs:
        yield {"ran": run.__name__}
        yield from same(f"{run.__name__} {name}", lambda r=run: r(x, weight, EPS, spec, *there, scale_layout), expected)


def _same_strides(t: torch.Tensor) -> torch.Tensor:
    """t on the device, laid out as it is here."""
    if DEVICE == "cpu":
        return t
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    storage = t.as_strided((size,), (1,)) if t.numel() else t
    return storage.to(DEVICE).as_strided(t.shape, t.stride()) if t.numel() else t.to(DEVICE)


def of_format(name: str | dict[str, object]) -> Iterator[dict[str, str]]:
    """One format: rounding, layouts, outer scales, kinds of weight."""
    for changes in ({}, {"rounding": "stochastic"}):
        try:
            spec = ms.find_quantizer(name, **changes).for_row(64)
        except SpecError:
            continue
        columns = 2 * max(32, spec.format.block)
        operands = (values(6, columns), torch.randn(6, columns).bfloat16(), torch.rand(columns))
        outer = spec.format.outer_scale
        amax = None if outer is None else torch.tensor(3.5) if outer.per == "tensor" else torch.rand(6, 1) + 1
        yield from check(spec, operands, amax=amax)
        if changes:
            continue
        yield from check(spec, (*operands[:2], None), layout.SWIZZLED, amax)
        if outer is not None:
            yield from check(spec, (*operands[:2], operands[2].bfloat16()))
            yield from check(spec, (*operands[:2], None), outer_scale=amax)


def of_shapes() -> Iterator[dict[str, str]]:
    """Shapes, strides, dtypes: ragged and short rows, rows longer than registers hold, halves of one projection."""
    mx, nv = (ms.find_quantizer(n) for n in ("mxfp8", "nvfp4"))
    for shape in ((3, 100), (1, 4352), (2, 3, 96), (130,), (5, 1), (70, 32)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            spec = mx if shape[-1] % 3 else nv
            weight = torch.randn(shape[-1]).to(dtype)
            yield from check(spec, (values(*shape, dtype=dtype), torch.randn(shape).to(dtype), weight))
    yield from check(ms.find_quantizer("mxfp4"), (values(1, 20480), values(1, 20480), torch.rand(20480)))
    both = values(6, 256)
    yield from check(mx, (both[:, :128], both[:, 128:], None))
    yield from check(mx, (both[1:, 1:65], both[:5, 64:128], None))  # starts off 16 bytes
    batches = values(2, 4, 192)[:, 1:]
    yield from check(nv, (batches[..., :96], batches[..., 96:], None), layout.SWIZZLED, torch.tensor(2.0))
    columns = values(64, 96)
    yield from check(mx, (columns.t(), values(64, 96).t(), torch.rand(64)))
    yield from check(mx, (columns.t(), values(96, 64), None))
    yield from check(ms.find_quantizer("nvfp4", hadamard=16), (values(4, 64), values(4, 64), None))
    yield from check(ms.find_quantizer("nvfp4", scale_tile=(16, 16)), (values(32, 64), values(32, 64), None))


def of_values() -> Iterator[dict[str, str]]:
    """SiLU and RMSNorm themselves, and their amax, for gates of every bf16."""
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(16, 4096)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        gate, up = gates.to(dtype), torch.randn(16, 4096).to(dtype)
        for name, run, wanted in (
            ("silu_mul", lambda g=gate, u=up: activations.silu_mul(g.to(DEVICE), u.to(DEVICE), True),
             numerics.silu_mul(gate, up)),
            ("rms_norm", lambda g=gate, u=up: activations.rms_norm(g.to(DEVICE), u[0].to(DEVICE), EPS, True),
             numerics.rms_norm(gate, up[0], EPS)),
        ):  # fmt: skip
            amax = wanted[wanted.isfinite()].abs().max().float()
            yield from same(f"{name} {dtype}", lambda r=run: (*r(), None), (wanted, amax, None))
            if DEVICE != "cpu":
                on_device = getattr(numerics, name)
                there = (gate, up) if name == "silu_mul" else (gate, up[0])
                args = [t.to(DEVICE) for t in there] + ([] if name == "silu_mul" else [EPS])
                again = on_device(*args)
                yield from same(f"reference of {name} {dtype}", lambda a=again: (a, a, None), (wanted, wanted, None))


def main(names: list[str]) -> None:
    """Compare bit for bit; the last line counts how often each kernel ran."""
    torch.manual_seed(20251122)
    ran: dict[str, int] = {}
    for name in [*(n for n in names if n != "user"), *(USER_FORMATS if "user" in names else ())]:
        cases = {"shapes": of_shapes, "values": of_values}.get(str(name), lambda n=name: of_format(n))
        for line in cases():
            if "ran" in line:
                ran[line["ran"]] = ran.get(line["ran"], 0) + 1
            else:
                print(json.dumps(line), flush=True)
    print(json.dumps({"ran": ran}))


if __name__ == "__main__":
    main(sys.argv[2:] or ms.list_formats())
