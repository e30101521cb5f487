"""JSON Schemas of what people write in YAML, for editors: formats, recipes, quantizers, elements, scale rules.

The pydantic records describe resolved data; in YAML a name may stand for an element, a scale rule or a format, a list
of one may be written without brackets, and a few mappings have a short form. This module adds those forms and the
known names. A schema is a help for writing: it accepts everything the loader does, and leaves to the loader the
combinations that cannot be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from microscale.errors import unknown_name
from microscale.spec.format import MAX_BLOCK, ROW_WORD, FormatSpec
from microscale.spec.quantizer import HADAMARD_SIZES
from microscale.spec.recipe import RecipeSpec
from microscale.spec.registry import list_elements, list_formats, list_scale_rules

DIALECT = "https://json-schema.org/draft/2020-12/schema"
KINDS = {
    "format": "a file formats/<name>.yaml",
    "recipe": "a file recipes/<name>.yaml",
    "quantizer": "one entry of a recipe's quantizers",
    "element": "one entry of elements.yaml, or an element written inline",
    "scale_rule": "one entry of scale_rules.yaml, or a rule written inline",
}

Schema = dict[str, Any]
_RECORDS = {
    "ElementSpec": "element",
    "FormatSpec": "format",
    "GemmSpec": "gemm",
    "HadamardSpec": "hadamard",
    "OuterScaleSpec": "outer_scale",
    "QuantizerSpec": "variant",
    "Rule": "rule",
    "ScheduleSpec": "schedule",
    "ScaleRuleSpec": "scale_rule",
}


def schema(kind: str) -> Schema:
    """Return the JSON Schema (draft 2020-12) of one kind of YAML: a key of `KINDS`.

    It lists the names known now, registered formats included. Raises UnknownNameError for another kind.
    """
    if kind not in KINDS:
        raise unknown_name("schema", kind, KINDS)
    definitions = _definitions()
    used = _reachable(kind, definitions)
    return {
        "$schema": DIALECT,
        "title": f"microscale {kind}: {KINDS[kind]}",
        "$ref": _ref(kind)["$ref"],
        "$defs": {name: definitions[name] for name in sorted(used)},
    }


def _definitions() -> dict[str, Schema]:
    """Every definition by its YAML-side name, with the forms that only YAML has."""
    recipe = RecipeSpec.model_json_schema()
    found = {_RECORDS[name]: body for name, body in recipe.pop("$defs").items()}
    found["recipe"] = recipe
    made: dict[str, Schema] = {name: _tidy(body) for name, body in found.items()}

    elements = {"anyOf": [{"enum": list_elements()}, _ref("element")]}
    rules = {"anyOf": [{"enum": list_scale_rules()}, _ref("scale_rule")]}
    outer = {"anyOf": [{"const": "fp32"}, _ref("outer_scale"), {"type": "null"}]}
    parts: Schema = {"element": elements, "scale": elements, "scale_rule": rules, "outer_scale": outer}
    described = made["format"]["properties"]["block"]["description"]
    numbers = {"type": "integer", "minimum": 1, "maximum": MAX_BLOCK}
    parts["block"] = {"anyOf": [numbers, {"const": ROW_WORD}], "description": described}
    names = {"anyOf": [{"enum": list_formats()}, {"type": "string", "description": "a path, or a registered name"}]}
    sizes = {"enum": list(HADAMARD_SIZES)}

    made["format"]["properties"].update(parts)
    own = {k: v for k, v in made["variant"]["properties"].items() if k != "format"}
    kept = {k: v for k, v in made["format"]["properties"].items() if k not in (*FormatSpec.prose, "name")}
    own["hadamard"] = {"anyOf": [sizes, _ref("hadamard"), {"type": "null"}]}
    made["variant"]["properties"] = {"format": {"anyOf": [*names["anyOf"], _ref("format")]}, **kept, **own}
    made["quantizer"] = {"anyOf": [*names["anyOf"], _ref("variant"), _ref("format")]}
    made["hadamard"]["properties"]["size"] = sizes
    signs = made["hadamard"]["properties"]["sign"]
    drawn = {"const": "random", "description": "in a training recipe: drawn from the seed"}
    made["hadamard"]["properties"]["sign"] = {**signs, "anyOf": [*signs["anyOf"], drawn]}
    made["recipe"]["properties"]["quantizers"]["additionalProperties"] = _ref("quantizer")
    for key in ("match", "types"):
        many = made["rule"]["properties"][key]
        made["rule"]["properties"][key] = {"anyOf": [many["items"], {**many, "minItems": 1}]}
    return made


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _tidy(body: Schema) -> Schema:
    """Rename references, drop the titles that repeat a key, and keep the first paragraph of a docstring."""
    result: Schema = {}
    for key, value in copy.deepcopy(body).items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "description" and isinstance(value, str):
            result[key] = " ".join(value.split("\n\n")[0].split())
        elif key == "$ref":
            result[key] = _ref(_RECORDS[value.rsplit("/", 1)[1]])["$ref"]
        elif key == "properties":
            result[key] = {name: _tidy(field) for name, field in value.items()}
        else:
            result[key] = _tidy_value(value)
    return result


def _tidy_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _tidy(value)
    return [_tidy_value(v) for v in value] if isinstance(value, list) else value


def _reachable(name: str, definitions: dict[str, Schema]) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(_references(definitions[current]))
    return found


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner.rsplit("/", 1)[1]
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
