"""The model and the text of tiny_lm.py: a Llama in plain torch, and the standard library's source, byte by byte."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

# What many installations leave out, and what is data rather than text written by people.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
HELD_OUT = 20  # one file of so many


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model. Every width is a multiple of 256 by default, so that all kernels apply."""

    dim: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    ffn: int = 1792
    length: int = 512
    vocabulary: int = 256
    tied: bool = False


class Norm(torch.nn.RMSNorm):
    """RMSNorm to the dtype of the products that read it: under autocast cast once, not once for each of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] to [..., dim]."""
        device = x.device.type
        return super().forward(x).to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


class Attention(torch.nn.Module):
    """Causal attention with rotary positions; fewer heads of keys and values than of queries are shared."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.dim // config.heads
        self.q_proj = torch.nn.Linear(config.dim, config.heads * self.width, bias=False)
        self.k_proj = torch.nn.Linear(config.dim, config.kv_heads * self.width, bias=False)
        self.v_proj = torch.nn.Linear(config.dim, config.kv_heads * self.width, bias=False)
        self.o_proj = torch.nn.Linear(config.heads * self.width, config.dim, bias=False)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [B, L, dim] to [B, L, dim]."""
        q, k, v = (
            proj(x).unflatten(-1, (heads, self.width)).transpose(1, 2)
            for proj, heads in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(torch.nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(config.dim, config.ffn, bias=False)
        self.up_proj = torch.nn.Linear(config.dim, config.ffn, bias=False)
        self.down_proj = torch.nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] to [..., dim]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(torch.nn.Module):
    """Attention and MLP, each with its norm before and the residual around."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.dim, eps=1e-5)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.dim, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [B, L, dim] to [B, L, dim]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(torch.nn.Module):
    """The language model. Modules are called as in published checkpoints, so that recipes' patterns mean the same."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = torch.nn.Embedding(config.vocabulary, config.dim)
        self.layers = torch.nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.dim, eps=1e-5)
        self.lm_head = torch.nn.Linear(config.dim, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # what is added to the residual 2 * layers times starts smaller
                depth = 2 * config.layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                torch.nn.init.normal_(parameter, std=0.02 / depth**0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [B, L] to logits [B, L, vocabulary]."""
        x = self.embed_tokens(tokens)
        rotation = rotations(tokens.shape[1], self.config.dim // self.config.heads, tokens.device)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.lm_head(self.norm(x))


def rotations(length: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles: FP32 [length, width / 2] each."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, H, L, width], first half against second half, in FP32; the result has x's dtype.

    The angles are FP32, so the products are, without a copy of x in FP32.
    """
    a, b = x.chunk(2, -1)
    halves = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat([half.to(x.dtype) for half in halves], -1)


# -- text --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as bytes, on the device that trains: `train` and `test` uint8 [N]; `length` of a sequence; `facts` for JSON.

    Files are joined by a zero byte, which Python source does not hold.
    """

    train: torch.Tensor
    test: torch.Tensor
    length: int
    facts: dict[str, Any]

    def order(self, steps: int, batch: int, seed: int) -> torch.Tensor:
        """Where each sequence of each step starts: int64 [steps, batch], from the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.train) - self.length, (steps, batch), generator=generator)
        return starts.to(self.train.device)

    def batch(self, starts: torch.Tensor) -> torch.Tensor:
        """Sequences that start there, with the byte after: int64 [batch, length + 1]."""
        return self._windows(self.train, starts)

    @property
    def windows(self) -> int:
        """How many sequences the held-out text has, none overlapping."""
        return (len(self.test) - 1) // self.length

    def held_out(self, windows: int) -> torch.Tensor:
        """So many sequences (or all, if there are fewer), evenly spread over the held-out text, none overlapping."""
        count = self.windows
        chosen = torch.arange(min(windows, count), device=self.test.device) * count // min(windows, count)
        return self._windows(self.test, chosen * self.length)

    def _windows(self, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return text[starts[:, None] + torch.arange(self.length + 1, device=text.device)].long()


def read_corpus(length: int, device: torch.device, folder: Path | None = None) -> Corpus:
    """Read every Python file of the standard library (or of a folder) in the order of their names.

    A file is held out by the hash of its name, so the split is the same on every machine.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        if not LEFT_OUT & set(name.split("/")):
            held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
            parts[held_out].append((root / name).read_bytes())
    texts = [b"\0".join(files) for files in parts]
    if min(map(len, texts)) <= length:
        raise SystemExit(f"too little Python source in {root}: {len(texts[0])} bytes, {len(texts[1])} held out")
    facts = {
        "files": [len(files) for files in parts],
        "bytes": [len(text) for text in texts],
        "sha256": hashlib.sha256(b"\0".join(texts)).hexdigest(),
    }
    train, test = (torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device) for text in texts)
    return Corpus(train, test, length, facts)
