"""Triton around a GEMM of another library: one pass each over FP32 sums, outer scales and numbers to be split."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from microscale.kernels.triton.launch import launch

WIDTH, WARPS = 1024, 4  # elements and warps of a program
_NONE: MappingProxyType[str, Any] = MappingProxyType({})
_FINISH = {
    key: MappingProxyType({"LEFT": key[0], "RIGHT": key[1], "BIAS": key[2], "WIDTH": WIDTH})
    for key in ((a, b, c) for a in (False, True) for b in (False, True) for c in (False, True))
}
_JOIN = {b: MappingProxyType({"SCALE": 2.0**-8, "BIAS": b, "SIZE": WIDTH}) for b in (False, True)}
_SPLIT = {n: MappingProxyType({"COUNT": n, "SCALE": 256.0, "SIZE": WIDTH}) for n in (1, 2, 3)}


def finish(
    sums: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write sums * left * right + bias to out, rounded once to its dtype.

    sums FP32 and out [B, M, N], both with dense rows (they may be the same); left FP32 () or [B, M, 1], right FP32 ()
    or [B, 1, N], with sizes of 1; bias [B, M, N] of any float dtype and strides. What is None is left out.
    """
    from microscale.kernels.triton import jit_epilogue

    batch, rows, columns = out.shape
    first, second = _strides(left), _strides(right)
    args = (
        sums, sums if left is None else left, sums if right is None else right, sums if bias is None else bias, out,
        rows, columns, *sums.stride()[:2], first[0], first[1], second[0], second[2],
        *((0, 0, 0) if bias is None else bias.stride()), *out.stride()[:2],
    )  # fmt: skip
    constants = _FINISH[left is not None, right is not None, bias is not None]
    launch(jit_epilogue.finish_sums, batch * rows * -(-columns // WIDTH), args, constants, WARPS)


def _strides(factor: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of [B, M, N], 0 where the size is 1."""
    if factor is None or factor.dim() == 0:
        return 0, 0, 0
    return tuple(0 if n == 1 else s for n, s in zip(factor.shape, factor.stride(), strict=True))


def combined(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two FP32 scalars whose product is first * second, as `jit_epilogue.combine_scales` says."""
    from microscale.kernels.triton import jit_epilogue

    made = torch.empty(2, dtype=torch.float32, device=first.device)
    alpha, power = made[0], made[1]
    launch(jit_epilogue.combine_scales, 1, (first, second, alpha, power), _NONE, 1)
    return alpha, power


def split(x: torch.Tensor, pieces: int) -> list[torch.Tensor]:
    """Return bfloat16 tensors as `cublas.exact.split`, with dense rows."""
    return list(stacked(x, pieces).unbind(0))


def stacked(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """Return the tensors of `split` as one, dense: bfloat16 [pieces, *x.shape]."""
    from microscale.kernels.triton import jit_epilogue

    x = x.contiguous()
    made = torch.empty((pieces, *x.shape), dtype=torch.bfloat16, device=x.device)
    if total := x.numel():
        args = (x, made.view(torch.int16), total)
        launch(jit_epilogue.split_values, -(-total // WIDTH), args, _SPLIT[pieces], WARPS)
    return made


def join(sums: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write sums[0] + 2**-8 sums[1] + bias to out, added in FP32 and rounded once to its dtype.

    sums FP32 [2, M, N] and out [M, N], dense; bias dense [N] of any float dtype, or None.
    """
    from microscale.kernels.triton import jit_epilogue

    if total := out.numel():
        args = (sums, sums if bias is None else bias, out, out.shape[-1], total)
        launch(jit_epilogue.join_pieces, -(-total // WIDTH), args, _JOIN[bias is not None], WARPS)
