"""Paths where a name could stand: what is one, which file it means, and what it may have meant if there is none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from microscale.errors import did_you_mean
from microscale.spec.document import Document
from microscale.spec.explain import seen
from microscale.spec.fields import Path_

NOT_FORMATS = {"elements", "scale_rules"}  # files that stand among the formats


def is_path(text: str) -> bool:
    """Return True for a text that is a path rather than a name: it has a slash, or ends as YAML files do."""
    return "/" in text or "\\" in text or text.endswith((".yaml", ".yml"))


def find_file(kind: str, source: str | Path, names: Iterable[str], doc: Document, path: Path_) -> Path:
    """Return the file that a path means, which stands at `path` in `doc`: relative to that file, if `doc` is one.

    `names` are the formats or recipes (`kind`) known by name. Raises SpecError with what may have been meant instead.
    """
    try:
        found = _relative(source, doc)
        if found.is_file():
            return found
        reason = "it is a folder" if found.is_dir() else "no such file"
    except (OSError, RuntimeError) as error:  # a name too long, a home folder that nobody has
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise doc.error(path, f"cannot read {seen(str(source))}: {reason}", "give a name, or a file's path") from None
    raise doc.error(path, f"cannot read {found}: {reason}", _instead(kind, found, list(names), Path(doc.origin)))


def _relative(source: str | Path, doc: Document) -> Path:
    """A path inside a YAML file is relative to that file, or to the working folder if only that has it."""
    path = Path(source).expanduser()
    beside = Path(doc.origin).parent / path
    return beside if doc.marks and not path.is_absolute() and (beside.exists() or not path.exists()) else path


def _instead(kind: str, missing: Path, names: list[str], asking: Path) -> str:
    """What a path that is no file may have meant: a known name, or another file of its folder."""
    if missing.stem in names:
        return f"the {kind} {missing.stem!r} is known by name, without a path"
    folder = missing if missing.is_dir() else missing.parent
    files = sorted(folder.glob("[!.]*.y*ml")) if folder.is_dir() else []
    inside = [p.name for p in files if p.stem not in NOT_FORMATS and p != asking]
    here = f"in {folder} there is {', '.join(inside[:8])}{', ...' * (len(inside) > 8)}" if inside else ""
    close = did_you_mean(missing.name, inside)
    return close or here or did_you_mean(missing.stem, names) or f"known {kind}s: {', '.join(names)}"
