"""Laws of the number formats: rounding, requantization, stochastic rounding, Hadamard, packing, swizzle."""

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import microscale as ms
from microscale.numerics.hadamard import hadamard
from microscale.numerics.layout import swizzle, unswizzle
from microscale.numerics.packing import pack, unpack
from microscale.numerics.rounding import philox, rounds_up
from tests.oracles import specmodel
from tests.oracles.families import FAMILIES

SIGNED = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "mxint8", "mxint4", "int8", "int4", "nf4"]
MX = [name for name, spec in specmodel.FORMATS.items() if spec.scale == "e8m0"]
SYMMETRIC = [name for name in specmodel.FORMATS if name != "nf4" and not name.endswith("_mae")]
TE_SIGN = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]

quick = settings(max_examples=40, deadline=None)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
around_one = st.floats(-1024, 1024, width=32, allow_subnormal=False)


def vectors(elements, size=64):
    return hnp.arrays(np.float32, size, elements=elements)


def matrices(elements):
    """Two rows that span two blocks of 32 and a ragged third."""
    return hnp.arrays(np.float32, (2, 72), elements=elements, fill=st.just(0.0)).map(torch.from_numpy)


def nearest_values(x, element):
    """Table values at the smallest distance from x (float64), one bool per (x, code)."""
    table = ms.decode_table(element).double()
    distance = (x.double()[:, None] - torch.where(table.isfinite(), table, torch.inf)).abs()
    return distance == distance.amin(1, keepdim=True)


# ------------------------------------------------------------------------------------------------ one element
@pytest.mark.parametrize("element", SIGNED)
@given(x=vectors(st.one_of(finite, around_one)))
@quick
def test_encode_is_monotone_and_nearest(element, x):
    x = torch.from_numpy(np.sort(x))
    codes = ms.encode(x, element)
    values = ms.decode_table(element)[codes.int()]
    assert (values[1:] >= values[:-1]).all()
    top = max(-ms.decode_table(element)[ms.encode(torch.tensor([-torch.inf]), element).int()].item(), 0)
    best = nearest_values(x.clamp(-top, None), element)
    assert best[torch.arange(len(x)), codes.long()].all()


@pytest.mark.parametrize("element", [e for e in SIGNED if e != "nf4"])
@given(x=vectors(st.one_of(finite, around_one)))
@quick
def test_encode_is_odd(element, x):
    x = torch.from_numpy(x)
    table = ms.decode_table(element)
    assert torch.equal(table[ms.encode(-x, element).int()], -table[ms.encode(x, element).int()])


# ------------------------------------------------------------------------------------------------- quantizing
@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("format", MX)
@given(x=matrices(st.one_of(around_one, st.floats(-(2.0**120), 2.0**120, width=32))))
@settings(max_examples=10, deadline=None)
def test_mx_values_are_fixed_points(format, rule, x):
    """Quantizing dequantized values gives the same values; under `floor` and `even` also the same bytes."""
    q = ms.quantize(x, format, scale_rule=rule)
    again = ms.quantize(q.dequantize(), format, scale_rule=rule)
    assert torch.equal(again.dequantize(), q.dequantize())
    if rule in ("floor", "even"):
        nonzero = torch.nn.functional.pad(q.dequantize(), (0, 24)).unflatten(-1, (3, 32)).any(-1)
        assert torch.equal(again.scales()[nonzero], q.scales()[nonzero])


@pytest.mark.parametrize("format", SYMMETRIC)
@given(x=matrices(around_one))
@settings(max_examples=10, deadline=None)
def test_negation_and_powers_of_two_pass_through(format, x):
    """quantize(-x) is -quantize(x); quantize(2^k x) is 2^k quantize(x) as long as nothing leaves the normal range."""
    values = ms.quantize(x, format).dequantize()
    assert torch.equal(ms.quantize(-x, format).dequantize(), -values)
    if specmodel.FORMATS[format].scale == "e8m0" or specmodel.FORMATS[format].outer:
        x = torch.where(x.abs() < 2.0**-20, 0, x)
        for factor in (8.0, 2.0**-9):
            scaled = ms.quantize(x * factor, format)
            assert torch.equal(scaled.dequantize(), ms.quantize(x, format).dequantize() * factor)


@pytest.mark.parametrize("format", [f for f in specmodel.FORMATS if not f.endswith("_mae")])
def test_any_strides_give_the_same_bytes(format):
    x = torch.from_numpy(FAMILIES["laplace"](np.random.default_rng(0), (256, 48)))
    q, strided = ms.quantize(x.t().contiguous(), format), ms.quantize(x.t(), format)
    assert torch.equal(q.codes(), strided.codes())
    assert torch.equal(q.scales(), strided.scales())


@pytest.mark.parametrize("format", [f for f in specmodel.FORMATS if not f.endswith("_mae")])
def test_the_input_is_left_alone(format):
    x = torch.from_numpy(FAMILIES["normal"](np.random.default_rng(0), (4, 100)))
    before = x.clone()
    ms.quantize(x, format).dequantize().zero_()
    assert torch.equal(x, before)


# ---------------------------------------------------------------------------------------- stochastic rounding
STOCHASTIC = ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp4", "mxint8", "nvfp4", "nvint4", "fp8_block128", "nf4"]


def stochastic(x, format, seed, **options):
    return ms.quantize(x, format, rounding="stochastic", generator=torch.Generator().manual_seed(seed), **options)


def below_and_above(y, element):
    """The two table values around each y (equal where y is representable), after saturation."""
    table = ms.decode_table(element)
    grid = torch.unique(table[table.isfinite()].double())
    if element in ("mxint8", "mxint4", "int4"):
        grid = grid[1:]  # the most negative integer is unused
    y = y.double().clamp(grid[0], grid[-1])
    low = grid[torch.searchsorted(grid, y, right=True) - 1]
    return low, torch.where(low == y, low, grid[torch.searchsorted(grid, y).clamp(max=len(grid) - 1)])


@pytest.mark.parametrize("format", STOCHASTIC)
@pytest.mark.parametrize("family", ["normal", "outliers", "element_ties", "negative_zero", "near_element_max"])
def test_stochastic_gives_only_the_two_neighbours(format, family):
    x = torch.from_numpy(FAMILIES[family](np.random.default_rng(3), (32, 256)))
    spec = specmodel.FORMATS[format]
    q = stochastic(x, format, 1)
    plain = ms.quantize(x, format)
    assert torch.equal(q.scales(), plain.scales())
    scale = q.scales().repeat_interleave(spec.block, -1)
    y = x * (1 / (scale if q.outer_scale is None else scale * q.outer_scale)).clamp(max=torch.finfo(torch.float32).max)
    low, high = below_and_above(y, spec.element)
    got = ms.decode_table(spec.element)[q.codes().int()].double()
    assert ((got == low) | (got == high)).all()
    assert torch.equal(q.codes()[x == 0], plain.codes()[x == 0])


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "mxint8", "nvint4"])
def test_stochastic_is_unbiased(format):
    """Over 2^20 draws the mean is within half a step of the 8-bit resolution and five standard errors of the input."""
    element = specmodel.FORMATS[format].element
    table = ms.decode_table(element)
    top = table[table.isfinite()].max().item()
    draws, columns = 1 << 15, 32
    y = torch.linspace(-0.9, 0.9, columns) * top
    y[0] = top  # keeps the scale at 1 (times the outer scale)
    q = stochastic(y.expand(draws, columns), format, 0, block=columns)
    unit = (q.scales()[0, 0] * (1 if q.outer_scale is None else q.outer_scale)).item()
    low, high = below_and_above(y / unit, element)
    gap = high - low
    mean = table[q.codes().int()].double().mean(0)
    assert ((mean - y / unit).abs() <= gap * (2**-8 + 5 * 0.5 / draws**0.5)).all()
    assert (mean - y / unit).mean().abs() <= gap.mean() * (2**-9 + 5 * 0.5 / (draws * columns) ** 0.5)


def test_stochastic_resolution():
    """Over all 256 random bytes: exact values stay, no fraction is off by more than 2^-9, all together by nothing."""
    fraction = (torch.arange(512) + 0.5) / 512
    up = rounds_up(fraction[:, None], torch.arange(256, dtype=torch.int32)).double().mean(1)
    assert not rounds_up(torch.zeros(256), torch.arange(256, dtype=torch.int32)).any()
    assert (up - fraction).abs().max() <= 2**-9
    assert (up - fraction).mean() == 0


def test_stochastic_is_decided_by_the_seed():
    x = torch.from_numpy(FAMILIES["normal"](np.random.default_rng(0), (64, 128)))
    for format in ("mxfp4", "nvfp4"):
        codes = stochastic(x, format, 5).codes()
        assert torch.equal(codes, stochastic(x, format, 5).codes())
        assert not torch.equal(codes, stochastic(x, format, 6).codes())
        by_int = [ms.quantize(x, format, rounding="stochastic", generator=seed).codes() for seed in (7, 7, 8)]
        assert torch.equal(by_int[0], by_int[1])
        assert not torch.equal(by_int[0], by_int[2])
        generator = torch.Generator().manual_seed(5)
        first, second = (ms.quantize(x, format, rounding="stochastic", generator=generator).codes() for _ in range(2))
        assert not torch.equal(first, second)  # a generator moves on


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10."""
    ones, pi = [0xFFFFFFFF] * 6, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for words, want in (
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        c0, c1, c2, c3, k0, k1 = words
        int64 = np.array([k0 | k1 << 32, c2 | c3 << 32], np.uint64).view(np.int64)
        counter = torch.tensor([c0]), torch.tensor([c1])
        assert [int(w) for w in philox(counter, torch.from_numpy(int64))] == want


# --------------------------------------------------------------------------------------------------- hadamard
def sylvester(size):
    index = np.arange(size)
    parity = np.array([[bin(i & j).count("1") % 2 for j in index] for i in index])
    return torch.from_numpy(1.0 - 2 * parity).double() / size**0.5


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128])
def test_hadamard_is_the_orthonormal_sylvester_matrix(size):
    x = torch.from_numpy(np.random.default_rng(size).standard_normal((5, 2, size * 3))).float()
    sign = torch.from_numpy(np.random.default_rng(0).choice([-1, 1], size))
    for s in (None, sign.tolist()):
        y = hadamard(x, size, s)
        signed = x.double().unflatten(-1, (3, size)) * (1 if s is None else sign)
        torch.testing.assert_close(y.double(), (signed @ sylvester(size)).flatten(-2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y.norm(), x.norm())
        undone = hadamard(y, size).unflatten(-1, (3, size)) * (1 if s is None else sign)
        torch.testing.assert_close(undone.flatten(-2), x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(hadamard(y, size, s, inverse=True), x, rtol=1e-6, atol=1e-6)


def test_hadamard_cancels_in_a_product():
    """(x R)(y R)^T = x y^T: why both operands of a wgrad GEMM may carry it."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.standard_normal((4, 64))).float() for _ in range(2))
    product = hadamard(x, 16, TE_SIGN) @ hadamard(y, 16, TE_SIGN).T
    torch.testing.assert_close(product, x @ y.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_quantize_with_hadamard_quantizes_the_transformed_tensor(format):
    x = torch.from_numpy(FAMILIES["student_t"](np.random.default_rng(0), (16, 64)))
    for option, sign in ((16, None), ({"size": 16, "sign": TE_SIGN}, TE_SIGN)):
        q, want = ms.quantize(x, format, hadamard=option), ms.quantize(hadamard(x, 16, sign), format)
        assert torch.equal(q.codes(), want.codes())
        assert torch.equal(q.scales(), want.scales())


# ---------------------------------------------------------------------------------------------------- storage
@pytest.mark.parametrize("width", range(2, 9))
@given(data=st.data())
@quick
def test_pack_is_a_little_endian_bit_stream(width, data):
    group = 8 // math.gcd(8, width)
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    codes = data.draw(hnp.arrays(np.uint8, (rows, groups * group), elements=st.integers(0, 2**width - 1)))
    packed = pack(torch.from_numpy(codes), width)
    assert packed.dtype == torch.uint8
    for row, octets in zip(codes, packed.numpy(), strict=True):
        stream = sum(int(code) << (i * width) for i, code in enumerate(row))
        assert stream.to_bytes(len(row) * width // 8, "little") == octets.tobytes()
    assert torch.equal(unpack(packed, width, codes.shape[1]), torch.from_numpy(codes))


def test_pack_four_bit_puts_the_even_element_in_the_low_nibble():
    assert pack(torch.tensor([0x1, 0x2, 0xA, 0xB], dtype=torch.uint8), 4).tolist() == [0x21, 0xBA]


@given(rows=st.integers(1, 300), columns=st.integers(1, 13))
@quick
def test_swizzle_index(rows, columns):
    """idx = ((i//128)*nX + j//4)*512 + (i%32)*16 + ((i%128)//32)*4 + j%4, zeros elsewhere, and the way back."""
    scale = torch.from_numpy(np.random.default_rng(rows).integers(1, 256, (rows, columns)).astype(np.uint8))
    blob = swizzle(scale)
    i, j = np.indices((rows, columns))
    index = ((i // 128) * -(-columns // 4) + j // 4) * 512 + (i % 32) * 16 + ((i % 128) // 32) * 4 + j % 4
    want = np.zeros(-(-rows // 128) * 128 * -(-columns // 4) * 4, np.uint8)
    want[index] = scale.numpy()
    assert np.array_equal(blob.numpy().ravel(), want)
    assert torch.equal(unswizzle(blob, rows, columns), scale)
