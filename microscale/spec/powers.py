"""Formats with scales that are powers of two, as kernels get operands whose FP32 scales have left their rows."""

from __future__ import annotations

import functools

from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec, ScaleRuleSpec

POWER = ElementSpec(name="e8m0", exponent=8, mantissa=0, bias=127, sign=False, subnormals=False, nan="all_ones")
ONE = 127  # the code of 1


@functools.lru_cache(maxsize=1024)
def with_powers(fmt: FormatSpec) -> FormatSpec:
    """Return a format with its elements and blocks, and scales that are powers of two; under its own name."""
    rule = ScaleRuleSpec(base="floor")
    return FormatSpec(name=fmt.name, element=fmt.element, block=fmt.block, scale=POWER, scale_rule=rule)
