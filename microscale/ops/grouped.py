"""`grouped_wgrad`: the gradient of a mixture of experts' weights, without asking the host how tokens are spread.

The other two products of training are `grouped_matmul`: y = x w.T takes the weights [E, N, K] as `w.mT`, and
dx = dy w takes them as they are.
"""

from __future__ import annotations

import torch

from microscale import dispatch
from microscale.errors import InputError
from microscale.kernels.reference import grouped_wgrad as _reference  # noqa: F401  (registers the reference)
from microscale.ops import api, graph, library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

library.LIBRARY.define("grouped_wgrad(Tensor dy, Tensor x, Tensor offsets, ScalarType out_dtype) -> Tensor")


def grouped_wgrad(
    dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `dy.T @ x` of each group of rows: [E, N, K], zeros where a group is empty.

    FP32 accumulation and one rounding to `out_dtype` (default: dy's dtype; float32 for main gradients).

    Args:
        dy: float32, bfloat16 or float16 [T, N], any strides.
        x: the same dtype [T, K], any strides.
        offsets: int32 [E] on their device, rising: group i ends before row offsets[i]. Rows after the last end count
            for nothing.
        out_dtype: float32, bfloat16 or float16.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    graph.arm()
    return _grouped_wgrad(dy, x, offsets, out_dtype)


@graph.in_graph
def _grouped_wgrad(
    dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype | None
) -> torch.Tensor:
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise InputError(f"grouped_wgrad of {list(dy.shape)} and {list(x.shape)}", "takes [T, N] and [T, K]")
    if dy.dtype != x.dtype or dy.dtype not in DTYPES:
        raise InputError(f"grouped_wgrad of {dy.dtype} and {x.dtype}", "takes two of float32, bfloat16 or float16")
    if offsets.dim() != 1 or offsets.dtype != torch.int32:
        raise InputError(f"offsets of {offsets.dtype} and rank {offsets.dim()}", "they are int32 [E]")
    if not dy.device == x.device == offsets.device:
        raise InputError(f"operands on {dy.device} and {x.device}, offsets on {offsets.device}", "use one device")
    dtype = dy.dtype if out_dtype is None else out_dtype
    if dtype not in DTYPES:
        raise InputError(f"grouped_wgrad gives float32, bfloat16 or float16, not {dtype}", "convert the result")
    return torch.ops.microscale.grouped_wgrad(dy.detach(), x.detach(), offsets, dtype)


@torch.library.impl(library.LIBRARY, "grouped_wgrad", "CompositeExplicitAutograd")
def _run(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return dispatch.select(_problem(dy, x, offsets, out_dtype)).run(dy, x, offsets, out_dtype)


def _problem(
    dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype | None = None
) -> dispatch.Problem:
    operands = tuple(
        dispatch.Operand(tuple(t.shape), library.dtype_name(t.dtype), order=library._order(t)) for t in (dy, x)
    )
    dtype = library.dtype_name(dy.dtype if out_dtype is None else out_dtype)
    return dispatch.Problem("grouped_wgrad", operands, x.device.type, library.capability(x.device), None, dtype)


@torch.library.register_fake("microscale::grouped_wgrad", lib=library.LIBRARY)
def _fake(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((offsets.shape[0], dy.shape[1], x.shape[1]), dtype=out_dtype)


api.PROBLEMS["grouped_wgrad"] = _problem
