"""Every mode of the quantize kernels against the reference: `python -m tests.kernels.interpreted_modes PART PARTS`.

Formats (shipped, and of every shape that the registry can describe) x scale rules and candidate searches x rounding x
scale tiles x Hadamard x scale layout x dtype x how x lies in memory x given or dynamic outer scale: not the whole
product, but enough cases that every pair of choices meets where it may. Prints one JSON line per mismatch, then
{"checked": n, "pairs": of choices that met, "launches": {call: kernels that ran}}.

Interpreted on the CPU, in a process of its own; with `cuda` as third argument compiled on the GPU, same cases.
"""

import itertools
import json
import os
import random
import sys

os.environ["TRITON_INTERPRET"] = "0" if "cuda" in sys.argv else "1"

import torch

import microscale as ms
from microscale.errors import SpecError
from microscale.kernels.reference import quantize as reference
from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton import launch, quantize, tiles
from microscale.testing import assert_same_bits, poison

DEVICE = "cuda" if "cuda" in sys.argv else "cpu"
FP16 = {"exponent": 5, "mantissa": 10, "nan": "ieee", "inf": True}
E5M0 = {"exponent": 5, "mantissa": 0, "sign": False, "subnormals": False, "nan": "all_ones"}
NO_ZERO_SCALE = {"exponent": 5, "mantissa": 2, "sign": False, "subnormals": False, "nan": "all_ones"}
NO_ZERO = {"exponent": 2, "mantissa": 1, "subnormals": False}
USER_FORMATS = {  # what no shipped format is like
    "e3m1": {"element": {"exponent": 3, "mantissa": 1}, "block": 32, "scale": "e8m0"},
    "int5": {"element": {"bits": 5}, "block": 8, "scale": "e4m3", "outer_scale": "fp32"},
    "odd block": {"element": "e2m1", "block": 24, "scale": "e8m0"},
    "block of one": {"element": "e4m3", "block": 1, "scale": "fp32"},
    "block of 96": {"element": "e3m2", "block": 96, "scale": "e8m0"},
    "two bits": {"element": {"values": [-1, 0, 0.25, 2]}, "block": 16, "scale": "fp32"},
    "small codebook": {"element": {"values": [-0.25, 0, 0.125, 0.5]}, "block": 8, "scale": "fp32"},
    "value twice": {
        "element": {"values": [-1, 0, 1, 1]},
        "block": 8,
        "scale": "e4m3",
        "outer_scale": {"per": "row"},
    },
    "codebook without zero": {"element": {"values": [-3, -1, 1, 3]}, "block": 12, "scale": "e8m0"},
    "codebook of 32": {"element": {"values": [round(-1.7 + i**1.3 / 20, 3) for i in range(32)]}, "block": 8,
                       "scale": "ue5m3", "outer_scale": {"per": "expert"}},
    "codebook of 256": {"element": {"values": [i**3 / 1e5 for i in range(-128, 128)]}, "block": 16, "scale": "fp32"},
    "no zero": {"element": NO_ZERO, "block": 16, "scale": "e4m3", "outer_scale": "fp32"},
    "no zero by expert": {"element": NO_ZERO, "block": 8, "scale": "e4m3", "outer_scale": {"per": "expert"}},
    "scale without zero": {"element": "e2m3", "block": 16, "scale": NO_ZERO_SCALE, "outer_scale": {"per": "row"}},
    "uneven int": {"element": {"bits": 4, "fraction": 1, "symmetric": False}, "block": 16, "scale": "e8m0"},
    "bf16 scale": {"element": "e4m3", "block": 32, "scale": "bf16"},
    "fp16 scale": {"element": "int8", "block": 16, "scale": FP16},
    "capped": {"element": {"exponent": 4, "mantissa": 3, "nan": "all_ones", "max": 240.0}, "block": 32,
               "scale": {"exponent": 4, "mantissa": 3, "nan": "all_ones", "max": 256.0}, "outer_scale": "fp32"},
    "large elements": {"element": {"exponent": 2, "mantissa": 1, "bias": -118}, "block": 16, "scale": "e8m0"},
    "small elements": {"element": {"exponent": 3, "mantissa": 2, "bias": 116}, "block": 16, "scale": "e8m0"},
    "small exponent": {"element": "e2m1", "block": 16, "scale": E5M0},
}  # fmt: skip
SIGNS = [(-1) ** (i * i // 3 % 5) for i in range(128)]
CHOICES = {
    "format": (*ms.list_formats(), *USER_FORMATS),
    "rule": (
        None, None, "floor", "ceil", "even", "four_over_six", "four_over_six_mae",
        {"candidates": [1.0, 0.5, 0.8125, 1.25, 1.75], "metric": "mse"},
        {"candidates": [1.0, 1.25, 0.75], "metric": "max"}, {"candidates": [2.0, 1.0], "metric": "mse"},
    ),
    "rounding": ("nearest_even", "stochastic"),
    "tile": (None, None, (16, 16), (32, 32), (128, 128), (3, 2), (1, 3), (5, 1)),  # columns below 16: in blocks
    "hadamard": (None, None, 2, 16, {"size": 16, "sign": SIGNS[:16]}, 128, {"size": 128, "sign": SIGNS}),
    "layout": ("strided", "swizzle_32_4_4"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "lies": ("dense", "transposed", "sliced", "stepped", "batch", "permuted", "one row", "vector", "tall", "repeated"),
    "columns": ("whole", "ragged"),
    "outer": ("dynamic", "dynamic", "amax", "scale", "amaxes", "scales", "broadcast", "strange"),
}  # fmt: skip
CASES = 260


def spec_of(case: dict[str, object]) -> ms.QuantizerSpec | None:
    """The quantizer of a case, or None where there is none such."""
    fmt = case["format"]
    if fmt in USER_FORMATS:
        made = USER_FORMATS[fmt]
        exponent_only = made["scale"] == "e8m0" or made["scale"] is E5M0
        fmt = {"name": fmt.replace(" ", "_"), "scale_rule": "rceil" if exponent_only else "nearest", **made}
    try:
        base = ms.find_quantizer(fmt).for_row(72)
        block = base.format.block
        tile = case["tile"]
        if tile is not None and tile[1] < 16:
            tile = (tile[0], tile[1] * block)
        return ms.find_quantizer(
            base, scale_rule=case["rule"], rounding=case["rounding"], scale_tile=tile, hadamard=case["hadamard"]
        )
    except SpecError:
        return None


def width_of(spec: ms.QuantizerSpec, ragged: bool) -> int:
    """Columns: two blocks and more; ragged: no whole number of blocks, where the Hadamard size allows it."""
    size = spec.hadamard.size if spec.hadamard else 1
    block = spec.format.block
    whole = -(-2 * block // size) * size
    while whole % block:
        whole += size
    return whole + (size if size > 1 else 3) if ragged else whole


def fill(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of every kind: normal, wide range, zero, negative zero, NaN, infinity, tiny, huge."""
    x = torch.randn(rows, columns, generator=generator)
    if rows > 8:
        x[1] *= torch.exp(6 * torch.randn(columns, generator=generator))
        x[2], x[3, : columns // 2] = 0, -0.0
        x[4, 1], x[5, columns // 2], x[6], x[7] = torch.nan, torch.inf, x[6] * 1e-38, x[7] * 1e4
        x[8] = torch.randint(-24, 24, (columns,), generator=generator) / 4  # ties
    return x


def tensor_of(lies: str, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A tensor [..., R, columns] that lies in memory as named."""
    if lies == "vector":
        return fill(9, columns, generator)[8].to(dtype)
    if lies == "one row":
        return fill(1, columns, generator).to(dtype)
    x = fill({"tall": 134, "sliced": 37}.get(lies, 18), columns, generator).to(dtype)
    if lies == "transposed":
        return x.t().contiguous().t()
    if lies == "sliced":
        return _inside(x)
    if lies == "stepped":
        return x.repeat_interleave(2, 1)[:, ::2]
    if lies == "batch":
        return x.reshape(2, 9, columns)
    if lies == "permuted":
        return x.reshape(2, 9, columns).transpose(1, 2).contiguous().transpose(1, 2)
    if lies == "repeated":
        return x[4:7].unsqueeze(1).expand(3, 4, columns)
    return x


def _inside(x: torch.Tensor) -> torch.Tensor:
    """X as part of a larger matrix, its rows starting at odd places."""
    wide = torch.full((x.shape[0], x.shape[1] + 9), 7.0, dtype=x.dtype)
    wide[:, 5:-4] = x
    return wide[:, 5:-4]


def _moved(x: torch.Tensor) -> torch.Tensor:
    """X on the device, lying as before; x.to() might make it dense."""
    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.element_size(),))
    return flat.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def outer_of(
    kind: str, x: torch.Tensor, spec: ms.QuantizerSpec, generator: torch.Generator
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(amax, outer_scale) as the reference takes them."""
    outer = spec.format.outer_scale
    if outer is None or kind == "dynamic":
        return None, None
    if kind in ("amax", "scale"):
        value = torch.tensor(3.25 if kind == "amax" else 0.0017)
        return (value, None) if kind == "amax" else (None, value)
    if kind == "strange":
        value = torch.tensor(random.choice([0.0, torch.nan, torch.inf, 1e-45, 3e38]))
        return (value, None) if random.random() < 0.5 else (None, value)
    shape = {"tensor": [1] * x.dim(), "row": [*x.shape[:-1], 1], "expert": [*x.shape[:-2], *[1] * min(2, x.dim())]}
    if kind == "broadcast" and x.dim() == 3:
        shape = dict.fromkeys(shape, [1, x.shape[1], 1] if spec.scale_tile is None else [1, 1, 1])
    values = torch.rand(shape[outer.per], generator=generator) * 4
    if values.numel() > 4:
        values.view(-1)[:4] = torch.tensor([0.0, torch.nan, torch.inf, 1e-40])
    return (values, None) if kind != "scales" else (None, values / 512)


def cases() -> list[dict[str, object]]:
    """Cases in which every pair of choices meets that may; the same on every run."""
    chance = random.Random(0)
    wanted = {
        (a, i, b, j)
        for a, b in itertools.combinations(CHOICES, 2)
        for i in range(len(CHOICES[a]))
        for j in range(len(CHOICES[b]))
    }
    made = []
    for _ in range(CASES):
        best, found, most = None, set(), -1
        for _ in range(12):
            picked = {name: chance.randrange(len(values)) for name, values in CHOICES.items()}
            case = {name: CHOICES[name][i] for name, i in picked.items()}
            met = {(a, picked[a], b, picked[b]) for a, b in itertools.combinations(picked, 2)} & wanted
            if len(met) > most and spec_of(case) is not None:
                best, most, found = case, len(met), met
        if best is not None:
            made.append(best)
            wanted -= found
    return made


def check(case: dict[str, object], number: int) -> str | None:
    """Return how the kernel differs from the reference, or None."""
    generator = torch.Generator().manual_seed(number)
    random.seed(number)
    # What depends on sizes that no interpreter gets through: more launches, programs that share a tile, 64-bit places.
    outer_scales.SMALL, outer_scales.LONG = ((16384, 65536), (64, 128))[number % 2]
    tiles.SHARED = (2**16, 256)[number // 2 % 2]
    quantize.WIDE = (2**31, 1)[number // 4 % 2]
    tiles.plan_of_amax.cache_clear()
    spec = spec_of(case)
    x = tensor_of(case["lies"], width_of(spec, case["columns"] == "ragged"), case["dtype"], generator)
    seed = torch.tensor([1234567890123 + number, 3])
    given = outer_of(case["outer"], x, spec, generator)
    expected = reference.quantize(x, spec, *given, seed, case["layout"])
    there = _moved(x)
    given = [None if t is None else t.to(DEVICE) for t in given]
    got = quantize.quantize(there, spec, *given, seed.to(DEVICE), case["layout"])
    try:
        for part, actual, wanted in zip(("qdata", "scale", "outer"), got, expected, strict=True):
            assert (actual is None) == (wanted is None), part
            if wanted is not None:
                assert_same_bits(actual.cpu(), wanted, part)
    except AssertionError as error:
        return f"{spec.name} {list(x.shape)} {x.stride()} {x.dtype} {case}: {str(error)[:300]}"
    return None


def launches() -> dict[str, list[str]]:
    """Which kernels run, in order, for calls whose number of launches is promised."""
    large, small = torch.randn(64, 512, device=DEVICE), torch.randn(2, 256, device=DEVICE)
    made = {}
    for name, x, fmt, amax in (
        ("mxfp8", large, "mxfp8", None),
        ("nvfp4", large, "nvfp4", None),
        ("nvfp4 small", small, "nvfp4", None),
        ("nvfp4 amax given", large, "nvfp4", torch.ones((), device=DEVICE)),
        ("nvfp4_row", large, "nvfp4_row", None),
        ("nvfp4_4over6", large, "nvfp4_4over6", None),
    ):
        with launch.recorded() as calls:
            quantize.quantize(x, ms.find_quantizer(fmt), amax, None, None, "strided")
            again = len(calls)
            quantize.quantize(x, ms.find_quantizer(fmt), amax, None, None, "strided")
        made[name] = [call.kernel.fn.__name__ for call in calls[:again]]
        assert all(a.constants is b.constants for a, b in zip(calls[:again], calls[again:], strict=True)), name
    return made


def main(part: int, parts: int) -> None:
    """Check every parts-th case."""
    promised = launches()
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: poison(empty(*args, **kwargs))
    todo = list(enumerate(cases()))[part::parts]
    for number, case in todo:
        error = check(case, number)
        if error is not None:
            print(json.dumps({"case": number, "error": error}), flush=True)
    met = {(a, str(c[a]), b, str(c[b])) for _, c in todo for a, b in itertools.combinations(CHOICES, 2)}
    print(json.dumps({"checked": len(todo), "pairs": len(met), "launches": promised}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
