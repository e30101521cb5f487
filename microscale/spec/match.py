"""The one layer matcher: which module names does a rule's pattern mean?

A pattern is a shell glob over the full dotted name, where `*` also crosses dots (`*lm_head`, `model.layers.0.*`), or a
regular expression after `re:` that must match the full name. A list of patterns matches when one of them does.
"""

from __future__ import annotations

import fnmatch
import functools
import re


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile one pattern. Raises ValueError with the reason for a bad regular expression."""
    text = pattern.removeprefix("re:")
    source = text if text != pattern else fnmatch.translate(pattern)
    try:
        return re.compile(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"bad pattern {pattern!r}: {error}") from None


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Return True if any of `patterns` matches the full dotted `name`."""
    return any(compile_pattern(p).fullmatch(name) for p in patterns)
