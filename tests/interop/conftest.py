"""A small model with one of everything, its checkpoint, and bitwise comparison."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from microscale.tensor import BlockScaledTensor


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(40, 70)  # ragged for every block size
        self.down = torch.nn.Linear(70, 40, bias=False)
        self.norm = torch.nn.LayerNorm(40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Tiny(torch.nn.Module):
    """Embedding, two blocks, a head that recipes keep, a buffer that is stored and one that is not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(50, 40)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(40, 50, bias=False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.arange(40.0), persistent=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids) + self.table
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, dtype and shape included; quantized tensors by their parts."""
    if isinstance(a, BlockScaledTensor) != isinstance(b, BlockScaledTensor):
        return False
    if not isinstance(a, BlockScaledTensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
    assert isinstance(b, BlockScaledTensor)
    if (a.format, a.block_axis, a.shape, a.dtype) != (b.format, b.block_axis, b.shape, b.dtype):
        return False
    pairs = [(a.qdata, b.qdata), (a.strided_scale(), b.strided_scale())]
    if (a.outer_scale is None) != (b.outer_scale is None):
        return False
    pairs += [] if a.outer_scale is None else [(a.outer_scale, b.outer_scale)]
    return all(same(x, y) for x, y in pairs)


@pytest.fixture(name="same")
def _same() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return same


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    """Make the small model, the same one every time."""

    def make(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Tiny:
        torch.manual_seed(0)
        return Tiny(tied).to(dtype)

    return make


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1, **config: Any) -> Path:
    """Write tensors with the `safetensors` library, as shards with an index if there are several files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    weights = {}
    for i, part in enumerate(parts, 1):
        file = "model.safetensors" if files == 1 else f"model-{i:05d}-of-{files:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, {"format": "pt"})
        weights |= dict.fromkeys(part, file)
    if files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Callable[..., Tiny]) -> Callable[..., Path]:
    """Write the small model's checkpoint: `checkpoint(files=3, dtype=torch.bfloat16)` gives the folder."""

    def make(name: str = "src", *, files: int = 1, dtype: torch.dtype = torch.float32) -> Path:
        return write_checkpoint(tmp_path / name, tiny(dtype).state_dict(), files, model_type="tiny")

    return make


@pytest.fixture(name="write_checkpoint")
def _write_checkpoint() -> Callable[..., Path]:
    return write_checkpoint
