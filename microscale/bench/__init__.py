"""Benchmarks: one way of timing, and suites that `microscale bench` and `benchmarks/` share."""

from microscale.bench.overhead import bench_overhead
from microscale.bench.quantize import bench_quantize
from microscale.bench.timing import BenchReport, Row, Timer

__all__ = ["BenchReport", "Row", "Timer", "bench_overhead", "bench_quantize"]
