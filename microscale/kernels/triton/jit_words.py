"""Blocks in registers: a thread owns whole blocks as tuples of words, two bf16 to a 32-bit word.

Nothing here crosses threads, so there are no shuffles and no shared memory: [T] tensors are one register (or a few) per
thread, tuples of them are that thread's blocks. Sixteen elements, eight words, are the unit of packing: their codes are
WIDTH / 2 words.
"""

# mypy: ignore-errors
# (The Triton language has no Python types.)

from __future__ import annotations

import triton
import triton.language as tl

from microscale.kernels.triton.jit_common import bits_of, float_of
from microscale.kernels.triton.jit_encode import encode


@triton.jit
def words_of(pointer):
    """A pointer to 16-bit numbers or bytes as one to words."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def split_four(v, T: tl.constexpr):
    """The columns of [T, 4] as four [T]."""
    even, odd = tl.split(tl.reshape(v, (T, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_words(x, start, live, T: tl.constexpr, COUNT: tl.constexpr):
    """COUNT words from word `start` on, 16 bytes at a time; zeros where not live."""
    words = ()
    for i in tl.static_range(COUNT // 4):
        four = tl.load(x + (start[:, None] + (4 * i + tl.arange(0, 4))[None, :]), mask=live[:, None], other=0)
        words = words + split_four(four, T)
    return words


@triton.jit
def store_words(out, start, live, words, T: tl.constexpr, COUNT: tl.constexpr):
    """Store COUNT words from word `start` on, 16, 8 or 4 bytes at a time."""
    if COUNT % 4 == 0:
        for i in tl.static_range(COUNT // 4):
            even, odd = tl.join(words[4 * i], words[4 * i + 2]), tl.join(words[4 * i + 1], words[4 * i + 3])
            four = tl.reshape(tl.join(even, odd), (T, 4))
            tl.store(out + (start[:, None] + (4 * i + tl.arange(0, 4))[None, :]), four, mask=live[:, None])
    elif COUNT % 2 == 0:
        for i in tl.static_range(COUNT // 2):
            two = tl.join(words[2 * i], words[2 * i + 1])
            tl.store(out + (start[:, None] + (2 * i + tl.arange(0, 2))[None, :]), two, mask=live[:, None])
    else:
        for i in tl.static_range(COUNT):
            tl.store(out + start + i, words[i], mask=live)


@triton.jit
def _halves(a, b, SECOND: tl.constexpr, PORTABLE: tl.constexpr):
    """The first (or SECOND) halves of two words as one word."""
    if PORTABLE:
        if SECOND:
            return ((a >> 16) & 0xFFFF) | (b & -65536)
        else:
            return (a & 0xFFFF) | (b << 16)
    elif SECOND:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def transpose_words(words, COUNT: tl.constexpr, PORTABLE: tl.constexpr):
    """From COUNT rows of a word (two columns): the words of the first column, and of the second."""
    first, second = (), ()
    for i in tl.static_range(COUNT // 2):
        first = first + (_halves(words[2 * i], words[2 * i + 1], False, PORTABLE),)
        second = second + (_halves(words[2 * i], words[2 * i + 1], True, PORTABLE),)
    return first, second


@triton.jit
def low(w):
    """FP32 of the first element of a word."""
    return float_of(w << 16)


@triton.jit
def high(w):
    """FP32 of the second element of a word."""
    return float_of(w & -65536)


@triton.jit
def max_pair(a, b, PORTABLE: tl.constexpr):
    """Larger halves of two words of sign-cleared bf16, which order as integers do."""
    if PORTABLE:
        return tl.maximum(a & 0xFFFF, b & 0xFFFF) | (tl.maximum(a >> 16, b >> 16) << 16)
    else:
        return tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def amax_bits(words, FIRST: tl.constexpr, COUNT: tl.constexpr, PORTABLE: tl.constexpr):
    """FP32 bits of the largest magnitude among words FIRST .. FIRST + COUNT."""
    best = words[FIRST] & 0x7FFF7FFF
    for i in tl.static_range(1, COUNT):
        best = max_pair(best, words[FIRST + i] & 0x7FFF7FFF, PORTABLE)
    return tl.maximum(best & 0xFFFF, best >> 16) << 16


@triton.jit
def _round_pair(a, b, PORTABLE: tl.constexpr):
    """A word of two FP32, rounded to bf16, a first."""
    if PORTABLE:
        p, q = bits_of(a), bits_of(b)
        p = tl.where((p & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, p + 0x7FFF + ((p >> 16) & 1))
        q = tl.where((q & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, q + 0x7FFF + ((q >> 16) & 1))
        return ((p >> 16) & 0xFFFF) | (q & -65536)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [b, a], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _butterflies(values, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Stages of the transform from STRIDE on."""
    mixed = ()
    for i in tl.static_range(SIZE):
        if (i // STRIDE) % 2 == 0:
            mixed = mixed + (values[i] + values[i + STRIDE],)
        else:
            mixed = mixed + (values[i - STRIDE] - values[i],)
    if 2 * STRIDE < SIZE:
        return _butterflies(mixed, SIZE, 2 * STRIDE)
    else:
        return mixed


@triton.jit
def hadamard_words(words, COUNT: tl.constexpr, SIZE: tl.constexpr, SIGNS: tl.constexpr, FACTOR: tl.constexpr,
                   PORTABLE: tl.constexpr):  # fmt: skip
    """The Hadamard transform of groups of SIZE elements, in the order of microscale.numerics.hadamard.

    SIGNS has bit i set where the sign vector's entry i is -1.
    """
    out = ()
    for group in tl.static_range(2 * COUNT // SIZE):
        values = ()
        for i in tl.static_range(SIZE // 2):
            w = words[group * (SIZE // 2) + i]
            w = _flip(w, (SIGNS >> (2 * i)) & 3)
            values = values + (low(w), high(w))
        values = _butterflies(values, SIZE, 1)
        for i in tl.static_range(SIZE // 2):
            out = out + (_round_pair(values[2 * i] * FACTOR, values[2 * i + 1] * FACTOR, PORTABLE),)
    return out


@triton.jit
def _flip(w, WHICH: tl.constexpr):
    """Change the sign of the first (1), the second (2), both (3) or no (0) element of a word."""
    if WHICH == 0:
        return w
    elif WHICH == 1:
        return w ^ 0x8000
    elif WHICH == 2:
        return w ^ -2147483648
    else:
        return w ^ -2147450880


@triton.jit
def _pack_codes(codes, WIDTH: tl.constexpr):
    """Sixteen codes as WIDTH / 2 words of a little-endian bit stream."""
    words = ()
    for k in tl.static_range(WIDTH // 2):
        word = tl.zeros_like(codes[0])
        for j in tl.static_range(16):
            at = j * WIDTH - 32 * k
            if at >= 0 and at < 32:
                word = word | (codes[j] << at)
            elif at < 0 and at > -WIDTH:
                word = word | (codes[j] >> -at)
        words = words + (word,)
    return words


@triton.jit
def sixteen_of(pointer, COUNT: tl.constexpr):
    """COUNT numbers at a pointer, the same for all threads, as a tuple."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(pointer + i),)
    return found


@triton.jit
def _place(y, t):
    """How many of the 15 rising thresholds t are <= y, by halving; 0 for NaN."""
    p3 = y >= t[7]
    p2 = y >= tl.where(p3, t[11], t[3])
    p1 = y >= tl.where(p3, tl.where(p2, t[13], t[9]), tl.where(p2, t[5], t[1]))
    upper = tl.where(p2, tl.where(p1, t[14], t[12]), tl.where(p1, t[10], t[8]))
    lower = tl.where(p2, tl.where(p1, t[6], t[4]), tl.where(p1, t[2], t[0]))
    p0 = y >= tl.where(p3, upper, lower)
    return tl.where(p3, 8, 0) + tl.where(p2, 4, 0) + tl.where(p1, 2, 0) + tl.where(p0, 1, 0)


@triton.jit
def encode_sixteen(
    words, FIRST: tl.constexpr, factor, finite, random, thresholds, code_of,
    ENCODER: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr, STOCHASTIC: tl.constexpr,
    E_KIND: tl.constexpr, E_WIDTH: tl.constexpr, E_MANTISSA: tl.constexpr, E_LOWEST: tl.constexpr,
    E_MAX: tl.constexpr, E_MAX_CODE: tl.constexpr, E_NAN_CODE: tl.constexpr, E_SIGNED: tl.constexpr,
    E_SYMMETRIC: tl.constexpr, E_LEVELS: tl.constexpr,
):  # fmt: skip
    """Packed codes of words FIRST .. FIRST + 8. `random`: four words of random bytes, or nothing.

    ENCODER: 0 portable; 1 PTX of (words, factor); 2 of (words, bf16 factor twice, keep); 3 of (words, factor, keep);
    4 of (words, factor, keep, random), see `ptx.py`; 5 a codebook of 16 values in rising order, `thresholds` a tuple.
    """
    eight = ()
    for i in tl.static_range(8):
        eight = eight + (words[FIRST + i],)
    if ENCODER == 0:
        codes = ()
        for i in tl.static_range(16):
            value = high(eight[i // 2]) if i % 2 else low(eight[i // 2])
            byte = (random[i // 4] >> (8 * (i % 4))) & 255 if STOCHASTIC else 0
            codes = codes + (encode(
                value * factor, byte, thresholds, code_of, E_KIND, E_WIDTH, E_MANTISSA, E_LOWEST, E_MAX, E_MAX_CODE,
                E_NAN_CODE, E_SIGNED, STOCHASTIC, True, E_SYMMETRIC, E_LEVELS,
            ),)  # fmt: skip
        return _pack_codes(codes, E_WIDTH)
    elif ENCODER == 5:
        codes = ()
        for i in tl.static_range(16):
            value = high(eight[i // 2]) if i % 2 else low(eight[i // 2])
            codes = codes + (tl.where(finite, _place(value * factor, thresholds), 15),)
        return _pack_codes(codes, 4)
    else:
        if ENCODER == 2:
            half = (bits_of(factor) >> 16) & 0xFFFF
            operands = eight + (half | (half << 16), tl.where(finite, -1, 0))
        elif ENCODER == 1:
            operands = eight + (factor,)
        elif ENCODER == 3:
            operands = eight + (factor, tl.where(finite, -1, 0))
        else:
            operands = eight + (factor, tl.where(finite, -1, 0)) + random
        if E_WIDTH == 4:
            return tl.inline_asm_elementwise(PTX, CONSTRAINTS, operands, (tl.int32, tl.int32), is_pure=True, pack=1)
        elif E_WIDTH == 6:
            return tl.inline_asm_elementwise(
                PTX, CONSTRAINTS, operands, (tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                PTX, CONSTRAINTS, operands, (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
            )


@triton.jit
def random_words(key, offset, counter):
    """The four words of random bytes of sixteen elements; see microscale.numerics.rounding. `counter`: int64."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = offset.to(tl.uint32) + tl.zeros_like(c0)
    c3 = (offset >> 32).to(tl.uint32) + tl.zeros_like(c0)
    r0, r1, r2, r3 = tl.philox(key.to(tl.uint64), c0, c1, c2, c3)
    return (
        r0.to(tl.int32, bitcast=True), r1.to(tl.int32, bitcast=True),
        r2.to(tl.int32, bitcast=True), r3.to(tl.int32, bitcast=True),
    )  # fmt: skip
