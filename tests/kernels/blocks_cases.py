"""Quantize kernels whose threads own blocks, against the reference: `python -m tests.kernels.blocks_cases cpu NAME`.

Interpreted on the CPU, or with `cuda` compiled on the device. NAME: a format, or "user" for formats that no shipped one
is like. Every format along rows and columns, in both scale layouts; the modes (stochastic rounding, Hadamard, scale
tiles, rules, candidates, given outer scales, both axes at once, several matrices) in turn. Inputs are views into larger
tensors full of NaN, outputs stand between guards. Prints one JSON line per mismatch, then {"checked": n, "ran": [...]}.
"""

import dataclasses
import itertools
import json
import os
import sys

if sys.argv[1:2] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale import dispatch
from microscale.errors import MicroscaleError
from microscale.kernels.reference import groups as reference_groups
from microscale.kernels.reference import quantize as reference
from microscale.kernels.triton import blocks_fit, groups, quantize_blocks, quantize_both
from microscale.numerics import layout
from microscale.ops import library
from microscale.ops.both import both_problem
from microscale.testing import assert_same_bits
from tests.kernels.interpreted_modes import USER_FORMATS

DEVICE = torch.device(sys.argv[1] if sys.argv[1:2] in (["cpu"], ["cuda"]) else "cpu")
SIGN = tuple(-1 if i % 3 == 1 else 1 for i in range(16))
MODES = (
    {"rounding": "stochastic"},
    {"hadamard": {"size": 16, "sign": SIGN}},
    {"scale_tile": 16},
    {"scale_rule": "even"},
    {"hadamard": 64},
    {"scale_tile": 32},
    {"scale_rule": "floor"},
    {"scale_rule": {"candidates": [1.0, 1.5, 0.75], "metric": "mse"}},
    {"scale_rule": "ceil"},
)
GUARD, CANARY = 64, 0xA5
guards: list[torch.Tensor] = []


def guarded(shape, dtype, device):
    """An output between two guards, which no kernel may touch; instead of `quantize_blocks.empty`."""
    size = torch.Size(shape).numel() * dtype.itemsize
    whole = torch.full((size + 2 * GUARD,), CANARY, dtype=torch.uint8, device=device)
    guards.append(torch.cat([whole[:GUARD].clone(), whole[GUARD + size :].clone()]))  # what they were
    guards.append(whole)
    return whole[GUARD : GUARD + size].view(dtype).view(shape)


def untouched() -> bool:
    """Whether all guards since the last call are as they were."""
    good = all(bool((w[:GUARD] == CANARY).all() and (w[-GUARD:] == CANARY).all()) for w in guards[1::2])
    guards.clear()
    return good


def data(rows: int, columns: int, lead: tuple[int, ...] = ()) -> torch.Tensor:
    """bf16 of every kind, inside a larger tensor of NaN."""
    x = torch.randn(*lead, rows, columns)
    x[..., 1, :] *= torch.exp(6 * torch.randn(columns))
    x[..., 2, :], x[..., 3, : columns // 2] = 0, -0.0
    x[..., 4, 1], x[..., 5, 7] = torch.nan, torch.inf
    x[..., 6, :] *= 1e-38
    x[..., 7, :] *= 1e37
    whole = torch.full((x.numel() + 256,), torch.nan, dtype=torch.bfloat16)
    whole[128:-128] = x.flatten().bfloat16()
    return whole.to(DEVICE)[128:-128].view(x.shape)


class Suite:
    """Runs cases and counts them."""

    def __init__(self) -> None:
        self.checked, self.ran = 0, set()
        self.seed = torch.tensor([12345678901234, 3], device=DEVICE)

    def compare(self, what: str, run, expected) -> None:
        """Compare outputs bit for bit and look at the guards."""
        try:
            got = run()
            for i, (one, other) in enumerate(zip(got, expected, strict=True)):
                assert (one is None) == (other is None), i
                if other is not None:
                    assert_same_bits(one, other, f"output {i}")
            assert untouched(), "wrote outside its outputs"
        except Exception as error:  # whatever goes wrong belongs to this case
            print(json.dumps({"case": what, "error": f"{type(error).__name__}: {error}"[:400]}))
        self.checked += 1

    def one_axis(self, spec: ms.QuantizerSpec, x: torch.Tensor, kind: str, scale_layout: str, **given) -> None:
        """One call along rows or columns, where the kernel takes it."""
        arg = x if kind == "rows" else x.mT
        wants = blocks_fit.ROWS if kind == "rows" else blocks_fit.COLUMNS
        problem = library.quantize_problem(arg, spec, bool(given), scale_layout)
        if wants.refusal(dataclasses.replace(problem, device="cuda", capability=(9, 0))) is not None:
            return
        self.ran.add(kind)
        kernel = quantize_blocks.quantize if kind == "rows" else quantize_blocks.quantize_columns
        args = (arg, spec, given.get("amax"), given.get("outer_scale"), self.seed, scale_layout)
        name = f"{spec.name} {kind} {scale_layout} {list(x.shape)} {list(given)}"
        self.compare(name, lambda: kernel(*args), reference.quantize(*args))

    def both(self, spec: ms.QuantizerSpec, other: ms.QuantizerSpec, x: torch.Tensor, scale_layout: str) -> None:
        """Both axes at once, where the kernel takes it."""
        (fused,) = (k for k in dispatch.kernels("quantize_both") if k.name == "triton.quantize_both")
        problem = dataclasses.replace(both_problem(x, spec, other, scale_layout), device="cuda", capability=(9, 0))
        if fused.requires.refusal(problem) is None:
            self.ran.add("both")
            args = (x, spec, other, (None, None), (self.seed, self.seed + 1), scale_layout)
            name = f"{spec.name} and {other.name} {scale_layout}"
            self.compare(name, lambda: quantize_both.quantize_both(*args), reference.quantize_both(*args))


def main(names: list[str]) -> None:
    """Run the cases of formats; the modes take turns over the formats, all of them on a GPU."""
    torch.manual_seed(0)
    suite, turn = Suite(), itertools.cycle(range(len(MODES)))
    x, tall, stack = data(32, 256), data(64, 96), data(32, 128, (2,))
    formats = [f for f in names if f != "user"]
    if "user" in names:
        formats += [{"name": name.replace(" ", "_"), "scale_rule": _rule(d), **d} for name, d in USER_FORMATS.items()]
    for fmt in formats:
        spec = ms.find_quantizer(fmt).for_row(64)
        for scale_layout in layout.LAYOUTS:
            suite.one_axis(spec, x, "rows", scale_layout)
            suite.one_axis(spec, tall, "columns", scale_layout)
        suite.one_axis(spec, stack, "rows", layout.SWIZZLED)
        suite.one_axis(spec, stack, "columns", layout.STRIDED)
        if fmt == "mxfp4":  # memory from elsewhere, between two words
            odd = torch.empty(x.numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(x.shape).copy_(x)
            args = (odd, spec, None, None, None, layout.STRIDED)
            suite.compare("unaligned", lambda a=args: quantize_blocks.quantize(*a), reference.quantize(*args))
        if fmt == "nvfp4":  # a run of as many blocks along rows as the pair's tile can hold
            suite.both(ms.find_quantizer(fmt, hadamard=64), spec, x, layout.STRIDED)
        suite.both(spec, spec, tall, layout.SWIZZLED if next(turn) % 2 else layout.STRIDED)
        if spec.format.outer_scale is not None and spec.format.outer_scale.per == "tensor":
            suite.one_axis(spec, x, "rows", layout.STRIDED, amax=torch.tensor(3.0, device=DEVICE))
            suite.one_axis(spec, tall, "columns", layout.STRIDED, outer_scale=torch.tensor(0.01, device=DEVICE))
        count = len(MODES) if DEVICE.type == "cuda" else 3
        for _, changes in zip(range(count), itertools.islice(itertools.cycle(MODES), next(turn), None), strict=False):
            try:
                changed = ms.find_quantizer(spec, **changes)
            except MicroscaleError:
                continue
            suite.one_axis(changed, x, "rows", layout.STRIDED)
            if DEVICE.type == "cuda" or "scale_tile" in changes:
                suite.one_axis(changed, x, "rows", layout.SWIZZLED)
            suite.one_axis(changed, tall, "columns", layout.SWIZZLED)
            suite.both(spec, changed, tall, layout.STRIDED)
    if "user" in names:
        for ends in ([3, 3, 9, 12], [0, 32], [40], []):
            offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
            wanted = reference_groups.group_amax(x, offsets)
            suite.compare(f"group_amax {ends}", lambda o=offsets: (groups.group_amax(x, o),), (wanted,))
    print(json.dumps({"checked": suite.checked, "ran": sorted(suite.ran)}))


def _rule(description: dict[str, object]) -> str:
    """A rule that fits the scale of a user's format."""
    scale = ms.find_element(description["scale"])
    return "rceil" if scale.exponent_only else "nearest"


if __name__ == "__main__":
    quantize_blocks.empty = quantize_both.blocks.empty = guarded
    main(sys.argv[2:])
