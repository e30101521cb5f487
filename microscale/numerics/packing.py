"""Codes of 2 to 8 bits in a little-endian bit stream along the row.

Element i occupies bits [i*w, (i+1)*w) of the row: 4-bit puts the even element in the low nibble, 6-bit puts four
elements in three bytes. A row is a whole number of groups (`8 / gcd(8, w)` elements), which the block size ensures.
"""

from __future__ import annotations

import torch

from microscale.errors import InputError


def _group(width: int) -> tuple[int, int, torch.dtype]:
    """(elements, bytes, integer dtype that holds them) of the smallest whole number of bytes."""
    if not 2 <= width <= 8:
        raise InputError(f"cannot pack {width}-bit codes", "element widths are 2 to 8 bits")
    size = 1
    while size * width % 8:
        size *= 2
    return size, size * width // 8, torch.int32 if size * width < 32 else torch.int64


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack uint8 codes [..., n] into uint8 bytes [..., n*width/8]. Raises InputError unless n fills whole groups."""
    size, octets, dtype = _group(width)
    if codes.shape[-1] % size:
        raise InputError(
            f"{codes.shape[-1]} codes of {width} bits do not fill whole bytes", f"pad to a multiple of {size}"
        )
    if width == 8:
        return codes
    groups = codes.unflatten(-1, (codes.shape[-1] // size, size)).to(dtype)
    word = groups[..., 0]
    for i in range(1, size):
        word = word | (groups[..., i] << (i * width))
    if octets == 1:
        return word.to(torch.uint8)
    parts = [((word >> (8 * j)) & 0xFF).to(torch.uint8) for j in range(octets)]
    return torch.stack(parts, dim=-1).flatten(-2)


def unpack(packed: torch.Tensor, width: int, count: int | None = None) -> torch.Tensor:
    """Unpack uint8 bytes [..., n*width/8] into uint8 codes [..., n], or the first `count` of them."""
    size, octets, dtype = _group(width)
    if packed.shape[-1] % octets:
        raise InputError(f"{packed.shape[-1]} bytes are no whole number of {octets}-byte groups of {width}-bit codes")
    if width == 8:
        return packed if count is None else packed[..., :count]
    groups = packed.unflatten(-1, (packed.shape[-1] // octets, octets))
    word = groups[..., 0].to(dtype)
    for j in range(1, octets):
        word = word | (groups[..., j].to(dtype) << (8 * j))
    mask = 2**width - 1
    codes = torch.stack([((word >> (i * width)) & mask).to(torch.uint8) for i in range(size)], dim=-1).flatten(-2)
    return codes if count is None else codes[..., :count]
