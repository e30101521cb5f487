"""A small checkpoint, a runner that keeps stdout and stderr apart, and a registry that forgets."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from microscale.cli import app
from microscale.spec import registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `from oracles import specmodel`


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(registry, "_user_formats", {})
    monkeypatch.setattr(registry, "_user_recipes", {})


@pytest.fixture
def run():
    """Run the command line in this process; returns the result (exit_code, stdout, stderr)."""

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
        return result

    return run


@pytest.fixture
def run_json(run):
    """Run with --json; returns the parsed stdout, which must be one strict JSON document."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    def run_json(*arguments, code=0):
        return json.loads(run(*arguments, "--json", code=code).stdout, parse_constant=refuse)

    return run_json


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with two linear layers, an lm_head, an embedding and a norm; config and tokenizer beside them."""
    folder = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": normal(40, 64),
        "model.layers.0.up_proj.weight": normal(96, 64),
        "model.layers.0.up_proj.bias": normal(96),
        "model.layers.0.down_proj.weight": normal(64, 96),
        "model.norm.weight": torch.ones(64),
        "lm_head.weight": normal(40, 64),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def user_yaml(tmp_path):
    """A format of a user's own, with an inline element, in a folder of its own."""
    path = tmp_path / "formats" / "user_e3m1.yaml"
    path.parent.mkdir()
    path.write_text(
        "name: user_e3m1\n"
        "description: E3M1 elements, one E8M0 scale per 16\n"
        "element: {exponent: 3, mantissa: 1, bias: 3, nan: none, inf: false}\n"
        "block: 16\n"
        "scale: e8m0\n"
        "scale_rule: rceil\n"
    )
    return path
