"""From a block's amax to its scale: the rules, the outer scale, and the candidate search.

Formulas (amax = max |x| over a block or tile, FP32; emax, max of the element):

    floor    E = floor(log2 amax) - emax                              OCP MX v1.0 section 6.3
    ceil     E = ceil(log2 amax) - emax
    rceil    E = ceil(log2 fp32(amax / max))                          cuBLAS, TransformerEngine
    even     E = floor(log2(amax rounded to the element's mantissa)) - emax
    nearest  S = round(amax / max)                                    without an outer scale
             S = round(amax * fp32(encode * fp32(1/max)))             with one (TransformerEngine's order)

where encode = min(max * scale_max / A, FLT_MAX), 1 where A = 0; A = amax over the tensor, row or expert;
outer_scale = 1 / encode. Elements are divided by multiplying with r = 2**-E, or min(1 / (S * outer_scale), FLT_MAX).

A NaN or an Inf makes its own block NaN (the scale's NaN code) and nothing else: A is taken over finite values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from microscale.numerics import bits, codec
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec, ScaleRuleSpec


@dataclasses.dataclass(frozen=True)
class OuterScale:
    """The FP32 second level, broadcastable to the scales: `decode` is stored, `encode` and `amax` are its sources."""

    amax: torch.Tensor
    encode: torch.Tensor
    decode: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> OuterScale:
        """Apply a tensor function to all three."""
        return OuterScale(function(self.amax), function(self.encode), function(self.decode))


def finite_amax(x: torch.Tensor, per: str) -> torch.Tensor:
    """Return the FP32 amax over finite values of x [..., R, K]: () per tensor, [..., R, 1] row, [..., 1, 1] expert."""
    if per == "tensor":
        dims: tuple[int, ...] | None = None
        shape: tuple[int, ...] = ()
    else:
        dims = (-1,) if per == "row" or x.dim() < 2 else (-2, -1)
        shape = (*x.shape[: x.dim() - len(dims)], *(1,) * len(dims))
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if dims is not None:
        return _finite_magnitude(x).amax(dims, keepdim=True).to(torch.float32)
    # In pieces, so that a large weight is not copied whole (twice) for its amax.
    pieces = x.reshape(-1).split(1 << 20) if x.is_contiguous() else [x]
    return torch.stack([_finite_magnitude(piece).amax() for piece in pieces]).amax().to(torch.float32)


def _finite_magnitude(x: torch.Tensor) -> torch.Tensor:
    magnitude = x.abs()
    return torch.where(magnitude < torch.inf, magnitude, 0)  # NaN compares false


def outer_from_amax(amax: torch.Tensor, fmt: FormatSpec) -> OuterScale:
    """Return the outer scale that maps `amax` to element max x scale_max; 1 where amax is 0."""
    top = torch.full((), fmt.element.max_value * fmt.scale_max, dtype=torch.float32, device=amax.device)
    encode = (top / amax).clamp(max=bits.FLT_MAX)
    encode = torch.where(amax == 0, torch.ones_like(encode), encode)
    return OuterScale(amax, encode, encode.reciprocal())


def outer_from_scale(outer_scale: torch.Tensor, fmt: FormatSpec) -> OuterScale:
    """Return the outer scale for a given decode scale (0, as some checkpoints store for zero tensors, counts as 1)."""
    decode = torch.where(
        outer_scale == 0, torch.ones_like(outer_scale), outer_scale
    )  # a copy: outputs own their memory
    amax = decode * (fmt.element.max_value * fmt.scale_max)
    return OuterScale(amax, decode.reciprocal().clamp(max=bits.FLT_MAX), decode)


def encode_scales(amax: torch.Tensor, rule: ScaleRuleSpec, fmt: FormatSpec, outer: OuterScale | None) -> torch.Tensor:
    """Return the stored scales (uint8 codes, or the native dtype of a wide scale) for block amaxes of the same shape.

    Follows `rule.base`; candidates are searched by `search`. `outer` broadcasts against amax.
    """
    if fmt.scale.exponent_only:
        return _exponent_codes(amax, rule.base or "", fmt.element, fmt.scale)
    if outer is None:
        value = bits.divide(amax, fmt.element.max_value)
    else:
        value = amax * (outer.encode * _inverse_max(fmt.element, amax.device))
    return _mantissa_codes(value, torch.isfinite(amax), fmt.scale)


def _inverse_max(element: ElementSpec, device: torch.device) -> torch.Tensor:
    return bits.divide(torch.ones((), dtype=torch.float32, device=device), element.max_value)


def _mantissa_codes(value: torch.Tensor, finite: torch.Tensor, scale: ElementSpec) -> torch.Tensor:
    if scale.width > 8:
        # Below 2**-126 the reciprocal overflows; a floor there costs nothing a block of such values could hold.
        value = value.clamp(min=bits.FLT_TINY)
    # A non-finite amax must become NaN even where a saturating encoder would turn infinity into the maximum.
    return codec.encode(torch.where(finite, value, torch.nan), scale)


def _exponent_codes(amax: torch.Tensor, rule: str, element: ElementSpec, scale: ElementSpec) -> torch.Tensor:
    """Biased exponents of the four power-of-two rules, clamped to the scale's finite codes."""
    if rule == "rceil":
        exponent = bits.ceil_log2(bits.divide(amax, element.max_value))
    elif rule == "ceil":
        exponent = bits.ceil_log2(amax) - element.max_exponent
    elif rule == "floor":
        exponent = bits.floor_log2(amax) - element.max_exponent
    else:
        y, shift = bits.normalized(amax)
        half_unit = 1 << (22 - (element.precision or 0))
        exponent = ((y.view(torch.int32) + half_unit) >> 23) - 127 + shift - element.max_exponent
    code = (exponent + (scale.bias or 0)).clamp(0, scale.max_code)
    return torch.where(torch.isfinite(amax), code, scale.nan_code or 0).to(torch.uint8)


def multiplier(scales: torch.Tensor, fmt: FormatSpec, outer: OuterScale | None) -> torch.Tensor:
    """Return r, the FP32 factor that elements are multiplied with before encoding; NaN for NaN scales."""
    if fmt.scale.exponent_only:
        return codec.reciprocal_table(fmt.scale, scales.device)[scales.to(torch.int32)]
    value = codec.decode(scales, fmt.scale)
    if outer is not None:
        value = value * outer.decode
    return value.reciprocal().clamp(max=bits.FLT_MAX)


def search(
    blocks: torch.Tensor,
    amax: torch.Tensor,
    fmt: FormatSpec,
    outer: OuterScale | None,
    tile_rows: int,
    tile_blocks: int,
) -> torch.Tensor:
    """Return the stored scales of the candidate with the smallest error; the first candidate wins a tie.

    blocks: FP32 [..., R, B, block]; amax: [..., R, B] (already shared over tiles of tile_rows x tile_blocks).
    A candidate's scale is the base rule of `multiplier * amax` (mantissa scales: round(multiplier * ((amax / max) *
    encode))); its error is summed sequentially over a block, by halving over the rows of a tile (arXiv:2512.02010 and
    TransformerEngine's order), with d = ((code * S) * A) / (max * scale_max) - x.
    """
    rule = fmt.scale_rule
    best_codes, best_error = None, None
    for factor in rule.candidates:
        codes = _candidate_codes(amax, factor, fmt, outer)
        error = _tile_sum(_block_error(blocks, codes, fmt, outer), rule.metric or "mse", tile_rows, tile_blocks)
        if best_codes is None or best_error is None:
            best_codes, best_error = codes, error
        else:
            better = error < best_error
            best_codes, best_error = torch.where(better, codes, best_codes), torch.where(better, error, best_error)
    assert best_codes is not None
    return best_codes


def _candidate_codes(amax: torch.Tensor, factor: float, fmt: FormatSpec, outer: OuterScale | None) -> torch.Tensor:
    if fmt.scale.exponent_only:
        return _exponent_codes(amax * factor, fmt.scale_rule.base or "", fmt.element, fmt.scale)
    value = bits.divide(amax, fmt.element.max_value)
    if outer is not None:
        value = value * outer.encode
    return _mantissa_codes(value * factor, torch.isfinite(amax), fmt.scale)


def _block_error(blocks: torch.Tensor, codes: torch.Tensor, fmt: FormatSpec, outer: OuterScale | None) -> torch.Tensor:
    """Error of every block [..., R, B] for given scales: sum of squares, sum of magnitudes, or maximum."""
    factor = multiplier(codes, fmt, outer)[..., None]
    value = codec.decode(codec.encode(blocks * factor, fmt.element), fmt.element)
    value = value * codec.decode(codes, fmt.scale)[..., None]
    if outer is not None:
        value = bits.divide(value * outer.amax[..., None], fmt.element.max_value * fmt.scale_max)
    difference = (value - blocks).abs()
    metric = fmt.scale_rule.metric
    if metric == "max":
        return difference.amax(-1) if difference.shape[-1] else difference.sum(-1)
    terms = difference * difference if metric == "mse" else difference
    total = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        total = total + terms[..., i]
    return total


def _tile_sum(error: torch.Tensor, metric: str, tile_rows: int, tile_blocks: int) -> torch.Tensor:
    """Combine block errors [..., R, B] over tiles and give every block of a tile the result."""
    if tile_rows == 1 and tile_blocks == 1:
        return error
    rows, columns = error.shape[-2:]
    tiles = error.unflatten(-1, (columns // tile_blocks, tile_blocks)).unflatten(-3, (rows // tile_rows, tile_rows))
    combine = torch.maximum if metric == "max" else torch.add
    while tiles.shape[-3] > 1:
        height = tiles.shape[-3]
        half = (height + 1) // 2
        low, high = tiles.narrow(-3, 0, half), tiles.narrow(-3, half, height - half)
        tiles = torch.cat(
            [combine(low.narrow(-3, 0, height - half), high), low.narrow(-3, height - half, 2 * half - height)], -3
        )
    total = tiles[..., 0]
    for i in range(1, tile_blocks):
        total = combine(total, tiles[..., i])
    # total: [..., R/tile_rows, 1, B/tile_blocks] -> every block of its tile
    return total.squeeze(-2).repeat_interleave(tile_rows, -2).repeat_interleave(tile_blocks, -1)
