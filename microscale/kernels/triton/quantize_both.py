"""Triton quantize along rows and columns at once, from one read of memory; see `jit_blocks.quantize_both`."""

from __future__ import annotations

import functools

import torch

from microscale.dispatch import Operand, Problem, Requires, kernel, select
from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton import blocks_fit, constants
from microscale.kernels.triton import quantize_blocks as blocks
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.quantizer import QuantizerSpec

Pair = tuple[torch.Tensor | None, torch.Tensor | None]
Result = tuple[torch.Tensor | None, ...]
WORDS = 64  # of a program: 128 columns


def _specs(problem: Problem) -> tuple[QuantizerSpec, QuantizerSpec]:
    assert problem.quantizer is not None and problem.second is not None
    return problem.quantizer, problem.second


def _down(spec: QuantizerSpec) -> int:
    return blocks_fit.run_of(spec, 32)


CHECKS = (
    ("needs a dense matrix that starts on 16 bytes", lambda p: p.operands[0].order == "rows"),
    ("needs one format for both axes", lambda p: _specs(p)[0].format == _specs(p)[1].format),
    ("needs blocks of 16 to 128 elements of 4 or 8 bits", lambda p: all(_fits(s) for s in _specs(p))),
    ("needs Hadamard groups of at most 64 elements and 32 bytes down", lambda p: blocks_fit.down_fits(_specs(p)[1])),
    (
        "needs whole blocks and Hadamard groups along both axes",
        lambda p: blocks_fit.whole(p.operands[0], _down(_specs(p)[1]), blocks_fit.run_of(_specs(p)[0])),
    ),
    (  # else a tile has fewer runs along its rows than threads, and the kernel would leave rows out
        "needs Hadamard groups along rows of at most twice what a thread owns down",
        lambda p: blocks_fit.run_of(_specs(p)[0]) <= 2 * _down(_specs(p)[1]),
    ),
    blocks_fit.SMALL,
)


def _fits(spec: QuantizerSpec) -> bool:
    width = spec.format.element.width
    return blocks_fit.fits(spec) and blocks_fit.search_fits(spec) and width in (4, 8) and spec.scale_tile is None


@functools.lru_cache(maxsize=1024)
def plan_of(
    spec: QuantizerSpec, column_spec: QuantizerSpec, kind: blocks.Kind, column_kind: blocks.Kind, swizzle: bool,
    capability: tuple[int, int] | None,
) -> blocks.Plan:  # fmt: skip
    """Return how `quantize_both` is launched; the same object for calls of one kind."""
    run, down = blocks_fit.run_of(spec), _down(column_spec)
    groups, shared = (8, 2) if spec.format.element.width == 8 else (4, 1)  # runs down the rows, words of a thread
    columns = blocks.axis_constants(column_spec, column_kind, capability, down)
    made = {
        **constants.quantizer_constants(spec), **blocks.axis_constants(spec, kind, capability, run),
        **{"T_" + name: value for name, value in columns.items()}, "CARRY": blocks.carry_of(spec),
        "PIECES": blocks.pieces_of(spec), "WORDS": WORDS, "GROUPS": groups, "SWIZZLE": swizzle,
        "PORTABLE": blocks.is_portable(capability),
    }  # fmt: skip
    picked = constants.only(blocks.jit().quantize_both, made)
    return blocks.Plan(picked, WORDS * groups // 32 // shared, down, WORDS * groups, blocks.scale_dtype_of(spec))


@kernel(
    "quantize_both",
    "triton.quantize_both",
    priority=20,
    requires=Requires(devices=("cuda",), packages=("triton",), dtypes=("bfloat16",), checks=CHECKS),
)
def quantize_both(
    x: torch.Tensor,
    spec: QuantizerSpec,
    column_spec: QuantizerSpec,
    amaxes: Pair,
    seeds: Pair,
    scale_layout: str,
) -> Result:
    """Quantize dense bf16 x [..., R, K] along both axes; arguments and results as `reference.quantize_both`."""
    x = blocks.aligned(x)
    fmt, swizzle = spec.format, scale_layout == layout.SWIZZLED
    *lead, rows, columns = x.shape
    matrices = x.numel() // (rows * columns)
    outer = outer_scales.outer_of(blocks.transformed(x, spec, amaxes[0], None), fmt, amaxes[0], None)
    column_outer = _column_outer(x, spec, column_spec, amaxes, outer)
    plan = plan_of(
        spec, column_spec, blocks.kind_of(outer), blocks.kind_of(column_outer), swizzle, blocks.capability_of(x.device)
    )
    made = []
    for high, wide in ((rows, columns), (columns, rows)):
        qdata = blocks.empty((*lead, high, wide // fmt.block * fmt.block_bytes), torch.uint8, x.device)
        scale = blocks.empty_scale(tuple(lead), high, wide // fmt.block, plan.scale_dtype, swizzle, False, x)
        made.append((qdata, scale))
    (qdata, scale), (t_qdata, t_scale) = made
    source, count, decode = (scale, 0, scale) if outer is None else outer[1:4]
    t_source, t_count, t_decode = (scale, 0, scale) if column_outer is None else column_outer[1:4]
    seed, t_seed = (scale if s is None else s for s in seeds)
    thresholds, code_of, multipliers = blocks.tables_of(spec, scale)
    args = (
        x, qdata, scale, source, decode, seed, multipliers, count,
        t_qdata, t_scale, t_source, t_decode, t_seed, t_count, thresholds, code_of,
        rows, columns // 2,
    )  # fmt: skip
    across, down = blocks.quotient(columns // 2, WORDS), blocks.quotient(rows // plan.run, plan.constants["GROUPS"])
    launch(blocks.jit().quantize_both, matrices * across * down, args, plan.constants, plan.warps)
    results = (None if outer is None else outer.result, None if column_outer is None else column_outer.result)
    return qdata, scale, results[0], t_qdata, t_scale, results[1]


def _column_outer(
    x: torch.Tensor,
    spec: QuantizerSpec,
    column_spec: QuantizerSpec,
    amaxes: Pair,
    outer: outer_scales.Outer | None,
) -> outer_scales.Outer | None:
    """The outer scale of the columns; one number that is the rows' too is computed once."""
    alone = spec.format.outer_scale is not None and spec.format.outer_scale.per == "tensor"
    plain = spec.hadamard is None and column_spec.hadamard is None
    if outer is not None and outer.kind < outer_scales.BY_ROW and alone and plain and amaxes == (None, None):
        decode = torch.empty_like(outer.decode)
        return outer._replace(decode=decode, result=decode)
    seen = blocks.transformed(x.mT, column_spec, amaxes[1], None)
    return outer_scales.outer_of(seen, column_spec.format, amaxes[1], None)


@kernel(
    "quantize_both",
    "triton.quantize_twice",
    priority=10,
    requires=Requires(devices=("cuda",), packages=("triton",)),
    bound="bit-equal to the reference; reads the input twice",
)
def quantize_twice(
    x: torch.Tensor,
    spec: QuantizerSpec,
    column_spec: QuantizerSpec,
    amaxes: Pair,
    seeds: Pair,
    scale_layout: str,
) -> Result:
    """Quantize x along its rows, then along its columns, by the kernels of quantize; as `reference.quantize_both`."""
    result: Result = ()
    dense = x if x.is_contiguous() else x.contiguous()
    for data, order, one, amax, seed in (
        (dense, "rows", spec, amaxes[0], seeds[0]),
        (dense.mT, "columns", column_spec, amaxes[1], seeds[1]),
    ):
        given = None if amax is None else "given"
        operand = Operand(tuple(data.shape), str(data.dtype).removeprefix("torch."), outer=given, order=order)
        problem = Problem(
            "quantize", (operand,), x.device.type, blocks.capability_of(x.device), one, None, scale_layout
        )
        result += tuple(select(problem).run(data, one, amax, None, seed, scale_layout))
    return result
