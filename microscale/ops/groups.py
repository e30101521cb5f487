"""`group_amax`: what the outer scales of a mixture of experts' tokens come from, without asking the host."""

from __future__ import annotations

import torch

from microscale import dispatch
from microscale.errors import InputError
from microscale.ops import api, graph, library

library.LIBRARY.define("group_amax(Tensor x, Tensor offsets) -> Tensor")


def group_amax(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return for every row the FP32 amax over the finite values of its group, shape [T, 1].

    For tokens sorted by expert: `quantize(x, "nvfp4", amax=group_amax(x, offsets))` gives the tokens of every expert an
    outer scale of their own, stored one per row, and nothing waits for the device.

    Args:
        x: float32, bfloat16 or float16 [T, K], any strides.
        offsets: int32 or int64 [E] on x's device, rising: group i ends before row offsets[i]. Groups may be empty, and
            the rows after the last end are a group too.

    Raises:
        InputError: other ranks or dtypes, or offsets on another device.
    """
    graph.arm()
    return _group_amax(x, offsets)


@graph.in_graph
def _group_amax(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    _check(x, offsets)
    return torch.ops.microscale.group_amax(x.detach(), offsets)


def _check(x: torch.Tensor, offsets: torch.Tensor) -> None:
    api._check_input(x, -1, "strided")
    if x.dim() != 2:
        raise InputError(f"group_amax of a tensor of rank {x.dim()}", "it takes tokens [T, K]: use x.flatten(0, -2)")
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise InputError(f"offsets of {offsets.dtype} and rank {offsets.dim()}", "they are int32 or int64 [E]")
    if offsets.device != x.device:
        raise InputError(f"offsets on {offsets.device} for x on {x.device}", "keep them on x's device")


@torch.library.impl(library.LIBRARY, "group_amax", "CompositeExplicitAutograd")
def _run(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return dispatch.select(_problem(x, offsets)).run(x, offsets)


def _problem(x: torch.Tensor, offsets: torch.Tensor) -> dispatch.Problem:
    operand = dispatch.Operand(tuple(x.shape), library.dtype_name(x.dtype), order=library._order(x))
    return dispatch.Problem("group_amax", (operand,), x.device.type, library.capability(x.device))


@torch.library.register_fake("microscale::group_amax", lib=library.LIBRARY)
def _fake(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], 1), dtype=torch.float32)


api.PROBLEMS["group_amax"] = _problem
