"""Every code of every shipped element, against ml_dtypes and gfloat; the numpy model is held to the same references."""

import functools

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
import torch

import microscale as ms
from tests.oracles import specmodel

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
GFLOAT = {
    "e4m3": gf.format_info_ocp_e4m3,
    "e5m2": gf.format_info_ocp_e5m2,
    "e2m3": gf.format_info_ocp_e2m3,
    "e3m2": gf.format_info_ocp_e3m2,
    "e2m1": gf.format_info_ocp_e2m1,
}
INTS = {"mxint8": (8, 6), "mxint4": (4, 2), "int8": (8, 0), "int4": (4, 0)}
MODEL = {**specmodel.ELEMENTS, "int8": specmodel.Int(8, 0)}
NAN_CODE = {"e4m3": 0x7F, "e5m2": 0x7F, "e2m3": 0x1F, "e3m2": 0x1F, "e2m1": 0x07, "ue5m3": 0xFF}


def library(x, element):
    return ms.encode(torch.from_numpy(x), element).numpy()


def model(x, element):
    return MODEL[element].encode(x)


@functools.cache
def inputs(element):
    """All bf16 and fp16 values, all midpoints and codes of the element with their fp32 neighbours, random bits."""
    rng = np.random.default_rng(7)
    with np.errstate(over="ignore"):
        bf16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
        fp16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
    grid = np.unique(MODEL[element].table()[np.isfinite(MODEL[element].table())])
    edges = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, grid * 2, grid[-1:] * 1.0625]).astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    random = rng.integers(0, 1 << 32, 300_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    mid_range = (rng.standard_normal(100_000) * grid[-1] / 2).astype(np.float32)
    return np.concatenate([bf16, fp16, near, random, mid_range])


def assert_codes(got, want, x):
    wrong = np.flatnonzero(got != want)
    assert not len(wrong), f"{len(wrong)} wrong, first x={x[wrong[0]]!r}: {got[wrong[0]]:#x}, not {want[wrong[0]]:#x}"


def test_every_shipped_element_has_a_reference_here():
    from microscale.spec.registry import list_elements

    assert set(list_elements()) == {*ML_DTYPES, *INTS, "ue5m3", "nf4", "e8m0", "fp32", "bf16"}


# ------------------------------------------------------------------------------------------------------ decode
@pytest.mark.parametrize("element", ML_DTYPES)
def test_decode_floats(element):
    got = ms.decode_table(element).numpy()
    bits = MODEL[element].bits
    want = np.arange(1 << bits, dtype=np.uint8).view(ML_DTYPES[element]).astype(np.float32)
    assert got.dtype == np.float32
    for other in (want, gfloat.decode_ndarray(GFLOAT[element], np.arange(1 << bits)), MODEL[element].table()):
        np.testing.assert_array_equal(got, other.astype(np.float32))
        assert np.array_equal(np.signbit(got) & ~np.isnan(got), np.signbit(other) & ~np.isnan(got))


def test_decode_e8m0():
    got = ms.decode_table("e8m0").numpy()
    code = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(got, code.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    np.testing.assert_array_equal(got, gfloat.decode_ndarray(gf.format_info_ocp_e8m0, code).astype(np.float32))


def test_decode_ue5m3_is_half_of_a_signed_e5m3():
    """No library has it: checked against fp16, whose exponent field has the same width and bias."""
    got = ms.decode_table("ue5m3").numpy()
    code = np.arange(248, dtype=np.uint16)  # below exponent field 31, which fp16 keeps for Inf and NaN
    np.testing.assert_array_equal(got[:248], (code << 7).view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(got[248:255], 65536.0 * np.arange(8, 15) / 8)
    assert got[254] == 114688
    assert np.isnan(got[255])


@pytest.mark.parametrize("element", INTS)
def test_decode_ints(element):
    bits, fraction = INTS[element]
    native = {8: np.int8, 4: ml_dtypes.int4}[bits]
    want = np.arange(1 << bits, dtype=np.uint8).view(native).astype(np.float32) / 2**fraction
    np.testing.assert_array_equal(ms.decode_table(element).numpy(), want)
    if element == "mxint8":
        np.testing.assert_array_equal(want, gfloat.decode_ndarray(gf.format_info_ocp_int8, np.arange(256)))


def test_decode_nf4():
    np.testing.assert_array_equal(ms.decode_table("nf4").numpy(), np.array(specmodel.NF4, np.float32))


# ------------------------------------------------------------------------------------------------------ encode
@pytest.mark.parametrize("encode", [library, model])
@pytest.mark.parametrize("element", ML_DTYPES)
def test_encode_floats(element, encode):
    x = inputs(element)
    top = np.float32(MODEL[element].max)
    clipped = np.clip(np.where(np.isnan(x), 0, x), -top, top)  # +-Inf saturate to +-max
    want = clipped.astype(ML_DTYPES[element]).view(np.uint8)
    want = np.where(np.isnan(x), NAN_CODE[element], want)  # the NaN code, or +max where there is none; no sign
    assert_codes(encode(x, element), want, x)


@pytest.mark.parametrize("encode", [library, model])
@pytest.mark.parametrize("element", GFLOAT)
def test_encode_floats_gfloat(element, encode):
    x = inputs(element)
    x = x[~np.isnan(x)]
    info = GFLOAT[element]
    rounded = gfloat.round_ndarray(info, x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    assert_codes(encode(x, element), gfloat.encode_ndarray(info, rounded).astype(np.uint8), x)


@pytest.mark.parametrize("encode", [library, model])
@pytest.mark.parametrize("element", INTS)
def test_encode_ints(element, encode):
    bits, fraction = INTS[element]
    x = inputs(element)
    top = 2 ** (bits - 1) - 1
    want = np.clip(np.rint(np.where(np.isnan(x), np.inf, x).astype(np.float64) * 2**fraction), -top, top)
    assert_codes(encode(x, element), want.astype(np.int8).view(np.uint8) & ((1 << bits) - 1), x)


@pytest.mark.parametrize("element", ["ue5m3", "nf4"])
def test_encode_like_the_model(element):
    x = inputs(element)
    if element == "ue5m3":
        x = np.abs(x)  # an unsigned element only ever sees scales
    assert_codes(library(x, element), model(x, element), x)


def test_encode_e8m0_powers_of_two():
    x = np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32)
    np.testing.assert_array_equal(library(x, "e8m0"), np.arange(255))
    np.testing.assert_array_equal(library(np.array([np.nan], np.float32), "e8m0"), [255])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("element", [*ML_DTYPES, *INTS, "nf4"])
def test_encode_low_precision_input_is_upcast_exactly(element, dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(ms.encode(x, element), ms.encode(x.float(), element))


@pytest.mark.parametrize("element", [*ML_DTYPES, *INTS, "ue5m3", "nf4", "e8m0"])
def test_every_finite_code_survives_a_round_trip(element):
    table = ms.decode_table(element).clone()
    code = torch.arange(len(table), dtype=torch.uint8)
    if element in INTS:
        unused = len(table) // 2  # the most negative integer
        table[unused], code[unused] = table[unused + 1], unused + 1
    keep = table.isfinite()
    assert torch.equal(ms.encode(table[keep], element), code[keep])


def test_decode_table_is_the_callers_own():
    ms.decode_table("e2m1").fill_(7)
    assert ms.decode_table("e2m1")[:3].tolist() == [0, 0.5, 1]
    assert ms.quantize(torch.ones(32), "mxfp4").dequantize().tolist() == [1] * 32


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5)], ids=str)
def test_encode_keeps_the_shape(shape):
    assert ms.encode(torch.zeros(shape), "e2m1").shape == shape
