"""What the cache of quantized weights cannot see, and how it is told: steps that are replays of a CUDA graph."""

import itertools

import pytest
import torch

import microscale as ms
from microscale.nn import set_progress


def replay(weight):
    """Change a weight as the replay of a captured optimizer step does: no counter, no hook."""
    weight.detach().untyped_storage().copy_((weight.detach() * 2).untyped_storage())


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(64, 32, bias=False)


@pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_then_bf16"])
@pytest.mark.parametrize("tell", ["step", "set_progress"])
def test_after_a_replay_the_layers_are_told(layer, name, tell):
    model = torch.nn.Sequential(layer)
    recipe = ms.find_recipe(name)
    training = ms.prepare_training_(
        model, recipe.model_copy(update={"rules": [r for r in recipe.rules if r.last is None]})
    )
    x = torch.randn(4, 64)
    before = model(x)
    version = layer.weight._version
    replay(layer.weight)
    assert layer.weight._version == version
    assert torch.equal(model(x), before)  # that is why it must be told
    if tell == "step":
        training.step(0.5)
    else:
        set_progress(model, 0.5)
    assert torch.allclose(model(x), 2 * before, rtol=1e-6)


def test_what_was_kept_is_freed(layer):
    model = torch.nn.Sequential(layer)
    ms.prepare_training_(model, "mxfp8_train")
    y = model(torch.randn(4, 64, requires_grad=True))
    assert layer.cache._made
    assert not set_progress(model, 1.0)
    assert not layer.cache._made
    y.sum().backward()  # which holds what it needs
    assert layer.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train"])
def test_an_evaluation_between_replays(layer, name):
    """As in a training loop: a captured step, a replay, an eager forward that sees the new weight."""
    model = torch.nn.Sequential(layer.cuda(), torch.nn.Linear(32, 32).cuda())
    recipe = ms.find_recipe(name)
    training = ms.prepare_training_(
        model, recipe.model_copy(update={"rules": [r for r in recipe.rules if r.last is None]})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True, capturable=True)
    x = torch.randn(64, 64, device="cuda")

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        with torch.enable_grad():
            for _ in range(3):
                step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), torch.enable_grad():
            step()
        seen = [model(x)]
        for i in range(3):
            graph.replay()
            training.step(i / 3)
            seen.append(model(x))
            fresh = ms.quantize(layer.weight, layer.gemms.fprop_weight)
            assert torch.equal(
                layer.cache.get(layer.weight, (layer.gemms.fprop_weight, None), None)[0].qdata, fresh.qdata
            )
    torch.cuda.current_stream().wait_stream(stream)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
