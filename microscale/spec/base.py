"""What all records share: frozen, no unknown keys, and one canonical text that is their identity.

The canonical text (`key`) leaves out prose (descriptions, references). Two specs are equal when their keys are, so a
hash or a comparison costs one string operation, which matters in the dispatcher; and the key is how a spec crosses a
`torch.library` boundary, where only plain values are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

_BY_KEY: dict[tuple[type, str], Any] = {}


class Spec(BaseModel):
    """Base of every record: immutable, hashable, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    prose: ClassVar[frozenset[str]] = frozenset({"description", "references"})

    def identity(self) -> dict[str, Any]:
        """Return the fields that make this spec what it is, as plain data (nested specs too)."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name not in self.prose}

    def __init__(self, **data: Any) -> None:
        """Validate, then fix the key: computing it later would put JSON and locks into torch.compile's traces."""
        super().__init__(**data)
        self._fix_key()

    def _fix_key(self) -> str:
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        self.__dict__["_key"] = text
        _BY_KEY.setdefault((type(self), text), self)
        return text

    @property
    def key(self) -> str:
        """Canonical one-line JSON of `identity()`; `from_key` is its inverse."""
        found = self.__dict__.get("_key")
        return found if found is not None else self._fix_key()  # pydantic builds some nested specs without __init__

    @classmethod
    def from_key(cls, key: str) -> Self:
        """Return the spec whose `key` this is (the same object where one was seen before in this process)."""
        found = _BY_KEY.get((cls, key))
        if found is None:
            found = _BY_KEY[(cls, key)] = cls.model_validate(json.loads(key))
        return found

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a validated copy with some fields changed; pydantic's own would keep the old key."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **(update or {})})

    def __eq__(self, other: object) -> bool:
        """Compare by identity fields; prose does not count."""
        return self is other or (type(self) is type(other) and self.key == other.key)

    def __hash__(self) -> int:
        """Hash the key."""
        return hash(self.key)


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.identity()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
