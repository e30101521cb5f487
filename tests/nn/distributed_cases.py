"""Two processes that train together, over gloo on the CPU or over NCCL on two GPUs; a JSON line for each comparison.

    python -m tests.nn.distributed_cases RECIPE [cuda]

Every case holds what torch's wrappers do against the same done by hand: gradients of each process alone, averaged.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import microscale as ms
from microscale.nn import Training

WORLD = 2
here = torch.device("cpu")  # of this process


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def prepared(name: str, **changes: object) -> tuple[torch.nn.Module, Training]:
    """Three blocks, every one of them trained by the recipe, with the same weights in each process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block() for _ in range(3))).to(here)
    recipe = ms.find_recipe(name)
    rules = [rule for rule in recipe.rules if rule.last is None]
    return model, ms.prepare_training_(model, recipe.model_copy(update={"rules": rules, **changes}), seed=1)


def batch(step: int) -> torch.Tensor:
    """Tokens that differ from process to process."""
    generator = torch.Generator().manual_seed(WORLD * step + dist.get_rank())
    return torch.randn(32, 64, generator=generator).to(here)


def backward(model: torch.nn.Module, step: int) -> float:
    x = batch(step).to(next(model.parameters()).dtype)
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.item()


def averaged(t: torch.Tensor) -> torch.Tensor:
    """The mean over processes, in FP32."""
    total = t.float()
    dist.all_reduce(total)
    return total / WORLD


def say(case: str, **facts: object) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"case": case, **facts}), flush=True)


def attempt(call: Callable[[], object]) -> str:
    """What a call raises, as text."""
    try:
        call()
    except ms.MicroscaleError as error:
        return str(error)
    return ""


def offsets(model: torch.nn.Module) -> list[int]:
    return [int(b[1]) for name, b in model.named_buffers() if name.endswith("rounding_state")]


def data_parallel(name: str) -> None:
    model, _ = prepared(name)
    by_hand = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    equal = []
    for step in range(2):
        for m in (wrapped, by_hand):
            m.zero_grad()
            backward(m, step)
        pairs = zip(*map(parameters, (by_hand, model)), strict=True)
        equal += [torch.equal(averaged(p.grad), q.grad) for p, q in pairs]
    say("ddp", equal=all(equal), compared=len(equal), offsets=offsets(model), by_hand=offsets(by_hand))


def parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(model.parameters())


def sharded(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fully_sharded(name: str, reshard: bool) -> None:
    """Three steps of AdamW, then an evaluation, then one after the weights changed by other means."""
    model, training = prepared(name)
    by_hand = copy.deepcopy(model)
    sharded(model, reshard_after_forward=reshard)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, by_hand)]
    grads, losses = [], []
    for step in range(3):
        losses.append(backward(model, step) == backward(by_hand, step))
        for p, q in zip(*map(parameters, (by_hand, model)), strict=True):
            p.grad = averaged(p.grad)
            grads.append(torch.equal(q.grad.full_tensor(), p.grad))
        training.step(step / 3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(99)).to(here)
    changed = []
    with torch.no_grad():
        evaluated = torch.equal(model(x), by_hand(x))
        for module in (model, *model):
            module.reshard()
        pairs = zip(*map(parameters, (by_hand, model)), strict=True)
        weights = [torch.equal(q.full_tensor(), p) for p, q in pairs]
        for _ in range(8):  # of which some gather the weights to the memory where they were before
            for m in (model, by_hand):
                for p in m.parameters():
                    p.mul_(0.9)
            changed.append(torch.equal(model(x), by_hand(x)))
            for module in (model, *model):
                module.reshard()
    facts = {"losses": all(losses), "grads": all(grads), "weights": all(weights), "evaluated": evaluated}
    say(f"fsdp, reshard={reshard}", **facts, offsets=offsets(model), by_hand=offsets(by_hand))
    say(f"fsdp changed, reshard={reshard}", equal=all(changed))


def mixed_precision(name: str) -> None:
    """FP32 shards, bfloat16 weights in the products, gradients summed in FP32."""
    model, _ = prepared(name)
    by_hand = copy.deepcopy(model).to(torch.bfloat16)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    backward(model, 0)
    backward(by_hand, 0)
    pairs = zip(*map(parameters, (by_hand, model)), strict=True)
    equal = [torch.equal(averaged(p.grad), q.grad.full_tensor()) for p, q in pairs]
    say("fsdp bf16", equal=all(equal), dtypes=sorted({str(p.grad.dtype) for p in model.parameters()}))


def main_grads(name: str) -> None:
    """By hand, main gradients are averaged like any; the wrappers see none of them, and layers say so."""
    plain, _ = prepared(name)
    model, training = prepared(name, main_grad="fp32")
    backward(plain, 0)
    backward(model, 0)
    kept = {name: averaged(layer.main_grad()) for name, layer in training.layers.items()}
    wanted = {name: averaged(plain.get_submodule(name).weight.grad) for name in kept}
    say("main_grad by hand", equal=all(torch.equal(kept[name], wanted[name]) for name in kept))

    model, training = prepared(name, main_grad="fp32")
    say("main_grad in ddp", error=attempt(lambda: backward(DistributedDataParallel(model), 0)))
    model, training = prepared(name, main_grad="fp32")
    left = [f"{name}.weight" for name in training.layers]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left)
    wrapped = DistributedDataParallel(model)
    error = attempt(lambda: backward(wrapped, 0))
    found = {name: averaged(layer.main_grad()) for name, layer in training.layers.items()}
    equal = [torch.equal(found[n], wanted[n]) for n in wanted]
    reduced = {n: p for n, p in model.named_parameters() if n not in left}
    equal += [torch.equal(p.grad, averaged(plain.get_parameter(n).grad)) for n, p in reduced.items()]
    say("main_grad beside ddp", error=error, equal=all(equal))

    model, _ = prepared(name, main_grad="fp32")
    sharded(model)
    say("main_grad in fsdp", error=attempt(lambda: backward(model, 0)))


def worker(rank: int, name: str, folder: str, device: str) -> None:
    global here
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    if device == "cuda":
        here = torch.device("cuda", rank)
        torch.cuda.set_device(here)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=WORLD)
    data_parallel(name)
    fully_sharded(name, True)
    fully_sharded(name, False)
    mixed_precision(name)
    main_grads(name)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        device = (sys.argv[2:] or ["cpu"])[0]
        start = "spawn" if device == "cuda" else "fork"  # CUDA cannot be used after a fork
        torch.multiprocessing.start_processes(worker, (sys.argv[1], folder, device), WORLD, start_method=start)
