"""Layout `fragments`: a matrix's codes and scales in the order in which tensor cores take them from registers.

The bytes are those of the plain layout in another order; qdata and scale keep their shapes. A warp's step is 64 rows by
64 of K. Of it, lane l = 4 g + t holds 16 codes of K, from 16 t on, of the rows g, g + 8, g + 16, ...: of an operand of
`mma.m16n8k16` whose K is counted in that order. Vectors of 16 bytes of neighbouring lanes are neighbours:

    qdata  [rows / 64, K / 64, vector, lane, 16 bytes]
    scale  [rows / 64, K / 64, g, block of the step, bytes of the rows g, g + 8, ..., g + 56]; or one FP32 number for
           each row, as in the plain layout, where a row is one block

Experts [E, N, K] are the matrix [E * N, K] in this layout, in their own shape; FP32 scales of rows they do not have.

A row's 16 codes are eight pairs; the two codes of a pair lie in the two halves of a word, at the same places. `places`
puts their bits so that shifting a word and masking it leaves them where bfloat16 has them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from microscale.numerics import packing
from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

ROWS = 64  # of a step of a warp
DEPTH = 64  # and of K
BFLOAT16_DIGITS = 8
CHUNK = 1 << 24  # codes that are reordered at a time: the intermediate words take eight bytes and more each


class Piece(NamedTuple):
    """`size` bits from `code_bit` of a code lie at `bit` of half of a word, and belong at `target`."""

    word: int
    bit: int
    code_bit: int
    target: int
    size: int


def targets(element: ElementSpec) -> tuple[tuple[int, int, int], ...]:
    """Return (bit of the code, where it belongs in 16 bits, how many) for the runs of an element's bits.

    Floats: the sign at 15, exponent and mantissa around bit 7, as bfloat16 has them. Integers stay at the bottom.
    """
    if element.kind == "int":
        return ((0, 0, element.width),)
    magnitude, low = element.width - int(element.sign), 7 - (element.mantissa or 0)
    sign = ((magnitude, 15, 1),) if element.sign else ()
    return (*sign, (0, low, magnitude))


@functools.cache
def places(element: ElementSpec) -> tuple[tuple[Piece, ...], ...]:
    """Return the pieces of each of the eight codes that share a row's words (width / 2 of them), pair by pair."""
    words = element.width // 2
    free = [[True] * 16 for _ in range(words)]
    runs, made = targets(element), []
    for _ in range(8):
        pieces = _in_one_shift(free, runs) or _in_pieces(free, runs)
        for p in pieces:
            free[p.word][p.bit : p.bit + p.size] = [False] * p.size
        made.append(tuple(pieces))
    return tuple(made)


def _in_one_shift(free: list[list[bool]], runs: tuple[tuple[int, int, int], ...]) -> list[Piece]:
    """All bits of a code in one word, at one distance from where they belong; [] if there is no such place."""
    for word, bits in enumerate(free):
        for shift in sorted(range(-15, 16), key=abs):
            found = [Piece(word, target - shift, code_bit, target, n) for code_bit, target, n in runs]
            if all(p.bit >= 0 and p.bit + p.size <= 16 and all(bits[p.bit : p.bit + p.size]) for p in found):
                return found
    return []


def _in_pieces(free: list[list[bool]], runs: tuple[tuple[int, int, int], ...]) -> list[Piece]:
    """The bits of a code wherever there is room, in few pieces."""
    open_bits, made = [list(bits) for bits in free], []
    for code_bit, target, n in runs:
        while n:
            word, bit, count = _longest(open_bits, n)
            n -= count
            made.append(Piece(word, bit, code_bit + n, target + n, count))
            open_bits[word][bit : bit + count] = [False] * count
    return made


def _longest(free: list[list[bool]], most: int) -> tuple[int, int, int]:
    """The shortest free run of at least `most` bits, else the longest: (word, bit, bits taken)."""
    found = []
    for word, bits in enumerate(free):
        start = 0
        while start < 16:
            stop = start
            while stop < 16 and bits[stop]:
                stop += 1
            if stop > start:
                found.append((stop - start, word, start))
            start = stop + 1
    enough = sorted(f for f in found if f[0] >= most)
    length, word, start = enough[0] if enough else max(found, key=lambda f: (f[0], -f[1], -f[2]))
    return word, start, min(length, most)


def fits(fmt: FormatSpec, rows: int, columns: int, *, experts: bool = False) -> bool:
    """Return True for matrices that have this layout: 4, 6 or 8 bits, sizes that are multiples of 64.

    Blocks are of 16 or 32, with scales of 8 bits, or whole rows, with FP32 scales; not these for matrices of `experts`.
    Scales of blocks leave values numbers of bfloat16's 8 digits, which is what codes are decoded to.
    """
    element, scale = fmt.element, fmt.scale
    regular = element.kind == "int" or (element.kind == "float" and element.subnormals and element.sign)
    regular = regular and element.width in (4, 6, 8)
    whole = scale.torch_dtype == "float32" and columns == fmt.block and not experts
    digits = element.width - 1 if element.kind == "int" else (element.mantissa or 0) + 1
    exact = scale.exponent_only or digits + (scale.mantissa or 0) + 1 <= BFLOAT16_DIGITS
    blocks = scale.width == 8 and exact if fmt.block in (16, 32) else whole
    return regular and blocks and rows % ROWS == 0 and columns % DEPTH == 0 and rows * columns > 0


def order(qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return qdata [..., N, bytes] and scale [..., N, K / block] of plain matrices [..., N, columns] in this layout.

    Both are dense, but for scales of whole rows, which stay as they are.
    """
    rows = qdata.reshape(-1, qdata.shape[-1])
    made = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part in _parts(rows.shape[0], columns):
        made[part] = to_fragments(packing.unpack(rows[part], fmt.element.width), fmt.element)
    return made.view(qdata.shape), scale_to_fragments(scale, fmt.block)


def restore(
    qdata: torch.Tensor, scale: torch.Tensor, fmt: FormatSpec, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the plain matrices' qdata and scale; the inverse of `order`."""
    rows = qdata.reshape(-1, qdata.shape[-1])
    made = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part in _parts(rows.shape[0], columns):
        made[part] = packing.pack(from_fragments(rows[part], fmt.element, columns), fmt.element.width)
    return made.view(qdata.shape), scale_from_fragments(scale, fmt.block)


def _parts(rows: int, columns: int) -> list[slice]:
    step = max(ROWS, CHUNK // columns // ROWS * ROWS)
    return [slice(start, start + step) for start in range(0, rows, step)]


def to_fragments(codes: torch.Tensor, element: ElementSpec) -> torch.Tensor:
    """Return the bytes of codes uint8 [N, K] in this layout: uint8 [N, K * width / 8]."""
    rows, columns = codes.shape
    held = _rows_of_lane(element)
    # [rows/64, units, row of the lane, g, K/64, t, pair, half]
    view = codes.reshape(rows // ROWS, 4 // (held // 2), held, 8, columns // DEPTH, 4, 8, 2).to(torch.int32)
    words = torch.zeros(*view.shape[:-2], element.width // 2, dtype=torch.int64, device=codes.device)
    for pair, pieces in enumerate(places(element)):
        for p in pieces:
            bits = (view[..., pair, :] >> p.code_bit) & ((1 << p.size) - 1)
            words[..., p.word] |= (bits[..., 0].long() << p.bit) | (bits[..., 1].long() << (p.bit + 16))
    # -> [rows/64, K/64, unit, lane (g, t), row of the lane, word] -> vectors of four words
    words = words.permute(0, 4, 1, 3, 5, 2, 6).reshape(
        rows // ROWS, columns // DEPTH, -1, 32, held * element.width // 8, 4
    )
    ordered = words.transpose(3, 4).contiguous()
    signed = torch.where(ordered >= 2**31, ordered - 2**32, ordered).to(torch.int32)
    return signed.view(torch.uint8).reshape(rows, columns * element.width // 8)


def from_fragments(data: torch.Tensor, element: ElementSpec, columns: int) -> torch.Tensor:
    """Return the codes uint8 [N, K] of bytes that `to_fragments` ordered."""
    rows, held = data.shape[0], _rows_of_lane(element)
    ordered = data.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    ordered = ordered.reshape(rows // ROWS, columns // DEPTH, 4 // (held // 2), held * element.width // 8, 32, 4)
    words = ordered.transpose(3, 4).reshape(rows // ROWS, columns // DEPTH, 4 // (held // 2), 8, 4, held, -1)
    words = words.permute(0, 2, 5, 3, 1, 4, 6)
    view = torch.zeros(*words.shape[:-1], 8, 2, dtype=torch.int64, device=data.device)
    for pair, pieces in enumerate(places(element)):
        for p in pieces:
            for half in (0, 1):
                bits = (words[..., p.word] >> (p.bit + 16 * half)) & ((1 << p.size) - 1)
                view[..., pair, half] |= bits << p.code_bit
    return view.reshape(rows, columns).to(torch.uint8)


def _rows_of_lane(element: ElementSpec) -> int:
    """Rows whose words fill whole vectors: 2, or 4 for six bits."""
    return 4 if element.width == 6 else 2


def scale_to_fragments(scale: torch.Tensor, block: int) -> torch.Tensor:
    """Return scales uint8 [..., N, K / block] in this layout, same shape; those of whole rows as they are."""
    if block >= DEPTH:
        return scale
    blocks = scale.shape[-1]
    parts = DEPTH // block
    # [rows/64, row of the lane, g, K/64, block] -> [rows/64, K/64, g, block, row of the lane]
    view = scale.reshape(scale.numel() // blocks // ROWS, 8, 8, blocks // parts, parts)
    return view.permute(0, 3, 2, 4, 1).contiguous().reshape(scale.shape)


def scale_from_fragments(scale: torch.Tensor, block: int) -> torch.Tensor:
    """Return scales uint8 [..., N, K / block] of bytes that `scale_to_fragments` ordered."""
    if block >= DEPTH:
        return scale
    blocks = scale.shape[-1]
    parts = DEPTH // block
    view = scale.contiguous().reshape(scale.numel() // blocks // ROWS, blocks // parts, 8, parts, 8)
    return view.permute(0, 4, 2, 1, 3).reshape(scale.shape)
