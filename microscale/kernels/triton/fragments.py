"""Decode GEMM: up to 64 rows of bfloat16 times a weight in layout `fragments`, on sm_80 and later.

Bound by the bytes of the weight, so built around reading them: every lane loads 16 bytes (its neighbours the next) a
step ahead, decodes them in its registers (`ptx_decode.py`; under 2.5 instructions per weight of 4 bits, all told) and
feeds them to `mma.m16n8k16` as the A operand: nothing of the weight crosses shared memory. The rows of x are the N
side, 8 at a time, so that one token wastes nothing that matters. K is split among the warps of a program, which add up
in shared memory, and, where programs are too few, among programs, whose FP32 sums are added in one order, so that
results repeat bit for bit: by the last program of a tile for few rows, by a second kernel for more, since one program's
loads of so much take longer than a launch.

Error: decoded operands are exact; FP32 accumulation, outer scale and bias in FP32, one rounding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Operand, Problem, Requires, kernel
from microscale.kernels.reference.matmul import Operand as KernelOperand
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import arrivals, fragment_tuning, ptx_decode
from microscale.kernels.triton.fragment_tuning import Tuning
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.numerics.fragments import DEPTH, ROWS
from microscale.spec.format import FormatSpec
from microscale.spec.powers import with_powers

MOST_ROWS = 64  # of x; above, tensor cores are what counts


class Plan(NamedTuple):
    """The constants of `matmul_fragments`, and how it is launched: programs, parts of K and steps in each of them.

    `adds`: the constants of the second kernel, which adds the parts; None where the first gives the result.
    """

    constants: dict[str, Any]
    warps: int
    programs: int
    splits: int
    each: int
    adds: dict[str, Any] | None


@functools.lru_cache(maxsize=1024)
def plan_of(fmt: FormatSpec, tuning: Tuning, eights: int, shape: tuple[int, int], outer: int, bias: bool) -> Plan:
    """Return the plan for at most 8 * eights rows and a weight of a shape (N, K), cut as `tuning` says.

    `outer`: 0 none, 1 a number, 2 one per column of the result.
    """
    steps = shape[1] // DEPTH
    each = -(-steps // tuning.splits)
    splits = -(-steps // each)
    alone = splits == 1 or eights == 1
    constants = constants_of(fmt, tuning._replace(splits=splits), eights, outer if alone else 0, bias and alone)
    programs = -(-shape[0] // (16 * tuning.units * tuning.across)) * splits
    adds = None if alone else _sum_constants(splits, outer, bias)
    return Plan(constants, tuning.across * tuning.along, programs, splits, each, adds)


@functools.lru_cache(maxsize=1024)
def constants_of(fmt: FormatSpec, tuning: Tuning, eights: int, outer: int, bias: bool) -> dict[str, Any]:
    """Return the constants of `matmul_fragments`; one object for the same ones, as `launch` wants it."""
    most = 1 << (tuning.splits - 1).bit_length() if eights == 1 else 1  # splits that it adds itself
    held = 4 if fmt.element.width == 6 else 2
    low, high = ptx_decode.decoder(fmt, 0), ptx_decode.decoder(fmt, 2 if held == 2 else 0)
    mma, mma_in = ptx_decode.mma()
    return {
        "UNITS": tuning.units, "HELD": held, "WIDTH": fmt.element.width, "BLOCK": min(fmt.block, DEPTH), "NT": eights,
        "WN": tuning.across, "WK": tuning.along, "MOST": most, "OUTER": outer, "BIAS": bias,
        "DROP": float(2**low.drop), "DECODE": low.assembly, "DECODE_NEXT": high.assembly,
        "DECODE_IN": low.constraints, "MMA": mma, "MMA_IN": mma_in,
    }  # fmt: skip


@functools.lru_cache(maxsize=64)
def _sum_constants(splits: int, outer: int, bias: bool) -> dict[str, Any]:
    return {"SPLITS": splits, "OUTER": outer, "BIAS": bias, "SIZE": 1024 if splits < 8 else 512}


def rows_of(operand: Operand) -> int:
    """Return the rows of x, rounded up to a power of two as selections are cached."""
    count = 1
    for n in operand.shape[:-1]:
        count *= 1 << max(0, n - 1).bit_length() if n else 0
    return count


def is_weight(problem: Problem) -> bool:
    """Return True for a right operand that `microscale.prepare` made: a matrix whose blocks run along K."""
    weight = problem.operands[1]
    return weight.layout == layout.FRAGMENTS and weight.axis == -2 and len(weight.shape) == 2


CHECKS = (
    ("needs a plain left operand", lambda p: p.operands[0].format is None),
    ("needs a weight that microscale.prepare made", is_weight),
    ("needs outer scales that are constant along K", lambda p: p.operands[1].outer in (None, "scalar", "vector")),
    ("adds a bias of one number per column", lambda p: p.bias is None or len(p.bias.shape) == 1),
)
REQUIRES = Requires(
    devices=("cuda",),
    min_capability=(8, 0),
    packages=("triton",),
    dtypes=("bfloat16",),
    checks=(
        *CHECKS,
        (f"is for at most {MOST_ROWS} rows of activations", lambda p: 0 < rows_of(p.operands[0]) <= MOST_ROWS),
    ),
)


@kernel(
    "matmul",
    "triton.matmul_fragments",
    priority=50,
    requires=REQUIRES,
    bound="FP32 accumulation over exact operands, one rounding; repeats bit for bit",
)
def matmul(a: KernelOperand, b: KernelOperand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias; arguments and result as `reference.matmul`."""
    assert isinstance(a, torch.Tensor) and isinstance(b, Parts)
    columns, depth = b.qdata.shape[-1], a.shape[-1]
    x = (a if a.dim() == 2 else a.reshape(-1, depth)).contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    rows = x.shape[0]
    eights = 1 if rows <= 8 else 2 if rows <= 16 else 4 if rows <= 32 else 8
    tuning = fragment_tuning.find(b.format, eights, columns, depth, x.device)
    out = run(x, b, bias, out_dtype, eights, tuning)
    return out if a.dim() == 2 else out.view(*a.shape[:-1], columns)


def run(
    x: torch.Tensor, b: Parts, bias: torch.Tensor | None, out_dtype: torch.dtype, eights: int, tuning: Tuning
) -> torch.Tensor:
    """Return x [M, K] @ b [K, N] + bias for dense x of at most 8 * eights rows, cut as `tuning` says."""
    jit_fragments, jit_splits = _kernels()
    (rows, depth), columns, device = x.shape, b.qdata.shape[-1], x.device
    outer, kind = outer_of(b.outer_scale, columns, x)
    added = x if bias is None else bias.expand(columns).contiguous()
    plan = plan_of(b.format, tuning, eights, (columns, depth), kind, bias is not None)
    splits = plan.splits
    out = torch.empty((rows, columns), dtype=out_dtype, device=device)
    sums = out if splits == 1 else torch.empty(splits * rows * columns, dtype=torch.float32, device=device)
    first, arrived = out, x
    if plan.adds is not None:
        first = sums
    elif splits > 1:
        arrived = arrivals.counters(device, plan.programs // splits)
    args = (x, b.qdata, b.scale, outer, added, first, sums, arrived, rows, columns, depth, plan.each, splits)
    launch(jit_fragments.matmul_fragments, plan.programs, args, plan.constants, plan.warps)
    if plan.adds is not None:
        total = rows * columns
        rest = (sums, outer, added, out, columns, total)
        launch(jit_splits.add_splits, -(-total // plan.adds["SIZE"]), rest, plan.adds, 4)
    return out


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The jitted kernels, which cannot be imported where Triton is not installed."""
    from microscale.kernels.triton import jit_fragments, jit_splits

    return jit_fragments, jit_splits


def outer_of(scale: torch.Tensor | None, columns: int, other: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what the kernel multiplies by, and whether it is nothing (0, and `other`), a number or one per column."""
    if scale is None:
        return other, 0
    return (scale, 1) if scale.numel() == 1 else (scale.reshape(-1).expand(columns).contiguous(), 2)


def has_row_scales(fmt: FormatSpec) -> bool:
    """Return True for a format in layout fragments with an FP32 scale for each row, and no others."""
    return fmt.scale.torch_dtype == "float32"


_DEQUANTIZE_WARPS = 4
MOST_VALUES = 2**31  # of one launch, which counts words of two or four of them in 32 bits


@functools.lru_cache(maxsize=64)
def _dequantize_constants(fmt: FormatSpec) -> dict[str, Any]:
    held, fmt = 4 if fmt.element.width == 6 else 2, with_powers(fmt) if has_row_scales(fmt) else fmt
    low, high = (ptx_decode.decoder(fmt, first, True) for first in (0, 2 if held == 2 else 0))
    return {
        "HELD": held, "WIDTH": fmt.element.width, "BLOCK": min(fmt.block, DEPTH), "WARPS": _DEQUANTIZE_WARPS,
        "DECODE": low.assembly, "DECODE_NEXT": high.assembly, "DECODE_IN": low.constraints,
    }  # fmt: skip


def decode(qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec) -> torch.Tensor:
    """Return bfloat16 [..., N, K] of qdata and scale in layout fragments, without FP32 scales, outer or of rows.

    Exact. Both are dense, each [..., N, n].
    """
    from microscale.kernels.triton import jit_fragments

    shape, depth = qdata.shape[:-1], qdata.shape[-1] * 8 // fmt.element.width
    rows = shape.numel()
    out = torch.empty((*shape, depth), dtype=torch.bfloat16, device=qdata.device)
    constants = _dequantize_constants(fmt)
    for part in row_parts(rows, depth):
        codes, scales, values = (t.view(rows, t.shape[-1])[part] for t in (qdata, scale, out))
        total = values.shape[0] // ROWS * (depth // DEPTH)
        args = (codes, scales, values, total, depth // 2)
        launch(jit_fragments.dequantize_fragments, -(-total // _DEQUANTIZE_WARPS), args, constants, _DEQUANTIZE_WARPS)
    return out


def row_parts(rows: int, depth: int) -> list[slice]:
    """Return ranges of the rows of a matrix [rows, depth], which experts may make long, that launches can address."""
    step = max(ROWS, MOST_VALUES // depth // ROWS * ROWS)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


@kernel(
    "dequantize",
    "triton.dequantize_fragments",
    priority=20,
    requires=Requires(
        devices=("cuda",), min_capability=(8, 0), packages=("triton",), layouts=(layout.FRAGMENTS,)
    ),
)  # fmt: skip
def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    outer_scale: torch.Tensor | None,
    fmt: FormatSpec,
    columns: int,
    scale_layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return values [..., N, columns] of a matrix or experts; arguments as `reference.dequantize`."""
    values = decode(qdata.contiguous(), scale.contiguous(), fmt)
    outer_scale = scale if has_row_scales(fmt) else outer_scale  # no format has both
    if outer_scale is None:
        return values.to(out_dtype)
    wide = outer_scale if outer_scale.dim() else outer_scale.reshape(1, 1)  # else torch would round it to bfloat16
    if wide.shape[-1] not in (1, columns):  # an outer scale per block of K
        wide = wide.repeat_interleave(fmt.block, dim=-1)
    return torch.mul(values, wide, out=torch.empty_like(values, dtype=out_dtype))  # in FP32, rounded once
