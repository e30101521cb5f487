"""The numerics of quantized training: against high precision, the inference quantizer, and GEMMs written out."""

import threading

import pytest
import torch

import microscale as ms
from microscale import dispatch, ops
from microscale.nn import GemmState, observe, three_gemm
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor

TRAINING = [name for name in ms.list_recipes() if ms.find_recipe(name).is_training]
# dB against the same layer in bfloat16: output, input gradient, weight gradient; the numbers where it has them.
FLOOR = {
    "mxfp8_train": (27, 25, 24),
    "mxfp8_train_2d": (27, 25, 24),
    "mxfp8_train_wgrad_hp": (27, 25, 34),
    "nvfp4_train": (15, 13, 13),
    "nvfp4_then_bf16": (15, 13, 13),
    "nvfp4_train_4over6": (16, 13, 13),
    "mxfp4_train": (14, 12, 12),
    "nvfp4_fwd_mxfp8_bwd": (15, 25, 24),
    "qat_nvfp4": (15, 18, 18),
    "qat_mxfp4": (14, 17, 17),
}


def sqnr(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum().clamp_min(1e-300)))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gemms_of(name: str, **changes: object) -> LayerGemms:
    """What a shipped recipe does to an ordinary layer, with random signs drawn as alternating ones."""
    recipe = ms.find_recipe(name).resolved([])
    gemms = recipe.gemms_of(recipe.rules[-1], lambda size: (1, -1, -1, 1) * (size // 4))
    return gemms.model_copy(update=changes)


def run(gemms, x, w, b, dy, seed=(3, 0)):
    """Output, input gradient, weight gradient, bias gradient."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    b = None if b is None else b.clone().requires_grad_()
    state = GemmState(rounding=torch.tensor(seed), name="layer")
    y = three_gemm(x, w, b, gemms, state)
    y.backward(dy)
    return y.detach(), x.grad, w.grad, None if b is None else b.grad


@pytest.fixture(scope="module")
def case():
    """Tokens, weight, bias, output gradient of a 256 wide layer."""
    dtype = torch.bfloat16
    return normal(512, 256, seed=1, dtype=dtype), normal(256, 256, seed=2, dtype=dtype) / 16, \
        normal(256, seed=3, dtype=dtype), normal(512, 256, seed=4, dtype=dtype)  # fmt: skip


class TestAgainstHighPrecision:
    @pytest.mark.parametrize("name", TRAINING)
    def test_reaches_its_sqnr(self, name, case):
        x, w, b, dy = case
        y, dx, dw, db = run(gemms_of(name), *case)
        wanted = x.float() @ w.float().T + b.float(), dy.float() @ w.float(), dy.float().T @ x.float()
        for got, exact, floor in zip((y, dx, dw), wanted, FLOOR[name], strict=True):
            assert sqnr(got, exact) >= floor
        assert sqnr(db, dy.float().sum(0)) >= 40
        assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16,) * 4

    def test_unquantized_gemms_are_the_plain_ones(self, case):
        got = run(LayerGemms(), *case)
        x, w, b, dy = case
        x, w, b = (t.clone().requires_grad_() for t in (x, w, b))
        y = torch.nn.functional.linear(x, w, b)
        y.backward(dy)
        for a, wanted in zip(got[:3], (y, x.grad, w.grad), strict=True):
            assert torch.equal(a, wanted)
        assert sqnr(got[3], b.grad) > 40


class TestOperands:
    """The three products are those of operands quantized along their contraction."""

    @pytest.mark.parametrize("name", ["mxfp8_train", "mxfp8_train_2d", "nvfp4_fwd_mxfp8_bwd"])
    def test_each_gemm(self, name):
        x, w, dy = normal(96, 64), normal(128, 64, seed=1), normal(96, 128, seed=2)
        g = gemms_of(name)
        y, dx, dw, _ = run(g, x, w, None, dy)
        assert torch.equal(y, ms.matmul(ms.quantize(x, g.fprop_input), ms.quantize(w, g.fprop_weight).mT))
        dgrad = ms.quantize(dy, g.dgrad_grad_output), ms.quantize(w, g.dgrad_weight, axis=-2)
        assert torch.equal(dx, ms.matmul(*dgrad))
        wgrad = ms.quantize(dy, g.wgrad_grad_output, axis=-2), ms.quantize(x, g.wgrad_input, axis=-2)
        assert torch.equal(dw, ms.matmul(wgrad[0].mT, wgrad[1]))

    def test_stochastic_operands_draw_at_the_counter(self):
        x, w, dy = normal(96, 64), normal(128, 64, seed=1), normal(96, 128, seed=2)
        g = gemms_of("nvfp4_train")
        _, dx, dw, _ = run(g, x, w, None, dy, (3, 40))
        first = ms.quantize(dy, g.dgrad_grad_output, generator=(3, 40))
        assert torch.equal(dx, ms.matmul(first, ms.quantize(w, g.dgrad_weight, axis=-2)))
        second = ms.quantize(dy, g.wgrad_grad_output, axis=-2, generator=(3, 41))
        assert torch.equal(dw, ms.matmul(second.mT, ms.quantize(x, g.wgrad_input, axis=-2)))

    @pytest.mark.parametrize("name", ["qat_nvfp4", "qat_mxfp4"])
    def test_qat_is_straight_through(self, name):
        x, w, dy = normal(96, 64), normal(128, 64, seed=1), normal(96, 128, seed=2)
        g = gemms_of(name)
        _, dx, dw, _ = run(g, x, w, None, dy)
        assert torch.equal(dx, ms.matmul(dy, ms.quantize(w, g.fprop_weight)))
        assert torch.equal(dw, ms.matmul(dy.mT, ms.quantize(x, g.fprop_input)))

    @pytest.mark.parametrize("name", TRAINING)
    def test_recompute_gives_the_same_bits(self, name):
        case = normal(50, 64), normal(96, 64, seed=1), normal(96, seed=3), normal(50, 96, seed=2)
        kept, again = (run(gemms_of(name, save=save), *case) for save in ("quantized", "recompute"))
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))

    @pytest.mark.parametrize("name", ["mxfp8_train_2d", "nvfp4_train", "nvfp4_train_4over6", "mxfp4_train"])
    def test_weight_and_transpose_dequantize_alike(self, name):
        w, g = normal(96, 80), gemms_of(name)
        assert g.fprop_weight == g.dgrad_weight
        assert torch.equal(
            ms.quantize(w, g.fprop_weight).dequantize(), ms.quantize(w, g.dgrad_weight, axis=-2).dequantize()
        )


class TestHadamard:
    @pytest.mark.parametrize("signs", [None, (1, -1, -1, 1) * 4])
    @pytest.mark.parametrize("tokens", [64, 50])
    def test_cancels_in_wgrad_with_quantization_off(self, monkeypatch, signs, tokens):
        def transform(t, spec, axis, generator):
            rows = ms.hadamard(t.movedim(axis, -1), spec.hadamard.size, spec.hadamard.sign)
            return rows.movedim(-1, axis)

        monkeypatch.setattr(ops, "quantize", transform)
        spec = ms.find_quantizer({"format": "nvfp4", "hadamard": {"size": 16, "sign": signs}})
        x, dy = normal(tokens, 48), normal(tokens, 32, seed=1)
        dw = run(LayerGemms(wgrad_grad_output=spec, wgrad_input=spec), x, normal(32, 48), None, dy)[2]
        assert sqnr(dw, dy.double().T @ x.double()) > 120

    @pytest.mark.parametrize("tokens", [1, 15, 17, 33])
    def test_pads_tokens_with_zeros(self, tokens):
        case = normal(tokens, 64), normal(96, 64, seed=1), None, normal(tokens, 96, seed=2)
        g = gemms_of("nvfp4_train")
        short = run(g, *case)
        rows = -tokens % 16
        pad = (0, 0, 0, rows)
        padded = run(g, torch.nn.functional.pad(case[0], pad), case[1], None, torch.nn.functional.pad(case[3], pad))
        assert torch.equal(short[0], padded[0][:tokens])
        assert torch.equal(short[2], padded[2])
        assert sqnr(short[2], case[3].T @ case[0]) > 8

    def test_pads_features_with_zeros(self):
        spec = ms.find_quantizer({"format": "mxfp8", "hadamard": 32})
        g = LayerGemms(fprop_input=spec, fprop_weight=spec, dgrad_grad_output=spec, dgrad_weight=spec)
        x, w, dy = normal(20, 40), normal(50, 40, seed=1), normal(20, 50, seed=2)
        y, dx, _, _ = run(g, x, w, None, dy)
        assert sqnr(y, x @ w.T) > 25
        assert sqnr(dx, dy @ w) > 25


class TestUnbiased:
    @pytest.mark.parametrize("name", ["nvfp4_train", "mxfp4_train"])
    def test_mean_over_seeds(self, name):
        """Against the gradient from unrounded gradient operands: within 3 standard errors for all but a few entries."""
        x, w, dy = normal(32, 32), normal(32, 32, seed=1), normal(32, 32, seed=2)
        g = gemms_of(name)
        exact = run(g.model_copy(update={"dgrad_grad_output": None, "wgrad_grad_output": None,
                                         "wgrad_input": None}), x, w, None, dy)  # fmt: skip
        transformed = ms.quantize(x, g.wgrad_input, axis=-2).dequantize()
        h = g.wgrad_input.hadamard
        dw = ms.hadamard(dy.T, h.size, h.sign) @ transformed
        samples = [run(g, x, w, None, dy, (seed, 0))[1:3] for seed in range(256)]
        for found, wanted in zip(zip(*samples, strict=True), (exact[1], dw), strict=True):
            found = torch.stack(found).double()
            error = found.mean(0) - wanted
            spread = found.std(0) / 16
            assert float((error.abs() <= 3 * spread).double().mean()) > 0.98  # 99.7 % expected of a normal error
            whole = error.sum().abs() / (found.sum((1, 2)).std() / 16)
            assert float(whole) < 3


class TestEdges:
    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (3, 64), (2, 3, 5, 64)])
    def test_leading_axes_and_no_tokens(self, name, shape):
        x, w, b = normal(*shape), normal(40, 64, seed=1), normal(40, seed=2)
        y, dx, dw, db = run(gemms_of(name), x, w, b, normal(*shape[:-1], 40, seed=3))
        assert y.shape == (*shape[:-1], 40)
        assert (dx.shape, dw.shape, db.shape) == (x.shape, w.shape, b.shape)
        if not x.numel():
            assert not dw.any()
            assert not db.any()

    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize(("tokens", "k", "n"), [(1, 1, 1), (7, 33, 17), (130, 100, 50)])
    def test_odd_sizes(self, name, tokens, k, n):
        x, w, dy = normal(tokens, k), normal(n, k, seed=1), normal(tokens, n, seed=2)
        y, dx, dw, _ = run(gemms_of(name), x, w, None, dy)
        assert all(bool(t.isfinite().all()) for t in (y, dx, dw))
        if tokens > 100:
            assert min(sqnr(y, x @ w.T), sqnr(dx, dy @ w), sqnr(dw, dy.T @ x)) > 11

    @pytest.mark.parametrize("name", TRAINING)
    def test_zero_gradients_are_zero(self, name):
        x, w, b = normal(40, 64), normal(32, 64, seed=1), normal(32, seed=2)
        for tensor in run(gemms_of(name), x, w, b, torch.zeros(40, 32))[1:]:
            assert not tensor.any()

    @pytest.mark.parametrize("name", TRAINING)
    def test_a_nan_gradient_is_not_hidden(self, name):
        x, w, b = normal(40, 64), normal(32, 64, seed=1), normal(32, seed=2)
        dy = normal(40, 32, seed=3)
        dy[5, 7] = torch.nan
        _, dx, dw, db = run(gemms_of(name), x, w, b, dy)
        assert dx[5].isnan().all()
        assert dw[7].isnan().all()
        assert db.isnan().tolist() == [i == 7 for i in range(32)]

    @pytest.mark.parametrize("name", TRAINING)
    def test_strides_do_not_matter(self, name):
        x, w, dy = normal(40, 64), normal(32, 64, seed=1), normal(40, 32, seed=2)
        dense = run(gemms_of(name), x, w, None, dy)
        strided = run(gemms_of(name), x.T.contiguous().T, w.T.contiguous().T, None, dy.T.contiguous().T)
        assert all(torch.equal(a, b) for a, b in zip(dense[:3], strided[:3], strict=True))
        expanded = run(gemms_of(name), x, w, None, torch.ones(1, 1).expand(40, 32))
        full = run(gemms_of(name), x, w, None, torch.ones(40, 32))
        assert all(torch.equal(a, b) for a, b in zip(expanded[:3], full[:3], strict=True))

    def test_double_backward_is_refused(self):
        x = normal(32, 32).requires_grad_()
        y = three_gemm(x, normal(32, 32, seed=1), None, gemms_of("mxfp8_train"))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    @pytest.mark.parametrize(
        ("x", "w", "name", "message"),
        [
            (torch.zeros(2, 4), torch.zeros(3, 5), "mxfp8_train", "cannot multiply"),
            (torch.zeros(()), torch.zeros(3, 5), "mxfp8_train", "cannot multiply"),
            (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16), "mxfp8_train", "weight of torch.bfloat16"),
            (torch.zeros(2, 4), torch.zeros(3, 4), "nvfp4_train", "needs a seed"),
        ],
    )
    def test_errors(self, x, w, name, message):
        with pytest.raises(ms.MicroscaleError, match=message):
            three_gemm(x, w, None, gemms_of(name))


class TestSaved:
    @pytest.mark.parametrize(("name", "ratio"), [("mxfp8_train", 1.8), ("nvfp4_train", 3.2), ("mxfp4_train", 3.2)])
    def test_saved_activations_shrink(self, name, ratio):
        x, w = normal(512, 256, dtype=torch.bfloat16), normal(16, 256, seed=1, dtype=torch.bfloat16).requires_grad_()
        held: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
            three_gemm(x, w, None, gemms_of(name), GemmState(rounding=torch.tensor([0, 0])))
        assert not any(isinstance(t, BlockScaledTensor) for t in held)
        saved = sum(t.numel() * t.element_size() for t in held)
        assert x.numel() * 2 / saved >= ratio

    def test_only_what_gradients_need_is_saved(self):
        x, w, held = normal(64, 32), normal(32, 32, seed=1), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(tuple(t.shape)), t)[1], lambda t: t):
            g = gemms_of("mxfp8_train")
            three_gemm(x, w, None, g)
            assert held == []
            three_gemm(x.clone().requires_grad_(), w, None, g)
            assert held == [(32, 32), (1, 32)]  # the weight in blocks along its columns
            held.clear()
            three_gemm(x, w.clone().requires_grad_(), None, g)
            assert held == [(64, 32), (2, 32)]
            held.clear()
            with torch.no_grad():
                three_gemm(x, w.clone().requires_grad_(), None, g)
            assert held == []

    def test_recompute_saves_the_tensors_themselves(self):
        x, w, held = normal(64, 32).requires_grad_(), normal(32, 32, seed=1).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t.data_ptr()), t)[1], lambda t: t):
            three_gemm(x, w, None, gemms_of("mxfp8_train", save="recompute"))
        assert sorted(held) == sorted([x.data_ptr(), w.data_ptr()])


class TestObserve:
    def test_each_operand_before_it_is_quantized(self):
        seen = {}
        g = gemms_of("nvfp4_train")
        x, w, dy = normal(32, 64), normal(48, 64, seed=1), normal(32, 48, seed=2)
        with observe(lambda layer, gemm, operand, tensor, spec: seen.update({(layer, gemm, operand): (tensor, spec)})):
            run(g, x, w, None, dy)
        wanted = {
            ("fprop", "input"): (x, g.fprop_input), ("fprop", "weight"): (w, g.fprop_weight),
            ("dgrad", "grad_output"): (dy, g.dgrad_grad_output), ("dgrad", "weight"): (w.T, g.dgrad_weight),
            ("wgrad", "grad_output"): (dy.T, g.wgrad_grad_output), ("wgrad", "input"): (x.T, g.wgrad_input),
        }  # fmt: skip
        assert {key[1:] for key in seen} == set(wanted)
        for (_, gemm, operand), (tensor, spec) in seen.items():
            assert torch.equal(tensor, wanted[gemm, operand][0])
            assert not tensor.requires_grad
            assert spec == wanted[gemm, operand][1]

    def test_ends_with_the_block(self):
        seen = []
        with observe(lambda *args: seen.append(args)):
            pass
        run(gemms_of("mxfp8_train"), normal(4, 32), normal(32, 32), None, normal(4, 32))
        assert not seen


def test_the_backward_obeys_what_was_in_force():
    """`use_backend` and its like belong to a thread, and autograd runs backwards on threads of its own."""
    recipe = ms.find_recipe("mxfp8_train").resolved([])
    x, w = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    with ms.use_backend("reference"):
        y = three_gemm(x, w, None, recipe.gemms_of(recipe.rules[-1]))
    seen = []
    with observe(lambda layer, gemm, *rest: seen.append((gemm, dispatch._backend.get()))):
        thread = threading.Thread(target=lambda: y.sum().backward())
        thread.start()
        thread.join()
    assert ("dgrad", "reference") in seen and ("wgrad", "reference") in seen
    assert x.grad is not None and dispatch._backend.get() is None
