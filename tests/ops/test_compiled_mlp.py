"""An MLP with every recipe for inference: `torch.compile(fullgraph=True)` gives what eager gives."""

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.testing import assert_same_bits

RECIPES = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]


class Mlp(torch.nn.Module):
    def __init__(self, size, hidden, device):
        super().__init__()
        self.gate = torch.nn.Linear(size, hidden, bias=False)
        self.up = torch.nn.Linear(size, hidden, bias=False)
        self.down = torch.nn.Linear(hidden, size)
        self.to(device, torch.bfloat16)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def made(recipe, device, size, hidden, prepare):
    torch.manual_seed(7)
    model, x = Mlp(size, hidden, device), torch.randn(6, size, device=device).bfloat16()
    ms.quantize_(model, recipe, calibrate=[x])
    if prepare:
        ms.prepare_(model)
    return model.eval(), x


def test_all_recipes_are_here():
    assert len(RECIPES) >= 10 and "mxfp4_fp8" in RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_graph_equals_eager(recipe):
    torch.compiler.reset()
    model, x = made(recipe, "cpu", 64, 96, False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_graph_equals_eager_on_a_gpu(recipe, prepare):
    """Bit for bit where no arithmetic is Inductor's: silu and the product of halves are rounded apart there."""
    torch.compiler.reset()
    model, x = made(recipe, "cuda", 256, 512, prepare)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), dispatch.strict():
        assert_same_bits(compiled(x), model(x))
    torch.compiler.reset()
    with torch.no_grad():
        inductor, eager = torch.compile(model, fullgraph=True)(x), model(x)
        torch.testing.assert_close(inductor, eager, rtol=0.05, atol=0.05 * float(eager.abs().max()))
