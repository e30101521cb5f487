"""Which problems the kernels of `quantize_blocks.py` take, as data."""

from __future__ import annotations

from collections.abc import Callable

from microscale.dispatch import Operand, Problem, Requires
from microscale.kernels.triton import properties, ptx
from microscale.numerics import layout
from microscale.spec.quantizer import QuantizerSpec

MOST_RUN = 128  # elements that a thread owns in a row
MOST_DOWN = 64  # and down two columns


def _spec(problem: Problem) -> QuantizerSpec:
    assert problem.quantizer is not None
    return problem.quantizer


def run_of(spec: QuantizerSpec, least: int = 16) -> int:
    """Return how many elements a thread owns in a row: whole blocks, whole Hadamard groups."""
    return max(least, spec.format.block, spec.hadamard.size if spec.hadamard is not None else 0)


def fits(spec: QuantizerSpec) -> bool:
    """Return True for elements, blocks and scales that threads can own."""
    fmt = spec.format
    element, scale = fmt.element, fmt.scale
    power = fmt.block & (fmt.block - 1) == 0
    regular = element.width in (4, 6, 8) and (element.kind != "float" or element.subnormals)
    regular = regular and abs(element.bias or 0) <= ptx.MOST_BIAS  # so that a zero amax has the lowest scale
    plain_scale = scale.exponent_only or scale.torch_dtype == "float32" or (scale.width <= 8 and scale.subnormals)
    return power and 16 <= fmt.block <= MOST_RUN and regular and plain_scale


def search_fits(spec: QuantizerSpec) -> bool:
    """Return True if there are no candidates to search, or in the one way that is fast."""
    rule, fmt = spec.format.scale_rule, spec.format
    by_square = rule.metric == "mse" and fmt.scale.width <= 8 and not fmt.scale.exponent_only
    return not rule.candidates or (by_square and properties.is_e2m1(fmt.element) and spec.scale_tile is None)


def _tiles_fit(spec: QuantizerSpec) -> bool:
    if spec.scale_tile is None:
        return True
    rows, columns = spec.scale_tile
    return columns == spec.format.block == run_of(spec) and rows % 4 == 0 and rows <= 128 and rows & (rows - 1) == 0


def _is_plain_octets(problem: Problem) -> bool:
    """8-bit floats have no neighbours to be packed with: the generic kernel reaches the copy's speed there."""
    spec = _spec(problem)
    plain = spec.hadamard is None and spec.scale_tile is None and spec.rounding == "nearest_even"
    element = spec.format.element
    return plain and element.width == 8 and element.kind == "float" and problem.layout == layout.STRIDED


def down_fits(spec: QuantizerSpec) -> bool:
    """Return True if a thread can own two runs down columns, and their codes be stored together."""
    run = run_of(spec, 32)
    return run <= MOST_DOWN and run * spec.format.element.width <= 256


def whole(operand: Operand, rows: int, columns: int) -> bool:
    """True if the matrices are made of whole rows x columns."""
    height = operand.shape[-2] if len(operand.shape) > 1 else 1
    return operand.shape[-1] % columns == 0 and height % rows == 0 and 0 not in operand.shape


def _ordered(order: str) -> tuple[str, Callable[[Problem], bool]]:
    text = f"needs dense {'rows' if order == 'rows' else 'columns (a transposed matrix)'} that start on 16 bytes"
    return text, lambda p: p.operands[0].order == order


def _is_small(problem: Problem) -> bool:
    """True if 32-bit places suffice; of sizes rounded up, because selections are cached by shape class."""
    return sum((n - 1).bit_length() for n in problem.operands[0].shape if n) < 31


SMALL = ("needs fewer than 2**31 elements, each size rounded up to a power of two", _is_small)
_COMMON = (
    ("needs blocks of 16 to 128 elements of 4, 6 or 8 bits", lambda p: fits(_spec(p))),
    ("searches candidates by squared error, for E2M1", lambda p: search_fits(_spec(p))),
    SMALL,
)
_ROW_CHECKS = (
    *_COMMON,
    ("leaves plain 8-bit floats with strided scales to triton.quantize", lambda p: not _is_plain_octets(p)),
    ("needs scale tiles one block wide and 4 to 128 rows high", lambda p: _tiles_fit(_spec(p))),
    (
        "needs rows of whole blocks, Hadamard groups and scale tiles",
        lambda p: whole(p.operands[0], (_spec(p).scale_tile or (1, 1))[0], run_of(_spec(p))),
    ),
    (
        "needs Hadamard groups of 4 blocks at most with swizzled scales",
        lambda p: p.layout == layout.STRIDED or run_of(_spec(p)) <= 4 * _spec(p).format.block,
    ),
)
ROWS = Requires(devices=("cuda",), packages=("triton",), dtypes=("bfloat16",), checks=(_ordered("rows"), *_ROW_CHECKS))
TURNED = Requires(
    devices=("cuda",),
    packages=("triton",),
    dtypes=("bfloat16",),
    checks=(
        _ordered("columns"),
        ("takes 6-bit elements, which triton.quantize_columns does not", lambda p: _spec(p).format.element.width == 6),
        *_ROW_CHECKS,
    ),
)
COLUMNS = Requires(
    devices=("cuda",),
    packages=("triton",),
    dtypes=("bfloat16",),
    checks=(
        _ordered("columns"),
        *_COMMON,
        ("takes no scale tile", lambda p: _spec(p).scale_tile is None),
        ("needs elements of 4 or 8 bits", lambda p: _spec(p).format.element.width in (4, 8)),
        ("needs blocks and Hadamard groups of at most 64 elements and 32 bytes", lambda p: down_fits(_spec(p))),
        (
            "needs columns of whole blocks and Hadamard groups, and an even number of them",
            lambda p: whole(p.operands[0], 2, run_of(_spec(p), 32)),
        ),
    ),
)
