"""Fixtures for registry tests: files in a temporary folder, and a registry that forgets what a test registered."""

import re

import pytest

import microscale as ms
from microscale.errors import SpecError
from microscale.spec import registry

FIELDS = {"name": "x", "element": "e2m1", "block": "32", "scale": "e8m0", "scale_rule": "rceil"}
INLINE = {"name": "z", "element": "e2m1", "block": 32, "scale": "e8m0", "scale_rule": "floor"}
RULE = '{match: "*", fprop: {weight: w}}'
PYDANTIC = re.compile(r"Input should|a valid |Value error|instance of|Spec\b|unable to parse|\bis a int\b|more problem")


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return its path."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_format(write):
    """Write x.yaml, an mxfp4 with some fields replaced (None drops one), one field a line."""

    def write_format(**changes):
        fields = {**FIELDS, **changes}
        name = fields["name"]
        lines = [f"{key}: {value}" for key, value in fields.items() if value is not None]
        return write(f"{name}.yaml", "\n".join(lines) + "\n")

    return write_format


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Registrations end with the test."""
    monkeypatch.setattr(registry, "_user_formats", {})
    monkeypatch.setattr(registry, "_user_recipes", {})


def parts(call):
    """Return position ("line:column", or "" for Python data), message, hint: all errors are one line and have one."""
    with pytest.raises(SpecError) as caught:
        call()
    error = caught.value
    assert error.hint, f"no way out: {error.message}"
    assert "\n" not in error.message + error.hint
    assert not PYDANTIC.search(str(error)), str(error)
    position = re.match(r"\S*\.yaml:(\d+:\d+) ", error.message)
    return (position[1] if position else ""), error.message[position.end() if position else 0 :], error.hint


def python_error(call):
    """Return message and hint of an error about Python data."""
    position, message, hint = parts(call)
    assert not position
    return message, hint


@pytest.fixture
def recipe_error(write):
    """Return (position, message, hint) of the error of a recipe: `w` stands on line 3, the rule on line 5."""

    def recipe_error(quantizer="mxfp4", rule=RULE, extra=""):
        path = write("r.yaml", f"name: r\nquantizers:\n  w: {quantizer}\nrules:\n  - {rule}\n{extra}")
        return parts(lambda: ms.find_recipe(path))

    return recipe_error


@pytest.fixture
def format_error(write_format):
    """Return (position, message, hint) of the error of a format file; `element` stands on line 2, the block on 3."""
    return lambda **changes: parts(lambda: ms.find_format(write_format(**changes)))
