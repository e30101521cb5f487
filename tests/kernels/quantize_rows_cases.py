"""The fused cast to rows against the reference's two steps: `python -m tests.kernels.quantize_rows_cases cpu NAME`.

Interpreted on the CPU, or with `cuda` compiled on the device. Then come names of formats, "user" for formats that no
shipped one is like. Inputs are views into larger tensors of NaN, outputs stand between guards. Prints one JSON line per
mismatch, then {"checked": n}.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator

if sys.argv[1:2] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.reference import quantize_rows as reference
from microscale.kernels.triton import quantize_blocks, quantize_rows
from microscale.ops import library
from microscale.testing import assert_same_bits

RULES = ("floor", "ceil", "rceil", "even")
USER_FORMATS = tuple(
    {"name": f"user{i}", "scale": "e8m0", "element": element, "block": block, "scale_rule": RULES[i % 4]}
    for i, (element, block) in enumerate((("e4m3", 16), ("e5m2", 64), ("e4m3", 128), ("e5m2", 16), ("e4m3", 256)))
)
# leading sizes, blocks of a row: one row and many, several in a program, full programs and parts of them, all chunks
SHAPES = (((), 1), ((5,), 3), ((2, 3), 8), ((3, 1, 2), 17), ((33,), 4), ((4,), 32), ((2,), 57), ((1,), 256))
LONG = (((3,), 28672), ((2,), 11008), ((2,), 65536))  # elements
GUARD, CANARY = 64, 0xA5
guards: list[torch.Tensor] = []


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An output between two guards, which no kernel may touch; in the place of `quantize_blocks.empty`."""
    size = torch.Size(shape).numel() * dtype.itemsize
    whole = torch.full((size + 2 * GUARD,), CANARY, dtype=torch.uint8, device=device)
    guards.append(whole)
    return whole[GUARD : GUARD + size].view(dtype).view(shape)


def untouched() -> bool:
    """Whether all guards since the last call are as they were."""
    good = all(bool((w[:GUARD] == CANARY).all() and (w[-GUARD:] == CANARY).all()) for w in guards)
    guards.clear()
    return good


def within_nan(x: torch.Tensor, device: str) -> torch.Tensor:
    """The same numbers as bf16 inside a larger tensor of NaN."""
    whole = torch.full((x.numel() + 256,), torch.nan, dtype=torch.bfloat16)
    whole[128:-128] = x.flatten().bfloat16()
    return whole.to(device)[128:-128].view(x.shape)


def kinds(lead: tuple[int, ...], columns: int, block: int, turn: int) -> torch.Tensor:
    """Rows of every kind: alike, of wide range, zero, with NaN, with infinity, subnormal, huge, of NaN blocks alone."""
    x = torch.randn(*lead, columns)
    rows = x.view(-1, columns)
    for i, row in enumerate(rows):
        kind = (i + turn) % 9
        if kind == 1:
            row *= torch.exp2(torch.randint(-140, 126, (columns // block,)).float()).repeat_interleave(block)
        elif kind == 2:
            row[:] = 0
            row[::3] = -0.0
        elif kind in (3, 4):
            row[torch.randint(columns, ())] = (torch.nan, -torch.inf)[kind - 3]
            row[:block] *= 2.0**-9
        elif kind == 5:
            row *= 1e-38
        elif kind == 6:
            row *= 1e37
        elif kind == 7:
            row[torch.arange(0, columns, block)] = (torch.nan, torch.inf)[turn % 2]
        elif kind == 8:
            row *= torch.exp2(-torch.randint(0, 24, (columns // block,)).float()).repeat_interleave(block)
    return x


def every_number() -> torch.Tensor:
    """All finite numbers of bf16: rows of neighbours, then all shuffled."""
    numbers = torch.arange(65536).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[torch.argsort(numbers.abs().nan_to_num(torch.inf), stable=True)][:65280]
    return torch.cat([numbers.view(-1, 13056), numbers[torch.randperm(len(numbers))].view(-1, 13056)])


def inputs(block: int, device: str, long: bool) -> Iterator[torch.Tensor]:
    """Yield CPU tensors, with `long` large ones too; fewer shapes on a GPU, where each takes a compilation."""
    if long:
        yield every_number()
    for i, (lead, count) in enumerate(SHAPES):
        if device == "cpu" or i % 2:
            yield kinds(lead, count * block, block, i)
    for i, (lead, columns) in enumerate(LONG):
        if long:
            yield kinds(lead, columns, block, i)


def main(device: str, formats: list[object]) -> None:
    """Compare codes and powers of every case bit for bit."""
    quantize_blocks.empty = guarded
    checked = 0
    for fmt in formats:
        named = isinstance(fmt, str)
        for rule in RULES if named and device == "cpu" else (None,):
            spec = ms.find_quantizer(fmt, **({} if rule is None else {"scale_rule": rule}))
            for cpu in inputs(spec.format.block, device, named and rule in (None, "rceil")):
                x = within_nan(cpu, device)
                problem = library.quantize_problem(x, spec, False, "strided")
                problem = dataclasses.replace(problem, op="quantize_rows", device="cuda", capability=(9, 0))
                what = f"{spec.name} {rule} {list(x.shape)}"
                try:
                    assert quantize_rows.FUSED.refusal(problem) is None
                    wanted = reference.quantize_rows(x.cpu(), spec)
                    got = quantize_rows.quantize_rows(x, spec)
                    for part, one, other in zip(("codes", "powers"), got, wanted, strict=True):
                        bits = torch.uint8 if part == "codes" else torch.int32
                        assert_same_bits(one.cpu().view(bits), other.view(bits), part)
                    assert untouched(), "wrote outside its outputs"
                except Exception as error:  # whatever goes wrong belongs to this case
                    print(json.dumps({"case": what, "error": f"{type(error).__name__}: {error}"[:300]}))
                checked += 1
    print(json.dumps({"checked": checked}))


if __name__ == "__main__":
    torch.manual_seed(0)
    names = [n for n in sys.argv[2:] if n != "user"]
    main(sys.argv[1], [*names, *(USER_FORMATS if "user" in sys.argv[2:] else ())])
