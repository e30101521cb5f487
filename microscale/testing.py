"""Assertions for kernels and formats: exact differences with coordinates, and poison for outputs.

Test helpers of the library, public because a third-party format or kernel is held to the same.
"""

from __future__ import annotations

import torch

from microscale.tensor import BlockScaledTensor


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Raise AssertionError unless two plain tensors agree in shape, dtype and every bit.

    The message gives the number of differing elements and the first: coordinate, both values, both bit patterns. -0.0
    differs from 0.0; any NaN equals any other (IEEE leaves the payload of a result open, and hardware differs).
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {actual.dtype} {list(actual.shape)} against {expected.dtype} {list(expected.shape)}"
        )
    actual, expected = actual.detach(), expected.detach().to(actual.device)
    left, right = _bits(actual), _bits(expected)
    differ = left != right
    if actual.dtype.is_floating_point:
        differ &= ~(torch.isnan(actual) & torch.isnan(expected))
    if not bool(differ.any()):
        return
    first = tuple(differ.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(differ.sum())} of {differ.numel()} elements differ; first at {list(first)}: "
        f"{actual[first].item()!r} (bits {left[first].item():#x}) against "
        f"{expected[first].item()!r} (bits {right[first].item():#x})"
    )


def _bits(t: torch.Tensor) -> torch.Tensor:
    """The bit patterns as an integer tensor."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(integer)


def assert_same_quantized(actual: BlockScaledTensor, expected: BlockScaledTensor, what: str = "") -> None:
    """Raise AssertionError unless two quantized tensors have the same codes, scales and outer scale, bit for bit.

    The layouts may differ. The message names the part, the first differing coordinate, both codes and both values.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)} against {list(expected.shape)}")
    if (actual.outer_scale is None) != (expected.outer_scale is None):
        raise AssertionError(f"{what}: only one of the two has an outer scale")
    if actual.outer_scale is not None and expected.outer_scale is not None:
        assert_same_bits(actual.outer_scale, expected.outer_scale, f"{what} outer_scale")
    assert_same_bits(actual.strided_scale(), expected.strided_scale(), f"{what} scale")
    left, right = actual.codes(), expected.codes().to(actual.device)
    differ = left != right
    if bool(differ.any()):
        first = tuple(differ.nonzero()[0].tolist())
        values = [float(t.dequantize(torch.float32).cpu()[first]) for t in (actual, expected)]
        raise AssertionError(
            f"{what} qdata: {int(differ.sum())} of {differ.numel()} codes differ; first at {list(first)}: "
            f"code {int(left[first]):#x} ({values[0]!r}) against {int(right[first]):#x} ({values[1]!r})"
        )


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with NaN, or with 0xFF bytes, in place: an element that a kernel forgot to write then shows."""
    return t.fill_(torch.nan) if t.dtype.is_floating_point else t.fill_(255 if t.dtype == torch.uint8 else -1)
