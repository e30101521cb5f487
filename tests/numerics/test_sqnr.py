"""Quality: QSNR on 1024x1024 samples of four distributions, within 0.1 dB of the published acceptance numbers."""

import functools

import numpy as np
import pytest
import torch

import microscale as ms

DISTRIBUTIONS = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "t5": lambda rng, n: rng.standard_t(5, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
}

# format, scale rule: dB on gaussian, laplace, t(5), uniform
NEAREST = {
    ("mxfp8", "floor"): (30.66, 30.00, 30.01, 26.24),
    ("mxfp8", "rceil"): (31.52, 31.55, 31.53, 32.52),
    ("mxfp8", "even"): (31.18, 30.86, 30.81, 30.77),
    ("mxfp8_e5m2", "floor"): (25.35, 25.20, 25.24, 24.33),
    ("mxfp8_e5m2", "rceil"): (25.53, 25.55, 25.58, 26.51),
    ("mxfp6", "floor"): (30.94, 30.29, 30.34, 31.26),
    ("mxfp6", "rceil"): (30.96, 30.25, 30.28, 32.18),
    ("mxfp4", "floor"): (18.80, 17.95, 18.00, 16.84),
    ("mxfp4", "rceil"): (18.76, 17.59, 17.56, 20.09),
    ("mxfp4", "ceil"): (16.82, 15.39, 15.38, 20.09),
    ("mxfp4", "even"): (19.04, 18.14, 18.17, 20.10),
    ("mxint8", "floor"): (41.67, 39.99, 40.06, 48.06),
    ("mxint8", "rceil"): (41.62, 39.91, 39.98, 45.97),
    ("mxint8", "ceil"): (35.65, 33.98, 34.04, 42.15),
    ("mxint4", "rceil"): (16.86, 14.92, 14.82, 18.10),
    ("nvfp4", None): (20.43, 20.66, 20.69, 19.86),
    ("nvfp4_4over6", None): (21.21, 21.19, 21.24, 21.19),
    ("nvfp4_4over6", "four_over_six_mae"): (21.08, 21.05, 21.13, 21.07),
    ("nvint4", None): (21.30, 19.79, 19.84, 23.58),
    ("nf4", None): (20.74, 19.69, 19.61, 20.79),
}
STOCHASTIC = {
    ("nvfp4", None): (17.26, 17.38, 17.41, 16.77),
    ("mxfp4", "rceil"): (15.67, 14.52, 14.51, 17.08),
}


@functools.cache
def sample(distribution):
    rng = np.random.default_rng(1234)
    return torch.from_numpy(DISTRIBUTIONS[distribution](rng, (1024, 1024)).astype(np.float32))


def qsnr(x, q):
    error = q.dequantize(torch.float32).double() - x.double()
    return 10 * torch.log10(x.double().square().sum() / error.square().sum()).item()


@pytest.mark.parametrize(("format", "rule"), NEAREST)
def test_nearest_even(format, rule):
    got = [qsnr(x, ms.quantize(x, format, scale_rule=rule)) for x in map(sample, DISTRIBUTIONS)]
    assert got == pytest.approx(NEAREST[format, rule], abs=0.1)


@pytest.mark.parametrize(("format", "rule"), STOCHASTIC)
def test_stochastic(format, rule):
    got = []
    for x in map(sample, DISTRIBUTIONS):
        generator = torch.Generator().manual_seed(0)
        got.append(qsnr(x, ms.quantize(x, format, scale_rule=rule, rounding="stochastic", generator=generator)))
    assert got == pytest.approx(STOCHASTIC[format, rule], abs=0.1)
