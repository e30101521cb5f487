"""YAML with positions: plain data plus the line and column of every key, so that an error can point at its cause.

The reader knows only the YAML 1.2 core scalars: `off` and `no` are strings, `16:16` is a string (PyYAML's defaults make
them False and 976), and a key given twice is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from microscale.errors import SpecError
from microscale.spec import explain
from microscale.spec.explain import Problem
from microscale.spec.fields import FieldError, Path_

MAX_VALUES = 100_000  # aliases of aliases can make a short file say more than memory holds

__all__ = ["Document", "Path_", "check_keys", "checking", "from_data", "parse", "read"]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema's resolvers only."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML declares it without ClassVar)


for _tag, _regexp, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?[0-9]+$", [*"-+0123456789"]),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        [*"-+.0123456789"],
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_regexp), _first)


@dataclasses.dataclass(frozen=True)
class Document:
    """Parsed data and where each part stands. `origin` is a file's path, or what Python data came from."""

    data: Any
    origin: str
    marks: dict[Path_, tuple[int, int]]

    def mark(self, *paths: Path_) -> tuple[int, int] | None:
        """Return line and column of the first path that was written, else of the deepest known part of the first."""
        parts = (paths[0][:end] for end in range(len(paths[0]), -1, -1))
        return next((self.marks[p] for p in (*paths, *parts) if p in self.marks), None)

    def where(self, *paths: Path_) -> str:
        """Return "file:line:column" of `mark(*paths)`, or the origin alone for Python data."""
        mark = self.mark(*paths)
        return f"{self.origin}:{mark[0]}:{mark[1]}" if mark else self.origin

    def error(
        self,
        path: Path_,
        message: str,
        hint: str = "",
        *,
        at: tuple[Path_, ...] = (),
        kind: type[SpecError] = SpecError,
    ) -> SpecError:
        """Build the error about the part at `path`, which points at the first of `at` that was written.

        Python data has no lines: there the message names the path, unless it begins with the key itself.
        """
        if self.marks:
            return kind(f"{self.where(*(at or (path,)))} {message}", hint)
        if not path and not at:
            return kind(message, hint)
        named = explain.subject(path)
        owner = path[: len(path) - len(named)] if named and message.startswith(explain.dotted(named)) else path
        return kind(": ".join(p for p in (self.origin, explain.dotted(owner), message) if p), hint)

    def explained(self, problem: Problem, path: Path_ = ()) -> SpecError:
        """Build the error for a problem of the record that stands at `path`."""
        at = tuple((*path, *p) for p in problem.at)
        return self.error((*path, *problem.path), problem.message, problem.hint, at=at)


def from_data(data: Any, origin: str) -> Document:
    """Wrap Python data; errors name `origin` instead of a line. Raises SpecError for a key that is no string."""
    document = Document(data, origin, {})
    _check_strings(data, document, ())
    return document


def _check_strings(data: Any, document: Document, path: Path_) -> None:
    if isinstance(data, Mapping):
        for key, value in data.items():
            if not isinstance(key, str):
                raise document.error(path, f"key {key!r} is no string", f"write '{key}'", at=(path,))
            _check_strings(value, document, (*path, key))
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            _check_strings(value, document, (*path, i))


def read(path: Path) -> Document:
    """Read one YAML file. Raises SpecError with file, line and column for anything that is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"cannot read {path}: it is no UTF-8 text", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"cannot read {path}: {reason.lower()}", "give the path of a YAML file") from None
    return parse(text, str(path))


def parse(text: str, origin: str) -> Document:
    """Parse YAML text; `origin` is the name used in errors."""
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        if node is None:
            raise SpecError(f"{origin}:1:1 the file is empty", "write a mapping: one `key: value` a line")
        builder = _Builder(origin, {})
        return Document(builder.build(node, (), ()), origin, builder.marks)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise SpecError(f"{where} not valid YAML: {error.problem}", "check indentation, quotes and brackets") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        reason = f"character U+{ord(text[error.position]):04X} is not allowed"
        raise SpecError(f"{origin}:{line}:{column} not valid YAML: {reason}", "delete it, or save as UTF-8") from None
    except RecursionError:
        raise SpecError(f"{origin} not valid YAML: nested too deeply", "check brackets") from None


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Turns YAML nodes into plain data, and notes where each part stands."""

    origin: str
    marks: dict[Path_, tuple[int, int]]

    def build(self, node: yaml.Node, path: Path_, inside: tuple[yaml.Node, ...]) -> Any:
        """Plain data of a node; `inside` are the nodes it stands in, which an alias must not name."""
        if any(node is outer for outer in inside):
            line, column = self.marks[path[:-1]] if path else (1, 1)
            message = f"{self.origin}:{line}:{column} an alias refers to what it stands in"
            raise SpecError(message, "write the value out")
        if len(self.marks) > MAX_VALUES:
            raise self._refusal(node, f"more than {MAX_VALUES} values", "write less, or fewer aliases of aliases")
        inside = (*inside, node)
        self.marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self._key(key_node, result)
                self.marks[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
                result[key] = self.build(value_node, (*path, key), inside)
            return result
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), inside) for i, item in enumerate(node.value)]
        try:
            return _CoreLoader("").construct_object(node)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or str(error)
            raise self._refusal(node, reason.splitlines()[0], "tags are not supported: delete it") from None
        except ValueError:  # Python limits the digits of an int; a tag may promise what the text is not
            raise self._refusal(node, "no such number", "write it shorter, or put it in quotes") from None

    def _key(self, node: yaml.Node, earlier: Mapping[str, Any]) -> str:
        """The text of a mapping's key."""
        if not isinstance(node, yaml.ScalarNode):
            kind = "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
            raise self._refusal(node, f"{kind} cannot be a key", "a key is a word; put text with brackets in quotes")
        key = str(node.value)
        if key == "<<" and node.style is None:
            raise self._refusal(node, "merge keys (<<) are not supported", "write the merged keys out")
        if key in earlier:
            raise self._refusal(node, f"key {key!r} is given twice", "delete one of the two")
        return key

    def _refusal(self, node: yaml.Node, message: str, hint: str) -> SpecError:
        mark = node.start_mark
        return SpecError(f"{self.origin}:{mark.line + 1}:{mark.column + 1} {message}", hint)


@contextlib.contextmanager
def checking(model: type[BaseModel], document: Document, path: Path_ = ()) -> Iterator[None]:
    """Within the block, turn the failed construction of `model` into a SpecError with position, reason and hint.

    `path` is where in the document its data stands. Of several problems the first in the file is told, unknown keys
    before all others and missing ones last.
    """
    try:
        yield
    except ValidationError as error:
        found = explain.problems(error, model)

        def place(problem: Problem) -> tuple[int, tuple[int, int]]:
            return problem.rank, document.mark(*((*path, *p) for p in problem.at)) or (0, 0)

        raise document.explained(min(found, key=place), path) from None
    except FieldError as error:
        raise document.explained(explain.from_field_error(error), path) from None


def check_keys(
    data: Mapping[str, Any],
    document: Document,
    path: Path_,
    owner: str,
    known: Iterable[str],
    required: Iterable[str] = (),
) -> None:
    """Raise SpecError for the first key of the mapping at `path` that is not `known`, else the first missing one.

    `owner` is what the mapping is, in words ("a format").
    """
    names, needed = tuple(known), tuple(required)
    for key in data:
        if key not in names:
            raise document.explained(explain.unknown_key(path, key, names))
    for key in needed:
        if key not in data:
            raise document.explained(explain.missing_key(path, key, owner, needed))
