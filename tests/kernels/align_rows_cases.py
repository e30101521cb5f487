"""Triton's `align_rows` against its reference: every code under every shift, every way of addressing.

`python -m tests.kernels.align_rows_cases cpu FORMAT ...` interprets the kernel, `cuda` runs it compiled on the device;
"user" adds formats that no shipped one is like. Prints one JSON line per mismatch, then {"checked": n}.
"""

import json
import os
import sys
from collections.abc import Iterator

if sys.argv[1:2] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import align_rows
from microscale.numerics import layout, packing
from microscale.testing import assert_same_bits

USER_FORMATS = tuple(
    {"name": f"user{i}", "scale_rule": "floor", **rest}
    for i, rest in enumerate((
        {"element": "e2m1", "block": 16, "scale": "e8m0"},
        {"element": "e5m2", "block": 64, "scale": "e8m0"},
        {"element": "e3m2", "block": 128, "scale": "e8m0"},
        {"element": {"exponent": 4, "mantissa": 3, "bias": 11, "nan": "all_ones"}, "block": 32, "scale": "e8m0"},
        {"element": {"exponent": 4, "mantissa": 1, "bias": 9}, "block": 256, "scale": "e8m0"},
        {"element": {"exponent": 3, "mantissa": 0, "bias": 3}, "block": 32, "scale": "e8m0"},
        {"element": {"exponent": 1, "mantissa": 2, "bias": 1}, "block": 32, "scale": "e8m0"},
        {"element": {"exponent": 4, "mantissa": 3, "bias": 0, "nan": "all_ones"}, "block": 16, "scale": "e8m0"},
    ))
)  # fmt: skip
# (leading sizes, columns): full programs, parts of them, several rows in one, several rounds in a row, ragged ends
SHAPES = (((4,), 8192), ((3,), 9984), ((2,), 2048), ((33,), 64), ((129,), 32), ((2, 5), 300), ((3, 2), 100), ((7,), 17))


def every_code_and_shift(fmt: ms.FormatSpec) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows whose first block decides the exponent: each has every code under each of 16 smaller scales, or NaN."""
    width, block = fmt.element.width, fmt.block
    blocks = -(-(2**width) // block)  # that hold every code
    codes = torch.arange(blocks * block).remainder(2**width).to(torch.uint8)
    rows, tops = [], (254, 247, 200, 127, 40, 9, 0)
    for top in tops:
        for first in range(0, 48, 16):
            scales = (top - first - torch.arange(16)).clamp(min=0)
            scales[-1] = 255
            rows.append(torch.cat([torch.tensor([top]), scales.repeat_interleave(blocks)]))
    scale = torch.stack(rows).to(torch.uint8)
    every = torch.cat([torch.zeros(block, dtype=torch.uint8), codes.repeat(16)])
    return packing.pack(every.expand(len(rows), -1), width), scale, scale.shape[-1] * block


def cases(fmt: ms.FormatSpec, device: str) -> Iterator[tuple]:
    """Yield (what, qdata, stored scales, columns, layout): fewer on a GPU, where each takes a compilation."""
    yield "every code and shift", *every_code_and_shift(fmt), layout.STRIDED
    for i, (lead, columns) in enumerate(SHAPES):
        if device == "cuda" and i % 3:
            continue
        blocks = -(-columns // fmt.block)
        qdata = torch.randint(256, (*lead, blocks * fmt.block_bytes), dtype=torch.uint8)
        scale = torch.randint(112, 134, (*lead, blocks)).to(torch.uint8)
        scale.view(-1, blocks)[i % 2, :: 2 + i] = 255
        if i % 3 == 0:
            scale[..., -1, :] = 255 if i % 2 else 0
        if device == "cpu" or i % 2:
            yield f"{[*lead, columns]}", qdata, scale, columns, layout.STRIDED
        if device == "cpu" or i % 2 == 0:
            yield f"{[*lead, columns]}, swizzled", qdata, layout.swizzle(scale), columns, layout.SWIZZLED


def main(device: str, formats: list[object]) -> None:
    """Compare codes and row scales of every case bit for bit."""
    checked = 0
    for fmt in (ms.find_format(f) for f in formats):
        assert reference.fits(fmt), fmt.name
        for what, qdata, scale, columns, scale_layout in cases(fmt, device):
            align_rows.ENOUGH = 1 if columns > 4096 else 4096  # so that long rows are taken whole
            expected = reference.align_rows(qdata, scale, fmt, columns, scale_layout)
            got = align_rows.align_rows(qdata.to(device), scale.to(device), fmt, columns, scale_layout)
            try:
                for part, actual, wanted in zip(("codes", "row scales"), got, expected, strict=True):
                    bits = torch.uint8 if part == "codes" else torch.float32
                    assert_same_bits(actual.cpu().view(bits), wanted.view(bits), part)
            except AssertionError as error:
                print(json.dumps({"case": f"{fmt.name}: {what}", "error": str(error)[:300]}))
            checked += 1
    print(json.dumps({"checked": checked}))


if __name__ == "__main__":
    torch.manual_seed(0)
    names = [n for n in sys.argv[2:] if n != "user"]
    main(sys.argv[1], [*names, *(USER_FORMATS if "user" in sys.argv[2:] else ())])
