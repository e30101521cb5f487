"""Transformer blocks that the train suite measures, in the shapes of published models.

A block is a module `layers.0` of its owner, with modules called as in published checkpoints: rules of recipes mean the
same here. Attention is torch's, in bf16; norms, rotary positions and SiLU are plain torch too, so what differs between
recipes is the linear layers.

In a mixture of experts tokens are routed by a router in bf16, sorted by expert, and summed again by `nn.TokenGroups`:
with groups at multiples of what the recipe wants, and in bf16 without. bf16 multiplies by torch's `grouped_mm`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from microscale.nn.token_groups import TokenGroups
from microscale.nn.training_experts import GroupedLinear


@dataclasses.dataclass(frozen=True)
class BlockSize:
    """Sizes of one block, and the tokens that go through it: `batch` sequences of `length`.

    With `experts` its MLP is so many, each of width `ffn`, and a token goes to `top` of them.
    """

    name: str
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    batch: int
    length: int
    experts: int = 0
    top: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


LLAMA_8B = BlockSize("llama_8b", 4096, 14336, 32, 8, 128, 8, 2048)
QWEN3_30B_A3B = BlockSize("qwen3_30b_a3b", 2048, 768, 32, 4, 128, 8, 2048, 128, 8)
TINY = BlockSize("tiny", 64, 128, 4, 2, 16, 2, 32)
TINY_EXPERTS = BlockSize("tiny_experts", 64, 32, 4, 2, 16, 2, 64, 4, 2)
_FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
BLOCKS = {"cuda": (LLAMA_8B, QWEN3_30B_A3B), "cpu": (TINY, TINY_EXPERTS)}
Layer = torch.nn.Linear | GroupedLinear


class Attention(torch.nn.Module):
    """Causal attention with rotary positions and grouped keys and values."""

    def __init__(self, size: BlockSize) -> None:
        super().__init__()
        self.size = size
        self.q_proj = torch.nn.Linear(size.dim, size.heads * size.head, bias=False)
        self.k_proj = torch.nn.Linear(size.dim, size.kv_heads * size.head, bias=False)
        self.v_proj = torch.nn.Linear(size.dim, size.kv_heads * size.head, bias=False)
        self.o_proj = torch.nn.Linear(size.heads * size.head, size.dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [B, L, dim], cos and sin [L, head] to [B, L, dim]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.size.head)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        grouped = self.size.heads != self.size.kv_heads
        # Named, so that a slow fallback is an error here and not a wrong comparison of the whole block.
        with sdpa_kernel(_FAST) if x.is_cuda else contextlib.nullcontext():
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(torch.nn.Module):
    """SwiGLU."""

    def __init__(self, size: BlockSize) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(size.dim, size.ffn, bias=False)
        self.up_proj = torch.nn.Linear(size.dim, size.ffn, bias=False)
        self.down_proj = torch.nn.Linear(size.ffn, size.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] to [..., dim]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(torch.nn.Module):
    """SwiGLU, a matrix for each expert."""

    def __init__(self, size: BlockSize) -> None:
        super().__init__()
        self.gate_up_proj = GroupedLinear(size.experts, size.dim, 2 * size.ffn)
        self.down_proj = GroupedLinear(size.experts, size.ffn, size.dim)

    @property
    def alignment(self) -> int:
        """Rows that groups should start at multiples of."""
        return math.lcm(self.gate_up_proj.alignment, self.down_proj.alignment)

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """rows [P, dim], sorted by expert, to [P, dim]."""
        gate, up = grouped(self.gate_up_proj, rows, offsets, self.alignment).chunk(2, -1)
        return grouped(self.down_proj, functional.silu(gate) * up, offsets, self.alignment)


class MixtureOfExperts(torch.nn.Module):
    """The best experts of a router, by the softmax of its logits over those."""

    def __init__(self, size: BlockSize) -> None:
        super().__init__()
        self.size = size
        self.gate = torch.nn.Linear(size.dim, size.experts, bias=False)
        self.experts = Experts(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] to [..., dim]."""
        tokens = x.flatten(0, -2)
        logits, chosen = self.gate(tokens).float().topk(self.size.top)
        groups = TokenGroups.of(chosen, self.size.experts, self.experts.alignment)
        rows = self.experts(groups.permute(tokens), groups.offsets)
        return groups.combine(rows, logits.softmax(-1)).view_as(x)


class Block(torch.nn.Module):
    """Attention and MLP, each with its norm before and the residual around."""

    def __init__(self, size: BlockSize) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.RMSNorm(size.dim, eps=1e-5)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = torch.nn.RMSNorm(size.dim, eps=1e-5)
        self.mlp = MixtureOfExperts(size) if size.experts else MLP(size)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [B, L, dim] to [B, L, dim]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class OneBlock(torch.nn.Module):
    """A model of one block, without embedding and head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, size: BlockSize) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(size)])
        frequency = 500000.0 ** (-torch.arange(0, size.head, 2) / size.head)
        angle = (torch.arange(size.length)[:, None] * frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, L, dim] to [B, L, dim]."""
        return self.layers[0](x, self.cos, self.sin)


def make_block(size: BlockSize, device: torch.device, seed: int = 0) -> OneBlock:
    """Return a block in bfloat16 with weights of standard deviation 1 / sqrt(fan-in), the same for the same seed."""
    with torch.device(device):
        block = OneBlock(size).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return block


def linears(block: torch.nn.Module) -> dict[str, Layer]:
    """Return the linear layers of a block by name, experts included."""
    return {name: m for name, m in block.named_modules() if isinstance(m, Layer)}


def grouped(layer: GroupedLinear, rows: torch.Tensor, offsets: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return what a layer of experts gives; by torch's kernel in high precision, where it is meant for."""
    if type(layer) is GroupedLinear and rows.is_cuda:
        return torch_grouped(rows, layer.weight.transpose(-1, -2), offsets)
    return layer(rows, offsets, alignment)


def torch_grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return torch's grouped product: rows of a by group, or with two matrices the contraction by group."""
    product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return product(a, b, offs=offsets)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
