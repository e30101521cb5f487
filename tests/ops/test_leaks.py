"""A thousand calls leave nothing behind: no memory, and no entries in what is remembered."""

import functools
import gc
import sys
import tracemalloc

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.kernels.triton import launch
from microscale.ops import api

CALLS, WARM, TRACED = 1000, 80, 200


def caches():
    """Every functools cache of the library, by the function's name."""
    found = {}
    for o in gc.get_objects():
        if type(o) is functools._lru_cache_wrapper and getattr(o, "__module__", "").startswith("microscale"):
            found[f"{o.__module__}.{o.__qualname__}"] = o.cache_info().currsize
    return found


def entries():
    """How many entries there are in all that is remembered."""
    own = (dispatch._cache, dispatch._by_facts, api._found, api._metas, launch._sites)
    return [len(d) for d in own], caches()


def calls(device):
    """A function that makes one of the products of a model: decode, prefill and residual, both quantized, grouped."""
    m, n, k = (96, 64, 128) if device.type == "cuda" else (6, 8, 32)
    x, few = torch.randn(m, k, device=device).bfloat16(), torch.randn(3, k, device=device).bfloat16()
    w = torch.randn(n, k, device=device).bfloat16()
    names = ("mxfp4", "fp8_row") if device.type == "cuda" else ("mxfp4", "nvfp4", "mxfp8", "fp8_row")
    weights = [ms.quantize(w, name) for name in names]
    weights += [ms.prepare(weights[0])] if device.type == "cuda" else []
    residual, bias = torch.randn(m, n, device=device).bfloat16(), torch.randn(n, device=device).bfloat16()
    stack = ms.quantize(torch.randn(2, n, k, device=device).bfloat16(), "mxfp4")
    ends = torch.tensor([m // 3, m], dtype=torch.int32, device=device)

    def one(i):
        q = weights[i // 4 % len(weights)]
        if i % 4 == 0:
            torch.nn.functional.linear(few, q, bias)
        elif i % 4 == 1:
            ms.matmul(x, q.t(), residual=residual)
        elif i % 4 == 2:
            ms.matmul(ms.quantize(x, "fp8_row"), weights[0].t(), bias)
        else:
            ms.grouped_matmul(x, stack.mT, ends)

    return one


def test_on_the_cpu():
    one = calls(torch.device("cpu"))
    for i in range(WARM):
        one(i)
    gc.collect()
    before = entries()
    for i in range(CALLS - 3 * TRACED):
        one(i)
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(3):  # the first counts what was there before as new when it is replaced
            for i in range(TRACED):
                one(i)
            gc.collect()
            sys._clear_type_cache()  # of methods by name, where torch looks them up by new strings
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert entries() == before
    assert sizes[2] - sizes[1] < 16 * TRACED, sizes  # bytes: less than any object a call


def test_tensors_are_freed():
    """No tensor outlives its call."""

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    one = calls(torch.device("cpu"))
    for i in range(WARM):
        one(i)
    before = tensors()
    for i in range(WARM):
        one(i)
    assert tensors() == before


@pytest.mark.gpu
def test_on_a_gpu():
    """What is allocated on the device is as before; what the allocator holds does not grow."""
    one = calls(torch.device("cuda"))
    for i in range(WARM):
        one(i)
    torch.cuda.synchronize()
    gc.collect()
    before, kept, held = entries(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for i in range(CALLS):
        one(i)
    torch.cuda.synchronize()
    gc.collect()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (kept, held)
    assert entries() == before
