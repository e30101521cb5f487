"""Tiny models: a checkpoint of plain tensors, and a Bert and a Llama with a tokenizer of a few words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TEXTS = [
    "the cat sat on a mat",
    "two red birds looked at the cat",
    "rain fell on the old tree while two birds sat in a tree and the cat looked at rain",
    "a mat",
    "the old cat and the red mat",
]
WORDS = sorted({word for text in TEXTS for word in text.split()})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with two linear layers, an embedding, a kept lm_head, a norm and a bias."""
    made = {
        "embed_tokens.weight": torch.randn(20, 32),
        "layers.0.up.weight": torch.randn(48, 32),
        "layers.0.up.bias": torch.randn(48),
        "layers.0.down.weight": torch.randn(32, 48, dtype=torch.bfloat16),
        "norm.weight": torch.ones(32),
        "lm_head.weight": torch.randn(20, 32),
    }
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_tokenizer(folder: Path, *, pad: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertModel, saved."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, pad=True)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForCausalLM, saved in bfloat16; its tokenizer has no padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, pad=False)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")
