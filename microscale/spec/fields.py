"""What the records' fields are made of: types that refuse near misses, and the error by which a check names a key.

Pydantic alone would read `true` as the block 1, "off" as a boolean and "32" as a number. These types take what was
meant and nothing else, from YAML and from Python (numpy's scalars are numbers too).
"""

from __future__ import annotations

import numbers
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Strict

Path_ = tuple[str | int, ...]


class FieldError(ValueError):
    """A value that cannot be, raised by a record's own check.

    `fields` are where the fault may stand, the likeliest first: a key of the record, or a path such as
    `("values", 3)`; an error points at the first of them that was written. None means the record as a whole.
    """

    def __init__(self, message: str, hint: str = "", *fields: str | Path_) -> None:
        super().__init__(message, hint, *fields)
        self.message = message
        self.hint = hint

    @property
    def paths(self) -> tuple[Path_, ...]:
        """`fields` as paths, the empty one if there are none."""
        found = tuple(f if isinstance(f, tuple) else (f,) for f in self.args[2:])
        return found or ((),)

    def __str__(self) -> str:
        """Return the message, and the hint in brackets (where a record is built by hand, pydantic prints this)."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


def _integer(value: Any) -> Any:
    return value if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)


def _name(name: str) -> str:
    parts = "/" in name or "\\" in name or name.endswith((".yaml", ".yml"))
    if not name or name != name.strip() or parts or not name.isprintable():
        hint = "a name is not empty and has no slash, no outer spaces, no control characters, no .yaml ending"
        raise FieldError(f"name {name!r} cannot be used", hint)
    return name


# A bound goes between the two, `Annotated[int, Strict(), Field(ge=1), AsInteger]`: outside, the JSON schema loses it.
AsInteger = BeforeValidator(_integer)
Integer = Annotated[int, Strict(), AsInteger]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Name = Annotated[str, AfterValidator(_name)]
