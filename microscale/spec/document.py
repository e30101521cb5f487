"""YAML with positions: plain data plus the line and column of every key, so that an error can point at its cause.

The reader knows only the YAML 1.2 core scalars: `off` and `no` are strings, `16:16` is a string (PyYAML's defaults make
them False and 976), and a key given twice is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from microscale.errors import SpecError, did_you_mean

Path_ = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema's resolvers only."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML declares it without ClassVar)


for _tag, _regexp, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$",
        "-+.0123456789",
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_regexp), list(_first))


@dataclasses.dataclass(frozen=True)
class Document:
    """Parsed data and where each part stands. `origin` is a file's path, or what Python data came from."""

    data: Any
    origin: str
    marks: dict[Path_, tuple[int, int]]

    def where(self, path: Path_) -> str:
        """Return "file:line:column" of the deepest known part of `path`, or the origin alone for Python data."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                line, column = self.marks[path[:end]]
                return f"{self.origin}:{line}:{column}"
        return self.origin

    def error(self, path: Path_, message: str, hint: str = "") -> SpecError:
        """Build the error for one part of this document."""
        return SpecError(f"{self.where(path)} {message}", hint)


def from_data(data: Any, origin: str) -> Document:
    """Wrap Python data; errors name `origin` instead of a line."""
    return Document(data, origin, {})


def read(path: Path) -> Document:
    """Read one YAML file. Raises SpecError with file, line and column for anything that is not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None
    return parse(text, str(path))


def parse(text: str, origin: str) -> Document:
    """Parse YAML text; `origin` is the name used in errors."""
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise SpecError(f"{where} not valid YAML: {error.problem}", "check indentation, quotes and brackets") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{origin} not valid YAML: {error}") from None
    if node is None:
        raise SpecError(f"{origin}:1:1 the file is empty")
    marks: dict[Path_, tuple[int, int]] = {}
    data = _build(node, (), marks, origin, ())
    return Document(data, origin, marks)


def _build(
    node: yaml.Node, path: Path_, marks: dict[Path_, tuple[int, int]], origin: str, inside: tuple[yaml.Node, ...]
) -> Any:
    """Plain data of a node; `inside` are the nodes it stands in, which an alias must not name."""
    if any(node is outer for outer in inside):
        line, column = marks[path[:-1]] if path else (1, 1)
        raise SpecError(f"{origin}:{line}:{column} an alias refers to what it stands in")
    inside = (*inside, node)
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            if key in result:
                raise SpecError(f"{origin}:{line}:{column} key {key!r} is given twice")
            marks[(*path, key)] = (line, column)
            result[key] = _build(value_node, (*path, key), marks, origin, inside)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), marks, origin, inside) for i, item in enumerate(node.value)]
    loader = _CoreLoader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        where = f"{origin}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        raise SpecError(f"{where} {str(error).splitlines()[0]}") from None


def validated(build: Callable[[], Any], document: Document, prefix: Path_ = (), known: Iterable[str] = ()) -> Any:
    """Run a pydantic construction; turn its first error into a SpecError with position, reason and hint.

    `prefix` is where in the document the data stood; `known` are the keys allowed there, for did-you-mean.
    """
    try:
        return build()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = (*prefix, *first["loc"])
        message, hint = _explain(first, path, tuple(known))
        more = error.error_count() - 1
        if more:
            hint = f"{hint}; " * bool(hint) + f"and {more} more problem{'s' * (more > 1)} in the same place"
        raise document.error(path, message, hint) from None


def _explain(error: Any, path: Path_, known: tuple[str, ...]) -> tuple[str, str]:
    key = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        return f"unknown key {path[-1]!r}", did_you_mean(str(path[-1]), known) or _list("keys", known)
    if error["type"] == "missing":
        return f"missing key {path[-1]!r}", ""
    if error["type"] == "literal_error":
        return f"{key}: {error['input']!r} is not one of {error['ctx']['expected']}", ""
    message = error["msg"].removeprefix("Value error, ")
    return (f"{key}: {message}" if key else message), ""


def _list(kind: str, names: tuple[str, ...]) -> str:
    return f"{kind}: {', '.join(sorted(names))}" if names else ""
