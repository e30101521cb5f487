"""The product of quantized experts: weights that are block-scaled already, tokens quantized on the way."""

from __future__ import annotations

import dataclasses

import torch

from microscale.nn.grouped_gemm import GroupedCall, _check, _groups_of
from microscale.nn.three_gemm import GemmState, _ThreeGemm
from microscale.numerics.hadamard import hadamard
from microscale.ops import graph
from microscale.ops.rows import in_dtype, quantize_as_rows, uses_rows
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    gemms: LayerGemms,
    amax: torch.Tensor | None = None,
    rows: BlockScaledTensor | None = None,
) -> torch.Tensor:
    """Return each row of x [T, K] times its expert's matrix of weight [E, N, K], transposed: [T, N] of x's dtype.

    As `three_grouped_gemm` for a weight that is quantized already, of which `gemms` names the `fprop_input` alone: the
    tokens' quantizer, by which every expert's are quantized by themselves. `amax`: FP32 scalar, the calibrated
    magnitude of a static one, which all experts share. The gradient to x is exact without a quantizer and
    straight-through with one; the weight gets none. `rows`: as `ops.linear` takes them, used from 128 tokens for each
    expert on. Raises InputError as `three_grouped_gemm` does.
    """
    x = _check(x, weight, offsets, 1)
    if torch.compiler.is_dynamo_compiling():
        graph.arm()
        return _traced(x, weight, offsets, gemms.key, amax, rows)
    return _apply(x, weight, offsets, gemms, amax, rows)


@graph.in_graph
def _traced(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    key: str,
    amax: torch.Tensor | None,
    rows: BlockScaledTensor | None,
) -> torch.Tensor:
    return _apply(x, weight, offsets, LayerGemms.from_key(key), amax, rows)


def _apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    gemms: LayerGemms,
    amax: torch.Tensor | None,
    rows: BlockScaledTensor | None,
) -> torch.Tensor:
    groups = _groups_of(offsets, x, 1, gemms)
    if rows is not None:
        rows = in_dtype(rows, x.dtype) if uses_rows(x, gemms.fprop_input, rows.shape[0]) else None
    call = _InferenceCall(gemms, GemmState(), x.dtype, torch.is_grad_enabled(), groups, amax, rows)
    return _ThreeGemm.apply(x, weight, None, call)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class _InferenceCall(GroupedCall):
    """A call of quantized experts."""

    amax: torch.Tensor | None = None
    rows: BlockScaledTensor | None = None

    def of_tokens(
        self,
        t: torch.Tensor,
        rows: QuantizerSpec | None,
        columns: QuantizerSpec | None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize x; as rows where experts are."""
        if self.rows is None or rows is None:
            return super().of_tokens(t, rows, columns, seed)
        return quantize_as_rows(t, rows), t

    def fprop(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x w.T of each group, by kept rows if there are any."""
        return super().fprop(x, weight if self.rows is None else self.rows, bias)

    def dgrad(self, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return dy w of each group, in the basis of x: weights that are transformed expect transformed tokens."""
        dx, spec = super().dgrad(dy, weight), self.gemms.fprop_input
        if spec is None or spec.hadamard is None:
            return dx
        return hadamard(dx, spec.hadamard.size, spec.hadamard.sign, inverse=True)

    def _row_amax(self, t: torch.Tensor, spec: QuantizerSpec | None) -> torch.Tensor | None:
        if spec is not None and spec.outer_scale_mode == "static":
            return self.amax
        return super()._row_amax(t, spec)
