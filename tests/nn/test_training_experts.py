"""Experts in training: each is `three_gemm` on its own rows, whatever sizes groups have; nothing mixes two experts."""

import dataclasses

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.kernels.reference import matmul
from microscale.kernels.reference.align_rows import fits
from microscale.nn import GemmState, alignment_of, observe, quantize_experts, three_gemm, three_grouped_gemm
from microscale.spec.training import LayerGemms

TRAINING = [name for name in ms.list_recipes() if ms.find_recipe(name).is_training]
E, N, K = 4, 96, 64
ALIGNED, RAGGED = (64, 0, 32, 128), (50, 0, 7, 90)
# dB against high precision: output, input gradient, weight gradient. As of one layer, less what small groups cost.
FLOOR = {
    "mxfp8_train": (27, 25, 24), "mxfp8_train_2d": (27, 25, 24), "mxfp8_train_wgrad_hp": (27, 25, 34),
    "nvfp4_train": (15, 13, 13), "nvfp4_then_bf16": (15, 13, 13), "nvfp4_train_4over6": (16, 13, 13),
    "mxfp4_train": (14, 12, 12), "nvfp4_fwd_mxfp8_bwd": (15, 25, 24), "qat_nvfp4": (15, 18, 18),
    "qat_mxfp4": (14, 17, 17),
}  # fmt: skip


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sqnr(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum().clamp_min(1e-300)))


def gemms_of(name: str, **changes: object) -> LayerGemms:
    recipe = ms.find_recipe(name).resolved([])
    gemms = recipe.gemms_of(recipe.rules[-1], lambda size: (1, -1, -1, 1) * (size // 4))
    return gemms.model_copy(update=changes)


def nearest(gemms: LayerGemms) -> LayerGemms:
    """The same without random numbers, whose places in a batch differ from those in an expert's rows alone."""
    fields = ("dgrad_grad_output", "wgrad_grad_output")
    specs = {name: getattr(gemms, name) for name in fields}
    return gemms.model_copy(
        update={name: q.model_copy(update={"rounding": "nearest_even"}) for name, q in specs.items() if q is not None}
    )


def ends_of(sizes) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def case(sizes, after=0, dtype=torch.float32):
    """Tokens, weights of very different size, output gradient."""
    rows = sum(sizes) + after
    w = normal(len(sizes), N, K, seed=1) / 8 * torch.tensor([1, 3, 0.1, 10])[: len(sizes), None, None]
    scale = normal(rows, 1, seed=3).exp()
    return (normal(rows, K) * scale).to(dtype), w.to(dtype), (normal(rows, N, seed=2) * scale).to(dtype)


def run(gemms, x, w, dy, sizes, *, seed=(3, 0), state=None, **options):
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    state = GemmState(rounding=torch.tensor(seed)) if state is None else state
    y = three_grouped_gemm(x, w, ends_of(sizes), gemms, state, **options)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def each(gemms, x, w, dy, sizes):
    """The same by three_gemm, expert by expert."""
    y, dx, dw, start = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(w), 0
    for expert, size in enumerate(sizes):
        part = slice(start, start + size)
        a, b = x[part].clone().requires_grad_(), w[expert].clone().requires_grad_()
        made = three_gemm(a, b, None, gemms)
        made.backward(dy[part])
        y[part], dx[part], dw[expert] = made.detach(), a.grad, b.grad
        start += size
    return y, dx, dw


def has_outer(*specs) -> bool:
    return any(spec is not None and spec.format.outer_scale is not None for spec in specs)


class TestEachExpert:
    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize(("sizes", "alignment"), [(ALIGNED, 1), (ALIGNED, 32), (RAGGED, 1)])
    def test_is_a_linear_layer_on_its_rows(self, name, sizes, alignment):
        """Bit for bit; where there are outer scales, the reference of grouped products rounds once more in FP32."""
        g, (x, w, dy) = nearest(gemms_of(name)), case(sizes, after=32)
        got, wanted = run(g, x, w, dy, sizes, alignment=alignment), each(g, x, w, dy, sizes)
        scaled = has_outer(g.fprop_input), has_outer(g.dgrad_grad_output, g.dgrad_weight or g.fprop_weight), False
        for a, b, close in zip(got, wanted, scaled, strict=True):
            if close:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().mean()))
            else:
                assert torch.equal(a, b)
        assert not got[0][sum(sizes) :].any()
        assert not got[1][sum(sizes) :].any()
        assert not got[2][1].any()

    @pytest.mark.parametrize(
        "quantizer",
        [
            "nvfp4",
            {"format": "nvfp4", "hadamard": 16},
            {"format": {"name": "rows", "element": "e2m1", "block": 24, "scale": "e4m3", "scale_rule": "nearest",
                        "outer_scale": {"per": "row"}}},
        ],
    )  # fmt: skip
    def test_other_quantizers(self, quantizer):
        """Outer scales and Hadamards wherever they may be, of rows and columns; a block that is no power of two."""
        spec = ms.find_quantizer(quantizer)
        operands = [name for name, field in LayerGemms.model_fields.items() if field.default is None]
        g = LayerGemms(**dict.fromkeys(operands, spec))
        assert len(operands) == 6
        for sizes in (RAGGED, (48, 0, 96, 144)):
            x, w, dy = case(sizes)
            for alignment in (1,) if sizes is RAGGED else (1, 48):
                got, wanted = run(g, x, w, dy, sizes, alignment=alignment), each(g, x, w, dy, sizes)
                for a, b in zip(got, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().mean()))

    @pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train", "qat_nvfp4"])
    def test_weights_are_quantized_expert_by_expert(self, name):
        g, w = gemms_of(name), case(RAGGED)[1]
        for spec, axis in ((g.fprop_weight, -1), (g.dgrad_weight, -2)):
            if spec is not None:
                q = quantize_experts(w, spec, axis)
                for expert in range(E):
                    one = ms.quantize(w[expert], spec, axis=axis)
                    assert torch.equal(q.select(0, expert).dequantize(), one.dequantize())
                    assert torch.equal(q.qdata[expert], one.qdata)

    @pytest.mark.parametrize("name", TRAINING)
    def test_experts_do_not_see_each_other(self, name):
        """Another expert's tokens, even NaN, change nothing."""
        g, (x, w, dy) = nearest(gemms_of(name)), case(RAGGED)
        before = run(g, x, w, dy, RAGGED)
        start = sum(RAGGED[:3])
        x[start:], dy[start:], w[3] = 100 * x[start:], torch.nan, 7 * w[3]
        after = run(g, x, w, dy, RAGGED)
        for a, b in zip(before, after, strict=True):
            part = slice(0, 3) if a.dim() == 3 else slice(0, start)
            assert torch.equal(a[part], b[part])
        assert after[2][3].isnan().all()


class TestAgainstHighPrecision:
    @pytest.mark.parametrize("name", TRAINING)
    def test_reaches_its_sqnr(self, name):
        sizes, dtype = (256, 0, 100, 156), torch.bfloat16
        x, w, dy = normal(512, 256, dtype=dtype), normal(4, 256, 256, seed=1, dtype=dtype) / 16, \
            normal(512, 256, seed=2, dtype=dtype)  # fmt: skip
        got = run(gemms_of(name), x, w, dy, sizes)
        exact = each(LayerGemms(), x.float(), w.float(), dy.float(), sizes)
        for a, wanted, floor in zip(got, exact, FLOOR[name], strict=True):
            assert a.dtype == dtype
            assert sqnr(a, wanted) >= floor

    def test_without_quantizers_it_is_the_plain_product(self):
        x, w, dy = case(RAGGED)
        for a, b in zip(run(LayerGemms(), x, w, dy, RAGGED), each(LayerGemms(), x, w, dy, RAGGED), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("sizes", [(32, 0, 32), (17, 0, 23)])
    def test_the_mean_over_seeds(self, sizes):
        """Against the gradients from unrounded gradient operands: within 3 standard errors for all but a few."""
        x, w, dy = normal(sum(sizes), 32), normal(3, 32, 32, seed=1), normal(sum(sizes), 32, seed=2)
        g = gemms_of("mxfp4_train")
        samples = [run(g, x, w, dy, sizes, seed=(seed, 0))[1:] for seed in range(128)]
        plain = g.model_copy(update={"dgrad_grad_output": None, "wgrad_grad_output": None, "wgrad_input": None})
        wanted_dx, h, dws, start = run(plain, x, w, dy, sizes)[1], g.wgrad_input.hadamard, [], 0
        for size in sizes:
            a, b = (torch.nn.functional.pad(t[start : start + size], (0, 0, 0, -size % 32)) for t in (x, dy))
            dws.append(ms.hadamard(b.T, h.size, h.sign) @ ms.quantize(a, g.wgrad_input, axis=-2).dequantize())
            start += size
        for found, wanted in zip(zip(*samples, strict=True), (wanted_dx, torch.stack(dws)), strict=True):
            found = torch.stack(found).double()
            spread = found.std(0) / 128**0.5
            assert float(((found.mean(0) - wanted).abs() <= 3 * spread).double().mean()) > 0.98


class TestEdges:
    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize(("rows", "experts"), [(0, 3), (20, 0), (0, 0), (20, 3)])
    def test_nothing_to_multiply(self, name, rows, experts):
        x, w, dy = normal(rows, K), normal(experts, N, K, seed=1), normal(rows, N, seed=2)
        for t, like in zip(run(gemms_of(name), x, w, dy, (0,) * experts), (dy, x, w), strict=True):
            assert t.shape == like.shape
            assert not t.any()

    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize(("k", "n"), [(1, 1), (33, 17)])
    def test_odd_sizes(self, name, k, n):
        sizes = (1, 0, 130, 7)
        x, w, dy = normal(138, k), normal(4, n, k, seed=1), normal(138, n, seed=2)
        assert all(bool(t.isfinite().all()) for t in run(gemms_of(name), x, w, dy, sizes))

    @pytest.mark.parametrize("name", TRAINING)
    def test_strides_do_not_matter(self, name):
        x, w, dy = case(RAGGED)
        dense = run(gemms_of(name), x, w, dy, RAGGED)
        strided = run(gemms_of(name), x.T.contiguous().T, w.mT.contiguous().mT, dy.T.contiguous().T, RAGGED)
        assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
        expanded = run(gemms_of(name), x, w, torch.ones(1, 1).expand_as(dy), RAGGED)
        full = run(gemms_of(name), x, w, torch.ones_like(dy), RAGGED)
        assert all(torch.equal(a, b) for a, b in zip(expanded, full, strict=True))

    @pytest.mark.parametrize("name", TRAINING)
    def test_recompute_gives_the_same_bits(self, name):
        runs = [run(gemms_of(name, save=save), *case(RAGGED), RAGGED) for save in ("quantized", "recompute")]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_a_seed_gives_the_same_numbers_and_the_counter_advances(self):
        g, counter = gemms_of("nvfp4_train"), torch.tensor([5, 8])
        runs = [run(g, *case(RAGGED), RAGGED, seed=(5, offset)) for offset in (8, 8, 10)]
        assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
        assert not torch.equal(runs[0][1], runs[2][1])
        run(g, *case(RAGGED), RAGGED, state=GemmState(rounding=counter))
        assert counter.tolist() == [5, 10]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train", "mxfp8_train_wgrad_hp"])
    def test_half_precision(self, name, dtype):
        x, w, dy = case(RAGGED)
        got = run(gemms_of(name), x.to(dtype), w.to(dtype), dy.to(dtype), RAGGED)
        for a, b in zip(got, run(LayerGemms(), x, w, dy, RAGGED), strict=True):
            assert a.dtype == dtype
            assert sqnr(a, b) > 10

    def test_autocast_takes_both_operands_and_returns_gradients_in_their_dtypes(self):
        x, w, dy = (t.requires_grad_() for t in case(RAGGED))
        with torch.autocast("cpu", torch.bfloat16):
            y = three_grouped_gemm(x, w, ends_of(RAGGED), gemms_of("mxfp8_train"))
        assert y.dtype == torch.bfloat16
        y.backward(dy.detach().bfloat16())
        assert (x.grad.dtype, w.grad.dtype) == (torch.float32,) * 2

    def test_main_grad_accumulates_in_fp32(self):
        x, w, dy = case(RAGGED, dtype=torch.bfloat16)
        for name in ("mxfp8_train", "nvfp4_train"):
            main = torch.zeros(E, N, K)
            state = GemmState(torch.tensor([3, 0]), main)
            _, dx, dw = run(gemms_of(name), x, w, dy, RAGGED, state=state)
            wanted = run(gemms_of(name), x, w, dy, RAGGED)
            assert dw is None
            assert torch.equal(dx, wanted[1])
            assert torch.equal(main.bfloat16(), wanted[2])

    def test_only_what_gradients_need(self):
        x, w, dy = case(RAGGED)
        g, ends = gemms_of("nvfp4_train"), ends_of(RAGGED)
        wanted = run(g, x, w, dy, RAGGED)
        for needs in ("x", "w"):
            a, b = x.clone().requires_grad_(needs == "x"), w.clone().requires_grad_(needs == "w")
            three_grouped_gemm(a, b, ends, g, GemmState(torch.tensor([3, 0]))).backward(dy)
            assert torch.equal((a.grad, b.grad)[needs == "w"], wanted[1 + (needs == "w")])

    def test_saved_activations_shrink(self):
        x, w, _ = case((2048, 0, 2000, 100), dtype=torch.bfloat16)
        for name, ratio in (("mxfp8_train", 1.8), ("nvfp4_train", 3.2)):
            held: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: (h.append(t), t)[1], lambda t: t):
                three_grouped_gemm(x, w.clone().requires_grad_(), ends_of((2048, 0, 2000, 100)), gemms_of(name),
                                   GemmState(torch.tensor([3, 0])))  # fmt: skip
            assert x.numel() * 2 / sum(t.numel() * t.element_size() for t in held) >= ratio

    def test_observers_see_every_operand(self):
        seen = {}
        g, (x, w, dy) = gemms_of("nvfp4_train"), case(RAGGED)
        with observe(lambda layer, gemm, operand, tensor, spec: seen.update({(gemm, operand): tensor})):
            run(g, x, w, dy, RAGGED)
        wanted = {
            ("fprop", "input"): x, ("fprop", "weight"): w, ("dgrad", "grad_output"): dy, ("dgrad", "weight"): w.mT,
            ("wgrad", "grad_output"): dy.mT, ("wgrad", "input"): x.mT,
        }  # fmt: skip
        assert seen.keys() == wanted.keys()
        assert all(torch.equal(seen[key], wanted[key]) for key in seen)

    def test_errors(self):
        x, w, _ = case(RAGGED)
        ends, g = ends_of(RAGGED), gemms_of("mxfp8_train")
        for args, message in [
            ((x.bfloat16(), w, ends, g), "weight of torch.float32"),
            ((x[:, :7], w, ends, g), "takes x"),
            ((x, w[0], ends, g), "takes x"),
            ((x, w, ends.long(), g), r"int32 \[4\]"),
            ((x, w, ends[:2], g), r"int32 \[4\]"),
            ((x, w, ends, gemms_of("nvfp4_train")), "needs a seed"),
        ]:
            with pytest.raises(InputError, match=message):
                three_grouped_gemm(*args)
        with pytest.raises(InputError, match="alignment 0"):
            three_grouped_gemm(x, w, ends, g, alignment=0)
        with pytest.raises(InputError, match="no multiples of 32"):
            three_grouped_gemm(x, w, ends, g, alignment=32)


def test_alignment_is_that_of_blocks_along_the_tokens():
    wanted = {"mxfp8_train": 32, "mxfp4_train": 32, "nvfp4_train": 16, "nvfp4_fwd_mxfp8_bwd": 32, "qat_nvfp4": 1,
              "mxfp8_train_wgrad_hp": 1}  # fmt: skip
    assert {name: alignment_of(gemms_of(name)) for name in wanted} == wanted


def test_one_scale_for_all_tokens_is_refused():
    spec = ms.find_quantizer("mxfp8").model_copy(update={"format": ms.find_format("mxfp8").variant(block="row")})
    with pytest.raises(InputError, match="one scale for all of them"):
        alignment_of(LayerGemms(wgrad_input=spec))


# -- many tokens on Hopper ---------------------------------------------------------------------------------------------

FP8 = "cublas.grouped_rows_e4m3"
MX = ("mxfp8_train", "mxfp8_train_2d", "mxfp8_train_wgrad_hp", "mxfp4_train", "qat_mxfp4")
MANY = (300, 0, 200, 1024)


def asked(name, monkeypatch):
    """What fprop and dgrad of a bfloat16 layer ask the dispatcher for, as a call on Hopper."""
    pytest.importorskip("triton")
    problems, select = [], dispatch.select_by

    def noted(op, facts, describe, *args):
        if op == "grouped_matmul":
            problems.append(dataclasses.replace(describe(*args), device="cuda", capability=(9, 0)))
        return select(op, facts, describe, *args)

    monkeypatch.setattr(dispatch, "select_by", noted)
    run(gemms_of(name), *case(MANY, after=12, dtype=torch.bfloat16), MANY)
    return problems


@pytest.mark.usefixtures("small_experts")
@pytest.mark.parametrize("name", TRAINING)
def test_pairs_of_mx_operands_go_to_fp8_tensor_cores(name, monkeypatch):
    """fprop and dgrad do, the gradient of the weights does not; exact_products keeps them where they were."""
    g, problems = gemms_of(name), asked(name, monkeypatch)
    pairs = ((g.fprop_input, g.fprop_weight), (g.dgrad_grad_output, g.dgrad_weight or g.fprop_weight))
    pairs = [pair for pair in pairs if any(pair)]
    taken = [all(spec is not None and fits(spec.format) for spec in pair) for pair in pairs]
    assert [dispatch.explain_problem(p).chosen == FP8 for p in problems] == taken[: len(problems)]
    assert name not in MX or any(taken)
    with dispatch.exact_products():
        assert all(dispatch.explain_problem(p).chosen != FP8 for p in problems)


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("alignment", [1, 4])
def test_fp8_products_of_training(name, alignment, monkeypatch):
    """The kernel itself, with torch's function and `align_rows` stood in for: operands lie as they do in training."""
    pytest.importorskip("triton")
    from microscale.kernels.cublas import grouped_rows_e4m3, rows_e4m3
    from microscale.kernels.reference import align_rows as reference
    from tests.kernels.scaled_grouped_mm_double import GroupedDouble

    g, (x, w, dy) = nearest(gemms_of(name)), case(MANY, after=12, dtype=torch.bfloat16)
    wanted, double = run(g, x, w, dy, MANY, alignment=alignment), GroupedDouble()
    monkeypatch.setattr(rows_e4m3, "align_rows", reference.align_rows)
    monkeypatch.setattr(grouped_rows_e4m3, "scaled_grouped_mm", double)
    monkeypatch.setattr(grouped_rows_e4m3, "zero_rows_after", lambda out, ends: out[int(ends[-1]) :].zero_())
    pairs = ((g.fprop_input, g.fprop_weight), (g.dgrad_grad_output, g.dgrad_weight or g.fprop_weight))

    def either(a, b, offsets, out_dtype):
        both = isinstance(a, matmul.Parts) and isinstance(b, matmul.Parts)
        kernel = grouped_rows_e4m3.grouped_matmul if both else matmul.grouped_matmul
        return kernel(a, b, offsets, out_dtype)

    with dispatch.stand_in("grouped_matmul", either):
        got = run(g, x, w, dy, MANY, alignment=alignment)
    assert len(double.calls) == sum(all(pair) for pair in pairs) > 0
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.bfloat16 and sqnr(a, b) > 45  # a rounding to bfloat16 apart
    assert torch.equal(got[2], wanted[2])
    assert not got[0][sum(MANY) :].any()
