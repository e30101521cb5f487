"""Pydantic's findings in our words: what was seen, what is expected, where it stands, and the way out.

Only independent problems are told. A list whose items failed is no shorter list, and a key that is missing beside one
that nobody knows is most likely that one, mistyped: unknown keys come first.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from microscale.errors import did_you_mean
from microscale.spec.fields import FieldError, Path_

EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
}
_NUMBER = re.compile(r"[-+]?\d{1,9}(\.\d*)?")


class Problem(NamedTuple):
    """One thing that is wrong. `path` is what the message is about, `at` where to point, the best place first."""

    path: Path_
    message: str
    hint: str
    at: tuple[Path_, ...]
    rank: int = 1


def problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Return the independent problems of a failed construction of `model`, unknown keys first, never an empty list."""
    found = error.errors(include_url=False)
    locations = [e["loc"] for e in found]
    first_causes = [e for e in found if not any(len(at) > len(e["loc"]) == _shared(at, e["loc"]) for at in locations)]
    return sorted((_problem(e, model) for e in first_causes), key=lambda p: p.rank)


def from_field_error(error: FieldError, loc: Path_ = ()) -> Problem:
    """Return the problem that a record's own check found; `loc` is where the record stands."""
    at = tuple((*loc, *path) for path in error.paths)
    return Problem(at[0], error.message, error.hint, at)


def unknown_key(path: Path_, key: str, known: Iterable[str], hint: str = "") -> Problem:
    """Return the problem of a key that the mapping at `path` does not have; `known` are those it has."""
    names = tuple(known)
    way_out = hint or did_you_mean(key, names) or (f"known keys: {', '.join(names)}" if names else "")
    return Problem(path, f"unknown key {key!r}", way_out, ((*path, key),), 0)


def missing_key(path: Path_, key: str, owner: str, required: Iterable[str]) -> Problem:
    """Return the problem of a key that the mapping at `path`, `owner` in words, must have."""
    return Problem(path, f"missing key {key!r}", f"{owner} needs {', '.join(required)}", ((*path, key),), 2)


def required_keys(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the keys that a record cannot do without."""
    return tuple(name for name, field in model.model_fields.items() if field.is_required())


def noun(model: type[BaseModel]) -> str:
    """Return what a record is called, with its article: "a scale rule" for ScaleRuleSpec."""
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", model.__name__.removesuffix("Spec")).lower()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def subject(path: Path_) -> Path_:
    """Return the end of a path that says what a value is: the last key, and the list index after it."""
    keys = [i for i, part in enumerate(path) if isinstance(part, str)]
    return path[keys[-1] :] if keys else path


def dotted(path: Path_) -> str:
    """Return a path as people write it: `rules[0].fprop`."""
    keys = (f"[{p}]" if isinstance(p, int) else f".{p}" if p and p.isprintable() else f".{p!r}" for p in path)
    return "".join(keys).removeprefix(".")


def seen(value: Any) -> str:
    """Return a value as a message shows it: short, and as YAML writes it where that differs."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple | str | int | float):
        text = repr(list(value) if isinstance(value, tuple) else value)
        return text if len(text) <= 48 else f"{text[:44]} ..."
    return f"a {type(value).__name__}"


def _shared(a: Path_, b: Path_) -> int:
    """How many leading parts two paths share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _problem(error: Any, model: type[BaseModel]) -> Problem:
    kind, loc, value, ctx = error["type"], tuple(error["loc"]), error["input"], error.get("ctx", {})
    owner = _model_at(model, loc[:-1])
    if kind == "value_error" and isinstance(ctx["error"], FieldError):
        return from_field_error(ctx["error"], loc)
    if kind == "extra_forbidden":
        return unknown_key(loc[:-1], str(loc[-1]), owner.model_fields if owner else ())
    if kind == "missing" and owner:
        return missing_key(loc[:-1], str(loc[-1]), noun(owner), required_keys(owner))
    name = dotted(subject(loc))
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", ctx["expected"])
        close = did_you_mean(value, options) if isinstance(value, str) else ""
        message = f"{name} {seen(value)} is not one of {', '.join(options)}"
        return Problem(loc, message, close or f"write {name}: {options[0]}, or leave it out", (loc,))
    if kind == "too_short":
        return Problem(loc, f"{name} is empty", f"it needs at least {ctx['min_length']}", (loc,))
    if kind in EXPECTED:
        message = f"{name} must be {EXPECTED[kind].format(**ctx)}, not {seen(value)}"
        return Problem(loc, message, _way_out(kind, value, model, loc), (loc,))
    text = error["msg"].removeprefix("Value error, ")
    return Problem(loc, f"{name}: {text}" if name else text, "", (loc,))


def _way_out(kind: str, value: Any, model: type[BaseModel], loc: Path_) -> str:
    """The hint for a value of the wrong type or out of bounds."""
    if (wanted := _model_at(model, loc)) is not None:
        return f"its keys are {', '.join(wanted.model_fields)}"
    if kind == "string_type":
        return f"put it in quotes: {text!r}" if "'" not in (text := seen(value)) else "write one text, in quotes"
    if kind in ("tuple_type", "list_type") and isinstance(value, str | int | float):
        return f"put it in brackets: [{value}]"
    if kind == "bool_type":
        return "YAML 1.2 has no yes, no, on or off; nor are 0 and 1 booleans"
    if kind in ("int_type", "float_type") and isinstance(value, str) and _NUMBER.fullmatch(value):
        return f"write {value} without quotes"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("tuple_type", "list_type"):
        return "begin each of its items with `- `"
    owner, key = _model_at(model, loc[: -len(subject(loc))]), subject(loc)[0]
    about = owner.model_fields[str(key)].description if owner and key in owner.model_fields else None
    return f"{key}: {about}" if about else "`microscale schema` prints what each key takes"


def _model_at(model: Any, loc: Path_) -> type[BaseModel] | None:
    """The record that a value at `loc` inside `model` should be, or None for anything else."""
    wanted = model
    for part in loc:
        wanted = _step(_bare(wanted), part)
    wanted = _bare(wanted)
    return wanted if isinstance(wanted, type) and issubclass(wanted, BaseModel) else None


def _bare(wanted: Any) -> Any:
    """A type without `| None` and without annotations."""
    while get_origin(wanted) in (Annotated, Union, types.UnionType):
        wanted = next(a for a in get_args(wanted) if a is not type(None))
    return wanted


def _step(wanted: Any, part: str | int) -> Any:
    """The type of one key or item of a type."""
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        field = wanted.model_fields.get(str(part))
        return field.annotation if field else None
    inner = [a for a in get_args(wanted) if a is not Ellipsis]
    if not inner:
        return None
    return inner[min(part, len(inner) - 1)] if isinstance(part, int) else inner[-1]
