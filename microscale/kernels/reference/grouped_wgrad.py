"""Reference gradient of grouped matrices: each group's tokens contracted in FP32, one rounding."""

from __future__ import annotations

import torch

from microscale.dispatch import Requires, kernel
from microscale.kernels.reference.matmul import _ieee_fp32


@kernel(
    "grouped_wgrad", "reference.grouped_wgrad", requires=Requires(), native=("cpu",),
    bound="FP32 accumulation over exact operands, one rounding; defines correctness",
)  # fmt: skip
def grouped_wgrad(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return dy.T @ x of each group of rows of dy [T, N] and x [T, K]: [E, N, K].

    `offsets` int32 [E] are the ends of each group's rows; an empty group gives zeros, and the rows after the last end
    are in no group.
    """
    out = torch.zeros((offsets.shape[0], dy.shape[1], x.shape[1]), dtype=out_dtype, device=x.device)
    start = 0
    with _ieee_fp32(x.device):
        for expert, stop in enumerate(offsets.tolist()):
            if stop > start:
                left, right = dy[start:stop].to(torch.float32), x[start:stop].to(torch.float32)
                out[expert] = torch.matmul(left.t(), right).to(out_dtype)
            start = max(start, stop)
    return out
