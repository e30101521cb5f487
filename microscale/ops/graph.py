"""How torch.compile sees the public functions, without importing its front end (over a second) until it is in use.

A function marked with `in_graph` is one call in the traced graph: its Python runs when the graph is traced by
AOTAutograd, not when bytecode is read. Marking needs `torch._dynamo`, so it is put off until a compiled function first
calls `arm`, which Dynamo runs as a constant just before it reaches the marked function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])
_pending: list[Callable[..., object]] = []


def constant(function: F) -> F:
    """Have Dynamo call a function while tracing and keep its result (a plain value) as a constant of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what assume_constant_result does
    return function


def in_graph(function: F) -> F:
    """Have Dynamo put calls of this function into the graph as they are; callers call `arm()` first."""
    _pending.append(function)
    return function


@constant
def arm() -> None:
    """Mark the pending functions once Dynamo is there; costs a dictionary look-up otherwise."""
    if _pending and "torch._dynamo" in sys.modules:
        while _pending:
            torch.compiler.allow_in_graph(_pending.pop())
