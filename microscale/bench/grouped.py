"""Mixtures of experts: tokens sorted by expert, times their expert's weight, with the offsets on the device.

Balanced: every expert has the same number of tokens. Skewed: the i-th expert has a share of 1 / i, and the last eighth
of the experts none. Each is held against one dense product of the same tokens, N, K and formats.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from microscale.bench import product
from microscale.bench.matmul import PREPARED_ON, Plan, Weights, partners_of, work
from microscale.bench.product import PLAIN, Product, Sample, normal, stored
from microscale.errors import MicroscaleError
from microscale.ops import align_rows, explain, grouped_matmul, matmul, prepare, quantize
from microscale.ops.rows import MANY, why_not
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor


def balanced(tokens: int, experts: int) -> list[int]:
    """Return the number of tokens of each expert, as equal as can be."""
    return [(i + 1) * tokens // experts - i * tokens // experts for i in range(experts)]


def skewed(tokens: int, experts: int) -> list[int]:
    """Return the number of tokens of each expert: the i-th has a share of 1 / i, the last eighth none."""
    busy = experts - -(-experts // 8)
    total = sum(1 / (i + 1) for i in range(busy))
    counts = [int(tokens / (i + 1) / total) for i in range(busy)]
    counts[0] += tokens - sum(counts)
    return counts + [0] * (experts - busy)


SPREADS: dict[str, Callable[[int, int], list[int]]] = {"balanced": balanced, "skewed": skewed}


def expert_products(
    place: torch.device, plan: Plan, spec: QuantizerSpec, sizes: tuple[int, int, int]
) -> Iterator[Product]:
    """Yield the products with E experts [N, K] in a format: weight-only, and with quantized activations."""
    partners: list[QuantizerSpec | None] = [None, *partners_of(spec, plan.pairs)]
    experts = Experts(normal(sizes, place, seed=1), spec)
    x = normal((plan.tokens, sizes[2]), place)
    for partner in partners:
        tokens = _Tokens.of(x, partner)
        for weights in experts.stored(plan.tokens, partner):
            if weights.suffix == weights.like:
                yield _dense(experts, tokens, weights)
            for spread in SPREADS:
                yield _grouped(experts, tokens, spread, weights)


class _Stored(NamedTuple):
    """What is multiplied by: all experts [E, N, K], the first of them, and what the case says of it.

    `like`: what is said of the dense product that it is held against.
    """

    experts: BlockScaledTensor
    first: BlockScaledTensor
    suffix: str = ""
    like: str = ""


class Experts:
    """Weights [E, N, K] in bf16 and quantized, with an outer scale for each expert where the format has one."""

    def __init__(self, plain: torch.Tensor, spec: QuantizerSpec) -> None:
        outer = spec.format.outer_scale
        amax = None
        if outer is not None and outer.per == "tensor":
            amax = torch.stack([w.abs().amax() for w in plain]).float()[:, None, None]
        self.plain, self.spec = plain, spec
        self.quantized = quantize(plain, spec, amax=amax)
        self.first = Weights(plain[0], spec)

    def stored(self, tokens: int, partner: QuantizerSpec | None) -> Iterator[_Stored]:
        """Yield the experts as they were quantized, prepared, and as a layer keeps rows of them, where it does."""
        yield _Stored(self.quantized, self.first.quantized)
        if self.plain.device.type in PREPARED_ON:
            try:
                made = prepare(self.quantized, quantized_activations=partner is not None)
            except MicroscaleError:  # a format or sizes that it does not take
                made = self.quantized
            if made.scale_layout != self.quantized.scale_layout:
                yield _Stored(made, self.first.quantized, ", prepared")
        if tokens >= MANY * len(self.plain) and why_not(self.quantized, partner) is None:
            yield self._kept

    @functools.cached_property
    def _kept(self) -> _Stored:
        made = align_rows(self.quantized)
        return _Stored(made, made.select(0, 0), ", rows kept", ", rows kept")  # type: ignore[arg-type]

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """Some rows of each expert, decoded."""
        return [Sample.of(self.quantized.select(0, i)) for i in range(self.plain.shape[0])]


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The activations x [T, K], quantized in the timed call where there is a partner format; `operand`: as they are."""

    x: torch.Tensor
    partner: QuantizerSpec | None
    operand: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, partner: QuantizerSpec | None) -> _Tokens:
        return _Tokens(x, partner, x if partner is None else quantize(x, partner))

    def cast(self) -> torch.Tensor:
        return self.x if self.partner is None else quantize(self.x, self.partner)


def _dense(experts: Experts, tokens: _Tokens, weights: _Stored) -> Product:
    """The product of all tokens with the first expert."""
    weight = weights.first.transpose(-1, -2)
    chosen = (explain("matmul", tokens.operand, weights.first),)

    def call() -> torch.Tensor:
        return matmul(tokens.cast(), weight)

    def check() -> None:
        experts.first.sample.check(call(), tokens.operand, product.extra_error("matmul", chosen))

    case = f"dense, as {len(experts.plain)} experts{weights.suffix}"
    fields = _common(experts, tokens)
    return Product(
        "matmul", case, call=call, check=check, chosen=chosen, work=work(tokens.x, experts.first.quantized), **fields
    )


def _grouped(experts: Experts, tokens: _Tokens, spread: str, weights: _Stored) -> Product:
    counts = SPREADS[spread](tokens.x.shape[0], len(experts.plain))
    ends = torch.tensor(counts).cumsum(0)
    offsets = ends.to(device=tokens.x.device, dtype=torch.int32)
    weight = weights.experts.transpose(-1, -2)
    chosen = (explain("grouped_matmul", tokens.operand, weights.experts),)

    def call() -> torch.Tensor:
        return grouped_matmul(tokens.cast(), weight, offsets)

    def check() -> None:
        y, start = call(), 0
        extra = product.extra_error("grouped_matmul", chosen)
        for sample, stop in zip(experts.samples, ends.tolist(), strict=True):
            if stop > start:
                taken = torch.arange(start, stop, device=y.device)
                sample.check(y[start:stop], tokens.operand.index_select(0, taken), extra)
            start = stop
        product.assert_repeats(call, y)

    fields = _common(experts, tokens)
    m, n, k = fields["sizes"]
    used = stored(experts.quantized) * sum(c > 0 for c in counts) // len(counts)
    return Product(
        "grouped_matmul", f"{len(counts)} experts, {spread}{weights.suffix}", call=call, check=check, chosen=chosen,
        work=((stored(tokens.x) + used + 2 * m * n, 2 * m * n * k),),
        like=f"dense, as {len(counts)} experts{weights.like}", **fields,
    )  # fmt: skip


def _common(experts: Experts, tokens: _Tokens) -> dict[str, Any]:
    """The fields that a dense and a grouped product share."""
    _, n, k = experts.plain.shape
    partner = tokens.partner
    return {
        "format": experts.spec.name,
        "activations": PLAIN if partner is None else partner.name,
        "sizes": (tokens.x.shape[0], n, k),
        "plain": functools.partial(functional.linear, tokens.x, experts.plain[0]),
        "eighth": product.is_eighth(None if partner is None else partner.format, experts.spec.format),
    }
