"""Triton's dequantize against the reference: every code with every scale, and every way of addressing.

`python -m tests.kernels.dequantize_cases cpu FORMAT ...` runs the kernels in Triton's interpreter, `cuda` compiled on
the device; "user" adds formats that no shipped one is like. A process of its own, because TRITON_INTERPRET must be set
before the jitted code is loaded. Prints one JSON line per mismatch, then
{"checked": n, "kernels": {format: [the kernels that ran]}}.
"""

import json
import os
import sys
from collections.abc import Iterator

if sys.argv[1:2] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.reference import dequantize as reference
from microscale.kernels.triton import dequantize, launch
from microscale.numerics import layout, packing
from microscale.testing import assert_same_bits, poison

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 1.2e-38, 5e-5, 1.0, -1.7, 3e3, 1e30, 3.4e38, torch.inf, torch.nan)
E4M3_IEEE = {"exponent": 4, "mantissa": 3, "nan": "ieee"}
USER_FORMATS = tuple(
    {"name": f"user{i}", "scale_rule": "nearest" if scale in ("e4m3", "fp32") else "rceil", "scale": scale} | rest
    for i, (scale, rest) in enumerate((
        ("e8m0", {"element": {"exponent": 3, "mantissa": 1}, "block": 32}),
        ("e4m3", {"element": {"bits": 5}, "block": 8, "outer_scale": "fp32"}),
        ("e4m3", {"element": {"bits": 6, "fraction": 3}, "block": 16, "outer_scale": {"per": "row"}}),
        ("e8m0", {"element": {"bits": 6}, "block": 8}),
        ("fp32", {"element": {"bits": 8, "fraction": 20}, "block": 256}),
        ("fp32", {"element": {"bits": 4, "fraction": 3}, "block": 8}),
        ("e8m0", {"element": "e2m1", "block": 24}),
        ("fp32", {"element": {"values": [-1, 0, 0.25, 2]}, "block": 16}),
        ("fp32", {"element": {"exponent": 3, "mantissa": 4, "nan": "all_ones"}, "block": 8}),
        ("e8m0", {"element": E4M3_IEEE, "block": 64}),
        ("e8m0", {"element": {"exponent": 4, "mantissa": 3, "bias": 11, "nan": "all_ones"}, "block": 64}),
        ("e8m0", {"element": {"exponent": 4, "mantissa": 3, "bias": 40}, "block": 16}),
        ("e8m0", {"element": {"exponent": 5, "mantissa": 2, "bias": 16}, "block": 16}),
        ("e8m0", {"element": {"exponent": 2, "mantissa": 1, "bias": -3}, "block": 16}),
        ("e8m0", {"element": {"exponent": 2, "mantissa": 3, "bias": -3}, "block": 8192}),
        (
            {"exponent": 4, "mantissa": 0, "bias": 9, "sign": False, "subnormals": False, "nan": "all_ones"},
            {"element": "int8", "block": 16},
        ),
        ({**E4M3_IEEE, "sign": False}, {"element": "int4", "block": 16, "scale_rule": "nearest"}),
    ))
)  # fmt: skip
# Rows, and columns in blocks or (from 1000 on) elements: each another way to address scales and outer scales.
SHAPES = (
    ((3,), 1, "strided"),
    ((9,), 4096, "swizzle_32_4_4"),
    ((2, 3), 7680, "swizzle_32_4_4"),
    ((131,), 3, "swizzle_32_4_4"),
    ((2, 129), 5, "swizzle_32_4_4"),
    ((4, 3), 2, "swizzle_32_4_4"),
    ((5,), 1, "swizzle_32_4_4"),
    ((), 3, "swizzle_32_4_4"),
    ((5, 2), 3, "strided"),
)


def scales(fmt: ms.FormatSpec, count: int) -> torch.Tensor:
    """`count` stored scales: every code in turn, or FP32 numbers with all edges among them."""
    if fmt.scale.width == 8:
        return torch.arange(count).remainder(256).to(torch.uint8)
    if fmt.scale.width < 8:
        return torch.arange(count).remainder(2**fmt.scale.width).to(torch.uint8)
    made = torch.randn(count) * torch.exp(20 * torch.randn(count))
    made[: len(EDGES)] = torch.tensor(EDGES)[:count]
    return made


def outers(fmt: ms.FormatSpec, shape: torch.Size, i: int) -> torch.Tensor | None:
    """An outer scale for scales of `shape`, the i-th of several: one for all, or one a row where the format has it."""
    if fmt.outer_scale is None:
        return None
    if fmt.outer_scale.per == "tensor" or i % 3 == 0:
        return torch.tensor((0.3731, 1e-30, EDGES[i % len(EDGES)])[i % 3])
    return torch.tensor(EDGES).roll(i).repeat(shape.numel())[: shape[:-1].numel()].reshape(*shape[:-1], 1)


def cases(fmt: ms.FormatSpec) -> Iterator[tuple]:
    """Yield (what, qdata, strided scales, outer scale, columns, layout, dtype)."""
    width, columns = fmt.element.width, max(2**fmt.element.width, fmt.block)
    if columns % fmt.block == 0 and columns <= 256:
        codes = torch.arange(columns).remainder(2**width).to(torch.uint8)
        for i, (dtype, step) in enumerate(zip(DTYPES, (1, 5, 3), strict=True)):
            scale = scales(fmt, 256)[::step, None].expand(-1, columns // fmt.block).contiguous()
            qdata = packing.pack(codes.expand(len(scale), -1), width)
            yield "every code and scale", qdata, scale, outers(fmt, scale.shape, i), columns, "strided", dtype
    for i, (rows, size, scale_layout) in enumerate(SHAPES):
        blocks = size if size < 1000 else -(-size // fmt.block)
        shape = torch.Size((*rows, blocks))
        if shape.numel() * fmt.block > 2**16:
            continue
        qdata = torch.randint(256, (*rows, blocks * fmt.block_bytes), dtype=torch.uint8)
        scale = scales(fmt, 2 * shape.numel())[torch.randperm(2 * shape.numel())[: shape.numel()]].reshape(shape)
        what, outer, columns = f"{list(shape)} blocks", outers(fmt, shape, i), blocks * fmt.block
        yield what, qdata, scale, outer, columns, scale_layout, DTYPES[i % 3]
        if i % 3 == 0 and fmt.block > 3:
            yield f"{what}, ragged", qdata, scale, outer, columns - 3, scale_layout, DTYPES[1]
            yield f"{what}, odd", qdata, scale, outer, columns, scale_layout, DTYPES[2]


def _at_an_odd_address(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


GUARD = 8192  # elements on either side of the output that must stay as they are


def guarded(args: tuple[object, ...], names: set[str]) -> torch.Tensor:
    """Dequantize into poisoned memory between guards; add the kernels that ran to `names`."""
    buffers, empty = [], torch.empty

    def between_guards(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 2 * GUARD,), 77.0, dtype=dtype, device=device))
        return poison(buffers[-1][GUARD : GUARD + size]).view(shape)

    torch.empty = between_guards
    try:
        with launch.recorded() as launches:
            got = dequantize.dequantize(*args)
    finally:
        torch.empty = empty
    names |= {f"{note.kernel.fn.__name__} {note.constants.get('ROWS', '')}".strip() for note in launches}
    assert len(buffers) == 1 and got.data_ptr() == buffers[0][GUARD:].data_ptr()
    assert all(bool((part == 77).all()) for part in (buffers[0][:GUARD], buffers[0][-GUARD:])), "a guard was written to"
    return got


def main(device: str, formats: list[object]) -> None:
    """Compare the values of every case bit for bit, and the memory around them."""
    checked, kernels = 0, {}
    for named in map(ms.find_format, formats):
        fmt, ran = named.for_row(64), kernels.setdefault(named.name, set())
        for what, qdata, scale, outer, columns, scale_layout, dtype in cases(fmt):
            stored = scale
            if scale_layout == layout.SWIZZLED:
                stored = layout.swizzle(scale if scale.dim() > 1 else scale[None])
            args = (qdata, stored, outer, fmt, columns, scale_layout, dtype)
            there = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
            if what.endswith("odd"):
                there = (_at_an_odd_address(there[0]), *there[1:])
            try:
                assert_same_bits(guarded(there, ran).cpu(), reference.dequantize(*args), "values")
            except AssertionError as error:
                print(json.dumps({"case": f"{fmt.name}: {what} {scale_layout} {dtype}", "error": str(error)[:300]}))
            checked += 1
    print(json.dumps({"checked": checked, "kernels": {name: sorted(ran) for name, ran in kernels.items()}}))


if __name__ == "__main__":
    torch.manual_seed(0)
    names = [n for n in sys.argv[2:] if n != "user"]
    main(sys.argv[1], [*names, *(USER_FORMATS if "user" in sys.argv[2:] else ())])
