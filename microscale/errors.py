"""Every error microscale raises: one base, subclasses that also are the built-in error they refine.

A message says what was wrong; the hint says how to get out. Both survive pickling (multi-process data loaders,
distributed launchers), and `str(error)` prints them on two lines.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MicroscaleError(Exception):
    """Base of every error raised on purpose. `message` is one line; `hint` names the way out, or is empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message, then the hint on a line of its own."""
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class SpecError(MicroscaleError, ValueError):
    """A format, element, quantizer or recipe that cannot be: bad YAML, unknown key, impossible combination."""


class UnknownNameError(SpecError, LookupError):
    """A name that no registry knows."""


class RecipeError(MicroscaleError, ValueError):
    """A recipe that is well formed but does not fit the model: a rule that matches nothing, a recipe without effect."""


class InputError(MicroscaleError, ValueError):
    """An argument the function cannot take: dtype, rank, shape, device."""


class UnsupportedOpError(MicroscaleError, NotImplementedError):
    """A torch operation that has no meaning on block-scaled data, or not at these block boundaries."""


class NoKernelError(MicroscaleError, RuntimeError):
    """No registered kernel accepts the problem; the message lists every kernel with the reason of its refusal."""


class CheckpointError(MicroscaleError, OSError):
    """A checkpoint that is missing, incomplete, or not what its metadata says."""

    # OSError formats two-argument instances its own way and drops the second one from `str`; keep ours.
    __str__ = MicroscaleError.__str__


class MissingDependencyError(MicroscaleError, ImportError):
    """An optional package is needed; the hint is the command that installs it."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> UnknownNameError:
    """Build the error for a name that is in no registry, with the nearest known names in the hint."""
    names = sorted(known)
    close = did_you_mean(name, names)
    text = close or f"known {kind}s: {', '.join(names)}"
    return UnknownNameError(f"unknown {kind} {name!r}", f"{text}; {hint}" if hint else text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.55)
    return "did you mean " + " or ".join(repr(c) for c in close) + "?" if close else ""
