"""The train suite through pytest-benchmark: `pytest benchmarks --benchmark-only`.

The same steps as `microscale bench train`, eager, timed by pytest-benchmark with a synchronising call. Results that are
committed come from the command, which replays CUDA graphs and measures the parts and the memory too.
"""

import copy

import pytest
import torch

import microscale as ms
from microscale.bench.blocks import BLOCKS, make_block
from microscale.bench.product import normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = BLOCKS[DEVICE.type][0]
RECIPES = ["bf16", *(name for name in ms.list_recipes() if ms.find_recipe(name).is_training)]


@pytest.fixture(scope="module")
def plain():
    return make_block(SIZE, DEVICE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_step(benchmark, plain, recipe):
    block = copy.deepcopy(plain)
    training = None if recipe == "bf16" else ms.prepare_training_(block, recipe, seed=0)
    shape = (SIZE.batch, SIZE.length, SIZE.dim)
    x, dy = normal(shape, DEVICE, seed=1).requires_grad_(), normal(shape, DEVICE, seed=2)

    def step():
        gradients = torch.autograd.grad(block(x), (x, *block.parameters()), dy)
        if training is not None:
            training.step(0.0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return gradients

    assert all(bool(torch.isfinite(g).all()) for g in benchmark(step))
