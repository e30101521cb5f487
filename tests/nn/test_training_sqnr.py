"""How far quantized training is from high precision, in layers as wide as those of real models: the issue's numbers.

`test_training.py` has every recipe at 256; here are the widths up to 4096 of the recipes whose numbers are promised.
On the CPU the widest layer sees few tokens: the ratio of signal to noise does not depend on how many there are.
"""

import pytest
import torch

import microscale as ms
from microscale.nn import GemmState, three_gemm

# dB: output, input gradient, weight gradient. nvfp4: an output is promised, gradients are unbiased instead.
FLOOR = {
    "mxfp8_train": (27, 25, 24),
    "mxfp8_train_2d": (27, 25, 24),
    "mxfp8_train_wgrad_hp": (27, 25, 34),
    "nvfp4_train": (15, 13, 13),
}
BIAS_FLOOR = 40


def sqnr(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum().clamp_min(1e-300)))


def levels(name: str, tokens: int, inputs: int, outputs: int, device: str) -> tuple[list[float], float]:
    """SQNR in dB of output, input and weight gradient, and of the bias gradient; everything in bfloat16."""
    generator = torch.Generator().manual_seed(inputs + outputs)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    x, w, b, dy = (
        normal(tokens, inputs),
        normal(outputs, inputs) / inputs**0.5,
        normal(outputs) / 10,  # which is not quantized: a large one would raise the output's level
        normal(tokens, outputs),
    )
    recipe = ms.find_recipe(name).resolved([])
    gemms = recipe.gemms_of(recipe.rules[-1], lambda size: (1, -1, -1, 1) * (size // 4))
    state = GemmState(rounding=torch.tensor([3, 0], device=device))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y = three_gemm(*leaves, gemms, state)
    y.backward(dy)
    wanted = x.float() @ w.float().T + b.float(), dy.float() @ w.float(), dy.float().T @ x.float()
    got = y.detach(), leaves[0].grad, leaves[1].grad
    bias = sqnr(leaves[2].grad, dy.float().sum(0))
    return [sqnr(a, exact) for a, exact in zip(got, wanted, strict=True)], bias


@pytest.mark.parametrize("name", FLOOR)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(256, 256, 1024), (128, 1024, 1024), pytest.param(64, 4096, 4096, marks=pytest.mark.slow)],
)
def test_gradients_against_high_precision(name, tokens, inputs, outputs):
    with ms.use_backend("reference"):
        found, bias = levels(name, tokens, inputs, outputs, "cpu")
    assert all(level >= floor for level, floor in zip(found, FLOOR[name], strict=True)), found
    assert bias >= BIAS_FLOOR


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLOOR)
@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_on_a_gpu(name, width):
    found, bias = levels(name, 4096, width, width, "cuda")
    assert all(level >= floor for level, floor in zip(found, FLOOR[name], strict=True)), found
    assert bias >= BIAS_FLOOR
