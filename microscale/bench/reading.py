"""How fast a weight's bytes can be read at all: what a product of few rows cannot be faster than.

Timed as every row is, with cold caches and as one node of a CUDA graph, so launch, ramp and tail are in it as they are
in a product. Of some ways to cut the bytes into programs the fastest counts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch

from microscale.bench.timing import Timer

BITS = (17, 32)  # bits of a value of a 4-bit format with one byte of scale for 32, as a fraction of a byte
WAYS = tuple(itertools.product((4, 8), (512, 1024, 2048), (2, 4), (2, 4, 8)))  # warps, words, at once, programs per SM


def read_gb_per_s(timer: Timer, size: int) -> float:
    """Return the bandwidth of the fastest read of about `size` bytes, in GB/s. Needs a CUDA device with Triton."""
    from microscale.kernels.triton.jit_read import read_words

    processors = torch.cuda.get_device_properties(timer.device).multi_processor_count
    found = 0.0
    for warps, words, at_once, programs in WAYS:
        grid, step = processors * programs, words * at_once
        each = max(1, round(size / 4 / grid / step)) * step
        if not 0.97 < 4 * grid * each / size < 1.03:  # a way that cannot read so much and no more
            continue
        data = torch.randint(
            -(2**31), 2**31, (grid * each,), dtype=torch.int32, device=timer.device
        )  # zeros read faster
        out = torch.empty(grid * words, dtype=torch.int32, device=timer.device)
        call = functools.partial(
            read_words[(grid,)], data, out, each, AT_ONCE=at_once, SIZE=words, num_warps=warps
        )  # fmt: skip
        found = max(found, 4 * data.numel() / timer.time(call).us / 1e3)
    return found


def ceilings(timer: Timer, shapes: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Return the bandwidth of reading 4-bit weights of these shapes (N, K), by their sizes."""
    sizes = sorted({n * k * BITS[0] // BITS[1] for n, k in shapes})
    found = {f"read_{size >> 20}MiB_weight": read_gb_per_s(timer, size) for size in sizes}
    return {name: value for name, value in found.items() if value}  # small ones are no way's
