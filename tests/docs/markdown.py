"""Runs the code of a Markdown file as its reader would: in order, in one folder, comparing what is printed.

    python    is executed; the blocks of a file share their names
    text      right after python: what it printed (`...` stands for anything, blanks may differ)
    yaml      starting with `# some/path.yaml`: is written there; otherwise it only has to be valid
    console   lines `$ microscale ...` are run, what follows is the output (may be left out); `$ make` needs a target
    toml, json   have to be valid

A comment before a block adds to that: `<!-- test: needs transformers -->` skips it where a package is missing,
`<!-- test: fails -->` is for a command that exits with code 2, whose error message is the output.
"""

import contextlib
import doctest
import importlib.util
import io
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from microscale.cli import app
from microscale.spec import document

ROOT = Path(__file__).resolve().parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_FENCE = re.compile(
    r"^(?:<!-- test: (?P<directive>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block and where it stands."""

    path: Path
    line: int
    language: str
    directive: str
    body: str

    @property
    def where(self):
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def missing(self):
        """The first package of `needs ...` that is not installed, or None."""
        names = self.directive.removeprefix("needs ").split() if self.directive.startswith("needs ") else []
        return next((n for n in names if importlib.util.find_spec(n.strip(",")) is None), None)


def blocks(path):
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, text[: m.start("language")].count("\n") + 1, m["language"], m["directive"] or "", m["body"])
        for m in _FENCE.finditer(text)
    ]


def assert_output(block, want, got):
    assert doctest.OutputChecker().check_output(want, got, FLAGS), (
        f"{block.where}: not the output shown\n--- shown\n{want}--- printed\n{got}"
    )


def run(path):
    """Run every block of a file in the current folder."""
    names = {"__name__": "__main__"}
    printed = None
    for block in blocks(path):
        if block.missing:
            printed = None
            continue
        if block.language == "python":
            printed = _run_python(block, names)
            continue
        if block.language == "text" and printed is not None:
            assert_output(block, block.body, printed)
        elif block.language == "yaml":
            _write_yaml(block)
        elif block.language == "console":
            _run_console(block)
        elif block.language == "toml":
            tomllib.loads(block.body)
        elif block.language == "json":
            json.loads(block.body)
        printed = None


def _run_python(block, names):
    # The line numbers of a traceback are those of the Markdown file.
    code = compile("\n" * block.line + block.body, str(block.path), "exec")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def _write_yaml(block):
    document.parse(block.body, block.where)
    if first := re.match(r"# (\S+\.ya?ml)$", block.body.splitlines()[0]):
        target = Path(first[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.body, encoding="utf-8")


def commands(block):
    """Yield (command, output) of a console block; a backslash continues a command."""
    text = block.body.replace("\\\n", "")
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command.strip(), output


def _run_console(block):
    for command, output in commands(block):
        program, *arguments = shlex.split(command, comments=True)
        if program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert arguments[0] in targets, f"{block.where}: the Makefile has no target {arguments[0]!r}"
        elif program == "microscale":
            expected = 2 if block.directive == "fails" else 0
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == expected, f"{block.where}: {command}\n{result.output}{result.exception!r}"
            if output.strip():
                assert_output(block, output, result.stderr if expected else result.stdout)
        else:
            assert program in {"pip", "python", "cd", "git", "ls"}, f"{block.where}: {command!r} is not checked"
