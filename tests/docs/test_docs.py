"""README and docs are true: their code runs, their output is what is shown, their tables and links are up to date."""

import re
import shutil

import pytest

from microscale.cli import docs
from microscale.errors import MicroscaleError
from microscale.spec import registry

from .markdown import ROOT, blocks, run

FILES = docs.documents(ROOT)
IDS = [p.name for p in FILES]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Every file runs in a folder of its own, beside a copy of the examples, with a registry of its own."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_user_formats", {})
    monkeypatch.setattr(registry, "_user_recipes", {})


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_code_runs_and_prints_what_is_shown(path):
    run(path)


def test_there_is_documentation():
    assert {"README.md", "design.md", "numerics.md", "formats.md", "recipes.md", "api.md"} <= set(IDS)


def test_readme_has_five_examples_and_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^### \d\. ", text, re.MULTILINE)) == 5
    assert "$ make demo" in text
    assert "$ make test" in text


def test_generated_sections_are_up_to_date():
    assert [p.name for p in docs.stale(ROOT)] == [], "run: python -m microscale.cli.docs"


def test_every_generated_section_is_used():
    used = {m for p in FILES for m in re.findall(r"<!-- generated: (\w+) -->", p.read_text(encoding="utf-8"))}
    assert used == set(docs.SECTIONS)


def test_an_unknown_generated_section_is_an_error():
    with pytest.raises(MicroscaleError, match="unknown generated section 'formts'"):
        docs.render("<!-- generated: formts -->\n<!-- end -->")


def test_update_rewrites_what_is_stale(tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- generated: recipes -->\nold\n<!-- end -->\nb\n")
    assert docs.main(["--check", str(tmp_path)]) == 1
    assert docs.main([str(tmp_path)]) == 0
    assert docs.main(["--check", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n<!-- generated")
    assert text.endswith("<!-- end -->\nb\n")
    assert "`nvfp4_dynamic`" in text
    assert "old" not in text


@pytest.mark.parametrize("path", [*FILES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{path.name}: {target}#{anchor}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_block_names_its_language(path):
    assert [b.where for b in blocks(path) if not b.language] == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_machine_is_named(path):
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp)/", path.read_text(encoding="utf-8"))
