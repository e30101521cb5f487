"""Published scale bytes, codes and corner cases as literals; the numpy model has to reproduce them too."""

import numpy as np
import pytest
import torch

import microscale as ms
from tests.oracles import specmodel

FORMATS = ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4"]
RULES = ["floor", "rceil", "ceil", "even"]

# E8M0 byte of a block whose only nonzero element is the amax: floor/rceil/ceil/even for e4m3, e5m2, e2m3, e3m2, e2m1
# (torchao, TransformerEngine). The last `even` row differs from torchao, which turns that finite block into NaN.
SCALE_BYTES = """
    1e-45         0/0/0/0          0/0/0/0          0/0/0/0          0/0/0/0          0/0/0/0
    0x1p-127      0/0/0/0          0/0/0/0          0/0/0/0          0/0/0/0          0/0/0/0
    0x1p-126      0/0/0/0          0/0/0/0          0/0/0/0          0/0/0/0          0/0/0/0
    0x1p-120      0/0/0/0          0/0/0/0          5/5/5/5          3/3/3/3          5/5/5/5
    1.0           119/119/119/119  112/112/112/112  125/125/125/125  123/123/123/123  125/125/125/125
    1.75          119/119/120/119  112/112/113/112  125/125/126/125  123/123/124/123  125/126/126/126
    1.96875       119/120/120/120  112/113/113/113  125/126/126/126  123/124/124/124  125/126/126/126
    6             121/121/122/121  114/114/115/114  127/127/128/127  125/125/126/125  127/127/128/127
    7             121/121/122/121  114/114/115/114  127/127/128/127  125/125/126/125  127/128/128/128
    7.5           121/122/122/121  114/115/115/115  127/127/128/127  125/126/126/126  127/128/128/128
    28            123/123/124/123  116/116/117/116  129/129/130/129  127/127/128/127  129/130/130/130
    448           127/127/128/127  120/120/121/120  133/133/134/133  131/131/132/131  133/134/134/134
    480           127/128/128/127  120/121/121/121  133/133/134/133  131/132/132/132  133/134/134/134
    496           127/128/128/128  120/121/121/121  133/134/134/134  131/132/132/132  133/134/134/134
    57344         134/134/135/134  127/127/128/127  140/140/141/140  138/138/139/138  140/141/141/141
    3.4e38        246/247/247/247  239/240/240/240  252/253/253/253  250/251/251/251  252/253/253/253
    15.9999990    122/123/123/123  115/116/116/116  128/129/129/129  126/127/127/127  128/129/129/129
"""
GOLDEN = [
    (float.fromhex(amax) if "x" in amax else float(amax), format, rule, int(byte))
    for amax, *columns in (line.split() for line in SCALE_BYTES.strip().splitlines())
    for format, column in zip(FORMATS, columns, strict=True)
    for rule, byte in zip(RULES, column.split("/"), strict=True)
]


def library(x, format, rule=None):
    q = ms.quantize(torch.tensor(x, dtype=torch.float32), format, scale_rule=rule)
    return q.codes().tolist(), q.scales().numpy()


def model(x, format, rule=None):
    q = specmodel.quantize(np.array(x, np.float32), format, rule or "rceil")
    return q.codes.tolist(), q.scales


def row(*values, length=16):
    return [*values, *[0.0] * (length - len(values))]


def nv_scale(byte):
    return specmodel.ELEMENTS["e4m3"].table()[byte]


@pytest.mark.parametrize("implementation", [library, model])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_mx_scale_bytes(format, rule, implementation):
    cases = [(amax, byte) for amax, f, r, byte in GOLDEN if (f, r) == (format, rule)]
    _, scales = implementation([row(amax, length=32) for amax, _ in cases], format, rule)
    want = np.ldexp(np.float32(1), np.array([byte for _, byte in cases]) - 127).astype(np.float32)
    np.testing.assert_array_equal(scales[:, 0], want)


@pytest.mark.parametrize("implementation", [library, model])
class TestMx:
    def test_floor_survives_fp32_log2(self, implementation):
        """log2 in fp32 of the value one ulp below 2^k is k: the classic off-by-one of `floor(log2(amax))`."""
        x = np.array([0x417FFFFF, 0x557FFFF0, 0x447FFFFF], np.int32).view(np.float32)
        _, scales = implementation([row(float(v), length=32) for v in x], "mxfp8", "floor")
        np.testing.assert_array_equal(scales[:, 0], [2.0 ** (3 - 8), 2.0 ** (43 - 8), 2.0 ** (9 - 8)])

    @pytest.mark.parametrize(("format", "top"), [("mxfp8", 448), ("mxfp4", 6), ("mxint8", 127 / 64), ("mxint4", 1.75)])
    def test_rceil_at_the_element_maximum(self, implementation, format, top):
        """max itself fits at scale 1; the next fp32 number does not."""
        above = float(np.nextafter(np.float32(top), np.float32(np.inf)))
        _, scales = implementation([row(top, length=32), row(above, length=32)], format, "rceil")
        assert scales.ravel().tolist() == [1.0, 2.0]

    def test_even_saturates_e4m3_below_its_threshold(self, implementation):
        """1.93 is under 1.9375: the scale stays, and 1.93 becomes 1.75."""
        codes, scales = implementation([row(1.93, length=32)], "mxfp8", "even")
        assert (codes[0][0], scales.item()) == (0x7E, 2.0**-8)

    def test_even_at_its_threshold(self, implementation):
        """The bump comes at 2 - 2^-(m+1): 1.9375 for e4m3, 1.75 for e2m1, 2 - 2^-7 for mxint8."""
        for format, threshold, emax in (("mxfp8", 1.9375, 8), ("mxfp4", 1.75, 2), ("mxint8", 2 - 2**-7, 0)):
            below = float(np.nextafter(np.float32(threshold), np.float32(0)))
            _, scales = implementation([row(below, length=32), row(threshold, length=32)], format, "even")
            assert scales.ravel().tolist() == [2.0**-emax, 2.0 ** (1 - emax)]

    def test_floor_saturates(self, implementation):
        """The worst case of e2m1: 7.99 -> 6."""
        codes, scales = implementation([row(7.99, -7.99, length=32)], "mxfp4", "floor")
        assert (codes[0][:3], scales.item()) == ([0x7, 0xF, 0x0], 1.0)

    def test_smallest_bf16_subnormal(self, implementation):
        """Byte 0 means 2^-127, not zero: 2^-133 becomes 2^-6 of it."""
        codes, scales = implementation([row(2.0**-133, length=32)], "mxfp8", "floor")
        assert (codes[0][0], scales.item()) == (0x08, 2.0**-127)

    def test_zero_block_keeps_signs(self, implementation):
        codes, scales = implementation([row(-0.0, length=32)], "mxfp4", "rceil")
        assert (codes[0][:2], scales.item()) == ([0x8, 0x0], 2.0**-127)

    def test_underflow_keeps_the_sign(self, implementation):
        for format, negative_zero in (("mxfp8", 0x80), ("mxfp6", 0x20), ("mxfp4", 0x8)):
            codes, _ = implementation([row(1.0, -1e-30, length=32)], format, "floor")
            assert codes[0][1] == negative_zero

    def test_integers_never_use_the_most_negative_code(self, implementation):
        codes, scales = implementation([row(-1.999, 1.999, length=32)], "mxint8", "floor")
        assert (codes[0][:2], scales.item()) == ([0x81, 0x7F], 1.0)


@pytest.mark.parametrize("implementation", [library, model])
class TestNvfp4:
    """One-level and two-level values worked out from TransformerEngine's formulas, and torchao's where they agree."""

    @pytest.mark.parametrize(
        ("values", "byte", "codes"),
        [
            ([6, 5, 4, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25], 0x38, [7, 6, 6, 6, 4, 4, 2, 2, 0]),  # every tie of e2m1
            ([-6, -5, -0.25, -0.0], 0x38, [15, 14, 8, 8]),
            ([4000.0], 0x7E, [7]),  # above 6 * 448
            ([0.046875], 0x04, [7]),  # a subnormal scale: torchao would clamp it to 0x08
            ([1e-3], 0x00, [7]),  # the scale underflows to zero: codes saturate, the value is 0
            ([0.0, -0.0], 0x00, [0, 8]),
        ],
    )
    def test_one_level(self, implementation, values, byte, codes):
        got, scales = implementation([row(*values)], "nvfp4_1level")
        assert (got[0][: len(codes)], scales.item()) == (codes, nv_scale(byte))

    @pytest.mark.parametrize(
        ("amax", "values", "byte", "codes"),
        [
            (2688.0, [1.0], 0x23, [7]),
            (2688.0, [0.0, -0.0], 0x00, [0, 8]),
            (1e-30, [1e-30], 0x7E, [7]),
            (2688.0, [1e-3, -1e-3], 0x00, [7, 15]),  # scale 0 in a tensor with an outlier: codes +-6, value 0
            (1e-42, [1e-42], 0x00, [0]),  # 2688 / amax overflows: capped at FLT_MAX
        ],
    )
    def test_two_level(self, implementation, amax, values, byte, codes):
        got, scales = implementation([row(amax), row(*values)], "nvfp4")
        assert (got[1][: len(codes)], scales[1, 0]) == (codes, nv_scale(byte))


def test_all_zero_tensor_is_zero_in_every_format():
    for format in specmodel.FORMATS:
        q = ms.quantize(torch.zeros(4, 256), format.removesuffix("_mae"))
        assert torch.equal(q.dequantize(), torch.zeros(4, 256)), format
        assert q.outer_scale is None or (q.outer_scale == 1).all(), format


def test_scale_255_makes_the_block_nan():
    for format in FORMATS:
        for rule in RULES:
            q = ms.quantize(torch.tensor([row(float("nan"), length=64)]), format, scale_rule=rule)
            assert q.scales().isnan().tolist() == [[True, False]]
            assert q.dequantize()[0, :32].isnan().all()
            assert (q.dequantize()[0, 32:] == 0).all()
