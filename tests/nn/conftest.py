"""A small model with the cases that matter, and recipes as data."""

from typing import Any

import pytest
import torch


class Tiny(torch.nn.Module):
    """Embedding, two blocks of linears (ragged K: 40 and 72), a norm and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 40)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(40, 72), "down": torch.nn.Linear(72, 40, bias=False)})
            for _ in range(2)
        )
        self.norm = torch.nn.LayerNorm(40)
        self.lm_head = torch.nn.Linear(40, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [..., T] to logits [..., T, 50]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["down"](torch.nn.functional.silu(block["up"](x)))
        return self.lm_head(self.norm(x))


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def tied() -> Tiny:
    return Tiny(tied=True)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(14).reshape(2, 7)


@pytest.fixture
def recipe():
    """Build a recipe from rules; its quantizers are w and x (nvfp4), s (static), m (mxfp8)."""

    def build(*rules: dict[str, Any], **quantizers: Any) -> dict[str, Any]:
        known = {
            "w": {"format": "nvfp4"},
            "x": {"format": "nvfp4"},
            "s": {"format": "nvfp4", "outer_scale_mode": "static"},
            "m": {"format": "mxfp8"},
            **quantizers,
        }
        gemms = [rule[gemm] for rule in rules for gemm in ("fprop", "dgrad", "wgrad") if gemm in rule]
        used = {name for gemm in gemms for name in gemm.values()} | set(quantizers)
        made = {name: body for name, body in known.items() if name in used} or {"w": known["w"]}
        return {"name": "test", "quantizers": made, "rules": list(rules)}

    return build
