"""The MLP of Llama-3 70B: gate and up as one weight, silu(gate) * up, down; casts included, one CUDA graph.

With bf16 activations the middle is torch's `silu(gate) * up`; with quantized ones it is `silu_mul_quantize`, and the
input is quantized first. The floor is that of the two products: what lies between them need not leave the chip.

Each part is checked on its own: both products on a sample against float64, the quantized middle bit for bit on sampled
rows against the reference; then the timed call must give the result of the parts, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from microscale import dispatch
from microscale.bench import product
from microscale.bench.matmul import Weights, partners_of
from microscale.bench.product import PLAIN, Product, normal, stored
from microscale.ops import explain, linear, matmul, quantize, silu_mul_quantize
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor
from microscale.testing import assert_same_quantized

if TYPE_CHECKING:
    from microscale.bench.matmul import Plan

ROWS = 16  # of the middle that are compared with the reference


def mlp_products(place: torch.device, plan: Plan, spec: QuantizerSpec) -> Iterator[Product]:
    """Yield the MLP with both weights in a format: weight-only, and with quantized activations."""
    size, hidden = plan.mlp
    gate_up, down = normal((2 * hidden, size), place, seed=1), normal((size, hidden), place, seed=2)
    mlp = _Mlp(Weights(gate_up, spec), Weights(down, spec))
    for m in plan.mlp_rows:
        yield _weight_only(mlp, normal((m, size), place))
    for partner in partners_of(spec, plan.mlp_pairs):
        for m in plan.mlp_rows:
            yield from _both_scaled(mlp, normal((m, size), place), partner)


class _Mlp(NamedTuple):
    gate_up: Weights
    down: Weights

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(_middle(functional.linear(x, self.gate_up.plain)), self.down.plain)


def _halves(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = h.chunk(2, dim=-1)
    return gate, up


def _middle(h: torch.Tensor) -> torch.Tensor:
    gate, up = _halves(h)
    return functional.silu(gate) * up


def _weight_only(mlp: _Mlp, x: torch.Tensor) -> Product:
    gate_up, case = mlp.gate_up.for_rows(x.shape[0])
    down, down_case = mlp.down.for_rows(x.shape[0])
    case = case if case == down_case else f"{case} and {down_case}"
    between = x.new_empty(x.shape[0], down.shape[1])
    chosen = (explain("matmul", x, gate_up), explain("matmul", between, down))

    def call() -> torch.Tensor:
        return functional.linear(_middle(functional.linear(x, gate_up)), down)

    def check() -> None:
        extra = product.extra_error("matmul", chosen)
        h = functional.linear(x, gate_up)
        mlp.gate_up.sample.check(h, x, extra)
        middle = _middle(h)
        y = functional.linear(middle, down)
        mlp.down.sample.check(y, middle, extra)
        product.assert_repeats(call, y)

    case = f"weight-only, {case}"
    return Product(case=case, call=call, check=check, chosen=chosen, **_common(mlp, x, None))


def _both_scaled(mlp: _Mlp, x: torch.Tensor, spec: QuantizerSpec) -> Iterator[Product]:
    yield _scaled(mlp, x, spec, (None, None))
    kept = tuple(w.kept_rows(x.shape[0], spec) for w in mlp)
    if None not in kept:
        yield _scaled(mlp, x, spec, kept)


def _scaled(mlp: _Mlp, x: torch.Tensor, spec: QuantizerSpec, kept: tuple[BlockScaledTensor | None, ...]) -> Product:
    """Both operands quantized. `kept`: rows of both weights, or None."""
    gate_up, down = (w.for_both if rows is None else rows for w, rows in zip(mlp, kept, strict=True))
    between = quantize(x.new_zeros(x.shape[0], down.shape[1]), spec)
    chosen = (explain("matmul", quantize(x, spec), gate_up), explain("matmul", between, down))

    def up(x: torch.Tensor) -> torch.Tensor:
        return linear(x, mlp.gate_up.for_both, input_quantizer=spec, rows=kept[0])

    def call() -> torch.Tensor:
        return matmul(silu_mul_quantize(*_halves(up(x)), spec), down.transpose(-1, -2))

    def check() -> None:
        extra = product.extra_error("matmul", chosen)
        h = up(x)
        mlp.gate_up.sample.check(h, quantize(x, spec), extra)
        middle = silu_mul_quantize(*_halves(h), spec)
        _check_middle(h, middle, spec)
        y = matmul(middle, down.transpose(-1, -2))
        mlp.down.sample.check(y, middle, extra)
        product.assert_repeats(call, y)

    case = "both scaled, cast included" + (", rows kept" if kept[0] is not None else "")
    return Product(case=case, call=call, check=check, chosen=chosen, **_common(mlp, x, spec))


def _common(mlp: _Mlp, x: torch.Tensor, partner: QuantizerSpec | None) -> dict[str, Any]:
    """The fields of a row that do not depend on how it is computed. `n` is the width of the middle."""
    m, (size, hidden) = x.shape[0], mlp.down.plain.shape
    up = (2 * m * size + stored(mlp.gate_up.quantized), 4 * m * size * hidden)
    down = (2 * m * size + stored(mlp.down.quantized), 2 * m * size * hidden)
    return {
        "op": "mlp",
        "format": mlp.down.spec.name,
        "activations": PLAIN if partner is None else partner.name,
        "sizes": (m, hidden, size),
        "plain": functools.partial(mlp.plain, x),
        "plain_op": "mlp",
        "work": (up, down),
        "eighth": product.is_eighth(None if partner is None else partner.format, mlp.down.spec.format),
    }


def _check_middle(h: torch.Tensor, middle: BlockScaledTensor, spec: QuantizerSpec) -> None:
    """Compare some rows with the reference. An outer scale of the whole is given to it: rows do not determine it."""
    rows = product.strata(h.shape[0], ROWS, h.device)
    got = middle.index_select(0, rows)
    assert isinstance(got, BlockScaledTensor)
    outer = None if middle.outer_scale is None or middle.outer_scale.dim() else middle.outer_scale
    with dispatch.use_backend("reference"):
        expected = silu_mul_quantize(*_halves(h.index_select(0, rows)), spec, outer_scale=outer)
    assert_same_quantized(got, expected, "silu_mul_quantize")
