"""Gluon: pairs of 6-bit codes as wgmma's left operand has pairs of values; see `ptx_sixes.py`.

What of a row is in a stage, 48 or 96 bytes, is two powers of two: `codes` has the first two thirds, `rest` the last.
"""
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _rows(BN, WARPS):
    """The registers, lanes and warps of rows [BN]: those of the left operand of wgmma."""
    registers, rows = [8], 16 * WARPS
    while rows < BN:
        registers.append(rows)
        rows *= 2
    return registers, [1, 2, 4], [16 << i for i in range(WARPS.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(BN, COUNT, WARPS):
    """Of words [BN, COUNT]: each lane of four has all words of its rows."""
    registers, lanes, warps = _rows(BN, WARPS)
    columns = [[0, 1 << i] for i in range(COUNT.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        columns + [[n, 0] for n in registers], [[0, 0], [0, 0]] + [[n, 0] for n in lanes], [[n, 0] for n in warps], [],
        [BN, COUNT],
    )  # fmt: skip


@gluon.constexpr_function
def _lanes_layout(BN, WARPS):
    """Of a number for each row and each lane of four, [BN, 4]."""
    registers, lanes, warps = _rows(BN, WARPS)
    return gl.DistributedLinearLayout(
        [[n, 0] for n in registers], [[0, 1], [0, 2]] + [[n, 0] for n in lanes], [[n, 0] for n in warps], [], [BN, 4]
    )


@gluon.jit
def lanes_of(BN: gl.constexpr, WARPS: gl.constexpr, BASE: gl.constexpr):
    """Selectors of the first and the second pair of 16 codes, and the factor, of each lane: [BN, 4]."""
    LANES: gl.constexpr = _lanes_layout(BN, WARPS)
    lane = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, LANES)), 0).broadcast_to([BN, 4])
    first = 0x1010 + (lane + (lane >> 1)) * 0x1111
    return first, first + 0x2222, (1 << BASE) >> ((lane & 1) * 4)


@gluon.jit
def pairs_of(codes, rest, lanes, PAIRS: gl.constexpr, WARPS: gl.constexpr, GATHER: gl.constexpr, IN: gl.constexpr):
    """Pairs of codes [BN, BK / 2] of a stage of words `codes` [BN, BK / 8] and `rest` [BN, BK / 16]."""
    BN: gl.constexpr = codes.shape[0]
    LANES: gl.constexpr = _lanes_layout(BN, WARPS)
    words = _columns(codes.load(_words_layout(BN, codes.shape[1], WARPS)))
    words = words + _columns(rest.load(_words_layout(BN, rest.shape[1], WARPS)))
    two: gl.constexpr = (gl.int32,) * 2
    made = ()
    for i in gl.static_range(len(words) // 3):
        given = ()
        for j in gl.static_range(3):
            word = gl.convert_layout(words[3 * i + j], gl.SliceLayout(1, LANES), assert_trivial=True)
            given = given + (gl.expand_dims(word, 1).broadcast_to([BN, 4]),)
        made = made + gl.inline_asm_elementwise(GATHER, IN, given + lanes, dtype=two, is_pure=True, pack=1)
    whole = _stacked(made).reshape([BN, 4, len(made)]).permute([0, 2, 1]).reshape([BN, 4 * len(made)])
    return gl.convert_layout(whole, PAIRS, assert_trivial=True)


@gluon.jit
def _columns(words):
    """The columns of [BN, COUNT] as a tuple."""
    if words.shape[1] == 2:
        return gl.split(words)
    else:
        even, odd = gl.split(words.reshape([words.shape[0], words.shape[1] // 2, 2]))
        first = _columns(even)
        second = _columns(odd)
        made = ()
        for i in gl.static_range(len(first)):
            made = made + (first[i], second[i])
        return made


@gluon.jit
def _stacked(parts):
    """A tuple of tensors as one, with dimensions of 2 at its end that count through them."""
    if len(parts) == 1:
        return parts[0]
    else:
        even = ()
        odd = ()
        for i in gl.static_range(len(parts) // 2):
            even = even + (parts[2 * i],)
            odd = odd + (parts[2 * i + 1],)
        return gl.join(_stacked(even), _stacked(odd))
