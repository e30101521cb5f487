"""The grouped kernels against FP64, within the derived bound.

`python -m tests.kernels.grouped_cases cpu FORMAT ...` runs them in Triton's interpreter, `cuda` compiled on the device;
"plain" multiplies plain operands, and the gradient of the matrices; "columns" takes that gradient from operands that
are stored column by column; "user" adds formats that no shipped one is like;
"engine" pretends in the interpreter that there is a copy engine. A process of its own, because TRITON_INTERPRET must
be set before the jitted code is loaded. Prints one JSON line per mismatch, then
{"checked": n, "kernels": {format: [the kernels that ran]}}.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator

if sys.argv[1:2] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.triton import grouped, launch, properties
from microscale.numerics import layout
from microscale.testing import assert_same_bits, poison
from tests.kernels.products import parts, wide

ENDS = {  # of four groups, out of 53 rows
    "ragged": (17, 17, 40, 53),
    "with rows left over": (1, 2, 33, 50),
    "empty at both ends": (0, 20, 53, 53),
    "all in one": (0, 0, 53, 53),
    "none": (0, 0, 0, 0),
}
USER_FORMATS = tuple(
    {"name": f"user{i}", "scale": scale, "scale_rule": rule} | rest
    for i, (scale, rule, rest) in enumerate((
        ("e8m0", "rceil", {"element": "mxint8", "block": 256}),
        ("e4m3", "nearest", {"element": "int4", "block": 8}),
        ("e4m3", "nearest", {"element": "e3m2", "block": 64, "outer_scale": {"dtype": "fp32", "per": "expert"}}),
    ))
)  # fmt: skip
ROWS, EXPERTS = 53, 4
SIZES = ((72, 192), (130, 72), (33, 256), (64, 40))  # columns and K
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def expected(a: torch.Tensor, b: torch.Tensor, ends: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 results, and the sums of magnitudes."""
    out, size = (torch.zeros(a.shape[0], b.shape[-1], dtype=torch.float64) for _ in range(2))
    start = 0
    for expert, stop in enumerate(ends):
        out[start:stop] = a[start:stop] @ b[expert]
        size[start:stop] = a[start:stop].abs() @ b[expert].abs()
        start = stop
    return out, size


def check(got: torch.Tensor, out: torch.Tensor, size: torch.Tensor, depth: int) -> None:
    """Within the bound of the kernels' records; NaN where and only where it should be."""
    info = torch.finfo(got.dtype)
    limit = (1.25 * depth + 8) * 2.0**-23 * size
    limit = limit + (out.abs() + limit) * info.eps / 2 + info.tiny
    got = got.cpu().double()
    assert got.shape == out.shape and torch.equal(got.isnan(), out.isnan()), "shape or NaN"
    wrong = ~((got - out).abs() <= limit) & ~out.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {out.numel()}, first at {wrong.nonzero()[0].tolist()}"


GUARD = 4096  # elements on either side of outputs that must stay as they are


@contextlib.contextmanager
def guards() -> Iterator[None]:
    """Have torch.empty give poisoned memory between guards, and look at these in the end."""
    buffers, empty = [], torch.empty

    def between_guards(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 2 * GUARD,), 77.0, dtype=dtype, device=device))
        return poison(buffers[-1][GUARD : GUARD + size]).view(shape)

    torch.empty = between_guards
    try:
        yield
    finally:
        torch.empty = empty
    for buffer in buffers:
        assert bool((buffer[:GUARD] == 77).all() & (buffer[-GUARD:] == 77).all()), "a guard was written to"


@contextlib.contextmanager
def small_workspace(bytes_: int) -> Iterator[None]:
    before, grouped.WORKSPACE = grouped.WORKSPACE, bytes_
    try:
        yield
    finally:
        grouped.WORKSPACE = before


# -- operands ----------------------------------------------------------------------------------------------------------


def weights(fmt: ms.FormatSpec, columns: int, size: int, i: int, device: str) -> ms.BlockScaledTensor:
    """w [E, N, K], quantized: an outer scale for each tensor, row or expert where the format has one."""
    w = torch.randn(EXPERTS, columns, size, device=device)
    w[1, 3, 5], w[2, 0, size - 1] = (torch.nan, torch.inf) if i % 2 else (1.0, -3.0)
    changes = {}
    if fmt.outer_scale is not None and fmt.outer_scale.per == "tensor" and i % 3:
        changes["amax"] = w.nan_to_num(0, 0, 0).abs().amax((1, 2), keepdim=True)
    scale_layout = layout.LAYOUTS[i % 2]
    return ms.quantize(w.bfloat16(), fmt, layout=scale_layout, **changes)


def tokens(size: int, device: str) -> torch.Tensor:
    return torch.randn(ROWS, size, device=device).bfloat16()


def cases(fmt: ms.FormatSpec, device: str) -> Iterator[tuple]:
    """Yield (what, a, b): plain and quantized tokens, weights as a linear layer has them and with blocks across K."""
    for i, (columns, size) in enumerate(SIZES):
        x, w = tokens(size, device), weights(fmt, columns, size, i, device)
        yield f"{columns} x {size}", x, w.mT
        if i % 2:
            qx = ms.quantize(x, fmt)
            yield f"{columns} x {size}, both", qx, w.mT
            yield f"{columns} x {size}, tokens", qx, torch.randn_like(w.dequantize()).mT
            yield f"{columns} x {size}, experts 1 to 4", x, _without_first(w).mT
        if fmt.outer_scale is None or fmt.outer_scale.per == "tensor":
            across = ms.quantize(torch.randn(EXPERTS, size, columns, device=device).bfloat16(), fmt)
            yield f"{columns} x {size}, blocks along N", x, across


def _without_first(w: ms.BlockScaledTensor) -> ms.BlockScaledTensor:
    """The same experts, cut out of more, so that strides are not those of dense memory and addresses are odd."""
    more = torch.cat([w.qdata.new_zeros(3), w.qdata.flatten()])[3:].view(w.qdata.shape)
    return w.replace(qdata=more)


# -- comparisons -------------------------------------------------------------------------------------------------------


def products(fmt: ms.FormatSpec, device: str, ran: set[str]) -> Iterator[tuple[str, str | None]]:
    """Compare every case by each kernel that takes it."""
    ends = itertools.cycle(ENDS.items())
    for i, (what, a, b) in enumerate(cases(fmt, device)):
        spread, stops = next(ends)
        offsets = torch.tensor(stops, dtype=torch.int32, device=device)
        a64, b64 = wide(a).cpu(), wide(b).cpu()
        out, size = expected(a64, b64, stops)
        kernels = [grouped.grouped_two_pass]
        if isinstance(b, ms.BlockScaledTensor) and b.block_axis == -2:
            kernels.append(grouped.grouped_matmul)
        for kernel in kernels:
            dtype = DTYPES[i % 3]
            case = f"{fmt.name}: {what}, {spread} by {kernel.__name__} to {dtype}"
            yield case, _error(kernel, (parts(a), parts(b), offsets, dtype), (out, size, a64.shape[1]), ran)


def _error(kernel, args, wanted, ran: set[str], workspace: int = 2**15) -> str | None:
    try:
        with guards(), launch.recorded() as launches, small_workspace(workspace):
            got = kernel(*args)
        if got.is_cuda:
            assert_same_bits(kernel(*args), got, "the same again")
        check(got, *wanted)
    except AssertionError as error:
        return str(error)[:300]
    for note in launches:
        ways = [
            w.lower()
            for w in ("ACROSS", "COPIES", "EVEN", "A_OUTER", "B_OUTER", "A_DOWN", "B_DOWN")
            if note.constants.get(w)
        ]
        if note.kernel.fn.__name__.startswith("grouped"):
            ran.add(" ".join([note.kernel.fn.__name__, *ways]))
    return None


def plain(device: str, ran: set[str]) -> Iterator[tuple[str, str | None]]:
    """Plain operands in any order, and the gradient of the matrices, for every way of spreading the rows."""
    for (columns, size), (spread, stops) in itertools.product((*SIZES, (40, 63), (256, 64)), ENDS.items()):
        offsets = torch.tensor(stops, dtype=torch.int32, device=device)
        x, dy = tokens(size, device), tokens(columns, device)
        w = torch.randn(EXPERTS, columns, size, device=device).bfloat16()
        x[-1], dy[-1] = torch.nan, torch.inf  # a row that often is in no group, and never in the first
        for what, b in (("w.mT", w.mT), ("w", w.mT.contiguous()), ("strided", w.mT[:, ::2].repeat(1, 2, 1)[:, :size])):
            out, total = expected(x.cpu().double(), b.cpu().double(), stops)
            args = (x, b, offsets, torch.bfloat16)
            yield (
                f"{columns} x {size}, {what}, {spread}",
                _error(grouped.grouped_two_pass, args, (out, total, size), ran),
            )
        for left, right in ((dy, x), (dy.t().contiguous().t(), x)):
            dtype = DTYPES[size % 2]
            starts = (0, *stops)
            rows = [slice(*pair) for pair in zip(starts, stops, strict=False)]
            out = torch.stack([left[r].cpu().double().t() @ right[r].cpu().double() for r in rows])
            total = torch.stack([left[r].cpu().double().abs().t() @ right[r].cpu().double().abs() for r in rows])
            args = (left, right, offsets, dtype)
            yield f"wgrad {columns} x {size}, {spread}", _error(grouped.grouped_wgrad, args, (out, total, ROWS), ran)


def columns_first(device: str, ran: set[str]) -> Iterator[tuple[str, str | None]]:
    """The gradient of the matrices from operands of which each column lies together, as decoding leaves them.

    Groups that start at multiples of eight and others, and what falls back: an odd number of rows, odd addresses.
    """
    ends = ENDS | {"whole": (24, 24, 40, 64), "whole with rows left over": (8, 16, 16, 56)}
    for (columns, size), (spread, stops) in itertools.product(((72, 192), (33, 256), (130, 40), (1, 1)), ends.items()):
        offsets = torch.tensor(stops, dtype=torch.int32, device=device)
        for i, rows in enumerate((64, 64, 64, 60, 64)):
            dy, x = (torch.randn(rows, n, device=device).bfloat16() for n in (columns, size))
            starts = (0, *stops)
            inside = torch.zeros(rows, dtype=torch.bool, device=device)
            inside[: stops[-1]] = True
            dy[~inside], x[~inside] = torch.nan, torch.inf
            if stops[0] < stops[1]:
                x[stops[0], 0] = torch.nan  # the first of the second group, which no other may see
            left, right = (_as_columns(t, i == 4) if down else t for t, down in ((dy, i != 1), (x, i != 2)))
            parts_ = [slice(*pair) for pair in zip(starts, stops, strict=False)]
            out = torch.stack([dy[r].cpu().double().t() @ x[r].cpu().double() for r in parts_])
            total = torch.stack([dy[r].cpu().double().abs().t() @ x[r].cpu().double().abs() for r in parts_])
            args = (left, right, offsets, DTYPES[(i + size) % 3])
            wanted = (out, total.nan_to_num(0), rows)
            yield f"wgrad {columns} x {size}, {rows} {spread}, {i}", _error(grouped.grouped_wgrad, args, wanted, ran)


def _as_columns(t: torch.Tensor, odd: bool) -> torch.Tensor:
    """The same values column by column, with room between columns; `odd`: from an odd address on."""
    rows, columns = t.shape
    room = torch.full((columns * (rows + 8) + 1,), torch.nan, dtype=t.dtype, device=t.device)
    out = room[int(odd) :][: columns * (rows + 8)].view(columns, rows + 8)[:, :rows].t()
    return out.copy_(t)


def main(device: str, names: list[str]) -> None:
    checked, kernels = 0, {}
    if device == "cpu" and "engine" in names:  # as if there were a copy engine
        properties.capability = lambda device: (9, 0)
    formats = [n for n in names if n not in ("engine", "user")] + list(USER_FORMATS if "user" in names else ())
    for fmt in formats:
        ran = kernels.setdefault(fmt["name"] if isinstance(fmt, dict) else fmt, set())
        other = {"plain": plain, "columns": columns_first}.get(str(fmt))
        found = other(device, ran) if other is not None else products(ms.find_format(fmt), device, ran)
        for case, error in found:
            checked += 1
            if error is not None:
                print(json.dumps({"case": case, "error": error}))
    print(json.dumps({"checked": checked, "kernels": {name: sorted(ran) for name, ran in kernels.items()}}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], sys.argv[2:])
