"""Run the Triton kernels in the interpreter against the reference; prints one JSON line per mismatch, then a count.

A process of its own (`python -m tests.kernels.interpreted`), because TRITON_INTERPRET must be set before the jitted
code is loaded, and would take the kernels off the GPU for every other test in the process.
"""

import itertools
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.errors import SpecError
from microscale.kernels.reference import dequantize as reference_dequantize
from microscale.kernels.reference import quantize as reference_quantize
from microscale.kernels.triton import dequantize, quantize
from microscale.testing import assert_same_bits

LAYOUTS = ("strided", "swizzle_32_4_4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
USER_FORMATS = (  # shapes of formats that no shipped one has
    {"name": "e3m1", "element": {"exponent": 3, "mantissa": 1}, "block": 32, "scale": "e8m0", "scale_rule": "rceil"},
    {
        "name": "int5",
        "element": {"bits": 5},
        "block": 8,
        "scale": "e4m3",
        "scale_rule": "nearest",
        "outer_scale": "fp32",
    },
    {"name": "odd", "element": "e2m1", "block": 24, "scale": "e8m0", "scale_rule": "floor"},
    {"name": "two", "element": {"values": [-1, 0, 0.25, 2]}, "block": 16, "scale": "fp32", "scale_rule": "nearest"},
)


def inputs(block: int, dtype: torch.dtype, ragged: int) -> torch.Tensor:
    """Rows of every kind: normal, wide range, zero, NaN, Inf, tiny, negative zero, non-contiguous."""
    x = torch.randn(11, 2 * block + ragged)
    x[1] *= torch.exp(6 * torch.randn(x.shape[1]))
    x[2], x[3, : block // 2] = 0, -0.0
    x[4, 1], x[5, block], x[6] = torch.nan, torch.inf, x[6] * 1e-38
    return x.to(dtype).t().contiguous().t() if ragged == 3 else x.to(dtype)


def specs(fmt: object) -> list[ms.QuantizerSpec]:
    """The quantizers of one format; for the other modes see `interpreted_modes.py`."""
    made = []
    rules = ("floor", "ceil", "even", "four_over_six")
    for changes in ({}, {"rounding": "stochastic"}, *({"scale_rule": r} for r in rules)):
        try:
            spec = ms.find_quantizer(fmt, **changes).for_row(72)
        except SpecError:
            continue
        if spec not in made:
            made.append(spec)
    return made


def main(formats: list[object]) -> None:
    """Compare quantize and dequantize bit for bit."""
    checked, seed = 0, torch.tensor([12345678901234, 3])
    for fmt in formats:
        for spec in specs(fmt):
            for dtype, ragged, layout in itertools.product(DTYPES, (0, 3), LAYOUTS):
                if dtype != torch.bfloat16 and layout != "strided":
                    continue
                x = inputs(spec.format.block, dtype, ragged)
                expected = reference_quantize.quantize(x, spec, None, None, seed, layout)
                got = quantize.quantize(x, spec, None, None, seed, layout)
                what = f"{spec.name} {dtype} ragged={ragged} {layout}"
                try:
                    for part, actual, wanted in zip(("qdata", "scale", "outer"), got, expected, strict=True):
                        assert (actual is None) == (wanted is None), part
                        if wanted is not None:
                            assert_same_bits(actual, wanted, part)
                    args = (*expected, spec.format, x.shape[1], layout, dtype)
                    assert_same_bits(dequantize.dequantize(*args), reference_dequantize.dequantize(*args), "values")
                except AssertionError as error:
                    print(json.dumps({"case": what, "error": str(error)[:300]}))
                checked += 1
    print(json.dumps({"checked": checked}))


if __name__ == "__main__":
    names = [n for n in sys.argv[1:] if n != "user"] or ms.list_formats()
    main([*names, *(USER_FORMATS if "user" in sys.argv[1:] else ())])
