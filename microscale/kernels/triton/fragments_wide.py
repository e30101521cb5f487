"""GEMM of some tens to hundreds of rows of bfloat16 with a weight in layout `fragments`, on Hopper (sm_90).

The weight is the A operand of `wgmma`, decoded in the registers that hold it, so that nothing of it crosses shared
memory decoded; x is the B operand, which the copy engine brings to shared memory and tensor cores read there. A program
is one warpgroup, two or three to an SM, so that one decodes while another multiplies: of a step of 64 of K, 128 columns
by 128 rows take the tensor cores 512 cycles, and decoding 128 columns of 4 bits some 220 instructions of each of four
warps. Tiles seldom fill the last wave of SMs, so steps are dealt out evenly to as many programs as run at once, to
whatever tiles they belong (stream-K); a second kernel adds the FP32 sums of tiles that programs share, in one order, so
that results repeat bit for bit.

Error: decoded operands are exact; FP32 accumulation, outer scale and bias in FP32, one rounding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference.matmul import Operand as KernelOperand
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import fragments, properties, ptx_decode
from microscale.kernels.triton.launch import launch
from microscale.numerics.fragments import DEPTH
from microscale.spec.format import FormatSpec

LEAST_ROWS, MOST_ROWS = 17, 512  # of x; above, decoding beforehand costs less than decoding for each tile of x
SHARED = 227 << 10  # bytes of shared memory of an SM that programs can have, 1 KiB of each for the system
FULL = 0.8  # of the programs that run at once: from this on tiles are cut into equal parts
BOUND = "FP32 accumulation over exact operands, one rounding; repeats bit for bit"


class Cut(NamedTuple):
    """A tile has `rows` of x and 64 * units columns of the result; `programs` share the steps of all tiles."""

    rows: int
    units: int
    programs: int


@functools.lru_cache(maxsize=4096)
def cut_of(rows: int, columns: int, sms: int) -> Cut:
    """Return the cut for x [rows, K], a weight [columns, K] and a number of SMs, as measured on an H200.

    Two or three programs fit an SM by their registers. Where so many parts of tiles, each tile in equal ones, nearly
    fill them, those are taken; else every program has an equal share of the steps.
    """
    tile, units = (32, 4) if rows <= 32 else (64, 2) if rows <= 64 else (128, 2)
    tiles = -(-rows // tile) * -(-columns // (64 * units))
    places = resident_of(tile) * sms
    parts = tiles * (places // tiles)
    return Cut(tile, units, parts if parts >= FULL * places else places)


def resident_of(tile: int) -> int:
    """Return how many programs with `tile` rows of x fit an SM, by the registers they need."""
    return 2 if tile == 128 else 3


def stages_of(fmt: FormatSpec, rows: int, units: int) -> int:
    """Return the steps that shared memory holds: four, three where else fewer programs fit an SM."""
    step = rows * DEPTH * 2 + units * 16 * 4 * DEPTH * fmt.element.width // 8 + units * 256
    return max(3, min(4, (SHARED // resident_of(rows) - 2048) // step))


@functools.lru_cache(maxsize=1024)
def constants_of(fmt: FormatSpec, rows: int, units: int, outer: int, bias: bool) -> dict[str, Any]:
    """Return the constants of `matmul_wide`; `outer`: 0 none, 1 a number, 2 one per column of the result."""
    held = 4 if fmt.element.width == 6 else 2
    low, high = ptx_decode.decoder(fmt, 0), ptx_decode.decoder(fmt, 2 if held == 2 else 0)
    return {
        "UNITS": units, "HELD": held, "WIDTH": fmt.element.width, "BLOCK": min(fmt.block, DEPTH), "N": rows,
        "STAGES": stages_of(fmt, rows, units), "OUTER": outer, "BIAS": bias, "DROP": float(2**low.drop),
        "DECODE": low.assembly, "DECODE_NEXT": high.assembly, "DECODE_IN": low.constraints,
    } | CHAINED  # fmt: skip


@functools.lru_cache(maxsize=256)
def _sum_constants(rows: int, units: int, outer: int, bias: bool, drop: float) -> dict[str, Any]:
    return {"N": rows, "UNITS": units, "OUTER": outer, "BIAS": bias, "DROP": drop, "CHAIN": True} | CHAINED


# Programmatic dependent launch: a kernel begins while the one before it ends, and waits for that where it needs it.
CHAINED = {"launch_pdl": True}  # an option of the compiler
_ORDER = {"SIZE": 1024, "CHAIN": True}


def _has_rows(problem: Problem) -> bool:
    return LEAST_ROWS <= fragments.rows_of(problem.operands[0]) <= MOST_ROWS


@kernel(
    "matmul",
    "triton.matmul_fragments_wide",
    priority=55,
    requires=Requires(
        devices=("cuda",), min_capability=(9, 0), max_capability=(9, 0), packages=("triton",), dtypes=("bfloat16",),
        checks=(
            *fragments.CHECKS,
            (f"is for {LEAST_ROWS} to {MOST_ROWS} rows of activations", _has_rows),
        ),
    ),
    bound=BOUND,
)  # fmt: skip
def matmul(a: KernelOperand, b: KernelOperand, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a [..., M, K] @ b [K, N] + bias; arguments and result as `reference.matmul`."""
    assert isinstance(a, torch.Tensor) and isinstance(b, Parts)
    x, columns = (a if a.dim() == 2 else a.reshape(-1, a.shape[-1])).contiguous(), b.qdata.shape[-1]
    cut = cut_of(x.shape[0], columns, properties.multiprocessors(x.device))
    out = run(x, b, bias, out_dtype, cut)
    return out if a.dim() == 2 else out.view(*a.shape[:-1], columns)


def run(x: torch.Tensor, b: Parts, bias: torch.Tensor | None, out_dtype: torch.dtype, cut: Cut) -> torch.Tensor:
    """Return x [M, K] @ b [K, N] + bias for dense x, cut as `cut` says."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from microscale.kernels.triton import jit_fragments_wide, jit_wide_steps

    (rows, depth), columns = x.shape, b.qdata.shape[-1]
    outer, outer_kind = fragments.outer_of(b.outer_scale, columns, x)
    bias = None if bias is None else bias.expand(columns).contiguous()
    added = x if bias is None else bias
    x = x.clone() if x.data_ptr() % 16 else x
    ordered = torch.empty_like(x)
    pairs = rows * depth // 2
    launch(jit_wide_steps.order_pairs, -(-pairs // _ORDER["SIZE"]), (x, ordered, pairs), _ORDER, 4)
    x_tiles = TensorDescriptor(ordered, [rows, depth], [depth, 1], [cut.rows, DEPTH], jit_fragments_wide.X_LAYOUT)
    steps, tiles_x = depth // DEPTH, -(-rows // cut.rows)
    tiles = tiles_x * -(-columns // (64 * cut.units))
    total = tiles * steps
    each = -(-total // min(cut.programs, total))
    programs = -(-total // each)
    shared = each % steps != 0
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    parts = x
    if shared:
        parts = torch.empty(programs * 128 * cut.units * cut.rows, dtype=torch.float32, device=x.device)
    constants = constants_of(b.format, cut.rows, cut.units, outer_kind, bias is not None)
    args: tuple[Any, ...] = (
        x_tiles,
        b.qdata,
        b.scale,
        outer,
        added,
        out,
        parts,
        rows,
        columns,
        steps,
        tiles_x,
        total,
        each,
    )
    launch(jit_fragments_wide.matmul_wide, programs, args, constants, 4)
    if shared:
        last = _sum_constants(cut.rows, cut.units, outer_kind, bias is not None, constants["DROP"])
        args = (parts, outer, added, out, rows, columns, steps, tiles_x, each)
        launch(jit_wide_steps.add_tiles, tiles * 4 * cut.units, args, last, 4)
    return out
