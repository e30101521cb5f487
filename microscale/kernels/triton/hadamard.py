"""The block-diagonal Hadamard transform as a kernel of its own, before quantizing: one read, one write."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from microscale.errors import InputError
from microscale.kernels.triton import properties
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import as_matrices
from microscale.spec.quantizer import HadamardSpec

LANES = 2048
WARPS = 4


def hadamard(x: torch.Tensor, spec: HadamardSpec) -> torch.Tensor:
    """Return the transform of the last axis of x [..., K], dense, of x's dtype; as `microscale.numerics.hadamard`.

    Raises InputError if K is no multiple of the size.
    """
    if x.shape[-1] % spec.size:
        raise InputError(
            f"a Hadamard transform of size {spec.size} needs a last axis that is a multiple of it, got {x.shape[-1]}",
            "pad the tensor with torch.nn.functional.pad; padding inside would change the transformed values",
        )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    seen = as_matrices(x)
    signs = out if spec.sign is None else _signs(spec.sign, x.device)
    args = (seen.data, out, signs, out.numel(), seen.rows, seen.columns, *seen.strides)
    plan = _plan(spec.size, spec.sign is not None, seen.dense, seen.batched)
    launch(_jit().hadamard, -(-out.numel() // LANES), args, plan, WARPS)
    return out


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_hadamard

    return jit_hadamard


@functools.lru_cache(maxsize=256)
def _signs(sign: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(sign, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _plan(size: int, signed: bool, dense: bool, batched: bool) -> dict[str, Any]:
    return {
        "SIZE": size, "STAGES": size.bit_length() - 1, "FACTOR": properties.fp32(1.0 / math.sqrt(size)),
        "SIGNED": signed, "LANES": LANES, "FLAT": dense, "BATCHED": batched, "INTERPRETED": properties.interpreted(),
    }  # fmt: skip
