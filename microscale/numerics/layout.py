"""The `swizzle_32_4_4` scale layout of cuBLAS and torch's `SwizzleType`, and back.

Scales [R, C] are padded to whole 128 x 4 tiles; a tile is 512 bytes: row r of the tile stands at
`(r % 32) * 16 + (r // 32) * 4`, its four columns side by side. Tiles follow each other along the row.
"""

from __future__ import annotations

import torch

TILE_ROWS, TILE_COLUMNS = 128, 4
STRIDED, SWIZZLED = "strided", "swizzle_32_4_4"
FRAGMENTS = "fragments"  # what `microscale.prepare` makes of a weight; see `numerics/fragments.py`
LAYOUTS = (STRIDED, SWIZZLED)


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Return (rows, columns) rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Return scales [..., R, C] as blobs [..., padded R * padded C]; the padding is zero-filled."""
    rows, columns = scale.shape[-2:]
    full_rows, full_columns = padded(rows, columns)
    whole = torch.nn.functional.pad(scale, (0, full_columns - columns, 0, full_rows - rows))
    lead = whole.shape[:-2]
    tiles = whole.reshape(*lead, full_rows // TILE_ROWS, 4, 32, full_columns // TILE_COLUMNS, TILE_COLUMNS)
    n = len(lead)
    return tiles.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*lead, full_rows * full_columns)


def unswizzle(blob: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return blobs [..., padded R * padded C] as contiguous scales [..., R, C]; the inverse of `swizzle`."""
    full_rows, full_columns = padded(rows, columns)
    lead = blob.shape[:-1]
    tiles = blob.reshape(*lead, full_rows // TILE_ROWS, full_columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    n = len(lead)
    whole = tiles.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*lead, full_rows, full_columns)
    return whole[..., :rows, :columns].contiguous()
