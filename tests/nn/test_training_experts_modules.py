"""Models with stacked experts prepared for training, and the sorting of tokens that they need."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import microscale as ms
from microscale.errors import InputError, RecipeError
from microscale.nn import (
    GroupedLinear,
    TokenGroups,
    TrainingGroupedLinear,
    quantize_experts,
    set_progress,
    three_gemm,
)
from microscale.nn.token_groups import pad_groups
from microscale.nn.training_linear import TrainingLayer

TRAINING = [name for name in ms.list_recipes() if ms.find_recipe(name).is_training]


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = GroupedLinear(4, 32, 64), GroupedLinear(4, 32, 32)

    def forward(self, rows: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
        alignment = self.gate_up_proj.alignment
        gate, up = self.gate_up_proj(rows, groups.offsets, alignment).chunk(2, -1)
        return self.down_proj(torch.nn.functional.silu(gate) * up, groups.offsets)


class Layer(torch.nn.Module):
    """A residual mixture of two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = torch.nn.Linear(32, 4, bias=False), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, chosen = self.gate(x).topk(2)
        groups = TokenGroups.of(chosen, 4, self.experts.gate_up_proj.alignment)
        rows = self.experts(groups.permute(x), groups)
        return x + groups.combine(rows, logits.softmax(-1))


class Model(torch.nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers, self.reentrant = torch.nn.ModuleList(Layer() for _ in range(2)), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int) -> torch.Tensor:
    return torch.randn(40, 32, generator=torch.Generator().manual_seed(step))


def train(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (model(batch(step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def without_last(name, **changes):
    """A recipe that keeps no blocks in high precision."""
    recipe = ms.find_recipe(name)
    return recipe.model_copy(update={"rules": tuple(r for r in recipe.rules if r.last is None), **changes})


class TestPrepare:
    def test_in_place(self, model):
        before, layer = dict(model.named_parameters()), model.layers[0].experts.down_proj
        made = ms.prepare_training_(model, "nvfp4_train")
        assert list(made.layers) == ["layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"]  # gates are kept
        assert made.layers["layers.0.experts.down_proj"] is layer
        assert isinstance(layer, TrainingGroupedLinear)
        assert isinstance(layer, GroupedLinear)
        assert not isinstance(layer, torch.nn.Linear)
        assert type(model.layers[1].experts.down_proj) is GroupedLinear  # of the last blocks
        assert all(after is before[name] for name, after in model.named_parameters())
        assert "experts=4, in_features=32, out_features=32, recipe=nvfp4_train" in repr(layer)
        text = str(made)
        assert "layers.0.experts.gate_up_proj  4x64x32" in text
        assert "2 of 6 linear layers" in text

    @pytest.mark.parametrize("name", TRAINING)
    def test_every_recipe_trains(self, model, name):
        ms.prepare_training_(model, name)
        losses = train(model, range(16))
        assert losses[-1] < 0.7 * losses[0]

    def test_rules_match_experts_alone(self, model):
        recipe = {"name": "r", "quantizers": {"q": "mxfp8"}, "rules": [
            {"match": "*.down_proj", "dgrad": {"grad_output": "q", "weight": "q"}}]}  # fmt: skip
        assert len(ms.prepare_training_(model, recipe).layers) == 2

    def test_what_stays(self, model):
        class Own(GroupedLinear):
            def forward(self, x, offsets):
                return x

        plain, own, computed, replaced = GroupedLinear(2, 32, 32), Own(2, 32, 32), *(GroupedLinear(2, 32, 32),) * 2
        computed = torch.nn.utils.parametrizations.weight_norm(GroupedLinear(2, 32, 32))
        replaced = GroupedLinear(2, 32, 32)
        replaced.forward = lambda x, offsets: x
        made = ms.prepare_training_(torch.nn.ModuleList([plain, own, computed, replaced]), "mxfp8_train")
        reasons = [row.reason for row in made.rows]
        assert reasons[0] == ""
        assert ["forward of its own" in reasons[1], "computed" in reasons[2], "replaced" in reasons[3]] == [True] * 3

    def test_refused_before_anything_changes(self, model):
        row = ms.find_format("mxfp8").variant(block="row")
        recipe = {"name": "r", "quantizers": {"q": {"format": row}}, "rules": [
            {"match": "*", "wgrad": {"grad_output": "q", "input": "q"}}]}  # fmt: skip
        with pytest.raises(InputError, match="one scale for all of them"):
            ms.prepare_training_(model, recipe)
        assert not any(isinstance(m, TrainingLayer) for m in model.modules())
        with torch.device("meta"):
            bare = torch.nn.ModuleList([GroupedLinear(2, 32, 32)])
        with pytest.raises(InputError, match="meta device"):
            ms.prepare_training_(bare, "mxfp8_train")
        ms.prepare_training_(model, "mxfp8_train")
        with pytest.raises(RecipeError, match="prepared for training already"):
            ms.prepare_training_(model, "mxfp8_train")

    def test_drawn_as_linear_layers_are(self):
        layer = GroupedLinear(3, 100, 50, dtype=torch.bfloat16)
        assert layer.weight.shape == (3, 50, 100)
        assert layer.weight.dtype == torch.bfloat16
        assert 0.099 < float(layer.weight.detach().abs().max()) <= 0.1001
        assert layer.alignment == 1


class TestState:
    def test_resume_is_bit_exact(self, model, tmp_path):
        ms.prepare_training_(model, "nvfp4_train", seed=1)
        train(model, range(2))
        torch.save(model.state_dict(), tmp_path / "c.pt")
        wanted = train(model, range(2, 4))
        torch.manual_seed(9)
        again = Model()
        ms.prepare_training_(again, "nvfp4_train", seed=77)  # what the checkpoint holds wins
        again.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
        assert train(again, range(2, 4)) == wanted
        assert same(again.state_dict(), model.state_dict())

    def test_a_seed_gives_the_same_run_twice(self):
        runs = []
        for seed in (5, 5, 6):
            torch.manual_seed(0)
            model = Model()
            ms.prepare_training_(model, "mxfp4_train", seed=seed)
            runs.append(train(model, range(3)))
        assert runs[0] == runs[1] != runs[2]

    def test_plain_checkpoints_load_strictly(self, model):
        plain = copy.deepcopy(model.state_dict())
        ms.prepare_training_(model, "nvfp4_train")
        model.load_state_dict(plain)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_train_alike(self, model, clone):
        ms.prepare_training_(model, "nvfp4_train")
        train(model, range(1))
        other = clone(model)
        assert type(other.layers[0].experts.down_proj) is TrainingGroupedLinear
        assert train(other, range(2)) == train(model, range(2))

    def test_subclasses_keep_their_methods(self):
        model = torch.nn.ModuleList([Named(2, 32, 32)])
        ms.prepare_training_(model, "mxfp8_train")
        assert isinstance(model[0], TrainingGroupedLinear)
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(made[0]) is type(model[0])
            assert made[0].hello() == "hello"
        ms.finish_training_(model)
        assert type(model[0]) is Named

    def test_back_to_what_it_was(self, model):
        keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        ms.prepare_training_(model, without_last("nvfp4_train", main_grad="fp32"))
        assert ms.finish_training_(model) is None
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        assert not hasattr(model.layers[0].experts.down_proj.weight, "main_grad")


class Named(GroupedLinear):
    def hello(self):
        return "hello"


class TestLoop:
    @pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train"])
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("save", ["quantized", "recompute"])
    def test_activation_checkpointing_changes_nothing(self, name, reentrant, save):
        found = []
        for checkpointed in (None, reentrant):
            torch.manual_seed(0)
            model = Model(checkpointed)
            ms.prepare_training_(model, without_last(name, save=save))
            model(batch(0).requires_grad_()).square().mean().backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        assert same(*found)

    def test_the_schedule_switches_to_the_plain_layer(self, model):
        plain, x = copy.deepcopy(model), batch(0)
        made = ms.prepare_training_(model, without_last("nvfp4_then_bf16"))
        assert model.layers[0].experts.down_proj.alignment == 16
        assert not torch.equal(model(x), plain(x))
        assert made.step(0.95)
        assert model.layers[0].experts.down_proj.alignment == 1
        assert torch.equal(model(x), plain(x))
        assert set_progress(model, 0.1)

    def test_main_grad(self, model):
        plain = copy.deepcopy(model)
        made = ms.prepare_training_(model, without_last("mxfp8_train", main_grad="fp32"))
        ms.prepare_training_(plain, without_last("mxfp8_train"))
        for m in (model, model, plain):
            m(batch(0)).square().mean().backward()
        a, b = model.layers[0].experts.down_proj.weight, plain.layers[0].experts.down_proj.weight
        assert a.grad is None
        assert torch.equal(a.main_grad, 2 * b.grad)
        made.zero_main_grad_()
        assert not a.main_grad.any()

    def test_weights_are_quantized_once_a_step(self, model):
        made = ms.prepare_training_(model, without_last("nvfp4_train"))
        layer = made.layers["layers.0.experts.down_proj"]
        model(batch(0)).sum().backward()
        kept = dict(layer.cache._made)
        assert len(kept) == 2
        model(batch(1)).sum().backward()
        assert all(layer.cache._made[key] is value for key, value in kept.items())
        train(model, range(1))
        model(batch(0))
        assert not any(layer.cache._made.get(key) is value for key, value in kept.items())

    def test_weights_that_are_gathered_anew_are_not_kept(self, model):
        """As `fully_shard` does, to the same memory with the same version; it marks the modules."""
        made = ms.prepare_training_(model, without_last("nvfp4_train"))
        for layer in made.layers.values():
            layer._is_fsdp_managed_module = True
        model(batch(0)).sum().backward()
        assert not any(layer.cache._made for layer in made.layers.values())

    @pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train", "qat_nvfp4"])
    def test_compiled(self, name):
        """The same bits from one graph, and the counter advances in it."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        eager = Layer()
        other = copy.deepcopy(eager)
        for m in (eager, other):
            ms.prepare_training_(m, without_last(name))
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for step in range(2):
            for m in (eager, compiled):
                m.zero_grad()
                m(batch(step)).square().sum().backward()
            for p, q in zip(eager.parameters(), other.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
        assert all(torch.equal(a, b) for a, b in zip(eager.buffers(), other.buffers(), strict=True))
        torch._dynamo.reset()

    def test_weight_only_experts(self):
        """A quantized weight in the plain layer: the product of what its bytes say."""
        layer, x, ends = GroupedLinear(3, 64, 48), torch.randn(50, 64, requires_grad=True), torch.tensor([20, 20, 50])
        q = quantize_experts(layer.weight, ms.find_quantizer("nvfp4"))
        wanted = GroupedLinear(3, 64, 48)
        wanted.weight = torch.nn.Parameter(q.dequantize())
        layer.weight = torch.nn.Parameter(q, requires_grad=False)
        y, z = (m(x, ends.to(torch.int32)) for m in (layer, wanted))
        assert torch.allclose(y, z, rtol=1e-5, atol=1e-6)
        for out in (y, z):
            x.grad = None
            out.sum().backward()
            dx = x.grad if out is y else dx  # noqa: F821
        assert torch.allclose(dx, x.grad, rtol=1e-5, atol=1e-6)


class TestTokenGroups:
    @pytest.mark.parametrize("alignment", [1, 8, 32])
    @pytest.mark.parametrize(("tokens", "top", "experts"), [(40, 2, 4), (1, 1, 1), (0, 2, 3), (33, 3, 9), (16, 1, 7)])
    def test_each_row_is_with_its_expert(self, tokens, top, experts, alignment):
        random = torch.Generator().manual_seed(0)
        chosen = torch.rand(tokens, experts, generator=random).topk(top).indices
        groups, x = TokenGroups.of(chosen, experts, alignment), torch.randn(tokens, 16, generator=random)
        assert groups.offsets.dtype == torch.int32
        assert not (groups.offsets % alignment).any()
        assert int(groups.offsets[-1]) == len(groups.source)
        rows, place = groups.permute(x), groups.place.view(tokens, top)
        for token in range(tokens):
            for choice in range(top):
                row = int(place[token, choice])
                assert int((groups.offsets <= row).sum()) == int(chosen[token, choice])
                assert torch.equal(rows[row], x[token])
        assert len(groups.blank) == len(groups.source) - tokens * top
        assert not rows[groups.blank].any()
        assert len(set(groups.blank.tolist()) | set(groups.place.tolist())) == len(groups.source)

    @pytest.mark.parametrize("alignment", [1, 16])
    def test_gradients_are_those_of_indexing(self, alignment):
        chosen = torch.rand(20, 5, generator=torch.Generator().manual_seed(1)).topk(3).indices
        groups = TokenGroups.of(chosen, 5, alignment)
        x, weights, dy = torch.randn(20, 8), torch.rand(20, 3), torch.randn(20, 8)
        found = []
        for mine in (True, False):
            a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
            y = groups.combine(groups.permute(a).square(), b) if mine else (a.square()[:, None] * b[..., None]).sum(1)
            y.backward(dy)
            found.append((y.detach(), a.grad, b.grad))
        for first, second in zip(*found, strict=True):
            torch.testing.assert_close(first, second)

    @pytest.mark.parametrize("unit", [1, 4, 24, 32])
    @pytest.mark.parametrize(("sizes", "after"), [((5, 0, 24, 1), 0), ((0, 0), 7), ((32, 64), 0), ((3,), 2)])
    def test_padded_groups(self, sizes, after, unit):
        rows, ends = sum(sizes) + after, torch.tensor(sizes).cumsum(0)
        source, blank, padded, shift = pad_groups(ends.to(torch.int32), rows, unit)
        assert len(source) % unit == 0
        assert len(blank) == len(source) - rows
        blanks, start = set(blank.tolist()), 0
        for expert, size in enumerate(sizes):
            place = int(padded[expert]) - -(-size // unit) * unit
            assert place % unit == 0
            assert int(shift[expert]) == place - start
            assert source[place : place + size].tolist() == list(range(start, start + size))
            assert set(range(place + size, int(padded[expert]))) <= blanks
            start += size
            assert not blanks & set(range(place, place + size))

    def test_errors(self):
        for chosen, experts, alignment in [
            (torch.zeros(3, dtype=torch.int64), 2, 1), (torch.zeros(3, 1), 2, 1),
            (torch.zeros(3, 1, dtype=torch.int64), 0, 1), (torch.zeros(3, 1, dtype=torch.int64), 2, 0),
        ]:  # fmt: skip
            with pytest.raises(InputError, match="chosen is int64"):
                TokenGroups.of(chosen, experts, alignment)


def test_a_list_of_linear_layers_trains_the_same():
    """Experts as nn.Linear modules, which need nothing of this, have the same gradients."""
    torch.manual_seed(0)
    layer, x = GroupedLinear(2, 64, 32), torch.randn(100, 64)
    ms.prepare_training_(torch.nn.ModuleList([layer]), "mxfp8_train")
    layer(x, torch.tensor([37, 100], dtype=torch.int32)).square().sum().backward()
    for expert, part in enumerate((slice(0, 37), slice(37, 100))):
        weight = layer.weight.detach()[expert].clone().requires_grad_()
        three_gemm(x[part], weight, None, layer.gemms).square().sum().backward()
        assert torch.equal(layer.weight.grad[expert], weight.grad)
