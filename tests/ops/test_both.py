"""Both axes at once: what two calls of quantize give, whatever kernel runs."""

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.testing import assert_same_quantized

FORMATS = ms.list_formats()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(64, 128), (2, 32, 64), (7, 100), (0, 32)])
def test_equals_two_calls(fmt, shape, device):
    x = torch.randn(shape, device=device).bfloat16()
    for layout in ("strided", "swizzle_32_4_4"):
        rows, columns = ms.quantize_both(x, fmt, layout=layout)
        assert_same_quantized(rows, ms.quantize(x, fmt, layout=layout), "rows")
        assert_same_quantized(columns, ms.quantize(x, fmt, axis=-2, layout=layout), "columns")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ("nvfp4", {"hadamard": 16, "rounding": "stochastic"}),
        ("nvfp4", {"rounding": "stochastic"}),
        ("mxfp8", {"scale_rule": "floor"}),
        ("nvfp4", {"scale_tile": 16}),
    ],
)
def test_quantizers_of_their_own(rows, columns, device):
    """Rounding, Hadamard, rules and outer scales differ by axis; the columns draw with the next offset."""
    x = torch.randn(64, 96, device=device).bfloat16()
    spec, other = ms.find_quantizer(rows, rounding="stochastic"), ms.find_quantizer(rows, **columns)
    made = ms.quantize_both(x, spec, other, generator=(5, 8))
    assert_same_quantized(made[0], ms.quantize(x, spec, generator=(5, 8)), "rows")
    seed = (5, 9) if other.rounding == "stochastic" else None
    assert_same_quantized(made[1], ms.quantize(x, other, axis=-2, generator=seed), "columns")


def test_given_amax_and_different_formats(device):
    x = torch.randn(64, 96, device=device)
    rows, columns = ms.quantize_both(x, "nvfp4", "mxfp8", amax=3.0)
    assert_same_quantized(rows, ms.quantize(x, "nvfp4", amax=3.0), "rows")
    assert_same_quantized(columns, ms.quantize(x, "mxfp8", axis=-2), "columns")


def test_compiled_and_explained(device):
    x = torch.randn(64, 96, device=device)
    compiled = torch.compile(
        lambda t: ms.quantize_both(t, "nvfp4")[1].dequantize(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ms.quantize_both(x, "nvfp4")[1].dequantize())
    assert "quantize_both" in ms.explain("quantize_both", x, "nvfp4").chosen or device.type == "cuda"


def test_one_read_on_a_gpu_and_two_where_formats_differ():
    def chosen(other, **changes):
        spec = ms.find_quantizer("nvfp4", **changes)
        operand = dispatch.Operand((256, 1024), "bfloat16")
        problem = dispatch.Problem("quantize_both", (operand,), "cuda", (9, 0), spec, second=ms.find_quantizer(other))
        return dispatch.explain_problem(problem).chosen

    assert chosen("nvfp4") == "triton.quantize_both" and chosen("mxfp8") == "triton.quantize_twice"
    # Groups too long for the threads of a tile: it would leave rows out.
    assert chosen("nvfp4", hadamard=64) == "triton.quantize_both"
    assert chosen("nvfp4", hadamard=128) == "triton.quantize_twice"


def test_errors(device):
    with pytest.raises(InputError, match="rank 1"):
        ms.quantize_both(torch.randn(32, device=device), "mxfp8")
    with pytest.raises(InputError, match="seed"):
        ms.quantize_both(torch.randn(32, 32, device=device), ms.find_quantizer("nvfp4", rounding="stochastic"))
    with pytest.raises(InputError, match="multiple"):
        ms.quantize_both(torch.randn(24, 64, device=device), "mxfp8", ms.find_quantizer("mxfp8", hadamard=16))
