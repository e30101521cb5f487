"""Quantized activations times a weight in layout `fragments`: decoded to bfloat16, then the kernels for plain ones.

Reading the weight is what few rows cost, and it is read once, in its own bits, by `fragments.py` or, from 17 rows on
Hopper, `fragments_wide.py`; what there is of activations is decoded before, in a launch of its own. From some number of
rows on it pays to write the weight as E4M3 rows for FP8 tensor cores, where the pair has such (`cublas.rows_e4m3`,
which takes the same prepared weight); for other pairs, up to the number of rows that `fragments_wide` is for, decoding
the weight beforehand as well (`cublas.two_pass`) would cost more.

Error: values without outer scales are bfloat16 numbers (those below 2**-126 keep the digits that bfloat16 has there);
FP32 accumulation, outer scales and bias in FP32, one rounding. Outer scales of both operands that are numbers become
one, as `two_pass` does it; one for each row of activations multiplies FP32 sums in a pass that adds the bias.
"""

from __future__ import annotations

import dataclasses

import torch

from microscale.dispatch import Operand, Problem, Requires, kernel
from microscale.kernels.cublas.exact import BFLOAT16_BITS, significant_bits
from microscale.kernels.cublas.two_pass import combined, finish
from microscale.kernels.reference.matmul import Operand as KernelOperand
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import dequantize as plain
from microscale.kernels.triton import fragments, fragments_wide, properties
from microscale.kernels.triton.fragments import rows_of
from microscale.numerics import layout

HOPPER = (9, 0)
MOST_ROWS = 256  # of activations on Hopper, where FP8 tensor cores are the other way; elsewhere those of `fragments.py`
BOUND = "FP32 accumulation over exact operands, one rounding; repeats bit for bit"


def _has_blocks_along_k(problem: Problem) -> bool:
    first = problem.operands[0]
    return first.format is not None and first.axis == -1 and first.layout in layout.LAYOUTS


def _is_exact(problem: Problem) -> bool:
    fmt = problem.operands[0].format
    return fmt is not None and plain._fits(fmt) and significant_bits(fmt) <= BFLOAT16_BITS


def _few_rows(problem: Problem) -> bool:
    most = MOST_ROWS if problem.capability == HOPPER else fragments.MOST_ROWS
    return 0 < rows_of(problem.operands[0]) <= most


def _late(operand: Operand) -> bool:
    return operand.outer in (None, "scalar", "vector")


CHECKS = (
    ("needs a weight that microscale.prepare made", fragments.is_weight),
    ("needs a block-scaled left operand, its blocks along K, in a layout that quantize writes", _has_blocks_along_k),
    ("needs activations whose values, outer scales aside, are bfloat16 numbers", _is_exact),
    ("needs outer scales that are constant along K", lambda p: all(map(_late, p.operands))),
    ("adds a bias of one number per column", lambda p: p.bias is None or len(p.bias.shape) == 1),
)


@kernel(
    "matmul", "triton.matmul_fragments_scaled_wide", priority=25, bound=BOUND,
    requires=Requires(
        devices=("cuda",), min_capability=HOPPER, max_capability=HOPPER, packages=("triton",),
        checks=(
            *CHECKS,
            (f"is for at most {fragments_wide.MOST_ROWS} rows of activations, of 6 bits "
             f"{fragments_wide.MOST_ROWS_OF_SIX}, with scales of columns {fragments_wide.MOST_ROWS_SCALED}",
             lambda p: fragments_wide.has_rows(p, 1)),
        ),
    ),
)  # fmt: skip
def matmul_wide(a: KernelOperand, b: KernelOperand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias; behind `cublas.rows_e4m3`, for pairs that it does not take."""
    return matmul(a, b, bias, out_dtype)


@kernel(
    "matmul", "triton.matmul_fragments_scaled", priority=50, bound=BOUND,
    requires=Requires(
        devices=("cuda",), min_capability=(8, 0), packages=("triton",),
        checks=(
            *CHECKS,
            (f"is for at most {MOST_ROWS} rows of activations on sm_90, elsewhere {fragments.MOST_ROWS}", _few_rows),
        ),
    ),
)  # fmt: skip
def matmul(a: KernelOperand, b: KernelOperand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias; arguments and result as `reference.matmul`."""
    assert isinstance(a, Parts) and isinstance(b, Parts)
    lead, columns = a.qdata.shape[:-1], b.qdata.shape[-1]
    outer, other, power = a.outer_scale, b.outer_scale, None
    if outer is not None and outer.numel() == 1:
        outer = outer.reshape(())
        if other is None:
            b, outer = dataclasses.replace(b, outer_scale=outer), None
        elif other.numel() == 1:
            alpha, power = combined(outer, other.reshape(()))
            b, outer = dataclasses.replace(b, outer_scale=alpha), None
    elif outer is not None:
        outer = outer.expand(*lead, 1).reshape(1, -1, 1)
    x = plain.dequantize(a.qdata, a.scale, power, a.format, a.size, a.layout, torch.bfloat16).reshape(-1, a.size)
    multiply = fragments_wide.matmul if _is_wide(x) else fragments.matmul
    if outer is None:
        return multiply(x, b, bias, out_dtype).reshape(*lead, columns)
    sums = multiply(x, b, None, torch.float32)
    out = sums if out_dtype == torch.float32 else torch.empty_like(sums, dtype=out_dtype)
    finish(sums[None], outer, None, None if bias is None else bias.expand(out.shape)[None], out[None])
    return out.reshape(*lead, columns)


def _is_wide(x: torch.Tensor) -> bool:
    """Whether `fragments_wide` multiplies x [M, K]: where it is there, from its first row on."""
    return x.shape[0] >= fragments_wide.LEAST_ROWS and properties.capability(x.device) == HOPPER
