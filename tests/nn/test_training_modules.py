"""Models prepared for training: what changes in place, state and resume, what a training loop does to them."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import microscale as ms
from microscale.errors import InputError, RecipeError
from microscale.nn import TrainingLinear, set_progress
from microscale.tensor import BlockScaledTensor

TRAINING = [name for name in ms.list_recipes() if ms.find_recipe(name).is_training]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Model(torch.nn.Module):
    """Two blocks and a head: of 2 blocks the last is kept by recipes that keep the last blocks."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.lm_head = torch.nn.Linear(64, 32, bias=False)
        self.reentrant = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.lm_head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int, tokens: int = 24) -> torch.Tensor:
    return torch.randn(2, tokens // 2, 64, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, grow=lambda y: y.square().mean()):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = grow(model(batch(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def grads(model, x=None):
    model.zero_grad()
    model(batch(0) if x is None else x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestPrepare:
    def test_in_place(self, model):
        before, layer = dict(model.named_parameters()), model.blocks[0].up
        called = []
        layer.register_forward_hook(lambda *args: called.append(1))
        made = ms.prepare_training_(model, "nvfp4_train")
        assert list(made.layers) == ["blocks.0.up", "blocks.0.down"]
        assert made.layers["blocks.0.up"] is layer is model.blocks[0].up
        assert isinstance(layer, TrainingLinear)
        assert isinstance(layer, torch.nn.Linear)
        assert type(model.blocks[1].up) is torch.nn.Linear  # of the last blocks
        assert type(model.lm_head) is torch.nn.Linear
        assert all(after is before[name] for name, after in model.named_parameters())
        model(batch(0))
        assert called == [1]
        assert "nvfp4_train" in repr(layer)

    def test_the_table_says_what_and_why(self, model):
        text = str(ms.prepare_training_(model, "nvfp4_train"))
        assert "lm_head" in text
        assert "kept in high precision" in text
        assert "fprop.weight=nvfp4(tile=16x16)" in text
        assert "2 of 5 linear layers" in text

    @pytest.mark.parametrize("name", TRAINING)
    def test_every_recipe_trains(self, model, name):
        ms.prepare_training_(model, name)
        losses = train(model, adam(model), range(8))
        assert losses[-1] < 0.7 * losses[0]

    def test_subclasses_keep_their_methods(self):
        class Named(torch.nn.Linear):
            def hello(self):
                return "hello"

        model = torch.nn.Sequential(Named(32, 32))
        ms.prepare_training_(model, "mxfp8_train")
        assert isinstance(model[0], TrainingLinear)
        assert isinstance(model[0], Named)
        assert copy.deepcopy(model)[0].hello() == "hello"
        ms.finish_training_(model)
        assert type(model[0]) is Named

    def test_attention_and_own_forwards_stay(self):
        layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        made = ms.prepare_training_(layer, "mxfp8_train")
        assert set(made.layers) == {"linear1", "linear2"}
        called = []
        layer.linear2.register_forward_hook(lambda *args: called.append(1))
        with torch.no_grad():  # torch's fused path would read the weights past the modules
            layer.eval()(torch.randn(1, 5, 32))
        assert called

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ("nvfp4_dynamic", "has no backward GEMM"),
            ({"name": "r", "quantizers": {"q": "mxfp8"}, "rules": [
                {"match": "nothing", "dgrad": {"grad_output": "q", "weight": "q"}}]}, "matches none"),
            ({"name": "r", "quantizers": {"q": "mxfp8"}, "rules": [
                {"match": "x", "optional": True, "dgrad": {"grad_output": "q", "weight": "q"}}]}, "no rule names"),
        ],
    )  # fmt: skip
    def test_refused_before_anything_changes(self, model, recipe, message):
        with pytest.raises(RecipeError, match=message):
            ms.prepare_training_(model, recipe)
        assert not any(isinstance(m, TrainingLinear) for m in model.modules())

    def test_twice_and_meta_and_nothing(self, model):
        ms.prepare_training_(model, "mxfp8_train")
        with pytest.raises(RecipeError, match="prepared for training already"):
            ms.prepare_training_(model, "mxfp8_train")
        with torch.device("meta"):
            bare = torch.nn.Sequential(torch.nn.Linear(32, 32))
        with pytest.raises(InputError, match="meta device"):
            ms.prepare_training_(bare, "mxfp8_train")
        with pytest.raises(RecipeError, match=r"no linear layer|matches nothing"):
            ms.prepare_training_(torch.nn.Sequential(torch.nn.ReLU()), "mxfp8_train")
        with pytest.raises(InputError, match=r"takes an nn\.Module"):
            ms.prepare_training_("model", "mxfp8_train")


class TestState:
    def test_a_seed_gives_the_same_run_twice(self):
        runs = []
        for seed in (5, 5, 6):
            torch.manual_seed(0)
            model = Model()
            ms.prepare_training_(model, "nvfp4_train", seed=seed)
            runs.append((train(model, adam(model), range(4)), model.state_dict()))
        assert runs[0][0] == runs[1][0]
        assert same(runs[0][1], runs[1][1])
        assert runs[0][0] != runs[2][0]

    def test_layers_draw_apart_and_share_signs(self, model):
        layers = ms.prepare_training_(model, "nvfp4_train").layers.values()
        assert len({int(layer.rounding_state[0]) for layer in layers}) == len(layers)
        assert len({tuple(layer.hadamard_sign.tolist()) for layer in layers}) == 1
        signs = {layer.gemms.wgrad_input.hadamard.sign for layer in layers}
        assert len(signs) == 1
        assert len(set(signs.pop())) == 2

    def test_resume_is_bit_exact(self, model, tmp_path):
        ms.prepare_training_(model, "nvfp4_train", seed=1)
        optimizer = adam(model)
        train(model, optimizer, range(3))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
        wanted = train(model, optimizer, range(3, 6))

        torch.manual_seed(9)
        again = Model()
        ms.prepare_training_(again, "nvfp4_train", seed=77)  # what the checkpoint holds wins
        optimizer = adam(again)
        saved = torch.load(tmp_path / "c.pt", weights_only=True)
        again.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        assert train(again, optimizer, range(3, 6)) == wanted
        assert same(again.state_dict(), model.state_dict())

    def test_plain_checkpoints_load_strictly_and_keep_the_seed(self, model):
        plain = copy.deepcopy(model.state_dict())
        layer = ms.prepare_training_(model, "nvfp4_train").layers["blocks.0.up"]
        state, sign = layer.rounding_state.clone(), layer.hadamard_sign.clone()
        model.load_state_dict(plain)
        assert torch.equal(layer.rounding_state, state)
        assert torch.equal(layer.hadamard_sign, sign)
        del plain["blocks.0.up.weight"]
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"blocks.0.up.weight\""):
            model.load_state_dict(plain)

    @pytest.mark.parametrize("name", ["mxfp8_train", "qat_nvfp4"])
    def test_recipes_without_random_numbers_add_no_state(self, model, name):
        before = set(model.state_dict())
        ms.prepare_training_(model, name)
        assert set(model.state_dict()) == before

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_train_alike(self, model, clone):
        ms.prepare_training_(model, "nvfp4_train")
        train(model, adam(model), range(1))
        other = clone(model)
        assert train(other, adam(other), range(2)) == train(model, adam(model), range(2))

    def test_dtype_moves_keep_the_state(self, model):
        layer = ms.prepare_training_(model, "nvfp4_train").layers["blocks.0.up"]
        before = layer.rounding_state.clone()
        model.to(torch.bfloat16)
        assert layer.rounding_state.dtype == torch.int64
        assert torch.equal(layer.rounding_state, before)
        assert model(batch(0).bfloat16()).dtype == torch.bfloat16


class TestForward:
    """The forward in training is the forward of the inference recipe with the same quantizers."""

    @pytest.mark.parametrize(("name", "inference"), [("qat_nvfp4", "nvfp4_dynamic"), ("qat_mxfp4", "mxfp4_dynamic")])
    def test_qat_converts_to_the_same_bytes(self, model, name, inference):
        ms.prepare_training_(model, name)
        train(model, adam(model), range(2))
        layer = model.blocks[0].up
        layer.cache.drop()
        with torch.no_grad():
            trained = model(batch(0))
        (seen,) = layer.cache._made.values()
        bias = layer.bias.detach().clone()
        plan = ms.finish_training_(model)
        assert plan.recipe.name == inference
        assert isinstance(layer.weight, BlockScaledTensor)
        assert torch.equal(layer.weight.qdata, seen.qdata)
        assert torch.equal(layer.weight.scale, seen.scale)
        assert torch.equal(layer.bias, bias)
        with torch.no_grad():
            assert torch.equal(model(batch(0)), trained)

    def test_autocast_quantizes_the_weight_itself(self, model):
        ms.prepare_training_(model, "qat_nvfp4")
        layer = model.blocks[0].up
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer(batch(0))
        (seen,) = layer.cache._made.values()
        assert torch.equal(seen.qdata, ms.quantize(layer.weight, "nvfp4").qdata)

    def test_qat_trains_biases(self, model):
        ms.prepare_training_(model, "qat_nvfp4")
        before = model.blocks[0].up.bias.detach().clone()
        train(model, adam(model), range(1))
        assert not torch.equal(model.blocks[0].up.bias, before)

    def test_autocast_takes_both_operands_and_returns_gradients_in_their_dtypes(self, model):
        ms.prepare_training_(model, "mxfp8_train")
        x = batch(0).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model.blocks[0].up(x)
        assert y.dtype == torch.bfloat16
        y.square().sum().backward()
        layer = model.blocks[0].up
        assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (torch.float32,) * 3

    def test_without_autocast_dtypes_must_agree(self, model):
        ms.prepare_training_(model, "mxfp8_train")
        with pytest.raises(InputError, match=r"weight of torch\.float32"):
            model(batch(0).bfloat16())


class TestLoop:
    @pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train", "qat_nvfp4"])
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("save", ["quantized", "recompute"])
    def test_activation_checkpointing_changes_nothing(self, name, reentrant, save):
        found = []
        for checkpointed in (None, reentrant):
            torch.manual_seed(0)
            model = Model(checkpointed)
            ms.prepare_training_(model, ms.find_recipe(name).model_copy(update={"save": save}))
            found.append(grads(model, batch(0).requires_grad_()))
        assert same(*found)

    def test_gradients_accumulate(self, model):
        ms.prepare_training_(model, "mxfp8_train")
        first, second = grads(model, batch(0)), grads(model, batch(1))
        model.zero_grad()
        for step in (0, 1):
            model(batch(step)).square().mean().backward()
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, first[name] + second[name])

    def test_main_grad_accumulates_in_fp32(self, model):
        model.to(torch.bfloat16)
        plain = copy.deepcopy(model)
        made = ms.prepare_training_(model, ms.find_recipe("mxfp8_train").model_copy(update={"main_grad": "fp32"}))
        ms.prepare_training_(plain, "mxfp8_train")
        x = batch(0).bfloat16()
        for _ in range(3):
            model(x).float().square().mean().backward()
        plain(x).float().square().mean().backward()
        wanted = {name: p.grad for name, p in plain.named_parameters()}
        for layer, other in zip(made.layers.values(), ("blocks.0.up", "blocks.0.down"), strict=False):
            assert layer.weight.grad is None
            assert layer.weight.main_grad.dtype == torch.float32
            assert torch.equal((layer.weight.main_grad / 3).bfloat16(), wanted[f"{other}.weight"])
        assert torch.equal(model.lm_head.weight.grad.isfinite(), torch.ones(32, 64, dtype=torch.bool))
        made.zero_main_grad_()
        assert not model.blocks[0].up.weight.main_grad.any()
        copied = copy.deepcopy(model)  # parameters lose their attributes
        copied(x).float().square().mean().backward()
        assert copied.blocks[0].up.weight.main_grad.any()

    def test_frozen_weights_and_inputs(self, model):
        ms.prepare_training_(model, "nvfp4_train")
        wanted = grads(model)
        state = {name: b.clone() for name, b in model.named_buffers()}
        ms.finish_training_(model, "high_precision")
        ms.prepare_training_(model, "nvfp4_train")
        model.blocks[0].up.weight.requires_grad_(False)
        found = grads(model)
        assert "blocks.0.up.weight" not in found
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        assert all(torch.equal(b, state[name]) for name, b in model.named_buffers())

    def test_shared_weights(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        model[2].weight = model[0].weight
        ms.prepare_training_(model, "mxfp8_train")
        assert model[2].weight is model[0].weight
        x, weight = batch(0), model[0].weight
        model(x).square().mean().backward()
        got = weight.grad.clone()
        untied = copy.deepcopy(model)
        untied[2].weight = torch.nn.Parameter(weight.detach().clone())
        untied.zero_grad()
        untied(x).square().mean().backward()
        assert torch.equal(got, untied[0].weight.grad + untied[2].weight.grad)

    def test_a_head_tied_to_an_embedding(self, tied, tokens):
        before = tied.embed.weight
        recipe = {"name": "r", "quantizers": {"q": "mxfp8"}, "rules": [
            {"match": "*", "wgrad": {"grad_output": "q", "input": "q"}}]}  # fmt: skip
        assert "lm_head" in ms.prepare_training_(tied, recipe).layers
        assert tied.embed.weight is tied.lm_head.weight is before
        tied(tokens).square().mean().backward()
        assert before.grad is not None

    def test_a_nan_loss_reaches_every_gradient(self, model):
        ms.prepare_training_(model, "nvfp4_train")
        (model(batch(0)).sum() * torch.nan).backward()
        for p in model.parameters():
            assert p.grad.isnan().all()

    def test_no_tokens(self, model):
        ms.prepare_training_(model, "nvfp4_train")
        model(torch.zeros(2, 0, 64)).sum().backward()
        assert not any(p.grad.any() for p in model.parameters())


class TestWeightCache:
    def counted(self, monkeypatch, model):
        calls = []
        real = ms.ops.quantize_both

        def counting(t, *args, **kwargs):
            calls.append(t) if isinstance(t, torch.nn.Parameter) else None
            return real(t, *args, **kwargs)

        monkeypatch.setattr(ms.ops, "quantize_both", counting)
        return calls

    def test_once_a_step(self, monkeypatch, model):
        ms.prepare_training_(model, "mxfp8_train")
        calls, optimizer = self.counted(monkeypatch, model), adam(model)
        for _ in range(2):
            for micro in range(3):
                model(batch(micro)).square().mean().backward()
            optimizer.step()
        assert len(calls) == 2 * 3  # the first layer's input wants no gradient: its weight is quantized one way

    @pytest.mark.parametrize("how", ["no_grad", "data", "load", "swap"])
    def test_sees_changes(self, model, how):
        ms.prepare_training_(model, "mxfp8_train")
        layer, x = model.blocks[0].up, batch(0)
        before = layer(x)
        if how == "no_grad":
            with torch.no_grad():
                layer.weight.mul_(2)
        elif how == "load":
            layer.load_state_dict({"weight": layer.weight.detach() * 2, "bias": layer.bias.detach()})
        elif how == "swap":
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
        else:

            class Old(torch.optim.Optimizer):
                def step(self):
                    for group in self.param_groups:
                        for p in group["params"]:
                            p.data.mul_(2)

            Old([layer.weight], {}).step()
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-5)

    def test_inference_mode(self, model):
        ms.prepare_training_(model, "nvfp4_train")
        with torch.inference_mode():
            first = model(batch(0))
        assert torch.equal(first, model(batch(0)))
        model(batch(0)).sum().backward()

    def test_step_frees(self, model):
        made = ms.prepare_training_(model, "mxfp8_train")
        y = model(batch(0))
        assert made.layers["blocks.0.up"].cache._made
        made.step(0.5)
        assert not made.layers["blocks.0.up"].cache._made
        y.sum().backward()  # the backward holds what it needs


class TestSchedule:
    def test_switches_at_its_share(self, model):
        plain = copy.deepcopy(model)
        made = ms.prepare_training_(model, "nvfp4_then_bf16")
        x = batch(0)
        assert not made.step(0.5)
        assert not torch.equal(model(x), plain(x))
        assert made.step(0.9)
        assert "high precision" in repr(model.blocks[0].up)
        assert same(grads(model, x), grads(plain, x))
        assert set_progress(model, 0.1)
        assert not torch.equal(model(x), plain(x))

    def test_other_recipes_have_none(self, model):
        made = ms.prepare_training_(model, "mxfp8_train")
        assert not made.step(1.0)
        with pytest.raises(InputError, match="from 0 to 1"):
            made.step(1.5)

    def test_main_grad_goes_on(self, model):
        spec = ms.find_recipe("nvfp4_then_bf16").model_copy(update={"main_grad": "fp32"})
        plain = copy.deepcopy(model)
        made = ms.prepare_training_(model, spec)
        made.step(1.0)
        wanted, _ = grads(plain), grads(model)
        assert model.blocks[0].up.weight.grad is None
        assert torch.allclose(model.blocks[0].up.weight.main_grad, wanted["blocks.0.up.weight"], rtol=1e-5, atol=1e-8)


class TestFinish:
    def test_back_to_what_it_was(self, model):
        keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        spec = ms.find_recipe("nvfp4_train").model_copy(update={"main_grad": "fp32"})
        ms.prepare_training_(model, spec)
        assert ms.finish_training_(model) is None
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        assert not hasattr(model.blocks[0].up.weight, "main_grad")
        ms.prepare_training_(model, "mxfp8_train")

    def test_to_another_recipe(self, model):
        ms.prepare_training_(model, "qat_nvfp4")
        assert ms.finish_training_(model, "mxfp8_dynamic").recipe.name == "mxfp8_dynamic"
        with pytest.raises(RecipeError, match="no training layers"):
            ms.finish_training_(model)
