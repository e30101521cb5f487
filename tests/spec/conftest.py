"""Fixtures for registry tests: files in a temporary folder, and a registry that forgets what a test registered."""

import pytest

from microscale.spec import registry

FIELDS = {"name": "x", "element": "e2m1", "block": "32", "scale": "e8m0", "scale_rule": "rceil"}


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
