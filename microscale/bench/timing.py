"""How a benchmark is timed, and what it reports.

On a GPU: the call is captured in a CUDA graph, the L2 cache is overwritten before every sample, and a sample is one
replay between two events; the median and the spread (90th minus 10th percentile) of the samples are reported. On a CPU:
wall-clock time of a call, after overwriting a buffer larger than the caches. A ceiling is the copy of a buffer, counted
as bytes read plus bytes written, timed in the same way in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from microscale import __version__

FLUSH_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # several times the last-level cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median and spread of one call, in microseconds."""

    us: float
    us_spread: float


class Timer:
    """Times calls on one device; see the module for the method."""

    def __init__(self, device: torch.device | str, samples: int = 21) -> None:
        self.device = torch.device(device)
        self.samples = samples
        self._flush = torch.empty(FLUSH_BYTES[self.device.type], dtype=torch.uint8, device=self.device)

    def time(self, call: Callable[[], object]) -> Timing:
        """Return the time of one call with a cold cache. The call must not synchronize with the host on a GPU."""
        sample = self._captured(call) if self.device.type == "cuda" else functools.partial(self._wall, call)
        times = sorted(self._cold(sample) for _ in range(self.samples))
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        return Timing(statistics.median(times), high - low)

    def _cold(self, sample: Callable[[], float]) -> float:
        self._flush.fill_(1)
        return sample()

    @staticmethod
    def _wall(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def _captured(self, call: Callable[[], object]) -> Callable[[], float]:
        call()  # compile and fill caches outside the graph
        torch.cuda.synchronize(self.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # `torch.cuda.graph` also collects garbage, which takes 50 ms
            graph.capture_begin()
            try:
                call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            return before.elapsed_time(after) * 1e3

        return sample

    def copy_gb_per_s(self, size: int) -> float:
        """Return the bandwidth of copying `size` bytes, bytes read and written counted, in GB/s."""
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * size / self.time(lambda: target.copy_(source)).us / 1e3

    def read_gb_per_s(self, size: int) -> float:
        """Return the bandwidth of summing `size` bytes of float32, in GB/s."""
        source = torch.ones(size // 4, dtype=torch.float32, device=self.device)
        return size / self.time(source.sum).us / 1e3


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. `ratio` is of the suite's ceiling; `us` is None where nothing was timed, and `note` says why."""

    op: str
    format: str
    mode: str
    shape: tuple[int, ...]
    us: float | None
    us_spread: float | None
    gb_per_s: float | None
    ratio: float | None
    kernel: str
    checked: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Where it was measured, the ceilings of that run, and the rows, one dataclass of the suite's own each.

    Ceilings are GB/s by what they are; TFLOP/s where the name ends in `tflops`.
    """

    environment: dict[str, Any]
    ceilings: dict[str, float]
    rows: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the device that numbers depend on."""
    import importlib.util

    found: dict[str, Any] = {
        "microscale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu",
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["cuda"] = torch.version.cuda
    return found
