"""`TrainingGroupedLinear`: the linear layers of a mixture of experts, as one module that trains by a recipe."""

from __future__ import annotations

import torch

from microscale.nn.experts import _PLAIN, GroupedLinear
from microscale.nn.grouped_gemm import alignment_of, three_grouped_gemm
from microscale.nn.three_gemm import GemmState
from microscale.nn.training_linear import TrainingLayer, add_training_class


class TrainingGroupedLinear(TrainingLayer, GroupedLinear):
    """`GroupedLinear` whose three GEMMs are quantized by a recipe's rule. Made by `prepare_training_`."""

    plain_class: type[torch.nn.Module] = GroupedLinear

    @property
    def alignment(self) -> int:
        """Rows that groups should start at multiples of, so that no operand is copied."""
        return 1 if self.high_precision else alignment_of(self.gemms)

    def forward(self, input: torch.Tensor, offsets: torch.Tensor, alignment: int = 1) -> torch.Tensor:
        """Return rows of input [T, K] times their expert's weight, transposed; as `GroupedLinear`, quantized."""
        gemms, main_grad = _PLAIN if self.high_precision else self.gemms, self.main_grad()
        state = GemmState(self.rounding_state, main_grad)
        if not torch.compiler.is_dynamo_compiling():
            state = GemmState(self.rounding_state, main_grad, self.kept_weights(), self.layer_name)
        return three_grouped_gemm(input, self.weight, offsets, gemms, state, alignment=alignment)


add_training_class(GroupedLinear, TrainingGroupedLinear)

__all__ = ["GroupedLinear", "TrainingGroupedLinear"]
