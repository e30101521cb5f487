"""Rows that are one block each and no power of two long: FP8 with a scale per token, 28672 wide.

`quantize.py` pads a block to a power of two and masks the rest, which keeps it from the hardware's FP8 conversions and
takes twice as long. Here a row is cut into chunks of the largest power of two that divides it, all loaded at once.

Bytes for bf16 in: 3 per element, read and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from microscale.kernels.triton import constants, properties
from microscale.kernels.triton.launch import launch
from microscale.kernels.triton.matrices import Matrices
from microscale.spec.quantizer import QuantizerSpec

LEAST, MOST = 512, 4096  # elements of a chunk
VALUES = 64  # of a thread, at most; a block has no more elements than 32 warps of these
FEW, MANY = 32, 16  # warps of a program: where rows are few, each has an SM to itself


REGISTERS = {"maxnreg": 64}  # an option of the compiler: two programs of 16 warps to an SM, one loads as one stores


class Plan(NamedTuple):
    """Constants of `quantize_long_rows` and options of its compiler; warps that few and that many rows want."""

    constants: Mapping[str, Any]
    few: int
    many: int


def takes(spec: QuantizerSpec, x: Matrices, strided: bool) -> bool:
    """Return True for dense rows that are one such block each; all else that counts is the quantizer's."""
    return strided and x.dense and _takes(spec, x.columns) and x.data.data_ptr() % 16 == 0


@functools.lru_cache(maxsize=1024)
def _takes(spec: QuantizerSpec, columns: int) -> bool:
    fmt = spec.format
    chunk = chunk_of(columns)
    plain = fmt.outer_scale is None and spec.rounding == "nearest_even" and not fmt.scale_rule.candidates
    return (
        fmt.block == columns
        and columns > MOST
        and columns & (columns - 1) != 0
        and chunk >= LEAST
        and plain
        and constants.quantizer_constants(spec)["TILE_BLOCKS"] == 0
        and fmt.element.kind != "codebook"
        and fmt.element.width == 8
        and fmt.scale.torch_dtype not in ("float16", "bfloat16")
    )


def chunk_of(columns: int) -> int:
    """Return the largest power of two that divides a row, 4096 at most."""
    return min(columns & -columns, MOST)


def quantize(x: Matrices, qdata: torch.Tensor, scale: torch.Tensor, spec: QuantizerSpec, by_fp8: bool) -> None:
    """Fill qdata [rows, columns] and scale [rows, 1]. `by_fp8`: the hardware converts such elements."""
    from microscale.kernels.triton import jit_long_rows

    plan = plan_of(spec, by_fp8)
    rows = x.total_rows
    warps = plan.few if rows < properties.multiprocessors(x.data.device) else plan.many
    launch(jit_long_rows.quantize_long_rows, rows, (x.data, qdata, scale), plan.constants, warps)


@functools.lru_cache(maxsize=1024)
def plan_of(spec: QuantizerSpec, by_fp8: bool) -> Plan:
    """Return how rows as long as a quantizer's block are quantized; one object for the same ones."""
    from microscale.kernels.triton import jit_long_rows

    columns = spec.format.block
    chunk = chunk_of(columns)
    made = constants.quantizer_constants(spec) | {"CHUNK": chunk, "CHUNKS": columns // chunk, "ENCODER": int(by_fp8)}
    least = properties.power_of_two_at_least(-(-columns // (VALUES * 32)))
    few = max(least, min(FEW, chunk // 64))
    known = constants.only(jit_long_rows.quantize_long_rows, made) | (REGISTERS if by_fp8 else {})
    return Plan(known, few, max(least, min(MANY, chunk // 64)))
