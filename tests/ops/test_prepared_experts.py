"""Experts [E, N, K] in layout `fragments`: the matrix [E * N, K] in that order, and the tensor that they were."""

import copy
import importlib
import io

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.kernels.reference import align_rows as reference_rows
from microscale.nn import GroupedLinear
from microscale.numerics import fragments
from microscale.testing import assert_same_bits, assert_same_quantized

prepare_module = importlib.import_module("microscale.ops.prepare")  # beside a function of the same name
FITTING = [f for f in ms.list_formats() if fragments.fits(ms.find_format(f), 64, 128, experts=True)]
SOME = ["mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8"]
ROWS = [f for f in FITTING if reference_rows.fits(ms.find_format(f))]
SIZES = (5, 0, 20)
TOKENS, E, N, K = 30, 3, 128, 192
HOPPER = (9, 0)


def experts(name="mxfp4", shape=(E, N, K), device="cpu", **options):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator) * 0.05
    w[:, 3] *= 30
    w[0, 5] = 0
    return ms.quantize(w.to(device, torch.bfloat16), name, **options)


def ends_of(sizes=SIZES, device="cpu"):
    return torch.tensor(sizes).cumsum(0).to(device, torch.int32)


@pytest.fixture
def on_hopper(monkeypatch):
    """Experts can be prepared, and tensors here count as those of an sm_90."""
    monkeypatch.setattr(prepare_module.library, "capability", lambda device: HOPPER)


# -- the order ---------------------------------------------------------------------------------------------------------


def test_which_formats_fit():
    """All that matrices can have, but those with FP32 scales."""
    matrices = {f for f in ms.list_formats() if fragments.fits(ms.find_format(f).for_row(1024), 64, 1024)}
    assert matrices - set(FITTING) == {f for f in matrices if ms.find_format(f).scale.torch_dtype == "float32"}
    assert set(SOME) <= set(FITTING)


@pytest.mark.parametrize("name", FITTING)
def test_they_are_one_tall_matrix(name):
    """Bytes as of [E * N, K], from every layout and orientation; every reading is that of the plain ones; and back."""
    q = experts(name)
    made, tall = q.to_layout("fragments"), q.reshape(E * N, K).to_layout("fragments")
    assert made.scale_layout == "fragments" and made.qdata.is_contiguous() and made.scale.is_contiguous()
    assert made.qdata.shape == q.qdata.shape and made.scale.shape == q.scale.shape
    assert_same_bits(made.qdata.view(E * N, -1), tall.qdata)
    assert_same_bits(made.scale.view(E * N, -1), tall.scale)
    for other in (q.to_layout("swizzle_32_4_4"), q.mT.mT):
        assert_same_bits(other.to_layout("fragments").qdata, made.qdata)
    turned = q.mT.to_layout("fragments")
    assert turned.block_axis == -2 and torch.equal(turned.qdata.mT, made.qdata)
    for got, want in ((made, q), (made.mT, q.mT), (turned, q.mT)):
        assert got.scale_layout == "fragments"
        assert_same_bits(got.dequantize(), want.dequantize())
        assert_same_bits(got.codes(), want.codes())
        assert_same_bits(got.scales(), want.scales())
        back = got.to_layout("strided")
        assert_same_bits(back.qdata.contiguous(), want.qdata.contiguous())
        assert_same_bits(back.scale.contiguous(), want.scale.contiguous())
    assert_same_quantized(made.to_layout("swizzle_32_4_4"), q)


def test_which_have_no_such_order():
    for q in (
        experts("fp8_row"), experts("fp8_block128", (2, 128, 128)), experts("nf4"), experts(shape=(2, 96, 64)),
        experts(shape=(2, 64, 96)), experts(shape=(2, 64, 128)).unsqueeze(0), experts(shape=(2, 64, 128), axis=-3),
        ms.quantize(torch.zeros(0, 64, 64), "mxfp4"), ms.quantize(torch.zeros(64), "mxfp4"),
    ):  # fmt: skip
        with pytest.raises(ms.MicroscaleError, match="no layout fragments"):
            q.to_layout("fragments")


# -- the tensor --------------------------------------------------------------------------------------------------------

STAY = {
    "mT": lambda q: q.mT, "clone": lambda q: q.clone(), "detach": lambda q: q.detach(), "full slice": lambda q: q[:],
    "to": lambda q: q.to("cpu", copy=True), "deepcopy": copy.deepcopy, "as_dtype": lambda q: q.as_dtype(torch.float32),
    "permute": lambda q: q.permute(0, 2, 1), "turned clone": lambda q: q.mT.clone(), "two turns": lambda q: q.mT.mT,
}  # fmt: skip
PLAIN = {
    "select": lambda q: q[1], "select row": lambda q: q[:, 3], "slice": lambda q: q[1:], "rows": lambda q: q[:, 64:],
    "blocks": lambda q: q[..., 64:], "index": lambda q: q[torch.tensor([2, 0, 2])], "mT of one": lambda q: q[0].mT,
    "cat": lambda q: torch.cat([q, q]), "cat rows": lambda q: torch.cat([q, q], 1),
    "cat blocks": lambda q: torch.cat([q, q], -1), "stack": lambda q: torch.stack([q, q]),
    "unbind": lambda q: q.unbind()[2], "split": lambda q: q.split(2)[1], "chunk": lambda q: q.chunk(3)[0],
    "reshape": lambda q: q.reshape(E * N, K), "unsqueeze": lambda q: q.unsqueeze(0),
    "expand": lambda q: q.expand(2, E, N, K), "flatten": lambda q: q.flatten(0, 1),
    "swap": lambda q: q.permute(1, 0, 2), "last first": lambda q: q.permute(2, 0, 1),
    "dense": lambda q: q.mT.contiguous(), "index_select": lambda q: q.index_select(0, torch.tensor([1])),
    "unflatten": lambda q: q.unflatten(1, (2, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["nvfp4", "mxfp6"])
@pytest.mark.parametrize("what", [*STAY, *PLAIN])
def test_every_op_gives_its_values(what, name):
    q = experts(name)
    op = (STAY | PLAIN)[what]
    got, want = op(q.to_layout("fragments")), op(q)
    assert got.scale_layout == ("fragments" if what in STAY else "strided")
    assert got.shape == want.shape and got.dtype == want.dtype and got.meta.exact_rows == want.meta.exact_rows
    assert_same_bits(got.dequantize(), want.dequantize())
    assert_same_bits(got.codes(), want.codes())


def test_a_dense_transpose_of_a_matrix_has_no_tiles():
    q = experts(shape=(1, 64, 128))[0]
    made = ms.prepare(q).t().contiguous()
    assert made.scale_layout == "strided"
    assert_same_bits(made.dequantize(), q.t().dequantize())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_copies_into_and_out_of_them(name):
    """copy_ keeps the target's layout, whichever the source has, either way round."""
    first, second = experts(name), experts(name) if name == "mxfp4" else experts(name).clone()
    second.qdata.copy_(second.qdata.flip(0))
    for layout in ("strided", "swizzle_32_4_4", "fragments"):
        for other in ("strided", "swizzle_32_4_4", "fragments"):
            target = first.clone().to_layout(layout)
            target.copy_(second.to_layout(other))
            assert target.scale_layout == layout
            assert_same_bits(target.dequantize(), second.dequantize())
    turned = first.clone().to_layout("fragments").mT
    turned.copy_(second.mT)
    assert_same_bits(turned.mT.dequantize(), second.dequantize())
    assert torch.equal(first.to_layout("fragments"), first)


def test_pickles():
    made = experts("nvfp4").to_layout("fragments")
    file = io.BytesIO()
    torch.save({"w": made}, file)
    file.seek(0)
    got = torch.load(file, weights_only=True)["w"]
    assert got.scale_layout == "fragments" and got.shape == made.shape
    assert_same_bits(got.dequantize(), made.dequantize())


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_products_are_those_of_the_plain_ones(name):
    """Of tokens, of their gradients, of quantized tokens, of batches of matrices, compiled: bit for bit on the CPU."""
    q = experts(name)
    made, ends = q.to_layout("fragments"), ends_of()
    x, dy = torch.randn(TOKENS, K).bfloat16(), torch.randn(TOKENS, N).bfloat16()
    wanted = ms.grouped_matmul(x, q.mT, ends)
    assert_same_bits(ms.grouped_matmul(x, made.mT, ends), wanted)
    assert_same_bits(ms.grouped_matmul(dy, made, ends), ms.grouped_matmul(dy, q, ends))
    qx = ms.quantize(x, "mxfp8")
    assert_same_bits(ms.grouped_matmul(qx, made.mT, ends), ms.grouped_matmul(qx, q.mT, ends))
    assert_same_bits(torch.nn.functional.grouped_mm(x, made.mT, offs=ends), wanted)
    batch = torch.randn(E, 7, K).bfloat16()
    assert_same_bits(batch @ made.mT, batch @ q.mT)
    compiled = torch.compile(lambda t: ms.grouped_matmul(t, made.mT, ends), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), wanted)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_e4m3(name):
    """`align_rows` of prepared experts has the bytes of that of plain ones."""
    q = experts(name)
    want, got = ms.align_rows(q), ms.align_rows(q.to_layout("fragments"))
    assert got.shape == (E, N, K) and got.scale_layout == "strided"
    assert_same_bits(got.qdata, want.qdata)
    assert_same_bits(got.scale, want.scale)


# -- prepare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTING)
def test_prepare_on_hopper(name, on_hopper):
    q = experts(name)
    made = ms.prepare(q)
    assert made.scale_layout == "fragments" and ms.prepare(made) is made and made.stored_bytes == q.stored_bytes
    assert_same_quantized(made, q)
    both = ms.prepare(q, quantized_activations=True)
    noted = prepare_module.noted(q).meta.exact_rows
    assert both.scale_layout == "fragments" and both.meta.exact_rows == noted
    assert ms.prepare(both, quantized_activations=True) is both
    again = ms.prepare(made, quantized_activations=True)
    assert again.scale_layout == "fragments" and again.meta.exact_rows == noted
    assert torch.equal(again.qdata, made.qdata)


def test_what_is_refused_on_hopper(on_hopper):
    """With the reason; for quantized activations nothing is."""
    large, nan = experts(), experts("mxfp8")
    large.scale[2, 100, 1] = 254
    nan.qdata[1, 64, 64] = 0x7F
    for q, reason in (
        (experts("fp8_row"), "FP32"), (experts("nf4"), "4, 6 or 8 bits"),
        (experts(shape=(2, 96, 64)), "multiples of 64"), (experts().mT, "blocks along K"), (large, "outside of codes"),
        (nan, "NaN or infinite"),
        (experts().unsqueeze(0), "or experts .E, N, K., got"),
    ):  # fmt: skip
        with pytest.raises(ms.MicroscaleError, match=reason):
            ms.prepare(q)
        if q.dim() == 3:
            made = ms.prepare(q, quantized_activations=True)
            assert made.scale_layout == "strided"
            assert_same_quantized(made, q)
    assert ms.prepare(large, quantized_activations=True).meta.exact_rows is False


def test_more_than_the_kernel_takes_stay(on_hopper):
    q = ms.quantize(torch.zeros(1025, 64, 64).bfloat16(), "mxfp4")
    with pytest.raises(ms.MicroscaleError, match="leave them as they are"):
        ms.prepare(q)
    assert ms.prepare(q, quantized_activations=True).scale_layout == "strided"


def test_formats_whose_values_bfloat16_lacks_are_refused(on_hopper):
    """Eleven digits: codes times scales would be rounded, and kernels would say that they are exact."""
    fmt = ms.find_format("nvfp4_1level").variant(element=ms.find_element("int8"), block=32)
    for shape in ((64, 64), (2, 64, 64)):
        with pytest.raises(ms.MicroscaleError, match="has no layout fragments"):
            ms.prepare(ms.quantize(torch.randn(shape).bfloat16(), fmt))


def test_what_prepare_refuses_is_not_copied_into_prepared_weights(on_hopper):
    target, source = (ms.quantize(torch.randn(64, 64).bfloat16(), "mxfp4") for _ in range(2))
    target = ms.prepare(target)
    target.copy_(source)
    assert_same_quantized(target.to_layout("strided"), source)
    source.scale[3, 1] = 200
    before = target.dequantize()
    with pytest.raises(ms.MicroscaleError, match="copy_ into a prepared weight: some scales"):
        target.copy_(source)
    assert torch.equal(target.dequantize(), before)


def test_elsewhere_they_stay(monkeypatch):
    q, prepared = experts(), experts().to_layout("fragments")
    for capability in ((7, 5), (8, 0), (8, 9), (10, 0), (12, 0), None):
        monkeypatch.setattr(prepare_module.library, "capability", lambda device, found=capability: found)
        with pytest.raises(ms.MicroscaleError, match="leave them as they are"):
            ms.prepare(q)
        for given in (q, prepared):
            made = ms.prepare(given, quantized_activations=True)
            assert made.scale_layout == "strided" and made.meta.exact_rows is True
            assert_same_quantized(made, q)


# -- models ------------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Two stacks of experts, one of which cannot be prepared."""

    def __init__(self, recipe, hidden=N):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = GroupedLinear(E, K, N), GroupedLinear(E, N, 72)
        ms.quantize_(self, recipe)

    def forward(self, x, ends):
        return self.down(self.up(x, ends), ends)


def test_models(on_hopper, tmp_path):
    """`prepare_` says what it did; nothing changes in what the model gives, saves, copies and loads."""
    for recipe, up, down in (
        ("mxfp4_weight_only", "fragments", "multiples of 64"),
        ("mxfp4_fp8", "fragments, rows exact in E4M3", "strided, rows exact in E4M3"),
        ("nvfp4_dynamic", "fragments", "strided"),
    ):
        model, x, ends = Model(recipe), torch.randn(TOKENS, K, requires_grad=True), ends_of()
        before, plain = model(x, ends), model.up.weight.detach().clone()
        (grad,) = torch.autograd.grad(before.sum(), x)
        parameter = model.up.weight
        told = ms.prepare_(model)
        assert told["up"] == up and down in told["down"] and ms.prepare_(model) == told
        assert model.up.weight is parameter and parameter.scale_layout == "fragments"
        after = model(x, ends)
        assert_same_bits(after, before)
        assert_same_bits(torch.autograd.grad(after.sum(), x)[0], grad)
        assert_same_bits(copy.deepcopy(model)(x, ends), before)
        state = model.state_dict()
        assert state["up.weight"].scale_layout == "fragments"
        fresh = Model(recipe)
        fresh.up.weight.data.qdata.zero_()
        fresh.load_state_dict(state)
        assert fresh.up.weight.scale_layout == "strided"
        assert_same_bits(fresh(x, ends), before)
        model.up.weight.qdata.zero_()
        model.load_state_dict(fresh.state_dict())
        assert model.up.weight.scale_layout == "fragments"
        assert_same_bits(model(x, ends), before)
        where = tmp_path / recipe
        ms.save(model, where, dialect="microscale")
        found = ms.load(where, Model(recipe)).up.weight
        assert found.scale_layout == "strided"
        assert_same_bits(found.qdata, plain.qdata)
        assert_same_bits(found.scale, plain.scale)
        loaded = ms.load(where, model)  # into the prepared one
        assert_same_bits(loaded(x, ends), before)
        assert_same_bits(model.to(torch.bfloat16).up.weight.dequantize(), plain.dequantize().bfloat16())


def test_models_keep_rows_of_prepared_experts(on_hopper, monkeypatch):
    """Beside the weight in its new order, and they are those of the plain one."""
    from microscale.kernels.cublas import grouped_rows_e4m3

    monkeypatch.setattr(grouped_rows_e4m3, "LARGE", 1)
    monkeypatch.setattr(dispatch, "installed", lambda package: False)  # the reference makes them
    model = Model("mxfp4_fp8").bfloat16()
    wanted = ms.align_rows(model.up.weight.detach())
    told = ms.prepare_(model, keep_rows=True)
    assert told["up"] == "fragments, rows exact in E4M3, rows kept"
    kept = model.up.kept_rows()
    assert kept is not None and torch.equal(kept.qdata, wanted.qdata) and torch.equal(kept.scale, wanted.scale)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOME)
def test_products_on_a_gpu(name):
    """Whatever the dispatcher chooses for prepared experts: near what it gives for plain ones, captured too."""
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs sm_90")
    q = experts(name, (8, 256, 512), "cuda")
    made = ms.prepare(q)
    assert made.scale_layout == "fragments"
    for tokens in (1, 20, 300, 4096):
        x, dy = (torch.randn(tokens, n, device="cuda").bfloat16() for n in (512, 256))
        sizes = torch.full((8,), tokens // 8)
        sizes[2] += tokens - int(sizes.sum())
        ends = ends_of(sizes.tolist(), "cuda")
        for a, turned in ((x, True), (dy, False), (ms.quantize(x, "mxfp8"), True)):
            given = [w.mT if turned else w for w in (q, made)]
            want, got = (ms.grouped_matmul(a, w, ends) for w in given)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    x = torch.randn(20, 512, device="cuda").bfloat16()
    ends = ends_of((2, 3, 0, 5, 0, 0, 10, 0), "cuda")
    eager = ms.grouped_matmul(x, made.mT, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ms.grouped_matmul(x, made.mT, ends)
    graph.replay()
    assert torch.equal(captured, eager)
