"""`GroupedLinear`: the linear layers of a mixture of experts as one module.

Models that keep their experts as a list of nn.Linear modules need none of this. Those that stack them, as [E, 2 I, H]
and [E, H, I], do: two GroupedLinear modules hold the same tensors as `weight`.
"""

from __future__ import annotations

import torch

from microscale.nn.grouped_gemm import three_grouped_gemm
from microscale.spec.training import LayerGemms

_PLAIN = LayerGemms()  # every operand in high precision


class GroupedLinear(torch.nn.Module):
    """E linear layers without bias on tokens sorted by expert: `weight` [E, N, K], made and drawn as nn.Linear's.

    `prepare_training_` and `quantize_` take it as they take nn.Linear: rules of recipes match its name.
    """

    weight: torch.Tensor

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty(experts, out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert's weight as nn.Linear does."""
        bound = max(1, self.in_features) ** -0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)

    @property
    def alignment(self) -> int:
        """Rows that groups should start at multiples of (`TokenGroups.of` takes it); 1 in high precision."""
        return 1

    def forward(self, input: torch.Tensor, offsets: torch.Tensor, alignment: int = 1) -> torch.Tensor:
        """Return rows of input [T, K] times their expert's weight, transposed: [T, N] of the input's dtype.

        `offsets` int32 [E]: expert e has the rows up to offsets[e]. `alignment`: every one of them is a multiple of it.
        See `three_grouped_gemm`.
        """
        return three_grouped_gemm(input, self.weight, offsets, _PLAIN, alignment=alignment)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
