"""Training under torch.compile: one graph per layer, the same bits, random state advanced by the compiled backward."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import microscale as ms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Pair(torch.nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)
        self.reentrant = reentrant

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=False)


def pair(name, **changes):
    """Two models alike, the second compiled."""
    torch.manual_seed(0)
    eager = Pair()
    other = copy.deepcopy(eager)
    recipe = ms.find_recipe(name).model_copy(update=changes)
    ms.prepare_training_(eager, recipe)
    ms.prepare_training_(other, recipe)
    return eager, other


def compare(eager, other, compiled, sizes=(34, 34, 40), dtype=torch.float32):
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, other)]
    for i, tokens in enumerate(sizes):
        x = torch.randn(2, tokens // 2, 64, generator=torch.Generator().manual_seed(i)).to(dtype)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = eager(first), compiled(second)
        assert torch.equal(y, z)
        for out, optimizer in zip((y, z), optimizers, strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
        assert torch.equal(first.grad, second.grad)
        for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
            for attribute in ("grad", "main_grad"):
                a, b = getattr(p, attribute, None), getattr(q, attribute, None)
                assert (a is None) == (b is None), name
                assert a is None or torch.equal(a, b), name
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(eager.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("name", ["mxfp8_train", "mxfp8_train_wgrad_hp", "nvfp4_train", "qat_nvfp4"])
def test_the_same_bits_in_one_graph(name):
    eager, other = pair(name)
    compare(eager, other, torch.compile(other, fullgraph=True, backend="aot_eager"))
    if eager.up.rounding_state is not None:
        assert int(eager.up.rounding_state[1]) == 6


@pytest.mark.parametrize("changes", [{"save": "recompute"}, {"main_grad": "fp32"}])
def test_recipe_fields(changes):
    eager, other = pair("nvfp4_train", **changes)
    compare(eager, other, torch.compile(other, fullgraph=True, backend="aot_eager"), (34, 34))


def test_the_weight_is_quantized_anew_after_each_step():
    """A cache in the graph would be that of the first step."""
    eager, other = pair("mxfp8_train")
    compare(eager, other, torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True), (34,) * 4)


def test_checkpointed_regions():
    eager, other = pair("nvfp4_train")
    other.reentrant = False
    compare(eager, other, torch.compile(other, fullgraph=True, backend="aot_eager"), (34, 34))


def test_autocast():
    eager, other = pair("mxfp8_train")
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")

    def cast(module):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return module(x)

        return call

    x = torch.randn(4, 64)
    y, z = cast(eager)(x), cast(compiled)(x)
    assert torch.equal(y, z)
    y.sum().backward()
    z.sum().backward()
    assert torch.equal(eager.up.weight.grad, other.up.weight.grad)


def test_the_schedule_switches_compiled_layers():
    torch.manual_seed(0)
    model = Pair()
    plain = copy.deepcopy(model)
    training = ms.prepare_training_(model, "nvfp4_then_bf16")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    assert not torch.equal(compiled(x), plain(x))
    training.step(0.95)
    assert torch.equal(compiled(x), plain(x))


def test_a_compiled_optimizer_is_seen_by_the_weight_cache():
    eager, other = pair("mxfp8_train")
    x = torch.randn(4, 64)
    for model, wrap in ((eager, lambda f: f), (other, lambda f: torch.compile(f, backend="aot_eager"))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = wrap(optimizer.step)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            step()
    assert torch.equal(eager(x), other(x))


def test_no_grad():
    eager, other = pair("nvfp4_train")
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(eager(torch.ones(3, 64)), compiled(torch.ones(3, 64)))


@pytest.mark.parametrize("name", ["nvfp4_train", "mxfp8_train"])
def test_blocks_compiled_one_by_one_share_a_graph(name):
    """Names, seeds and weights are no constants of the graph; past a few recompilations torch.compile would give up."""
    blocks = torch.nn.Sequential(*(Pair() for _ in range(12)))
    recipe = ms.find_recipe(name)
    last = [rule for rule in recipe.rules if rule.last is None]
    ms.prepare_training_(blocks, recipe.model_copy(update={"rules": last}))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    x = torch.randn(4, 64, requires_grad=True)
    blocks(x).sum().backward()
    assert counter.frame_count == 1
