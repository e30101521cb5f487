"""Benchmarks: one way of timing, and suites that `microscale bench` and `benchmarks/` share."""

from microscale.bench.matmul import Plan, bench_matmul, default_plan
from microscale.bench.overhead import bench_overhead
from microscale.bench.product import ProductRow
from microscale.bench.quantize import bench_quantize
from microscale.bench.timing import BenchReport, Row, Timer
from microscale.bench.train import bench_train

__all__ = [
    "BenchReport",
    "Plan",
    "ProductRow",
    "Row",
    "Timer",
    "bench_matmul",
    "bench_overhead",
    "bench_quantize",
    "bench_train",
    "default_plan",
]
