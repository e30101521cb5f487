"""Tokens sorted by expert: where each row goes, with ends of groups that stay on the device.

Operands with blocks along the tokens need groups that start at multiples of a block. `TokenGroups.of` sorts tokens into
such groups at once (`alignment`), which costs nothing but the zero rows between them; `pad_groups` says how to spread
rows that are sorted already. Sizes of tensors follow from shapes alone: nothing waits for the device, and CUDA graphs
capture all of it. Every sum has one order, so that two runs give the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from microscale.errors import InputError


class PaddedGroups(NamedTuple):
    """Groups of rows spread so that each starts at a multiple of a unit; P rows, as many as there may be at the most.

    `source` int64 [P]: which row comes there. `blank` int64 [P - rows]: places that have none, those between groups
    first, of which `source` says anything. `ends` int32 [E]: the ends of the groups, whole units. `shift` int64 [E]:
    how far each group moved.
    """

    source: torch.Tensor
    blank: torch.Tensor
    ends: torch.Tensor
    shift: torch.Tensor


def pad_groups(offsets: torch.Tensor, rows: int, unit: int) -> PaddedGroups:
    """Return how `rows` > 0 rows in groups that end at `offsets` (int [E], E > 0, rising) go to multiples of `unit`.

    Rows after the last end are left out.
    """
    experts, ends = offsets.shape[0], offsets.to(torch.int64)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    gaps = (starts - ends) % unit
    shift = gaps.cumsum(0) - gaps
    padded = ends + shift + gaps
    total = -(-(rows + experts * (unit - 1)) // unit) * unit
    place = torch.arange(total, device=offsets.device)
    group = torch.searchsorted(padded, place, right=True).clamp(max=experts - 1)
    source = (place - shift[group]).clamp(0, rows - 1)
    # Before the j-th blank are j blanks and the rows of all groups up to its own.
    count = torch.arange(total - rows, device=offsets.device)
    owner = torch.searchsorted(gaps.cumsum(0), count, right=True)
    blank = count + torch.cat((ends, ends[-1:]))[owner]
    return PaddedGroups(source, blank, padded.to(torch.int32), shift)


def take_rows(t: torch.Tensor, source: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Return the rows `source` of t, zeros at the places `blank`."""
    out = t.index_select(0, source)
    return out.index_fill_(0, blank, 0) if blank.shape[0] else out


@dataclasses.dataclass(frozen=True)
class TokenGroups:
    """Where the tokens of a batch go: each of T tokens to `top` experts, so S = T * top rows, P >= S with zero rows.

    `offsets` int32 [E] are the ends of the groups, as grouped products take them; the last is P, so that every row is
    some expert's. `source` int64 [P] is the place token * top + choice that each row comes from, `place` int64 [S] the
    row that each of them went to, `blank` int64 [P - S] the zero rows.
    """

    offsets: torch.Tensor
    source: torch.Tensor
    place: torch.Tensor
    blank: torch.Tensor
    top: int

    @staticmethod
    def of(chosen: torch.Tensor, experts: int, alignment: int = 1) -> TokenGroups:
        """Sort tokens by expert.

        Args:
            chosen: int64 [T, top], each token's experts, 0 to experts - 1, on the tokens' device.
            experts: how many there are.
            alignment: rows that groups start at multiples of; `alignment` of a GroupedLinear is what its recipe wants.

        Raises InputError for other shapes or dtypes.
        """
        if chosen.dim() != 2 or chosen.dtype != torch.int64 or experts < 1 or alignment < 1:
            got = f"{chosen.dtype} {list(chosen.shape)}, {experts} experts, alignment {alignment}"
            raise InputError(f"token groups of {got}", "chosen is int64 [T, top]; the numbers are positive")
        sorted_by, order = chosen.flatten().sort(stable=True)
        rows, top = order.shape[0], chosen.shape[1]
        every = torch.arange(experts, device=chosen.device)
        offsets = torch.searchsorted(sorted_by, every, right=True)
        place = torch.arange(rows, device=chosen.device)
        if alignment == 1 or not rows:
            inverse = torch.empty_like(place).scatter_(0, order, place)
            return TokenGroups(offsets.to(torch.int32), order, inverse, place[:0], top)
        padded = pad_groups(offsets, rows, alignment)
        inverse = torch.empty_like(place).scatter_(0, order, place + padded.shift[sorted_by])
        last = torch.full_like(padded.ends[-1:], padded.source.shape[0])
        ends = torch.cat((padded.ends[:-1], last))
        return TokenGroups(ends, order[padded.source], inverse, padded.blank, top)

    def permute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows [P, K] of tokens x [T, K], sorted by expert; the gradient sums a token's rows."""
        rows: torch.Tensor = _Permute.apply(x, self.source, self.place, self.blank, self.top)  # type: ignore[no-untyped-call]
        return rows

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return each token's weighted sum of its rows [P, N]: [T, N], for weights [T, top] (in the rows' dtype)."""
        taken: torch.Tensor = _Unpermute.apply(rows, self.source, self.place, self.blank)  # type: ignore[no-untyped-call]
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), taken.unflatten(0, (-1, self.top))).squeeze(1)


class _Permute(torch.autograd.Function):
    """Tokens to rows. Both directions gather: a scatter would sum by atomics, in whatever order."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: torch.Tensor, place: torch.Tensor, blank: torch.Tensor, top: int
    ) -> torch.Tensor:
        """Gather a row for each choice."""
        ctx.save_for_backward(place)
        ctx.top = top
        return take_rows(x, source // top, blank)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sum a token's rows."""
        (place,) = ctx.saved_tensors
        return drows.index_select(0, place).unflatten(0, (-1, ctx.top)).sum(1), None, None, None, None


class _Unpermute(torch.autograd.Function):
    """Rows back to the order of the tokens, each token's choices side by side."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, source: torch.Tensor, place: torch.Tensor, blank: torch.Tensor
    ) -> torch.Tensor:
        """Gather the rows that are some token's."""
        ctx.save_for_backward(source, blank)
        return rows.index_select(0, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtaken: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gather the gradients, zeros for rows that are no token's."""
        source, blank = ctx.saved_tensors
        return take_rows(dtaken, source, blank), None, None, None
