"""SiLU(gate) * up and RMSNorm written as they are, in the input dtype; see `jit_activations.py`.

Bytes for bf16: 2 + 2 + 2 per element, and 2 + 2 (a row is read twice, the second time from the cache).
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch

from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import Matrices, as_matrices
from microscale.numerics.activations import LANES, OCTET, RUN

WARPS = 4
SIZE = 2048  # elements of a program of `silu_mul`


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_activations

    return jit_activations


def lanes_of(columns: int) -> int:
    """Return how many lanes share a row."""
    return min(LANES, properties.power_of_two_at_least(-(-columns // RUN)))


def bits_of(eps: float) -> int:
    """Return the bits of FP32 eps: an argument of a type that launches are remembered by."""
    return int(struct.unpack("i", struct.pack("f", eps))[0])


def silu_mul(gate: torch.Tensor, up: torch.Tensor, with_amax: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return silu(gate) * up, shape and dtype of gate; with_amax: also the FP32 amax over its finite
    values, shape ().
    """
    if gate.dim() > 1 and not gate.is_contiguous() and gate.mT.is_contiguous() and up.mT.is_contiguous():
        y, found = silu_mul(gate.mT, up.mT, with_amax)
        return y.mT, found
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not y.numel():
        return y, None
    left, right = _rows(gate), _rows(up)
    rows, columns = left.total_rows, left.columns
    if left.dense and right.dense:
        rows, columns = 1, y.numel()
    tiles = -(-columns // SIZE)
    parts = torch.empty(rows * tiles if with_amax else 1, dtype=torch.float32, device=y.device)
    args = (left.data, right.data, y, parts, columns, tiles, *left.strides[1:], *right.strides[1:])
    launch(_jit().silu_mul_rows, rows * tiles, args, _silu_mul_rows_constants(with_amax), WARPS)
    return y, parts.amax() if with_amax else None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, with_amax: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return x / rms(x) * weight, shape and dtype of x; with_amax as `silu_mul`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y, None
    seen = _rows(x)
    lanes = lanes_of(seen.columns)
    programs = -(-seen.total_rows * lanes // LANES)
    parts = torch.empty(programs if with_amax else 1, dtype=torch.float32, device=y.device)
    args = (
        seen.data, parts if weight is None else weight.contiguous(), y, parts, seen.total_rows, seen.columns,
        *seen.strides[1:], bits_of(eps),
    )  # fmt: skip
    constants = _rms_norm_rows_constants(lanes, weight is not None, with_amax)
    launch(_jit().rms_norm_rows, programs, args, constants, WARPS)
    return y, parts.amax() if with_amax else None


@functools.cache
def _silu_mul_rows_constants(with_amax: bool) -> dict[str, Any]:
    return {"SIZE": SIZE, "AMAX": with_amax, "INTERPRETED": properties.interpreted()}


@functools.cache
def _rms_norm_rows_constants(lanes: int, has_weight: bool, with_amax: bool) -> dict[str, Any]:
    return {
        "T": LANES, "ROWS": LANES // lanes, "LEVELS": (lanes * OCTET).bit_length() - 1, "HAS_WEIGHT": has_weight,
        "AMAX": with_amax, "INTERPRETED": properties.interpreted(),
    }  # fmt: skip


def _rows(x: torch.Tensor) -> Matrices:
    """Rows at even distances; copies x where they are not so."""
    seen = as_matrices(x)
    return as_matrices(x.contiguous()) if seen.batched else seen
