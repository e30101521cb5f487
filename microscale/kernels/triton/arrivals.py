"""Counters by which the last of the programs that share a tile knows itself, so that it adds up what all of them have.

A kernel that splits a sum among programs is given `counters`: zeros, one number per tile. Each program stores its part,
then counts itself; who finds the others there adds all parts, in their order whoever was last, and sets the counter to
zero again. So a set of counters serves every launch that follows in a stream. Launches that may run at the same time
must not share one: each stream has its own, and so has each CUDA graph, since it may be replayed in any stream.

The sets lie in memory of the driver, not of torch's allocator: while a graph is captured, or warmed up for, what that
gives belongs to the graph. Where no set is to be had, a call gets zeros of its own, for a launch more.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import torch

COUNT = 4096  # tiles of a set
_TOGETHER, _MOST = 32, 1024  # sets that are made at once, 512 KiB; sets that there are at most on a device

_sets: dict[tuple[int, int, int], torch.Tensor] = {}  # by device, stream, and number of the graph (0: none)
_spare: dict[int, list[torch.Tensor]] = {}  # by device
_made: dict[int, int] = {}


def counters(device: torch.device, tiles: int) -> torch.Tensor:
    """Return int32 zeros, at least `tiles`, for a launch in the device's current stream; it leaves them zero."""
    place = torch.cuda.current_device() if device.index is None else device.index
    found = None
    if tiles <= COUNT:
        stream = torch._C._cuda_getCurrentRawStream(place)
        captures = torch.cuda.current_device() != place or torch.cuda.is_current_stream_capturing()
        graph = _capture_id(stream) if captures else 0  # torch tells of the current device's stream alone
        if graph == 0 and not _spare.get(place):
            _make(place)  # while a graph is captured it is too late
        if graph is not None:
            found = _sets.get((place, stream, graph))
            found = _claim(place, stream, graph) if found is None else found
    return torch.zeros(tiles, dtype=torch.int32, device=device) if found is None else found


def _claim(place: int, stream: int, graph: int) -> torch.Tensor | None:
    """Return a set that nobody has, and note whose it is; None if none is left. A graph's is never given again."""
    spare = _spare.get(place)
    if not spare:
        return None
    if graph:  # no more launches of an earlier one will come
        for key in [key for key in list(_sets) if key[0] == place and key[2] not in (0, graph)]:
            _sets.pop(key, None)
    found = _sets[place, stream, graph] = spare.pop()
    return found


def _make(place: int) -> None:
    """Make spare sets, up to the limit of a device."""
    if _made.get(place, 0) < _MOST:
        _made[place] = _made.get(place, 0) + _TOGETHER
        memory = _zeros(place, _TOGETHER * COUNT)
        _spare[place] = [] if memory is None else list(memory.view(_TOGETHER, COUNT).unbind())


# -- the driver --------------------------------------------------------------------------------------------------------


class _Memory:
    """Memory of the driver as torch takes it: an address, and how many int32 lie there."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False), "shape": (count,), "typestr": "<i4", "version": 3,
        }  # fmt: skip


def _zeros(place: int, count: int) -> torch.Tensor | None:
    """Return int32 zeros [count] that lie outside of every pool of torch and are never freed; None if refused."""
    driver, address = _driver(), ctypes.c_uint64()
    if driver is None:
        return None
    with torch.cuda.device(place):
        stream = torch.cuda.current_stream()
        stream.synchronize()  # makes the device's context the current one
        if driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(4 * count)):
            return None
        handle = ctypes.c_void_p(stream.cuda_stream)
        failed = driver.cuMemsetD8Async(address, ctypes.c_ubyte(0), ctypes.c_size_t(4 * count), handle)
        stream.synchronize()  # not the device, on which another thread may be capturing
        return None if failed else torch.as_tensor(_Memory(address.value or 0, count), device=f"cuda:{place}")


def _capture_id(stream: int) -> int | None:
    """Return the number of the capture that a stream takes part in, no other has it; 0 if in none, None if unknown."""
    driver = _driver()
    if driver is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    at = ctypes.byref
    failed = driver.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), at(status), at(number), None, None, None)
    if failed or status.value not in (0, 1):  # none, active
        return None
    return number.value if status.value else 0


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The driver, if it has what is asked of it here."""
    needed = ("cuStreamGetCaptureInfo_v2", "cuMemAlloc_v2", "cuMemsetD8Async")
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            found = ctypes.CDLL(name)
            return found if all(hasattr(found, function) for function in needed) else None
    return None
