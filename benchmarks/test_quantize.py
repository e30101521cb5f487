"""The quantize suite through pytest-benchmark: `pytest benchmarks --benchmark-only`.

The same calls as `microscale bench quantize`, timed by pytest-benchmark with a synchronising call. Committed results
come from the command, which also keeps the cache cold and replays CUDA graphs.
"""

import pytest
import torch

import microscale as ms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (16384, 8192) if DEVICE == "cuda" else (256, 1024)


def synchronised(call):
    """Return a call that ends when the device has."""

    def run():
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("fmt", ms.list_formats())
@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
def test_quantize(benchmark, fmt, layout):
    x = torch.randn(SHAPE, device=DEVICE).bfloat16()
    spec = ms.find_quantizer(fmt)
    with ms.use_backend("reference"):
        expected = ms.quantize(x, spec, layout=layout)
    q = benchmark(synchronised(lambda: ms.quantize(x, spec, layout=layout)))
    assert torch.equal(q.qdata, expected.qdata) and torch.equal(q.scale, expected.scale)


@pytest.mark.parametrize("fmt", ms.list_formats())
def test_dequantize(benchmark, fmt):
    q = ms.quantize(torch.randn(SHAPE, device=DEVICE).bfloat16(), fmt)
    with ms.use_backend("reference"):
        expected = q.dequantize()
    assert torch.equal(benchmark(synchronised(q.dequantize)), expected)
