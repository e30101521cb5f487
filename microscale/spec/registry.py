"""Names to specs: the shipped YAML, user files and folders, Python registration, and entry points.

A format is looked up by name, by the path of a YAML file, or given as data or as a spec; `find_quantizer` also takes
the inline variants that recipes use (`{format: mxfp4, scale_rule: floor, block: 16}`). Third-party packages publish
formats through the entry-point group `microscale.formats`: each entry point loads to a path, a mapping or a FormatSpec.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from microscale.errors import SpecError, UnknownNameError, unknown_name
from microscale.spec import document, paths
from microscale.spec.document import Document, Path_, check_keys, checking
from microscale.spec.element import ElementSpec
from microscale.spec.explain import noun, required_keys, seen, unknown_key
from microscale.spec.format import FormatSpec, OuterScaleSpec, ScaleRuleSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.recipe import RecipeSpec

ENTRY_POINTS = "microscale.formats"
FormatLike = str | Path | Mapping[str, Any] | FormatSpec
QuantizerLike = FormatLike | QuantizerSpec
RecipeLike = str | Path | Mapping[str, Any] | RecipeSpec

_VARIANT_KEYS = ("element", "block", "scale", "scale_rule", "outer_scale")
_QUANTIZER_KEYS = ("rounding", "scale_tile", "hadamard", "outer_scale_mode")

_Spec = TypeVar("_Spec", bound=BaseModel)
_user_formats: dict[str, FormatSpec] = {}
_user_recipes: dict[str, RecipeSpec] = {}


def data_folder(kind: str) -> Path:
    """Return the folder of the shipped `formats` or `recipes`: inside the wheel, or in the checkout when editable."""
    package = Path(__file__).resolve().parent.parent
    packed = package / "_data" / kind
    return packed if packed.is_dir() else package.parent / kind


# -- elements and scale rules: one file each ---------------------------------------------------------------------------


@functools.cache
def _elements() -> dict[str, ElementSpec]:
    return _entries("elements.yaml", _element)


@functools.cache
def _scale_rules() -> dict[str, ScaleRuleSpec]:
    return _entries("scale_rules.yaml", _scale_rule)


def _entries(file: str, build: Callable[[Any, Document, Path_], Any]) -> dict[str, Any]:
    """The specs of a file that holds a mapping for each name."""
    doc = document.read(data_folder("formats") / file)
    for path, part in [((), doc.data), *(((name,), body) for name, body in dict(doc.data or {}).items())]:
        if not isinstance(part, dict):
            raise doc.error(path, f"{path[-1] if path else file} must be a mapping, not {seen(part)}")
    return {name: build({"name": name, **body}, doc, (name,)) for name, body in doc.data.items()}


def list_elements() -> list[str]:
    """Return the names of the shipped elements."""
    return list(_elements())


def list_scale_rules() -> list[str]:
    """Return the names of the scale rules."""
    return list(_scale_rules())


def find_element(source: str | Mapping[str, Any] | ElementSpec) -> ElementSpec:
    """Return an element by name or from data. Raises UnknownNameError or SpecError."""
    return _element(source, document.from_data(source, "element"), ())


def _element(source: Any, doc: Document, path: Path_) -> ElementSpec:
    if isinstance(source, str):
        return _by_name("element", source, _elements(), doc, path)
    return _from_mapping(ElementSpec, source, doc, path)


def _scale_rule(source: Any, doc: Document, path: Path_) -> ScaleRuleSpec:
    if isinstance(source, str):
        return _by_name("scale rule", source, _scale_rules(), doc, path)
    return _from_mapping(ScaleRuleSpec, source, doc, path)


def _outer_scale(source: Any, doc: Document, path: Path_) -> OuterScaleSpec:
    if isinstance(source, str):
        with checking(OuterScaleSpec, doc, path):
            return OuterScaleSpec.model_validate(source)
    return _from_mapping(OuterScaleSpec, source, doc, path)


_PARTS: dict[str, Callable[[Any, Document, Path_], Any]] = {
    "element": _element,
    "scale": _element,
    "scale_rule": _scale_rule,
    "outer_scale": _outer_scale,
}


def _from_mapping(model: type[_Spec], source: Any, doc: Document, path: Path_) -> _Spec:
    """A record from data; a record is returned as it is."""
    if isinstance(source, model):
        return source
    if not isinstance(source, Mapping):
        hint = f"its keys are {', '.join(model.model_fields)}"
        what = path[-1] if path else noun(model)
        raise doc.error(path, f"{what} must be a name or a mapping, not {seen(source)}", hint)
    with checking(model, doc, path):
        return model.model_validate(source)


def _by_name(kind: str, name: str, known: Mapping[str, Any], doc: Document, path: Path_) -> Any:
    if name not in known:
        error = unknown_name(kind, name, known)
        raise doc.error(path, error.message, error.hint, kind=UnknownNameError)
    return known[name]


def _file(kind: str, source: str | Path, doc: Document, path: Path_) -> Path:
    # No entry points among the names: while they load, a bad path in one must not load them again.
    names = [*_shipped(f"{kind}s"), *(_user_formats if kind == "format" else _user_recipes)]
    return paths.find_file(kind, source, names, doc, path)


# -- formats -----------------------------------------------------------------------------------------------------------


@functools.cache
def _shipped(kind: str) -> dict[str, Path]:
    folder = data_folder(kind)
    if not folder.is_dir():
        raise SpecError(f"the shipped {kind} are missing ({folder})", "reinstall microscale")
    return {p.stem: p for p in sorted(folder.glob("*.yaml")) if p.stem not in paths.NOT_FORMATS}


@functools.cache
def _shipped_format(name: str) -> FormatSpec:
    return _load_format(_shipped("formats")[name])


@functools.cache
def _entry_point_formats() -> dict[str, FormatSpec]:
    found: dict[str, FormatSpec] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        value = point.load()
        for spec in _formats_in(value() if isinstance(value, Callable) else value):  # type: ignore[arg-type]
            found[spec.name] = spec
    return found


def list_formats() -> list[str]:
    """Return the names of all formats: shipped, from entry points, then registered in this process."""
    return list(dict.fromkeys([*_shipped("formats"), *_entry_point_formats(), *_user_formats]))


def find_format(source: FormatLike) -> FormatSpec:
    """Return a format by name, by YAML path, from data, or unchanged if it is a spec.

    Raises UnknownNameError for a name nobody registered, SpecError (file, line, reason, hint) for a bad definition.
    """
    if isinstance(source, FormatSpec):
        return source
    return _format(source, document.from_data(source, "format"), ())


def bound_format(name: str) -> FormatSpec | None:
    """Return the format that a name stands for now, None for a path or an unknown name; costs a few look-ups.

    The same object as long as nobody registers the name again, so what was derived from it may be kept beside it.
    """
    if name in _user_formats:
        return _user_formats[name]
    if name in _shipped("formats"):
        return _shipped_format(name)
    return None if paths.is_path(name) else _entry_point_formats().get(name)


def _format(source: Any, doc: Document, path: Path_) -> FormatSpec:
    if isinstance(source, FormatSpec):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and paths.is_path(source)):
        return _load_format(_file("format", source, doc, path))
    if isinstance(source, str):
        if source in _user_formats:
            return _user_formats[source]
        if source in _shipped("formats"):
            return _shipped_format(source)
        known: dict[str, FormatSpec | None] = {**dict.fromkeys(list_formats()), **_entry_point_formats()}
        return _by_name("format", source, known, doc, path)
    if not isinstance(source, Mapping):
        raise doc.error(path, f"a format is a name, a path or a mapping, not {seen(source)}", "for example mxfp4")
    return _build_format(dict(source), doc, path)


def _build_format(data: dict[str, Any], doc: Document, path: Path_) -> FormatSpec:
    for key in data:
        if key in ("format", *_QUANTIZER_KEYS):
            hint = (
                f"a variant is a quantizer, not a format: {{format: NAME, {key if key != 'format' else 'block'}: ...}}"
            )
            raise doc.explained(unknown_key(path, key, (), hint))
    check_keys(data, doc, path, "a format", FormatSpec.model_fields, required_keys(FormatSpec))
    parts = _resolve_parts(data, doc, path)
    with checking(FormatSpec, doc, path):
        return FormatSpec(**parts)


def _resolve_parts(data: Mapping[str, Any], doc: Document, path: Path_) -> dict[str, Any]:
    """Replace the names and mappings of element, scale, scale_rule and outer_scale by specs."""
    made = dict(data)
    for key in (k for k in data if k in _PARTS):
        if key != "outer_scale" or data[key] is not None:
            made[key] = _PARTS[key](data[key], doc, (*path, key))
    return made


def _load_format(path: Path) -> FormatSpec:
    doc = document.read(path)
    if not isinstance(doc.data, dict):
        raise doc.error((), f"a format file is a mapping, not {seen(doc.data)}", "write name: first, one key a line")
    spec = _build_format(doc.data, doc, ())
    if spec.name != path.stem:
        raise doc.error(("name",), f"name {spec.name!r} in a file called {path.name}", f"rename one: {spec.name}.yaml")
    return spec


def _formats_in(source: FormatLike) -> Iterator[FormatSpec]:
    if isinstance(source, str | Path) and Path(source).is_dir():
        for path in sorted(Path(source).glob("*.yaml")):
            yield _load_format(path)
    else:
        yield find_format(source)


def register_format(source: FormatLike, *, replace: bool = False) -> list[FormatSpec]:
    """Make formats known by name: a spec, data, a YAML file, or a folder of them. Returns what was registered.

    Raises SpecError if a name is taken by a different definition and `replace` is not set.
    """
    added = list(_formats_in(source))
    for spec in added:
        if not replace and spec.name in list_formats() and find_format(spec.name) != spec:
            raise _taken("format", spec.name)
    _user_formats.update({spec.name: spec for spec in added})
    return added


def _taken(kind: str, name: str) -> SpecError:
    return SpecError(f"{kind} {name!r} exists with another definition", "choose another name, or pass replace=True")


# -- quantizers --------------------------------------------------------------------------------------------------------


def find_quantizer(source: QuantizerLike, **changes: Any) -> QuantizerSpec:
    """Return the quantizer for a format name, path, spec, mapping, or an inline variant, with `changes` applied.

    `changes` are any of element, block, scale, scale_rule, outer_scale (they make a variant of the format) and
    rounding, scale_tile, hadamard, outer_scale_mode. As a keyword None means unchanged; in a mapping it means none, so
    that `{format: nvfp4, outer_scale: null}` has no outer scale.
    """
    changes = {k: v for k, v in changes.items() if v is not None}
    if not changes and isinstance(source, str) and source in _shipped("formats") and source not in _user_formats:
        return _plain_quantizer(source)
    doc = document.from_data(source, "quantizer")
    base = _quantizer(source, doc, ())
    return base if not changes else _changed(base, changes, doc, ())


@functools.cache
def _plain_quantizer(name: str) -> QuantizerSpec:
    return QuantizerSpec(format=_shipped_format(name))


def _quantizer(source: Any, doc: Document, path: Path_) -> QuantizerSpec:
    if isinstance(source, QuantizerSpec):
        return source
    if not isinstance(source, Mapping) or ("name" in source and "format" not in source):
        return QuantizerSpec(format=_format(source, doc, path))
    check_keys(source, doc, path, "a quantizer", ("format", *_VARIANT_KEYS, *_QUANTIZER_KEYS), ("format",))
    base = QuantizerSpec(format=_format(source["format"], doc, (*path, "format")))
    return _changed(base, {k: v for k, v in source.items() if k != "format"}, doc, path)


def _changed(base: QuantizerSpec, changes: Mapping[str, Any], doc: Document, path: Path_) -> QuantizerSpec:
    check_keys(changes, doc, path, "a variant", (*_VARIANT_KEYS, *_QUANTIZER_KEYS))
    parts = _resolve_parts({k: v for k, v in changes.items() if k in _VARIANT_KEYS}, doc, path)
    own = {k: v for k, v in changes.items() if k in _QUANTIZER_KEYS}
    kept = {name: getattr(base, name) for name in _QUANTIZER_KEYS}
    with checking(FormatSpec, doc, path):
        fmt = base.format.variant(**parts)
    with checking(QuantizerSpec, doc, path):
        return QuantizerSpec(format=fmt, **{**kept, **own})


# -- recipes -----------------------------------------------------------------------------------------------------------


def list_recipes() -> list[str]:
    """Return the names of all recipes: shipped, then registered in this process."""
    return list(dict.fromkeys([*_shipped("recipes"), *_user_recipes]))


def find_recipe(source: RecipeLike) -> RecipeSpec:
    """Return a recipe by name, by YAML path, from data, or unchanged if it is a spec. Raises as `find_format` does."""
    if isinstance(source, RecipeSpec):
        return source
    if isinstance(source, Mapping):
        return _build_recipe(source, document.from_data(source, "recipe"))
    if not isinstance(source, str | Path):
        raise SpecError(f"a recipe is a name, a path or a mapping, not {seen(source)}", "for example nvfp4_dynamic")
    if isinstance(source, Path) or paths.is_path(source):
        return _load_recipe(_file("recipe", source, document.from_data(source, "recipe"), ()))
    if source in _user_recipes:
        return _user_recipes[source]
    if source in _shipped("recipes"):
        return _load_recipe(_shipped("recipes")[source])
    raise unknown_name("recipe", source, list_recipes(), hint="a path to a YAML file works too")


def register_recipe(source: RecipeLike, *, replace: bool = False) -> RecipeSpec:
    """Make a recipe known by name. Raises SpecError if the name is taken by another and `replace` is not set."""
    spec = find_recipe(source)
    if not replace and spec.name in list_recipes() and find_recipe(spec.name) != spec:
        raise _taken("recipe", spec.name)
    _user_recipes[spec.name] = spec
    return spec


def _load_recipe(path: Path) -> RecipeSpec:
    doc = document.read(path)
    spec = _build_recipe(doc.data, doc)
    if spec.name != path.stem:
        raise doc.error(("name",), f"name {spec.name!r} in a file called {path.name}", f"rename one: {spec.name}.yaml")
    return spec


def _build_recipe(data: Any, doc: Document) -> RecipeSpec:
    if not isinstance(data, Mapping):
        raise doc.error((), f"a recipe is a mapping, not {seen(data)}", "write name: first, one key a line")
    check_keys(data, doc, (), "a recipe", RecipeSpec.model_fields, required_keys(RecipeSpec))
    raw = data["quantizers"]
    if not isinstance(raw, Mapping):
        hint = "give each a name, as in quantizers: {w: {format: mxfp4}}"
        raise doc.error(("quantizers",), f"quantizers must be a mapping, not {seen(raw)}", hint)
    random = [name for name, body in raw.items() if _has_random_sign(body)]
    plain = {name: {**raw[name], "hadamard": {**raw[name]["hadamard"], "sign": None}} for name in random}
    made = {name: _quantizer(plain.get(name, body), doc, ("quantizers", name)) for name, body in raw.items()}
    given = {**data, "quantizers": made}
    if random and isinstance(written := data.get("random_signs", ()), list | tuple):
        given["random_signs"] = (*written, *(name for name in random if name not in written))
    with checking(RecipeSpec, doc):
        return RecipeSpec.model_validate(given)


def _has_random_sign(body: Any) -> bool:
    """Whether a quantizer says `hadamard: {size: 16, sign: random}`; the recipe, not the quantizer, keeps that."""
    hadamard = body.get("hadamard") if isinstance(body, Mapping) else None
    return isinstance(hadamard, Mapping) and hadamard.get("sign") == "random"


def _check_files(names: list[str]) -> None:
    """Load the named YAML files, or everything that ships; the pre-commit hook calls this."""
    files = [Path(n) for n in names] or [*_shipped("formats").values(), *_shipped("recipes").values()]
    _elements(), _scale_rules()
    for path in files:
        if path.stem not in paths.NOT_FORMATS:
            (_load_recipe if path.parent.name == "recipes" else _load_format)(path)


if __name__ == "__main__":
    import sys

    _check_files(sys.argv[1:])
