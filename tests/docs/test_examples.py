"""The examples run, say what they promise, and are valid by the published schema."""

import runpy
import sys

import jsonschema
import pytest

import microscale as ms
from microscale.spec import document, registry

from .markdown import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(registry, "_user_formats", {})
    monkeypatch.setattr(registry, "_user_recipes", {})


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run an example as a script from another folder; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("recipe", ["nvfp4_dynamic", "mxfp8_weight_only", "nvfp4_static"])
def test_quantize_model(run, recipe):
    text = run("quantize_model.py", recipe)
    assert f"{recipe}: 3 of 3 layers quantized" in text
    assert "loaded model gives the same bits: True" in text


@pytest.mark.parametrize("path", [EXAMPLES / "my_format.yaml", registry.data_folder("formats") / "nvint4.yaml"])
def test_user_format(run, path):
    text = run("user_format.py", path)
    assert f"format={path.stem}" in text
    assert "linear agrees with its dequantized weight: True" in text
    assert "loaded bytes are the same: True" in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_yaml_is_valid(path):
    data = document.read(path).data
    kind = "recipe" if "rules" in data else "format"
    jsonschema.validate(data, ms.schema(kind))
    (ms.find_recipe if kind == "recipe" else ms.find_format)(path)


def test_the_readme_shows_the_example():
    """The format in the README is the one in examples/, so that neither goes its own way."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert ms.find_format(document.parse(shown, "README").data) == ms.find_format(EXAMPLES / "my_format.yaml")
