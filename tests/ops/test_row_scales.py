"""One FP32 scale per row, from end to end: quantize, every door, products, and how kernels get such operands."""

import dataclasses

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError, UnsupportedOpError
from microscale.kernels.reference.matmul import Parts
from microscale.nn.layers import QuantizedLinear
from microscale.ops import late, library
from microscale.spec.powers import ONE
from microscale.testing import assert_same_bits, assert_same_quantized

SPEC = ms.find_quantizer("fp8_row")


def expected(x):
    """Codes and scales by torch alone: amax / 448 a row, elements rounded by torch's own conversion.

    On the CPU: on a GPU torch multiplies by a reciprocal where a number divides.
    """
    x = x.cpu()
    amax = x.float().abs().amax(-1, keepdim=True)
    scale = (amax / 448).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() * (1 / scale)).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 100), (1, 33), (7, 1), (4096,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_those_of_fp8_per_token(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype) * 3
    q = ms.quantize(x, "fp8_row")
    codes, scale = expected(x)
    assert_same_bits(q.qdata.cpu(), codes.view(torch.uint8))
    assert_same_bits(q.scale.cpu(), scale)
    assert q.scale.shape == (*shape[:-1], 1) and q.format.block == shape[-1] and q.shape == shape


def test_zero_nan_and_infinite_rows(device):
    x = torch.randn(5, 40, device=device)
    x[1], x[2, 3], x[3, 7] = 0, torch.nan, torch.inf
    y = ms.quantize(x, "fp8_row").dequantize()
    assert not y[1].any() and y[2:4].isnan().all() and y[[0, 4]].isfinite().all()


def test_every_door_gives_the_same(device):
    x, w = torch.randn(6, 72, device=device), torch.rand(72, device=device)
    q = ms.quantize(x, "fp8_row")
    assert_same_quantized(ms.quantize(x, SPEC), q)
    assert_same_quantized(ms.quantize(x, "fp8_block128", block="row"), q)
    rows, columns = ms.quantize_both(x, "fp8_row")
    assert_same_quantized(rows, q)
    assert_same_quantized(columns, ms.quantize(x, "fp8_row", axis=0))
    assert columns.format.block == 6 and columns.scale.shape == (1, 72)
    assert_same_quantized(ms.silu_mul_quantize(x, x, "fp8_row", axis=0), ms.silu_mul_quantize(x.t(), x.t(), SPEC).t())
    made = ms.rms_norm_quantize(x, w, 1e-5, "fp8_row")
    assert made.format is q.format and made.scale.shape == (6, 1)
    assert ms.explain("quantize", x, "fp8_row").problem == "quantize(fp32[6, 72], fp8_row[block=72])"


def test_swizzled_scales_are_the_same_tensor():
    x = torch.randn(130, 40)
    q = ms.quantize(x, "fp8_row", layout="swizzle_32_4_4")
    assert_same_quantized(q, ms.quantize(x, "fp8_row"))
    w = torch.randn(40, 8)
    assert_same_bits(ms.matmul(q, ms.quantize(w.t(), "mxfp4").t()).isfinite().all(), torch.tensor(True))


def test_rows_are_not_cut_and_may_be_joined():
    q = ms.quantize(torch.randn(4, 64), "fp8_row")
    assert_same_bits(q[1:3].dequantize(), q.dequantize()[1:3])
    with pytest.raises(UnsupportedOpError, match="block boundaries") as caught:
        q[:, :32]
    assert "multiples of 64" in caught.value.hint
    both = torch.cat([q, q], 1)  # rows of two blocks then
    assert both.shape == (4, 128) and both.format.block == 64
    assert_same_bits(both.dequantize(), torch.cat([q.dequantize()] * 2, 1))
    with pytest.raises(UnsupportedOpError, match="requantize"):
        torch.cat([q, ms.quantize(torch.randn(4, 32), "fp8_row")], 1)


def test_saved_and_loaded(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 32))
    quantizers = {"w": {"format": "fp8_row"}}
    rules = [{"match": "*", "fprop": {"weight": "w"}}]
    ms.quantize_(model, {"name": "fp8", "quantizers": quantizers, "rules": rules})
    assert [m.weight.format.block for m in model] == [48, 64]
    ms.save(model, tmp_path / "out", dialect="microscale")
    other = ms.load(tmp_path / "out", model)
    for one, two in zip(model, other, strict=True):
        assert_same_quantized(two.weight, one.weight)


# -- how kernels get them ----------------------------------------------------------------------------------------------


def given(monkeypatch):
    """What the reference is called with."""
    seen = []
    entry = next(k for k in dispatch.kernels("matmul") if k.name == "reference.matmul")

    def run(*args):
        seen.append(args)
        return entry.run(*args)

    monkeypatch.setattr(dispatch, "_kernels", {**dispatch._kernels, "matmul": [dataclasses.replace(entry, run=run)]})
    monkeypatch.setattr(dispatch, "_cache", {})
    return seen


def test_the_scale_of_a_row_multiplies_the_sums(monkeypatch):
    """Codes under powers of two, an FP32 outer scale of rows, whichever operand and rank it is."""
    seen = given(monkeypatch)
    x, w = torch.randn(2, 5, 48), torch.randn(16, 48)
    a, b = ms.quantize(x, "fp8_row"), ms.quantize(w, "fp8_row")
    got = ms.matmul(a, b.t())
    first, second = seen[-1][:2]
    for part, q, axis in ((first, a, -1), (second, b.t(), -2)):
        assert isinstance(part, Parts) and part.axis == axis and part.format.name == "fp8_row[block=48]"
        assert part.format.scale.exponent_only and bool((part.scale == ONE).all())
        assert_same_bits(part.outer_scale, q.scale)
        torch.testing.assert_close(part.dequantize(torch.float32), q.dequantize(), rtol=1e-6, atol=0)
    exact = a.dequantize().double() @ b.dequantize().double().t()
    size = a.dequantize().double().abs() @ b.dequantize().double().abs().t()
    assert bool(((got.double() - exact).abs() <= (1.25 * 48 + 8) * 2.0**-23 * size).all())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4_row", "fp8_block128"])
def test_other_operands_go_as_they_are(monkeypatch, name):
    seen = given(monkeypatch)
    q = ms.quantize(torch.randn(16, 256), name)
    ms.matmul(torch.randn(3, 256), q.t())
    assert seen[-1][1].format is q.format and seen[-1][1].scale.dtype == q.scale.dtype
    along = ms.quantize(torch.randn(16, 48), "fp8_row", axis=0)  # its rows are not what is contracted
    ms.matmul(torch.randn(3, 48), along.t())
    assert seen[-1][1].outer_scale is None


def test_descriptions_agree(monkeypatch):
    """`explain`, the direct way and the op describe one problem; M = 1 has a scalar."""
    for m in (1, 7):
        a, b = ms.quantize(torch.randn(m, 64), "fp8_row"), ms.quantize(torch.randn(32, 64), "mxfp4")
        problems = []
        monkeypatch.setattr(dispatch, "explain_problem", problems.append)
        ms.explain("matmul", a, b)
        first = late.late(Parts(a.qdata, a.scale, None, a.format, -1, 64, "strided"), -1)
        second = Parts(b.qdata.t(), b.scale.t(), None, b.format, -2, 64, "strided")
        made = library.product_problem("matmul", first, second, None, torch.float32)
        assert problems[0].key() == made.key() and str(problems[0]) == str(made)
        assert made.operands[0].outer == ("scalar" if m == 1 else "vector")


def test_one_block_of_three_thousand_is_no_two(monkeypatch):
    """Rows of 3000 and of 3016 in blocks of 3000 have one shape class, and not one kernel."""
    one = late.describe((8, 3000), SPEC.for_row(3000).format, -1, -1, "strided", None)
    two = late.describe((8, 3016), SPEC.for_row(3000).format, -1, -1, "strided", None)
    assert one.shape_class() == two.shape_class() and one.one_block and not two.one_block
    assert two.outer is None and two.format.scale.torch_dtype == "float32"


def test_grouped_and_reference_products():
    x, w = torch.randn(6, 64), torch.randn(3, 16, 64)
    a, b = ms.quantize(x, "fp8_row"), ms.quantize(w, "mxfp4")
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    got = ms.grouped_matmul(a, b.mT, ends)
    plain = [a.dequantize()[i] @ b.dequantize()[g].t() for i, g in ((0, 0), (1, 0), (2, 2), (3, 2), (4, 2))]
    torch.testing.assert_close(got[:5], torch.stack(plain), rtol=1e-5, atol=1e-5)
    assert not got[5].any()


# -- prepared weights --------------------------------------------------------------------------------------------------


def test_a_prepared_weight_gives_what_the_plain_one_gives(monkeypatch):
    """In both orders of dimensions, by every operation; kernels get its scales as an outer one."""
    q = ms.quantize(torch.randn(128, 256).bfloat16(), "fp8_row")
    made = ms.prepare(q)
    assert made.scale_layout == "fragments" and made.scale.dtype == torch.float32
    for m in (1, 33):
        x, y = torch.randn(m, 256).bfloat16(), torch.randn(m, 128).bfloat16()
        assert_same_bits(torch.nn.functional.linear(x, made), torch.nn.functional.linear(x, q))
        assert_same_bits(ms.matmul(y, made), ms.matmul(y, q))
    assert_same_bits(torch.cat([made, made]).dequantize(), torch.cat([q, q]).dequantize())
    seen = given(monkeypatch)
    torch.nn.functional.linear(x, made)
    part = seen[-1][1]
    assert part.layout == "fragments" and bool((part.scale == ONE).all()) and part.scale.shape == (1, 128)
    assert_same_bits(part.outer_scale, q.scale.t())


@pytest.mark.parametrize(("rows", "wanted"), [(1, "fragments"), (64, "fragments_wide"), (300, "fragments_wide")])
def test_few_rows_read_it_in_its_own_bits(rows, wanted):
    fmt = SPEC.for_row(4096).format
    b = late.describe((4096, 8192), fmt, -2, -2, "fragments", None)
    left = dispatch.Operand((rows, 4096), "bfloat16")
    problem = dispatch.Problem("matmul", (left, b), "cuda", (9, 0), None, "bfloat16")
    assert dispatch.explain_problem(problem).chosen == f"triton.matmul_{wanted}"
    scaled = late.describe((rows, 4096), fmt, -1, -1, "strided", None)
    problem = dispatch.Problem("matmul", (scaled, b), "cuda", (9, 0), None, "bfloat16")
    assert dispatch.explain_problem(problem).chosen.startswith("triton.matmul_fragments_scaled")


def test_fp8_tensor_cores_take_rows_as_they_lie(monkeypatch):
    """So for quantized activations a weight of rows stays in the plain layout."""
    w, fmt = torch.randn(128, 256).bfloat16(), ms.find_format("fp8_row")
    integers = fmt.variant(element=ms.find_format("mxint8").element)  # which FP8 tensor cores do not take
    for capability, wanted in (((9, 0), "strided"), ((8, 9), "strided"), ((8, 0), "fragments")):
        monkeypatch.setattr(library, "capability", lambda device, found=capability: found)
        for source, layout in ((fmt, wanted), (integers, "fragments"), ("mxfp8", "fragments")):
            q = ms.quantize(w, source)
            made = ms.prepare(q, quantized_activations=True)
            assert made.scale_layout == layout
            assert_same_bits(made.dequantize(), q.dequantize())


def test_ones_of_a_capture_are_not_kept(monkeypatch):
    """Memory that a graph's capture gave out may be written by its replays."""
    monkeypatch.setattr(late, "_ones", {})
    kept = late._one(torch.device("cpu"))
    assert late._one(torch.device("cpu")) is kept and int(kept) == ONE


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_a_model_by_the_recipe():
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32)).bfloat16()
    plain = [m.weight.detach().clone() for m in (model[0], model[2])]
    made = ms.quantize_(model, "mxfp4_fp8")
    assert len(made.quantized) == 2 and isinstance(model[0], QuantizedLinear)
    for layer, w in zip((model[0], model[2]), plain, strict=True):
        assert_same_quantized(layer.weight, ms.quantize(w, "mxfp4"))
    x = torch.randn(5, 64).bfloat16()
    a = ms.quantize(x, "fp8_row")
    assert_same_bits(model[0](x), ms.matmul(a, model[0].weight.t(), model[0].bias, torch.bfloat16))
    assert model(x).shape == (5, 32)
    torch.compiler.reset()
    assert_same_bits(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_a_row_too_long_names_the_way_out():
    with pytest.raises(InputError, match="65537"):
        ms.quantize(torch.zeros(1, 65537), "fp8_row")


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [64, 100, 4096, 5120, 28672, 40001])
def test_a_gpu_gives_the_same_bytes(columns):
    x = (torch.randn(33, columns) * torch.exp(2 * torch.randn(33, 1))).bfloat16()
    x[3, 1], x[4] = torch.nan, 0
    on_gpu, on_cpu = ms.quantize(x.cuda(), "fp8_row"), ms.quantize(x, "fp8_row")
    assert ms.explain("quantize", x.cuda(), "fp8_row").chosen == "triton.quantize"
    assert_same_quantized(on_gpu.to("cpu"), on_cpu)
    assert_same_bits(on_gpu.dequantize().cpu(), on_cpu.dequantize())
