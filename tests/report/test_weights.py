"""The error of one weight: against hand-made tensors, and against a second computation for every format."""

import math

import numpy as np
import pytest
import torch

import microscale as ms
from microscale.nn.diagnostics import clipping_edges
from microscale.report import weights
from microscale.spec.element import ElementSpec


def measured(values: list[float], source: object, columns: int = 32, **changes: object) -> weights.Tally:
    row = torch.zeros(columns)
    row[: len(values)] = torch.tensor(values)
    return weights.measure(row[None], ms.find_quantizer(source, **changes))


# -- clipped and flushed, by hand --------------------------------------------------------------------------------------


def test_clipped_is_more_than_half_the_last_step_beyond_the_maximum():
    # amax 7.5 by the floor rule: scale 2**(2 - 2) = 1, so the element ends at 6 and its last step, 4 to 6, is 2
    tally = measured([7.5, 7.0, 6.9, -7.25, -7.0, 6.0], "mxfp4", scale_rule="floor")
    assert (tally.values, tally.nonzero) == (32, 6)
    assert tally.clipped == 2  # 7.5 and -7.25; 7 is exactly half a step out, where a next code would still tie


def test_a_rule_that_covers_the_maximum_clips_nothing():
    assert measured([7.5, 7.0, 6.9, -7.25, -7.0, 6.0], "mxfp4", scale_rule="rceil").clipped == 0


def test_the_scale_of_each_block_counts():
    row = torch.zeros(64)
    row[0], row[1], row[32] = 7.5, 7.2, 75.0  # scales 1 and 16: 75 lies within 7 * 16
    assert weights.measure(row[None], ms.find_quantizer("mxfp4", scale_rule="floor")).clipped == 2


def test_an_outer_scale_counts_too():
    # 448 * 6 is what the outer scale of 1 reaches; the block scale saturates at 448
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1] = 448 * 7.5, 448 * 6.9
    quantizer = ms.find_quantizer("nvfp4_1level")
    assert weights.measure(x, quantizer).clipped == 1
    assert weights.measure(x, ms.find_quantizer("nvfp4")).clipped == 0


def test_clipping_is_one_sided_where_the_element_is():
    wide = {
        "name": "x",
        "element": {"bits": 4, "symmetric": False},
        "block": 32,
        "scale": "e8m0",
        "scale_rule": "floor",
    }
    assert clipping_edges(ms.find_format(wide).element) == (-8.5, 7.5)
    # amax 7.9: scale 2**(2 - 2) = 1
    assert measured([7.9, -7.9, 7.4], wide).clipped == 1


@pytest.mark.parametrize(
    ("element", "edges"),
    [
        ("e2m1", (-7, 7)),
        ("e4m3", (-464, 464)),
        ("e5m2", (-61440, 61440)),
        ("e2m3", (-7.75, 7.75)),
        ("mxint8", (-127.5 / 64, 127.5 / 64)),
        ("int4", (-7.5, 7.5)),
        ({"exponent": 2, "mantissa": 1, "bias": 1, "max": 4.0}, (-4.5, 4.5)),
    ],
)
def test_edges_of_elements(element, edges):
    assert clipping_edges(ms.find_element(element)) == edges


def test_edges_of_a_codebook_follow_its_own_steps():
    element = ElementSpec(values=(-4.0, -1.0, 0.0, 2.0))
    assert clipping_edges(element) == (-5.5, 3.0)


def test_flushed_counts_nonzero_values_that_became_zero():
    # scale 1: 0.25 ties to the even code 0, 0.26 rounds to 0.5
    tally = measured([6.0, 0.25, -0.2, 0.26, 1e-30], "mxfp4")
    assert (tally.nonzero, tally.flushed) == (5, 3)
    assert tally.layer("x").flushed == 3 / 5


def test_a_zero_scale_flushes_and_does_not_clip():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 1e-6  # the second block's scale is far below the smallest e4m3
    tally = weights.measure(x, ms.find_quantizer("nvfp4"))
    assert (tally.flushed, tally.clipped) == (1, 0)


def test_an_all_zero_weight_has_no_error():
    tally = measured([], "nvfp4")
    assert tally.sqnr_db is None
    assert tally.layer("x") == weights.LayerError("x", 32, None, 0.0, 0.0)


def test_values_beside_a_nan_are_counted_as_lost_and_spoil_nothing_else():
    x = torch.randn(2, 64)
    x[0, 3] = math.nan
    tally = weights.measure(x, ms.find_quantizer("mxfp8"))
    rest = weights.measure(torch.cat([x[0, 32:], x[1]])[None], ms.find_quantizer("mxfp8"))
    assert tally.lost == 31
    assert tally.sqnr_db == pytest.approx(rest.sqnr_db)


# -- against a second computation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ms.list_formats())
@pytest.mark.parametrize("shape", [(64, 96), (5, 50), (2, 8, 40), (77,)])
def test_sqnr_and_flushed_of_every_format(name, shape):
    x = torch.randn(shape) * torch.exp(torch.randn(shape[-1]))
    tally = weights.measure(x, ms.find_quantizer(name))
    q = ms.quantize(x, name)
    a, b = x.numpy().astype(np.float64), ms.dequantize(q).numpy().astype(np.float64)
    assert tally.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-9)
    assert tally.flushed == int(((a != 0) & (b == 0)).sum())
    assert (tally.values, tally.stored_bytes, tally.lost) == (x.numel(), q.stored_bytes, 0)


@pytest.mark.parametrize("name", ms.list_formats())
@pytest.mark.parametrize("shape", [(40, 96), (3, 7, 40)])
def test_chunks_change_nothing(name, shape, monkeypatch):
    x = torch.randn(shape)
    whole = weights.measure(x, ms.find_quantizer(name))
    monkeypatch.setattr(weights, "CHUNK", 200)
    parts = [part.numel() for part, _ in weights._chunks(x, ms.quantize(x, name))]
    assert sum(parts) == x.numel() and max(parts) <= 200 and len(parts) > 5
    pieces = weights.measure(x, ms.find_quantizer(name))
    assert pieces.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)
    for field in ("values", "nonzero", "clipped", "flushed", "lost", "stored_bytes"):
        assert getattr(pieces, field) == getattr(whole, field)


def test_bfloat16_is_measured_against_itself():
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert weights.measure(x, ms.find_quantizer("mxfp8")) == weights.measure(x.float(), ms.find_quantizer("mxfp8"))


def test_a_hadamard_transform_is_orthogonal_and_is_no_error():
    x = torch.randn(16, 64)
    tally = weights.measure(x, ms.find_quantizer("mxfp8", hadamard=32))
    assert tally.sqnr_db == pytest.approx(31.5, abs=0.7)
    assert tally.signal == pytest.approx(float(x.double().square().sum()), rel=1e-5)


def test_stochastic_rounding_is_reproducible():
    x, quantizer = torch.randn(16, 64), ms.find_quantizer("nvfp4", rounding="stochastic")
    assert weights.measure(x, quantizer) == weights.measure(x, quantizer)
