"""Reference quantize: the oracle. Rows in chunks, so memory beyond input and output stays small at any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from microscale.dispatch import Requires, kernel
from microscale.numerics import codec, hadamard, layout, packing, rounding, scaling
from microscale.spec.quantizer import QuantizerSpec

CHUNK = 1 << 20  # elements that are in flight at once; about 40 bytes of temporaries each


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Geometry of one call: x is seen as [lead, rows, columns]; a tile is tile_rows x tile_blocks blocks."""

    spec: QuantizerSpec
    lead: int
    rows: int
    columns: int
    tile_rows: int
    tile_blocks: int

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.spec.format.block)

    @property
    def step(self) -> int:
        """Rows per chunk: whole tiles, about CHUNK elements."""
        rows = max(1, CHUNK // max(1, self.columns))
        return max(self.tile_rows, rows // self.tile_rows * self.tile_rows)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        for index in range(self.lead):
            for start in range(0, self.rows, self.step):
                yield index, start, min(self.rows, start + self.step)


def _plan(x: torch.Tensor, spec: QuantizerSpec) -> _Plan:
    columns = x.shape[-1]
    rows = x.shape[-2] if x.dim() > 1 else 1
    lead = x.numel() // max(1, rows * columns) if x.numel() else 0
    tile_rows, tile_columns = spec.scale_tile or (1, spec.format.block)
    if tile_rows == 1:  # rows are independent: no reason to stop at a matrix's end
        rows, lead = lead * rows, min(lead, 1)
    return _Plan(spec, lead, rows, columns, tile_rows, tile_columns // spec.format.block)


@kernel("quantize", "reference.quantize", requires=Requires(), native=("cpu",), bound="defines correctness")
def quantize(
    x: torch.Tensor,
    spec: QuantizerSpec,
    amax: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale_layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize x [..., R, K] along the last axis.

    `amax` (FP32, shape of the outer scale) replaces the tensor's own amax; `outer_scale` is used as it stands; both
    None is dynamic. Returns qdata uint8 [..., R, blocks * block bytes], scale [..., R, blocks] (or swizzled blobs),
    outer scale FP32 or None.
    """
    spec = spec.for_row(x.shape[-1])
    if spec.hadamard is not None:
        x = hadamard.hadamard(x, spec.hadamard.size, spec.hadamard.sign)
    fmt, plan = spec.format, _plan(x, spec)
    outer = _outer(x, spec, amax, outer_scale)
    shape = x.shape[:-1]
    qdata = torch.empty((*shape, plan.blocks * fmt.block_bytes), dtype=torch.uint8, device=x.device)
    dtype = torch.uint8 if fmt.scale.torch_dtype is None else getattr(torch, fmt.scale.torch_dtype)
    scale = torch.empty((*shape, plan.blocks), dtype=dtype, device=x.device)
    if x.numel():
        x3, q3, s3 = (t.reshape(plan.lead, plan.rows, t.shape[-1]) for t in (x, qdata, scale))
        # Row outer scales follow the rows; the others are constant over a matrix.
        o3 = None if outer is None else outer.map(lambda t: t.expand(*shape, 1).reshape(plan.lead, plan.rows, 1))
        for index, start, stop in plan.chunks():
            part = slice(start, stop)
            part_outer = None if o3 is None else o3.map(lambda t, i=index, p=part: t[i, p])  # type: ignore[misc]
            random = None
            if spec.rounding == "stochastic":
                width = plan.blocks * fmt.block
                first = (index * plan.rows + start) * width
                random = rounding.random_bytes((stop - start) * width, first, seed).view(stop - start, width)  # type: ignore[arg-type]
            codes, scales = _quantize_rows(x3[index, part], plan, part_outer, random)
            q3[index, part] = packing.pack(codes, fmt.element.width)
            s3[index, part] = scales
    if scale_layout == layout.SWIZZLED:
        scale = layout.swizzle(scale if x.dim() > 1 else scale[None])
    return qdata, scale, None if outer is None else outer.decode


@kernel("quantize_both", "reference.quantize_both", requires=Requires(), native=("cpu",), bound="defines correctness")
def quantize_both(
    x: torch.Tensor,
    spec: QuantizerSpec,
    column_spec: QuantizerSpec,
    amaxes: tuple[torch.Tensor | None, torch.Tensor | None],
    seeds: tuple[torch.Tensor | None, torch.Tensor | None],
    scale_layout: str,
) -> tuple[torch.Tensor | None, ...]:
    """Quantize x [..., R, K] along its rows and along its columns: what `quantize` gives for x, then for its transpose.

    The second of each pair belongs to the columns.
    """
    rows = quantize(x, spec, amaxes[0], None, seeds[0], scale_layout)
    return (*rows, *quantize(x.mT, column_spec, amaxes[1], None, seeds[1], scale_layout))


def _outer(
    x: torch.Tensor, spec: QuantizerSpec, amax: torch.Tensor | None, outer_scale: torch.Tensor | None
) -> scaling.OuterScale | None:
    fmt = spec.format
    if fmt.outer_scale is None:
        return None
    if outer_scale is not None:
        return scaling.outer_from_scale(outer_scale, fmt)
    return scaling.outer_from_amax(scaling.finite_amax(x, fmt.outer_scale.per) if amax is None else amax, fmt)


def _quantize_rows(
    x: torch.Tensor, plan: _Plan, outer: scaling.OuterScale | None, random: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows x [R, K]; returns codes [R, blocks * block] and stored scales [R, blocks]."""
    fmt, rows = plan.spec.format, x.shape[0]
    tile_columns = plan.tile_blocks * fmt.block
    pad_columns, pad_rows = -x.shape[1] % tile_columns, -rows % plan.tile_rows
    whole = torch.nn.functional.pad(x.to(torch.float32), (0, pad_columns, 0, pad_rows))
    blocks = whole.unflatten(-1, (whole.shape[1] // fmt.block, fmt.block))
    if outer is not None and pad_rows:
        outer = outer.map(lambda t: torch.nn.functional.pad(t, (0, 0, 0, pad_rows), value=1.0))
    amax = _tile_amax(blocks.abs().amax(-1), plan)
    if fmt.scale_rule.candidates:
        scales = scaling.search(blocks, amax, fmt, outer, plan.tile_rows, plan.tile_blocks)
    else:
        scales = scaling.encode_scales(amax, fmt.scale_rule, fmt, outer)
    scales, blocks = scales[:rows, : plan.blocks], blocks[:rows, : plan.blocks]
    outer = None if outer is None else outer.map(lambda t: t[:rows])
    scaled = blocks * scaling.multiplier(scales, fmt, outer)[..., None]
    lanes = None if random is None else random.unflatten(-1, (plan.blocks, fmt.block))
    return codec.encode(scaled, fmt.element, lanes).flatten(-2), scales


def _tile_amax(amax: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """Share the amax of every tile among its blocks: [R, B] -> [R, B]."""
    rows, blocks = plan.tile_rows, plan.tile_blocks
    if rows == 1 and blocks == 1:
        return amax
    tiles = amax.unflatten(-1, (amax.shape[1] // blocks, blocks)).unflatten(0, (amax.shape[0] // rows, rows))
    return tiles.amax((1, 3)).repeat_interleave(rows, 0).repeat_interleave(blocks, 1)
