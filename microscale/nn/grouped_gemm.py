"""The three GEMMs of a mixture of experts: each expert is a linear layer on its own tokens.

    fprop   y_TN   = q(x_TK) @ q(w_ENK)[e].T         blocks along K
    dgrad   dx_TK  = q(dy_TN) @ q(w_ENK)[e]          blocks along N
    wgrad   dw_ENK = q(dy_TN)[e].T @ q(x_TK)[e]      blocks along the tokens of e

Rows are sorted by expert, and the ends of the groups stay on the device. Every expert's operands are what `three_gemm`
makes of its rows alone: blocks, Hadamard groups and outer scales never span two experts. For wgrad a group is filled up
with zero rows to whole blocks (zeros change neither a block's amax nor the product). So operands with blocks along the
tokens are made from a copy with the groups spread, unless the caller says that groups are `alignment`ed: then in place,
and both axes of an activation from one read. Stochastic rounding draws for the rows of all experts together.

wgrad's operands are decoded without their outer scales, exactly, and multiplied as plain numbers (`ops.grouped_wgrad`);
outer scales multiply the FP32 sums. The other two products are `ops.grouped_matmul`, so the dispatcher decides: on
Hopper, pairs of MX operands with many tokens for each expert run on FP8 tensor cores unless `exact_products` is on.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from microscale import dispatch, ops
from microscale.errors import InputError
from microscale.nn.three_gemm import GemmCall, GemmState, _quantize, _quantize_both, _ThreeGemm, _whole_groups
from microscale.nn.token_groups import PaddedGroups, pad_groups, take_rows
from microscale.numerics import layout
from microscale.numerics.hadamard import hadamard
from microscale.ops import direct, graph, library
from microscale.spec.format import ROW
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor, bare

LEAST = 32  # rows that groups are spread to multiples of: what kernels for blocks along the tokens take
MOST = 128  # rows of a piece with an outer scale of its own


def three_grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    gemms: LayerGemms,
    state: GemmState | None = None,
    *,
    alignment: int = 1,
) -> torch.Tensor:
    """Return each row of x [T, K] times its expert's matrix of weight [E, N, K], transposed: [T, N], with gradients.

    `offsets` int32 [E], on x's device, rising: expert e has the rows up to offsets[e]. Groups may be empty; rows after
    the last end are zero, and so are their gradients. `alignment`: the caller's word that every end is a multiple of it
    (looked at on a CPU only); with a multiple of `alignment_of(gemms)` no operand is copied. Everything else as in
    `three_gemm`; `state.main_grad` is FP32 [E, N, K].

    Raises InputError for shapes or dtypes that do not fit, for stochastic rounding without `state.rounding`, and for a
    quantizer with one scale for all tokens.
    """
    state = GemmState() if state is None else state
    x = _check(x, weight, offsets, alignment)
    if gemms.is_stochastic and state.rounding is None:
        raise InputError("stochastic rounding needs a seed", "GemmState(rounding=torch.tensor([seed, 0]))")
    if torch.compiler.is_dynamo_compiling():
        graph.arm()
        return _traced(x, weight, offsets, state.rounding, state.main_grad, gemms.key, alignment)
    return _apply(x, weight, offsets, gemms, state, alignment)


def _check(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return x in the dtype that it is multiplied in. Raises InputError for arguments that do not fit."""
    with bare():
        shape, dtype = weight.shape, weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != dtype:
        raise InputError(f"input of {x.dtype}, weight of {dtype}", "convert one of them, or use torch.autocast")
    if x.dim() != 2 or len(shape) != 3 or x.shape[1] != shape[2]:
        raise InputError(f"experts {list(shape)} on {list(x.shape)}", "takes x [T, K] and weight [E, N, K]")
    if offsets.dtype != torch.int32 or offsets.shape != shape[:1] or offsets.device != x.device:
        got = f"{offsets.dtype} {list(offsets.shape)} on {offsets.device}"
        raise InputError(f"offsets {got}", f"they are int32 [{shape[0]}] on {x.device}")
    if alignment < 1:
        raise InputError(f"alignment {alignment}", "it is a number of rows: 1 for groups of any size")
    return x


def alignment_of(gemms: LayerGemms) -> int:
    """Return how many rows groups start at multiples of where operands have blocks along the tokens; 1 if none has.

    Raises InputError for a quantizer with one scale for all tokens: those of an expert are of no known number.
    """
    rows = 1
    for spec in _down_specs(gemms):
        if spec.format.block == ROW:
            reason = f"wgrad quantizes along the tokens by {spec.name}, one scale for all of them"
            raise InputError(reason, "give wgrad of experts a format with a block, or high_precision")
        tile = 1 if spec.scale_tile is None else spec.scale_tile[1]
        rows = math.lcm(rows, spec.format.block, tile, 1 if spec.hadamard is None else spec.hadamard.size)
    return rows


def _down_specs(gemms: LayerGemms) -> list[QuantizerSpec]:
    specs = (gemms.wgrad_grad_output, None if gemms.wgrad_input_is_fprops else gemms.wgrad_input)
    return [spec for spec in specs if spec is not None]


@graph.in_graph
def _traced(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    rounding: torch.Tensor | None,
    main_grad: torch.Tensor | None,
    key: str,
    alignment: int,
) -> torch.Tensor:
    return _apply(x, weight, offsets, LayerGemms.from_key(key), GemmState(rounding, main_grad), alignment)


def _apply(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, gemms: LayerGemms, state: GemmState, alignment: int
) -> torch.Tensor:
    seen = alignment > 1 and offsets.device.type == "cpu" and direct.is_direct(offsets)
    if seen and bool((offsets % alignment).any()):
        raise InputError(f"ends of groups {offsets.tolist()} are no multiples of {alignment}", "leave out alignment")
    call = grouped_call(gemms, state, offsets, x, alignment)
    return _ThreeGemm.apply(x, weight, None, call)  # type: ignore[no-untyped-call]


def grouped_call(
    gemms: LayerGemms, state: GemmState, offsets: torch.Tensor, x: torch.Tensor, alignment: int
) -> GroupedCall:
    """Return what a call of `three_grouped_gemm` with these arguments does, step by step."""
    groups = _groups_of(offsets, x, alignment, gemms)
    return GroupedCall(gemms, state, x.dtype, torch.is_grad_enabled(), groups)


def _groups_of(offsets: torch.Tensor, x: torch.Tensor, alignment: int, gemms: LayerGemms) -> _Groups:
    return _Groups(offsets, x.shape[0], alignment, alignment_of(gemms))


# -- where the tokens are ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The groups of `rows` rows that end at `offsets`, and those that blocks along the tokens are made from.

    Ends are multiples of `alignment`, blocks need multiples of `needed`. In place where these agree, else spread.
    """

    offsets: torch.Tensor
    rows: int
    alignment: int
    needed: int

    @property
    def in_place(self) -> bool:
        """Whether blocks along the tokens need no copy with the groups spread."""
        return self.alignment % self.needed == 0 and self.rows % self.needed == 0

    @functools.cached_property
    def unit(self) -> int:
        """Rows of pieces that groups are made of; whole blocks."""
        if not self.in_place:
            return math.lcm(self.needed, LEAST)
        unit = math.gcd(self.rows, self.alignment)
        while unit > MOST and unit % (2 * self.needed) == 0:
            unit //= 2
        return unit

    @functools.cached_property
    def padded(self) -> PaddedGroups:
        """How rows are spread."""
        return pad_groups(self.offsets, self.rows, self.unit)

    def spread(self, t: torch.Tensor) -> torch.Tensor:
        """The rows of t as blocks along them are made from."""
        return t if self.in_place else take_rows(t, self.padded.source, self.padded.blank)

    @property
    def ends(self) -> torch.Tensor:
        """The ends of the groups of `spread`."""
        return self.offsets if self.in_place else self.padded.ends

    def of_each(self, pieces: torch.Tensor, unit: int) -> torch.Tensor:
        """The first piece of each group, of pieces [n, ...] of `unit` rows that are alike within a group: [E, ...]."""
        ends = self.offsets if unit == 1 else self.ends // unit
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        return pieces.index_select(0, starts.clamp(max=pieces.shape[0] - 1))


# -- operands and products ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupedCall(GemmCall):
    """A call of grouped layers: weights [E, N, K], tokens sorted by expert."""

    groups: _Groups

    def is_empty(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> bool:
        """Whether nothing is multiplied: results are zeros."""
        return 0 in x_TK.shape or 0 in weight_NK.shape

    def of_tokens(
        self,
        t: torch.Tensor,
        rows: QuantizerSpec | None,
        columns: QuantizerSpec | None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize x or dy for both GEMMs that contract it; the second with blocks along the tokens."""
        if self.groups.in_place and not any(_has_outer(spec) for spec in (rows, columns)):
            return _quantize_both(t, rows, columns, seed)
        first = _quantize(t, rows, -1, seed, self._row_amax(t, rows))
        if columns is None:
            return first, t
        second = None if seed is None else torch.stack([seed[0], seed[1] + 1])
        spread = self.groups.spread(t)
        if not _has_outer(columns):
            return first, _quantize(spread, columns, -2, second)
        pieces = spread.unflatten(0, (-1, self.groups.unit))
        return first, _quantize(pieces, columns, -2, second, self._piece_amax(pieces, columns))

    def of_weight(
        self, weight: torch.Tensor, rows: QuantizerSpec | None, columns: QuantizerSpec | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize w for both GEMMs that contract it, every expert by itself."""
        if not any(_has_outer(spec) for spec in (rows, columns)):
            return _quantize_both(weight, rows, columns)
        return quantize_experts(weight, rows, -1), quantize_experts(weight, columns, -2)

    def fprop(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x w.T of each group."""
        return ops.grouped_matmul(x, weight.transpose(-1, -2), self.groups.offsets, self.dtype)

    def dgrad(self, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return dy w of each group."""
        return ops.grouped_matmul(dy, weight, self.groups.offsets, self.dtype)

    def wgrad(self, dy: torch.Tensor, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """Return dy.T x of each group, rounded once to `out_dtype`."""
        values, outers, ends = self.wgrad_operands(dy, x)
        if not outers:
            return ops.grouped_wgrad(*values, ends, out_dtype)
        dw_ENK = ops.grouped_wgrad(*values, ends, torch.float32)
        for outer in outers[:-1]:
            dw_ENK.mul_(outer)
        return torch.mul(dw_ENK, outers[-1], out=dw_ENK if out_dtype == dw_ENK.dtype else _like(dw_ENK, out_dtype))

    def wgrad_operands(
        self, dy: torch.Tensor, x: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Return what wgrad multiplies: plain values of dy and x, outer scales of dw [E, N, K], the ends of groups."""
        dtype = self._values_dtype(dy, x)
        (left, dy_outer), (right, x_outer) = self._values(dy, dtype), self._values(x, dtype)
        dy_outer = None if dy_outer is None else dy_outer.transpose(1, 2)
        spread = [_blocked_down(t) and not self.groups.in_place for t in (dy, x)]
        if any(spread):  # the other one, too
            left, right = (v if done else self.groups.spread(v) for v, done in zip((left, right), spread, strict=True))
        ends = self.groups.ends if any(spread) else self.groups.offsets
        return (left, right), [outer for outer in (dy_outer, x_outer) if outer is not None], ends

    def _values_dtype(self, *operands: torch.Tensor) -> torch.dtype:
        """What wgrad's operands are decoded to: this call's dtype; not FP16, whose range ends before that of scales."""
        if self.dtype != torch.float16:
            return self.dtype
        return torch.bfloat16 if all(isinstance(t, BlockScaledTensor) for t in operands) else torch.float32

    def _values(self, t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Plain values [T, C], and the outer scale [E, 1, C or 1] of each expert that they lack."""
        if not isinstance(t, BlockScaledTensor):
            return t.to(dtype), None
        outer = t.outer_scale
        if outer is None or not (_blocked_down(t) or _is_shared(t)):
            return ops.dequantize(t, dtype), None
        plain = BlockScaledTensor(t.qdata, t.scale, None, t.meta, t.shape, dtype)
        values = ops.dequantize(plain, dtype)
        if not _blocked_down(t):
            return values, self.groups.of_each(outer, 1).unsqueeze(1)
        return values.flatten(0, 1), self.groups.of_each(outer, self.groups.unit)

    def _row_amax(self, t: torch.Tensor, spec: QuantizerSpec | None) -> torch.Tensor | None:
        """The amax [T, 1] of each row's group, for an outer scale of each expert."""
        if spec is None or not _has_outer(spec) or _is_by_row(spec):
            return None
        return ops.group_amax(_transformed(_whole_groups(t, spec, -1), spec), self.groups.offsets)

    def _piece_amax(self, pieces: torch.Tensor, spec: QuantizerSpec) -> torch.Tensor:
        """The amax [n, 1, 1 or C] of each piece's group, of pieces [n, unit, C]."""
        seen, ends = _transformed(pieces.mT, spec), self.groups.ends // self.groups.unit
        if _is_by_row(spec):  # a scale for each column of each expert
            magnitude = torch.where(seen.isfinite(), seen.abs(), 0).amax(-1).float()
            order = torch.arange(pieces.shape[0], device=ends.device, dtype=ends.dtype)
            group = torch.searchsorted(ends, order, right=True)
            most = magnitude.new_zeros(ends.shape[0] + 1, magnitude.shape[1])
            most.scatter_reduce_(0, group.unsqueeze(1).expand_as(magnitude), magnitude, "amax")
            return most[group].unsqueeze(1)
        if spec.hadamard is None:
            seen = pieces  # which is dense where rows are
        return ops.group_amax(seen.flatten(1), ends).unsqueeze(-1)


def quantize_experts(weight: torch.Tensor, spec: QuantizerSpec | None, axis: int = -1) -> torch.Tensor:
    """Quantize weights [E, N, K] along an axis as E matrices of their own, with an outer scale each if there are any.

    The bytes of expert e are those of `quantize(weight[e], spec, axis=axis)`. None gives the weight itself.
    """
    if spec is None or not _has_outer(spec) or _is_by_row(spec):
        return _quantize(weight, spec, axis, None)
    seen = _whole_groups(weight, spec, axis)
    seen = seen if spec.hadamard is None else _transformed(seen if axis == -1 else seen.mT, spec)
    each = torch.arange(1, weight.shape[0] + 1, device=weight.device, dtype=torch.int32)
    return _quantize(weight, spec, axis, None, ops.group_amax(seen.flatten(1), each).unsqueeze(-1))


def _has_outer(spec: QuantizerSpec | None) -> bool:
    return spec is not None and spec.format.outer_scale is not None


def _is_by_row(spec: QuantizerSpec) -> bool:
    """Whether rows have outer scales of their own: no other row matters to them."""
    return spec.format.outer_scale is not None and spec.format.outer_scale.per == "row"


def _is_shared(t: BlockScaledTensor) -> bool:
    outer = t.format.outer_scale
    return outer is not None and outer.per != "row"


def _blocked_down(t: torch.Tensor) -> bool:
    return isinstance(t, BlockScaledTensor) and t.block_axis == -2


def _like(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(t, dtype=dtype)


def _transformed(t: torch.Tensor, spec: QuantizerSpec) -> torch.Tensor:
    """What an outer scale is taken over: t [..., K] after its Hadamard transform.

    Where the dispatcher would quantize t by a Triton kernel, by that one's transform: the same bits from one read.
    """
    if spec.hadamard is None:
        return t
    if direct.is_direct(t):
        problem = library.quantize_problem(t, spec.for_row(t.shape[-1]), True, layout.STRIDED)
        if dispatch.select(problem).backend == "triton":
            from microscale.kernels.triton.hadamard import hadamard as kernel

            return kernel(t, spec.hadamard)
    return hadamard(t, spec.hadamard.size, spec.hadamard.sign)


__all__ = ["alignment_of", "quantize_experts", "three_grouped_gemm"]
