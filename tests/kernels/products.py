"""Shared by the tests of products: operands as kernels get them, FP64 values, and the derived bound."""

import torch

import microscale as ms
from microscale.kernels.reference.matmul import Parts


def parts(q):
    """What a kernel gets of an operand."""
    if not isinstance(q, ms.BlockScaledTensor):
        return q
    return Parts(q.qdata, q.scale, q.outer_scale, q.format, q.block_axis, q.shape[q.block_axis], q.scale_layout)


def plain(t):
    return t.dequantize(torch.float32) if isinstance(t, ms.BlockScaledTensor) else t


def wide(q):
    """FP64 values: those of an outer scale that multiplies the sums are not rounded into FP32 values."""
    if not isinstance(q, ms.BlockScaledTensor):
        return q.double()
    values = q.replace(outer_scale=None).dequantize(torch.float32).double()
    outer = q.outer_scale
    if outer is None or not outer.dim() or outer.shape[q.block_axis] == 1:
        return values if outer is None else values * outer.double()
    return plain(q).double()


def check(got, a, b, bias=None, out_dtype=None):
    """Within the bound that the module derives, for the shape that torch gives."""
    out_dtype = got.dtype if out_dtype is None else out_dtype
    a64, b64 = wide(a), wide(b)
    expected, size = a64 @ b64, a64.abs() @ b64.abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    k = a.shape[-1]
    limit = (1.25 * k + 8) * 2.0**-23 * size
    limit = limit + (expected.abs() + limit) * torch.finfo(out_dtype).eps / 2 + torch.finfo(out_dtype).tiny
    assert got.shape == expected.shape and got.dtype == out_dtype
    error = (got.double() - expected).abs()
    assert bool((error <= limit).all()), float((error / limit).max())
