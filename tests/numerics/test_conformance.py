"""Every shipped format against the independent numpy model, bit for bit: codes, scales, outer scale and values.

MX blocks are independent of each other, so all input families are stacked into one tensor; a format with an outer
scale per tensor gets each family as a tensor of its own. A failure names the family of the first mismatch.
"""

import functools

import numpy as np
import pytest
import torch

import microscale as ms
from tests.oracles import specmodel
from tests.oracles.families import FAMILIES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MX = [name for name, spec in specmodel.FORMATS.items() if spec.scale == "e8m0"]
RULES = ["floor", "ceil", "rceil", "even"]
PER_TENSOR = [name for name, spec in specmodel.FORMATS.items() if spec.outer == "tensor"]
OTHERS = ["nvfp4_1level", "nvfp4_row", "fp4_ue5m3", "fp8_block128", "nf4"]
ROWS, COLS = 32, 256

bits = functools.partial(np.ascontiguousarray, dtype=np.float32)


def family(name, dtype, seed=0, shape=(ROWS, COLS)):
    """A family's values in `dtype`; only `nonfinite` may hold NaN and Inf, the others stay inside the dtype's range."""
    x = torch.from_numpy(FAMILIES[name](np.random.default_rng([seed, *name.encode()]), shape))
    if name != "nonfinite":
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


@functools.cache
def stacked(dtype):
    return torch.cat([family(name, dtype) for name in FAMILIES])


def first_difference(what, got, want, compared, x):
    """Message for the first coordinate where `compared` holds and the bits differ, or None."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    view = np.uint8 if got.dtype == np.uint8 else np.uint32
    wrong = (got.view(view) != want.view(view)) & compared
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = list(FAMILIES)[at[0] // ROWS] if x.ndim == 2 and len(x) == ROWS * len(FAMILIES) else ""
    return f"{what}: {wrong.sum()} of {wrong.size} differ, first at {at} {where}: {got[at]!r}, expected {want[at]!r}"


def assert_conforms(x, format, rule=None, block=None, tile=None):
    """Quantize `x` with the library and with the model; everything the specification determines must be equal."""
    fp32 = x.float().numpy()
    want = specmodel.quantize(fp32, format, rule, block, tile)
    if format.endswith("_mae"):
        format, rule = format.removesuffix("_mae"), "four_over_six_mae"
    q = ms.quantize(x, format, scale_rule=rule, block=block, scale_tile=tile)
    scales, values = q.scales().numpy(), q.dequantize(torch.float32).numpy()
    assert q.codes().dtype == torch.uint8
    assert q.scales().dtype == torch.float32
    assert np.array_equal(np.isnan(scales), np.isnan(want.scales)), "not the NaN scales expected"
    assert np.isnan(values[want.poisoned]).all(), "every value of a block with a NaN scale is NaN"
    healthy, healthy_scale = ~want.poisoned, ~np.isnan(want.scales)
    differences = [
        first_difference("scales", bits(scales), want.scales, healthy_scale, x),
        first_difference("codes", q.codes().numpy(), want.codes, healthy, x),
        first_difference("values", bits(values), want.values, healthy, x),
    ]
    assert (q.outer_scale is None) == (want.outer is None)
    if want.outer is not None:
        assert q.outer_scale.dtype == torch.float32
        differences.append(first_difference("outer", bits(q.outer_scale.numpy()), bits(want.outer), np.True_, x))
    assert not any(differences), "\n".join(filter(None, differences))


@pytest.mark.parametrize("block", [None, 16, 64], ids=["native", "16", "64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", MX)
def test_mx(format, rule, dtype, block):
    assert_conforms(stacked(DTYPES[dtype]), format, rule, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", OTHERS)
def test_mantissa_scales(format, dtype):
    assert_conforms(stacked(DTYPES[dtype]), format)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("format", ["nvfp4_1level", "nvfp4_row", "nvfp4", "nvfp4_4over6", "fp4_ue5m3"])
def test_other_blocks_with_mantissa_scales(format, block):
    assert_conforms(stacked(torch.float32), format, block=block)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", PER_TENSOR)
def test_two_level(format, dtype, name):
    for seed in range(4):
        assert_conforms(family(name, DTYPES[dtype], seed), format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", ["mxfp8", "mxfp4"])
def test_mx_32x32_tiles(format, rule, dtype):
    assert_conforms(stacked(DTYPES[dtype]), format, rule, tile=(32, 32))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["nvfp4", "nvint4", "nvfp4_4over6", "nvfp4_4over6_mae"])
def test_two_level_16x16_tiles(format, name):
    for dtype in DTYPES.values():
        assert_conforms(family(name, dtype), format, tile=(16, 16))


@pytest.mark.parametrize("format", ["nvfp4_4over6", "nvfp4_4over6_mae"])
def test_order_of_error_sums_over_a_tile(format):
    """Powers of two give candidates with almost equal errors, so that the order of the fp32 additions decides."""
    assert_conforms(family("powers_of_two", torch.float32, shape=(512, 512)), format, tile=(16, 16))


@pytest.mark.parametrize("shape", [(200,), (1,), (5, 40), (3, 2, 50), (2, 1, 3, 130), (7, 33)], ids=str)
@pytest.mark.parametrize("format", specmodel.FORMATS)
def test_ranks_and_ragged_k(format, shape):
    for name in ("normal", "near_element_max", "zero_rows", "nonfinite"):
        assert_conforms(family(name, torch.bfloat16, shape=shape), format, "rceil" if format in MX else None)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), (2, 0, 33)], ids=str)
@pytest.mark.parametrize("format", [f for f in specmodel.FORMATS if not f.endswith("_mae")])
def test_empty(format, shape):
    q = ms.quantize(torch.zeros(shape, dtype=torch.bfloat16), format)
    assert q.codes().shape == q.dequantize().shape == shape
    assert q.scales().shape == (*shape[:-1], -(-shape[-1] // specmodel.FORMATS[format].block))


@pytest.mark.parametrize("shape", [(40, 72), (5, 200), (3, 33, 50)], ids=str)
@pytest.mark.parametrize(
    ("format", "tile"), [("nvfp4", (16, 16)), ("nvfp4_4over6", (16, 16)), ("mxfp8", (32, 32)), ("mxfp4", (8, 64))]
)
def test_ragged_tiles(format, tile, shape):
    for name in ("normal", "near_element_max", "zero_rows", "nonfinite"):
        rule = "rceil" if format in MX else None
        assert_conforms(family(name, torch.float32, shape=shape), format, rule, tile=tile)


@pytest.mark.parametrize("format", specmodel.FORMATS)
def test_default_dequantize_rounds_once_to_the_input_dtype(format):
    rule, name = ("four_over_six_mae", "nvfp4_4over6") if format.endswith("_mae") else (None, format)
    for dtype in DTYPES.values():
        q = ms.quantize(family("laplace", dtype), name, scale_rule=rule)
        assert q.dequantize().dtype == dtype
        assert torch.equal(q.dequantize(), q.dequantize(torch.float32).to(dtype))


def test_default_mx_rule_is_rceil():
    x = family("near_element_max", torch.float32)
    for format in MX:
        default, rceil = ms.quantize(x, format), ms.quantize(x, format, scale_rule="rceil")
        assert torch.equal(default.codes(), rceil.codes())
        assert torch.equal(default.scales(), rceil.scales())


@pytest.mark.parametrize("format", specmodel.FORMATS)
def test_nonfinite_poisons_only_its_block(format):
    """One NaN or Inf turns its own block into NaN; every other value, and the outer scale, is as without it."""
    rule, name = ("four_over_six_mae", "nvfp4_4over6") if format.endswith("_mae") else (None, format)
    x = family("normal", torch.float32, shape=(4, 256))
    x[:, 0] = 10  # the amax of the tensor and of each row sits elsewhere
    clean = ms.quantize(x, name, scale_rule=rule)
    block = specmodel.FORMATS[format].block
    hit = torch.zeros(4, 256, dtype=torch.bool)
    hit[2, 130 // block * block : (130 // block + 1) * block] = True
    for bad in (np.nan, np.inf, -np.inf):
        x[2, 130] = bad
        values = ms.quantize(x, name, scale_rule=rule).dequantize(torch.float32)
        assert torch.equal(values.isnan(), hit)
        assert torch.equal(values[~hit], clean.dequantize(torch.float32)[~hit])
