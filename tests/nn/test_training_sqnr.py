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


def unbiased(width: int, device: str, seeds: int = 256) -> list[tuple[float, float]]:
    """For dx and dw of nvfp4_train: the share of entries whose mean is within 3 standard errors, and of the sum of all.

    Against the gradients from unrounded gradient operands; the other operand is quantized in both.
    """
    generator = torch.Generator().manual_seed(width)
    x, w, dy = (torch.randn(n, width, generator=generator).to(device) for n in (64, width, 64))
    recipe = ms.find_recipe("nvfp4_train").resolved([])
    gemms = recipe.gemms_of(recipe.rules[-1], lambda size: (1, -1, -1, 1) * (size // 4))
    assert gemms.wgrad_input is not None and gemms.wgrad_input.hadamard is not None
    weight, h = gemms.dgrad_weight or gemms.fprop_weight, gemms.wgrad_input.hadamard
    tokens = ms.quantize(x, gemms.wgrad_input, axis=-2).dequantize()
    wanted = [dy @ ms.quantize(w, weight).dequantize(), ms.hadamard(dy.T.contiguous(), h.size, h.sign) @ tokens]
    sums = [torch.zeros(2, *t.shape, dtype=torch.float64, device=device) for t in wanted]
    totals: list[list[float]] = [[], []]
    for seed in range(seeds):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        state = GemmState(rounding=torch.tensor([seed, 0], device=device))
        three_gemm(leaves[0], leaves[1], None, gemms, state).backward(dy)
        for i, leaf in enumerate(leaves):
            assert leaf.grad is not None
            error = leaf.grad.double() - wanted[i].double()
            sums[i] += torch.stack((error, error.square()))
            totals[i].append(float(error.sum()))
    found = []
    for (total, squares), each in zip(sums, totals, strict=True):
        mean = total / seeds
        spread = ((squares / seeds - mean.square()).clamp_min(0) / (seeds - 1)).sqrt()
        of_all = torch.tensor(each, dtype=torch.float64)
        ratio = float(of_all.mean().abs() / (of_all.std() / seeds**0.5))
        found.append((float((mean.abs() <= 3 * spread).double().mean()), ratio))
    return found


@pytest.mark.parametrize("width", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_gradients_are_unbiased(width):
    """Over 256 seeds; of normal errors 99.7 % are within 3 standard errors."""
    with ms.use_backend("reference"):
        for share, whole in unbiased(width, "cpu"):
            assert share > 0.99 and whole < 3, (share, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 4096])
def test_gradients_are_unbiased_on_a_gpu(width):
    for share, whole in unbiased(width, "cuda"):
        assert share > 0.99 and whole < 3, (share, whole)


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
