"""Decode GEMM for float16 activations: up to 32 rows, cut into bfloat16 pieces, by the kernel of `fragments.py`.

A float16 number has 11 significant bits, so it is the sum of two bfloat16 numbers: its first 8 bits, cut off, and what
is left, at most 3, both exact down to float16's last subnormal. The rows of both pieces are multiplied at once, the
rest below the first (each weight is still read once), in FP32, and one pass adds the two sums and the bias.

Error: let S be the sum of |x| |w| over K for an element of the result. Products of pieces are exact, as those of
bfloat16 activations are. A piece has the number's sign, so |first| + |rest| = |x|: what accumulation loses in either
sum is bounded by its own sum of magnitudes, and these add up to S. So the bound is that of a product with bfloat16
activations, and one FP32 addition more. An infinity or NaN is all in the first piece; the rest of it is zero.
"""

from __future__ import annotations

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.reference.matmul import Operand as KernelOperand
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import epilogue, fragments
from microscale.kernels.triton.fragments import rows_of

PIECES = 2
MOST_ROWS = fragments.MOST_ROWS // PIECES


REQUIRES = Requires(
    devices=("cuda",),
    min_capability=(8, 0),
    packages=("triton",),
    dtypes=("float16",),
    checks=(
        *fragments.CHECKS,
        (
            f"is for at most {MOST_ROWS} rows of activations",
            lambda p: 0 < rows_of(p.operands[0]) <= MOST_ROWS,
        ),
    ),
)


@kernel(
    "matmul",
    "triton.matmul_fragments_fp16",
    priority=50,
    requires=REQUIRES,
    bound="FP32 accumulation over exact operands, float16 cut into two exact pieces; one rounding; repeats bit for bit",
)
def matmul(a: KernelOperand, b: KernelOperand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias for float16 a; arguments and result as `reference.matmul`."""
    assert isinstance(a, torch.Tensor) and isinstance(b, Parts)
    *lead, depth = a.shape
    x, columns = a.reshape(-1, depth), b.qdata.shape[-1]
    rows = x.shape[0]
    pieces = epilogue.stacked(x, PIECES).view(PIECES * rows, depth)
    sums = fragments.matmul(pieces, b, None, torch.float32).view(PIECES, rows, columns)
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    epilogue.join(sums, None if bias is None else bias.expand(columns).contiguous(), out)
    return out.reshape(*lead, columns)
