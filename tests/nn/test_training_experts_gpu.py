"""Experts on a GPU: the CPU reference's bytes, no host synchronization, CUDA graphs, the same run twice."""

import contextlib

import pytest
import torch

import microscale as ms
from microscale.nn import GemmState, GroupedLinear, TokenGroups, three_grouped_gemm

pytestmark = pytest.mark.gpu
TRAINING = [name for name in ms.list_recipes() if ms.find_recipe(name).is_training]
SIZES = {"aligned": (64, 0, 32, 128), "ragged": (50, 0, 7, 90)}


def gemms_of(name):
    recipe = ms.find_recipe(name).resolved([])
    return recipe.gemms_of(recipe.rules[-1], lambda size: (1, -1, -1, 1) * (size // 4))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ends_of(sizes, device="cuda"):
    return torch.tensor(sizes).cumsum(0).to(device, torch.int32)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = GroupedLinear(8, 128, 256), GroupedLinear(8, 256, 128)

    def forward(self, x, chosen):
        groups = TokenGroups.of(chosen, 8, self.up.alignment)
        rows = torch.nn.functional.silu(self.up(groups.permute(x), groups.offsets, self.up.alignment))
        return groups.combine(self.down(rows, groups.offsets), torch.ones_like(chosen, dtype=x.dtype))


def layer(name):
    torch.manual_seed(0)
    made = Layer().bfloat16().cuda()
    rules = tuple(rule for rule in ms.find_recipe(name).rules if rule.last is None)
    ms.prepare_training_(made, ms.find_recipe(name).model_copy(update={"rules": rules}), seed=3)
    return made


def batch(seed=0):
    scores = torch.rand(100, 8, generator=torch.Generator().manual_seed(seed))
    return normal(100, 128, seed=seed).cuda(), scores.topk(2).indices.cuda()


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(("groups", "alignment"), [("aligned", 32), ("aligned", 1), ("ragged", 1)])
def test_the_bytes_of_the_reference(name, groups, alignment):
    """What is saved for the backward, bit for bit; results within what the products may differ by."""
    sizes, g = SIZES[groups], gemms_of(name)
    rows = sum(sizes) + 32
    x, w, dy = normal(rows, 128), normal(4, 96, 128, seed=1), normal(rows, 96, seed=2)
    results = []
    for device in ("cpu", "cuda"):
        held: list[torch.Tensor] = []
        a, b = (t.to(device, copy=True).requires_grad_() for t in (x, w))
        state = GemmState(rounding=torch.tensor([5, 8], device=device))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: (h.append(t), t)[1], lambda t: t):
            y = three_grouped_gemm(a, b, ends_of(sizes, device), g, state, alignment=alignment)
        y.backward(dy.to(device))
        results.append(([t.detach().cpu() for t in held], [t.float().cpu() for t in (y.detach(), a.grad, b.grad)]))
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(first, second)
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2 * float(first.abs().mean()))
    assert not results[1][1][0][sum(sizes) :].any()
    assert not results[1][1][2][1].any()


@pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train", "qat_nvfp4", "mxfp8_train_wgrad_hp"])
@pytest.mark.parametrize("alignment", [1, 32])
def test_many_tokens(name, alignment):
    """Against the reference backend on the same GPU: equal bytes, so results differ by the products alone."""
    chosen = torch.rand(4096, 16, generator=torch.Generator().manual_seed(0)).topk(4).indices.cuda()
    groups = TokenGroups.of(chosen, 16, alignment)
    rows, g = groups.source.shape[0], gemms_of(name)
    x, w = normal(rows, 512).cuda(), normal(16, 768, 512, seed=1).cuda() * 0.02
    sizes = torch.randn(rows, 1, generator=torch.Generator().manual_seed(3)).mul(3).exp()
    dy = (normal(rows, 768, seed=2) * sizes * 1e-6).bfloat16().cuda()
    found = {}
    for backend in ("reference", None):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        with contextlib.nullcontext() if backend is None else ms.use_backend(backend):
            state = GemmState(rounding=torch.tensor([5, 8], device="cuda"))
            y = three_grouped_gemm(a, b, groups.offsets, g, state, alignment=alignment)
        y.backward(dy)  # which obeys what the forward did
        found[backend] = (y.detach(), a.grad, b.grad)
    for wanted, got in zip(found["reference"], found[None], strict=True):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert got.dtype == wanted.dtype and float(error) < 4e-3


@pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train", "qat_nvfp4"])
@pytest.mark.parametrize("alignment", [1, 32])
def test_nothing_waits_for_the_host(name, alignment):
    """Sorting tokens, both kinds of groups, forward and backward."""
    made, (x, chosen) = layer(name), batch()
    weight, g = made.up.weight, made.up.gemms

    def step():
        made(x, chosen).sum().backward()
        groups = TokenGroups.of(chosen, 8, alignment)
        state = GemmState(made.up.rounding_state)
        y = three_grouped_gemm(groups.permute(x), weight, groups.offsets, g, state, alignment=alignment)
        y.backward(y.detach())

    step()  # compiles and selects kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["mxfp8_train", "nvfp4_train"])
def test_cuda_graphs(name):
    """Replays follow other routes of the tokens, quantize the changed weight again, and draw as eager steps do."""
    eager, captured = layer(name), layer(name)
    batches = [batch(seed) for seed in range(5)]
    x, chosen = (t.clone() for t in batches[0])

    def step(m, x, chosen):
        for p in m.parameters():
            p.grad = None
        m(x, chosen).float().square().mean().backward()
        with torch.no_grad():
            for p in m.parameters():
                p.sub_(1e-2 * p.grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            x.copy_(batches[i][0]), chosen.copy_(batches[i][1])
            step(captured, x, chosen)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, x, chosen)
    for i in range(2, 5):
        x.copy_(batches[i][0]), chosen.copy_(batches[i][1])
        graph.replay()
    for made in batches:
        step(eager, *made)
    torch.cuda.synchronize()
    for first, second in zip(eager.state_dict().values(), captured.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_a_seed_gives_the_same_run_twice():
    runs = []
    for _ in range(2):
        made = layer("nvfp4_train")
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, fused=True)
        for step in range(4):
            optimizer.zero_grad()
            made(*batch(step)).float().square().mean().backward()
            optimizer.step()
        runs.append(made.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


# -- products on FP8 tensor cores, of 512 tokens for each expert and more ----------------------------------------------


def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


def many(seed=0):
    """2048 tokens on two of eight experts each, one of which gets none."""
    scores = torch.rand(2048, 8, generator=torch.Generator().manual_seed(seed))
    scores[:, 5] = -1
    return normal(2048, 128, seed=seed).cuda(), scores.topk(2).indices.cuda()


@pytest.mark.usefixtures("small_experts")
@pytest.mark.parametrize(("name", "products"), [("mxfp8_train", 4), ("mxfp8_train_2d", 4), ("mxfp4_train", 4)])
def test_fp8_products(name, products, monkeypatch):
    """fprop and dgrad of both layers, and none under exact_products, which the backward obeys too."""
    hopper()
    from microscale.kernels.cublas import grouped_rows_e4m3

    calls, product, (x, chosen) = [], grouped_rows_e4m3.scaled_grouped_mm, many()
    noted = lambda *args, **options: (calls.append(args[0].shape), product(*args, **options))[1]  # noqa: E731
    monkeypatch.setattr(grouped_rows_e4m3, "scaled_grouped_mm", noted)
    found = {}
    for exact in (False, True):
        made, tokens = layer(name), x.clone().requires_grad_()
        with ms.exact_products(exact):
            y = made(tokens, chosen)
        y.float().square().sum().backward()
        assert len(calls) == products
        found[exact] = (y.detach(), tokens.grad, made.up.weight.grad, made.down.weight.grad)
    assert not found[False][2][5].any()
    for got, wanted in zip(found[False], found[True], strict=True):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert bool(got.isfinite().all()) and float(error) < 5e-2  # what differs in h is quantized anew


@pytest.mark.usefixtures("small_experts")
@pytest.mark.parametrize("alignment", [1, 32])
def test_fp8_products_wait_for_nothing_and_are_captured(alignment):
    """One graph for all routes of the tokens, with the bits of eager steps."""
    hopper()
    g, w = gemms_of("mxfp8_train"), normal(8, 256, 128, seed=1).cuda().requires_grad_()
    batches = [many(seed) for seed in range(3)]
    x, chosen = (t.clone() for t in batches[0])

    def step(x, chosen):
        groups, w.grad = TokenGroups.of(chosen, 8, alignment), None
        rows = groups.permute(x).requires_grad_()
        state = GemmState(seed)
        y = three_grouped_gemm(rows, w, groups.offsets, g, state, alignment=alignment)
        y.backward(y.detach())
        return y.detach(), rows.grad, w.grad

    seed = torch.tensor([5, 8], device="cuda")
    eager = [[t.clone() for t in step(*made)] for made in batches]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, chosen)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, chosen)
    for made, wanted in zip(batches, eager, strict=True):
        x.copy_(made[0]), chosen.copy_(made[1])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
