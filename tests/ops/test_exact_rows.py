"""`meta.exact_rows`: found once, kept with the bytes it was found of, and obeyed by the dispatcher."""

import copy
import dataclasses
import importlib
import io

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.kernels.reference import align_rows
from microscale.numerics import packing
from microscale.ops import library
from microscale.ops.prepare import noted
from microscale.testing import assert_same_quantized

prepare_module = importlib.import_module("microscale.ops.prepare")  # beside a function of the same name
SPANS = {"mxfp4": 14, "mxfp6": 11, "mxfp6_e3m2": 9}
HOPPER = (9, 0)


def weight(fmt, span, rows=8, blocks=4):
    """A weight whose third row has blocks `span` powers of two apart, all others equal ones."""
    block = ms.find_format(fmt).block
    q = ms.quantize(torch.randn(rows, blocks * block), fmt)
    scale = torch.full_like(q.scale, 120)
    scale[2, 1] = 120 + span
    return q.replace(scale=scale)


def lossless(q):
    codes, row = align_rows.align_rows(q.qdata, q.scale, q.format, q.shape[1], "strided")
    return torch.equal((codes.float() * row)[:, : q.shape[1]], q.dequantize(torch.float32))


@pytest.mark.parametrize("fmt", SPANS)
def test_exactly_while_exponents_span_so_much(fmt):
    """Every span: the note is what re-encoding shows, for weights that have all codes in all blocks."""
    block = ms.find_format(fmt).block
    for span in (0, 1, SPANS[fmt] - 1, SPANS[fmt], SPANS[fmt] + 1, 40):
        q = weight(fmt, span)
        width = q.format.element.width
        every = torch.arange(2**width, dtype=torch.uint8).repeat(-(-4 * block * 8 // 2**width))[: 4 * block * 8]
        q = q.replace(qdata=packing.pack(every.view(8, -1), width))
        assert noted(q).meta.exact_rows is (span <= SPANS[fmt]) is lossless(q), span
        assert_same_quantized(noted(q), q)


def test_what_does_not_count():
    """Blocks of zeros and NaN blocks; both signs of zero."""
    for code in (0x00, 0x88):
        q = weight("mxfp4", 0)
        q.scale[1, 0], q.qdata[1, :16] = 0, code
        assert noted(q).meta.exact_rows is True and lossless(q)
        q.qdata[1, 3] = 1
        assert noted(q).meta.exact_rows is False
    q = weight("mxfp4", 0)
    q.scale[4, 2] = 255
    assert noted(q).meta.exact_rows is True
    assert noted(ms.quantize(torch.zeros(4, 64), "mxfp4")).meta.exact_rows is True
    assert noted(ms.quantize(torch.zeros(0, 64), "mxfp4")).meta.exact_rows is True


def test_ends_of_the_range_of_scales():
    """Where the row's own power of two would leave FP32's normal numbers."""
    q = weight("mxfp4", 0)
    for least, most in ((0, 0), (0, 14), (0, 15), (239, 254), (240, 254), (254, 254)):
        scale = torch.full_like(q.scale, most)
        scale[:, 1] = least
        made = q.replace(scale=scale, qdata=torch.full_like(q.qdata, 0x17))
        assert noted(made).meta.exact_rows is (most - least <= 14) is lossless(made)


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp8_e5m2", "nvfp4", "mxint8", "nf4", "fp8_row", "fp8_block128"])
def test_other_formats_have_no_such_question(fmt):
    q = ms.quantize(torch.randn(64, 128), fmt)
    assert noted(q) is q and ms.prepare(q, quantized_activations=True) is q


def test_layouts_and_axes():
    for layout in ("strided", "swizzle_32_4_4"):
        q = weight("mxfp4", 15).to_layout(layout)
        made = ms.prepare(q, quantized_activations=True)
        assert made.meta.exact_rows is False and made.scale_layout == layout
        assert noted(q.t()).meta.exact_rows is False and noted(q.t()).block_axis == -2
    q = ms.quantize(torch.randn(64, 128), "mxfp4")
    made = ms.prepare(ms.prepare(q), quantized_activations=True)
    assert made.scale_layout == "strided" and made.meta.exact_rows is True
    assert_same_quantized(made, q)


# -- where prepared weights are multiplied -----------------------------------------------------------------------------


@pytest.fixture
def on_hopper(monkeypatch):
    """Weights here count as those of a GPU whose kernels take them prepared."""
    monkeypatch.setattr(prepare_module.library, "capability", lambda device: (9, 0))


def test_which_devices(monkeypatch):
    """Blackwell takes scales itself, so weights stay as they are there; so they do on the CPU."""
    for capability, there in (((7, 5), False), ((8, 0), True), ((8, 9), True), (HOPPER, True), ((10, 0), False),
                              ((12, 0), False), (None, False)):  # fmt: skip
        monkeypatch.setattr(library, "capability", lambda device, found=capability: found)
        assert prepare_module.decodes_on(torch.device("cuda")) is there
        q = ms.quantize(torch.randn(64, 128), "mxfp4")
        made = ms.prepare(q, quantized_activations=True)
        assert (made.scale_layout, made.meta.exact_rows) == ("fragments" if there else "strided", True)


def test_both_at_once(on_hopper):
    """Reordered and looked at, from every layout, once; what is noted is of the values, not of the order."""
    for span in (3, 20):
        q = weight("mxfp4", span, rows=64)
        q = q.replace(scale=q.scale - 20)  # all of it among what bfloat16 holds
        for given in (q, q.to_layout("swizzle_32_4_4"), ms.prepare(q), noted(q)):
            made = ms.prepare(given, quantized_activations=True)
            assert made.scale_layout == "fragments" and made.meta.exact_rows is (span <= 14)
            assert_same_quantized(made, q)
            assert ms.prepare(made, quantized_activations=True) is made and ms.prepare(made) is made
            plain = made.to_layout("strided")
            assert plain.meta.exact_rows is (span <= 14) and torch.equal(plain.qdata, q.qdata)
            assert made.t().meta.exact_rows is (span <= 14)
    for fmt in ("mxfp8", "nvfp4", "mxint8"):
        made = ms.prepare(ms.quantize(torch.randn(64, 128), fmt), quantized_activations=True)
        assert made.scale_layout == "fragments" and made.meta.exact_rows is None


def test_what_has_no_such_order_stays(on_hopper):
    """Nothing is refused: sizes, formats, values and blocks along N that the layout is not for."""
    for q in (
        weight("mxfp4", 3), ms.quantize(torch.randn(64, 128), "nf4"), ms.quantize(torch.randn(64, 128), "fp8_row"),
        ms.quantize(torch.full((64, 64), torch.nan), "mxfp4"), weight("mxfp4", 3, rows=64).t(),
    ):  # fmt: skip
        made = ms.prepare(q, quantized_activations=True)
        assert made.scale_layout == "strided" and made.meta.exact_rows == noted(q).meta.exact_rows
        assert_same_quantized(made, q)


def test_it_is_saved_in_the_plain_layout(on_hopper, tmp_path):
    """Models: what is said of each layer; the checkpoint has the plain bytes, and the note."""
    layer = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 100))
    ms.quantize_(layer, "mxfp4_fp8")
    plain, x = layer[0].weight.detach().clone(), torch.randn(3, 128)
    with torch.no_grad():
        first = layer[0](x)
    assert ms.prepare_(layer) == {"0": "fragments, rows exact in E4M3", "1": "strided, rows exact in E4M3"}
    assert torch.equal(layer[0](x), first)
    ms.save(layer, tmp_path / "out", dialect="microscale")
    found = ms.load(tmp_path / "out", layer)[0].weight
    assert found.scale_layout == "strided" and found.meta.exact_rows is True
    assert torch.equal(found.qdata, plain.qdata) and torch.equal(found.scale, plain.scale)


# -- it stays with the bytes -------------------------------------------------------------------------------------------


def test_views_and_copies_keep_it():
    q = noted(weight("mxfp4", 3))
    for made in (
        q.t(), q.t().t(), q[1:], q[:, :64], q.clone(), q.detach(), q[torch.tensor([2, 1])], q.unsqueeze(0),
        q.unflatten(1, (2, 64)), torch.cat([q, q]), torch.stack([q, q]), copy.deepcopy(q), q.as_dtype(torch.bfloat16),
        q.to_layout("swizzle_32_4_4"), q.expand(2, 8, 128), torch.nn.Parameter(q, requires_grad=False).data,
    ):  # fmt: skip
        assert made.meta.exact_rows is True


def test_rows_that_join_lose_it():
    q, other = noted(weight("mxfp4", 3)), weight("mxfp4", 3)
    assert torch.cat([q, q], 1).meta.exact_rows is None and q.reshape(4, 256).meta.exact_rows is None
    assert torch.cat([q, other]).meta.exact_rows is None
    wide = noted(weight("mxfp4", 20))
    assert torch.cat([q, wide]).meta.exact_rows is False and wide[:2].meta.exact_rows is False


def test_bytes_that_are_written_bring_their_own():
    target, source = noted(weight("mxfp4", 3)), weight("mxfp4", 20)
    for found in (source, noted(source), noted(weight("mxfp4", 3))):
        target.copy_(found)
        assert target.meta.exact_rows is found.meta.exact_rows
        assert_same_quantized(target, found)


def test_pickles_and_checkpoints(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(128, 64))
    ms.quantize_(layer, "mxfp4_weight_only")
    layer[0].weight = torch.nn.Parameter(noted(layer[0].weight), requires_grad=False)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["0.weight"].meta.exact_rows is True
    ms.save(layer, tmp_path / "out", dialect="microscale")
    assert ms.load(tmp_path / "out", layer)[0].weight.meta.exact_rows is True
    plain = ms.quantize(torch.randn(4, 64), "mxfp4").meta
    assert type(plain).unpack(plain.pack()) == plain and ":" not in plain.pack().split("|")[1]


# -- who asks ----------------------------------------------------------------------------------------------------------


def chosen(a, w, capability=HOPPER):
    first, second = ms.quantize(torch.randn(32, w.shape[1]), a), w
    problem = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "explain_problem", problem.append)
        ms.explain("matmul", first, second, torch.bfloat16)
    return dispatch.explain_problem(dataclasses.replace(problem[0], device="cuda", capability=capability))


@pytest.mark.parametrize("activations", ["mxfp8", "fp8_row"])
def test_the_dispatcher_obeys(activations):
    """Exact or not looked at: FP8 tensor cores. Not exact: bfloat16, with the reason."""
    for span, asked, kernel in ((3, True, "rows_e4m3"), (20, False, "rows_e4m3"), (20, True, "two_pass")):
        q = weight("mxfp4", span, rows=32)
        found = chosen(activations, noted(q) if asked else q)
        assert found.chosen == f"cublas.{kernel}", (span, asked)
    reason = next(r.reason for r in found.refused if r.kernel == "cublas.rows_e4m3")
    assert "`prepare` found" in reason


def test_a_product_takes_the_note_along(monkeypatch):
    seen = []
    entry = next(k for k in dispatch.kernels("matmul") if k.name == "reference.matmul")

    def run(*args):
        seen.append(args[1].exact_rows)
        return entry.run(*args)

    monkeypatch.setattr(dispatch, "_kernels", {**dispatch._kernels, "matmul": [dataclasses.replace(entry, run=run)]})
    x, q = torch.randn(3, 128), noted(weight("mxfp4", 20))
    torch.nn.functional.linear(x, q)
    ms.matmul(x, q.t())
    torch.compile(lambda t: ms.matmul(t, q.t()), fullgraph=True, backend="aot_eager")(x)
    x.requires_grad_()
    ms.linear(x, q)
    assert set(seen) == {False} and len(seen) >= 4


def test_models_are_prepared_for_what_they_take():
    def model():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 64))

    by = {}
    for recipe in ("mxfp4_weight_only", "mxfp4_fp8", "mxfp8_dynamic", "nvfp4_dynamic"):
        made = model()
        ms.quantize_(made, recipe)
        by[recipe] = (ms.prepare_(made)["0"], made[0].weight.meta.exact_rows)
    assert by == {
        "mxfp4_weight_only": ("fragments", None),
        "mxfp4_fp8": ("strided, rows exact in E4M3", True),
        "mxfp8_dynamic": ("strided", None),
        "nvfp4_dynamic": ("strided", None),
    }
