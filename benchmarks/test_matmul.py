"""The matmul suite through pytest-benchmark: `pytest benchmarks --benchmark-only`.

The same products as `microscale bench matmul`, each checked first, timed by pytest-benchmark with a synchronising call.
Committed results come from the command, which also keeps the cache cold and replays CUDA graphs.
"""

import dataclasses

import pytest
import torch

import microscale as ms
from microscale.bench import default_plan
from microscale.bench.grouped import expert_products
from microscale.bench.matmul import FORMATS, PAIRS, weight_products
from microscale.bench.mlp import mlp_products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = default_plan(DEVICE.type)
SHAPE, EXPERTS = PLAN.shapes[0], PLAN.experts[-1]


def synchronised(call):
    """Return a call that ends when the device has."""

    def run():
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def run(benchmark, products, index):
    """Check and time one of a generator's products."""
    product = next(p for i, p in enumerate(products) if i == index)
    if any(e.fallback for e in product.chosen):
        pytest.skip("only the reference runs this here")
    product.check()
    benchmark.extra_info.update(case=product.case, sizes=product.sizes, kernel=[e.chosen for e in product.chosen])
    benchmark(synchronised(product.call))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", PLAN.rows)
def test_weight_only(benchmark, fmt, rows):
    plan = dataclasses.replace(PLAN, cases=("weight_only",))
    run(benchmark, weight_products(DEVICE, plan, ms.find_quantizer(fmt), SHAPE, (rows,)), 0)


@pytest.mark.parametrize("pair", PAIRS, ids=" x ".join)
@pytest.mark.parametrize("rows", PLAN.pair_rows)
def test_both_scaled(benchmark, pair, rows):
    plan = dataclasses.replace(PLAN, cases=("both_scaled",), pair_rows=(rows,), pairs=(pair,))
    run(benchmark, weight_products(DEVICE, plan, ms.find_quantizer(pair[0]), SHAPE, ()), 0)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("index", [1, 2], ids=["balanced", "skewed"])
def test_grouped(benchmark, fmt, index):
    run(benchmark, expert_products(DEVICE, PLAN, ms.find_quantizer(fmt), EXPERTS), index)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", PLAN.mlp_rows)
def test_mlp(benchmark, fmt, rows):
    plan = dataclasses.replace(PLAN, mlp_rows=(rows,), mlp_pairs=())
    run(benchmark, mlp_products(DEVICE, plan, ms.find_quantizer(fmt)), 0)
