"""Triton's `dot_scaled` against FP64 in the interpreter: `python -m tests.kernels.dot_scaled_cases cpu`.

Tiles are decoded and multiplied in FP32 there, so that addresses, masks, scales, outer scales, bias and the one
rounding are tested; the MMA instructions are not. Prints one JSON line per mismatch, then {"checked": n}.
"""

import itertools
import json
import os
import sys

if sys.argv[1:2] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import dot_scaled

MX = ("mxfp8", "mxfp8_e5m2", "mxfp4")
NV = ("nvfp4", "nvfp4_1level", "nvfp4_row")
PAIRS = (*itertools.product(MX, MX), *itertools.product(NV, NV))
SHAPES = (((3,), 5, 64), ((2, 70), 130, 160), ((2, 128), 96, 320))


def parts(q: ms.BlockScaledTensor) -> Parts:
    """A tensor as a kernel gets it."""
    return Parts(q.qdata, q.scale, q.outer_scale, q.format, q.block_axis, q.shape[q.block_axis], q.scale_layout)


def biases(i: int, lead: tuple[int, ...], n: int, device: str) -> torch.Tensor | None:
    """One a column, one for all, one each, one a row, or none."""
    shapes = (None, (n,), (1,), (*lead, n), (lead[-1], 1))
    shape = shapes[i % len(shapes)]
    return None if shape is None else torch.randn(shape, device=device).to((torch.bfloat16, torch.float32)[i % 2])


def main(device: str) -> None:
    """Compare with FP64 within FP32 sums and one rounding."""
    checked = 0
    for i, ((left, right), (lead, n, k)) in enumerate(itertools.product(PAIRS, SHAPES)):
        layouts = ("strided", "swizzle_32_4_4")
        x, w = torch.randn(*lead, k, device=device), torch.randn(n, k, device=device)
        x[..., 0, 3], w[n // 2] = torch.nan, 0
        a = ms.quantize(x, left, layout=layouts[i % 2])
        b = ms.quantize(w, right, layout=layouts[i // 2 % 2])
        bias, dtype = biases(i, lead, n, device), (torch.bfloat16, torch.float32, torch.float16)[i % 3]
        got = dot_scaled.matmul(parts(a), parts(b.t()), bias, dtype)
        a64, b64 = (t.dequantize(torch.float32).double() for t in (a, b))
        exact = a64 @ b64.t() + (0 if bias is None else bias.double())
        size = a64.abs() @ b64.t().abs() + (0 if bias is None else bias.double().abs())
        good = (got.double() - exact).abs() <= (k + 4) * 2.0**-24 * size + 0.51 * torch.finfo(dtype).eps * exact.abs()
        same_nan = torch.equal(got.isnan(), exact.isnan())
        if got.shape != exact.shape or not same_nan or not bool((good | exact.isnan()).all()):
            error = float((got.double() - exact).abs().nan_to_num().max())
            print(json.dumps({"case": f"{left} x {right} {lead} {n} {k} {dtype}", "error": error}))
        checked += 1
    print(json.dumps({"checked": checked}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
