"""How jitted kernels are launched: one door for all of them.

Triton's own launch binds all arguments by name, asks for the specialization of each, and looks the kernel up under a
text of it all: some 30 us with the forty constants of these kernels, more than a small tensor takes on the device. Here
a compiled kernel is remembered under what Triton specialises by,

    tensor    its dtype, and whether its address is a multiple of 16
    int       whether it is 1 (a constant then), whether it is a multiple of 16; int32, int64 or uint64
    None      that it is None (a constant)
    descriptor (of the copy engine)  the dtype of its tensor, the block, and how that lies in shared memory

and the next such launch goes straight to Triton's launcher. Everything else is left to Triton: the first launch of each
kind, arguments of other types, tensors of several devices or of none, the interpreter, backends other than CUDA, hooks
(profilers), and any Triton whose launcher is not called in a way known here.

Two things count when a kernel is first launched and not again: knobs that change how it is compiled, and Triton's check
that the globals it uses are unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

_LIMIT = 4096  # call sites, and kinds of launch of each, that are remembered; past it they are forgotten
_UNALIGNED = "unaligned"

# How the launchers of Triton 3.6 and 3.7 are called. `args` are the kernel's own, with a place for each constant.
_CALLS = (
    ["self", "gridX", "gridY", "gridZ", "stream", "function", "args"],
    [
        *["self", "gridX", "gridY", "gridZ", "stream", "function"],
        *["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"],
    ],
)


class Launch(NamedTuple):
    """The arguments of one `launch`."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    warps: int


class _Compiled(NamedTuple):
    """A kernel as the driver has it. `places` stand for its constants among the arguments."""

    run: Callable[..., None]
    function: int
    metadata: tuple[Any, ...]
    places: tuple[None, ...]


_Key = tuple[Any, ...]


class _Site:
    """A kernel with its constants, and what was compiled of it. It is found by their ids, so it keeps them alive."""

    __slots__ = ("by_class", "by_value", "constants", "driver", "kernel", "runtime")

    def __init__(self, kernel: Any, constants: Mapping[str, Any]) -> None:
        import triton

        self.kernel, self.constants = kernel, constants
        self.driver, self.runtime = triton.runtime.driver, triton.knobs.runtime
        self.by_value: dict[_Key, _Compiled] = {}  # ints as they are, which is quick to look up
        self.by_class: dict[_Key, _Compiled] = {}  # ints by what Triton specialises of them

    def find(self, key: _Key) -> _Compiled | None:
        """Return what to launch for a key of `_by_value`; None where it is for Triton to say."""
        try:
            if self.runtime.launch_enter_hook.calls or self.runtime.launch_exit_hook.calls:
                return None
        except AttributeError:  # some other hook in the place of the chain
            return None
        found = self.by_value.get(key)
        if found is None:
            found = self.by_class.get(_by_class(key))
            if found is not None:
                _keep(self.by_value, key, found)
        return found


_sites: dict[_Key, _Site] = {}
_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: int, args: tuple[Any, ...], constants: Mapping[str, Any], warps: int) -> None:
    """Launch a jitted kernel on `grid` programs with runtime `args` in order and constexpr `constants`.

    Among the constants may be options of the compiler, such as `maxnreg`.
    It runs on the device of its tensors, current or not, in that device's current stream. Pass the same mapping object
    for the same constants and leave it unchanged: it is known by its identity. Without fused multiply-add: every
    operation that decides a bit is one IEEE operation.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, warps))
    key, values, device = _by_value(args)
    site = _sites.get((id(kernel), id(constants), warps))
    found = None if site is None or key is None else site.find(key)
    if site is None or found is None:
        _through_triton(Launch(kernel, grid, args, constants, warps), key)
        return
    active = site.driver.active
    if device == active.get_current_device():
        _run(found, grid, values, active.get_current_stream(device))
    else:
        with torch.cuda.device(device):
            _run(found, grid, values, active.get_current_stream(device))


def _run(found: _Compiled, grid: int, values: list[Any], stream: int) -> None:
    run, function, metadata, places = found
    run(grid, 1, 1, stream, function, metadata, None, None, None, *values, *places)


def _by_value(args: tuple[Any, ...]) -> tuple[_Key | None, list[Any], int]:
    """Return (dtypes and ints in order, then the device; the arguments with addresses for tensors; the device).

    The first is None for arguments that are left to Triton. Its descriptors stay as they are: its launcher makes the
    driver's from them.
    """
    key: list[Any] = []
    values: list[Any] = []
    device, last, address = -2, None, 0  # -1 is torch's for the CPU
    mark: Any = None
    for arg in args:
        if type(arg) is int:
            key.append(arg)
            values.append(arg)
        elif arg is last and arg is not None:  # what a kernel does not use is often the same tensor, many times
            key.append(mark)
            values.append(address)
        elif isinstance(arg, torch.Tensor):
            last, mark, address, place = arg, arg.dtype, arg.data_ptr(), arg.get_device()
            if place != device:
                if device >= 0 or place < 0:
                    return None, values, device
                device = place
            if address & 15:
                mark = mark, _UNALIGNED
            key.append(mark)
            values.append(address)
        elif arg is None:
            key.append(None)
            values.append(None)
        elif type(arg).__name__ == "TensorDescriptor" and (arg.base.get_device() == device or device < 0):
            key.append((arg.base.dtype, tuple(arg.block_shape), getattr(arg, "layout", None)))
            values.append(arg)
            device = arg.base.get_device()
            if device < 0:
                return None, values, device
        else:
            return None, values, device
    key.append(device)
    return (tuple(key) if device >= 0 else None), values, device


def _by_class(key: _Key) -> _Key:
    """Return a key of `_by_value` with each int replaced by what Triton specialises of it."""
    *kinds, device = key
    return (*(_int_class(kind) if type(kind) is int else kind for kind in kinds), device)


def _int_class(n: int) -> tuple[str, str]:
    """Return Triton's type of an int, 1 being a constant, and "D" where 16 divides it."""
    if n == 1:
        return "constexpr", ""
    width = "i32" if -(2**31) <= n < 2**31 else "i64" if n < 2**63 else "u64"
    return width, "D" if n % 16 == 0 else ""


def _through_triton(call: Launch, key: _Key | None) -> None:
    """Launch as Triton does, on the device of the first tensor, and remember under `key` what it compiled."""
    kernel, grid, args, constants, warps = call
    device = next((arg.get_device() for arg in args if isinstance(arg, torch.Tensor)), -1)
    with contextlib.nullcontext() if device < 0 else torch.cuda.device(device):
        made = kernel[(grid,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)
    compiled = None if key is None else _compiled(kernel, made, len(args), constants)
    if key is None or compiled is None:
        return
    place = (id(kernel), id(constants), warps)
    site = _sites.get(place)
    if site is None:
        site = _Site(kernel, constants)
        _keep(_sites, place, site)
    _keep(site.by_class, _by_class(key), compiled)


def _compiled(kernel: Any, made: Any, runtime: int, constants: Mapping[str, Any]) -> _Compiled | None:
    """Return what a launch needs of what Triton made, or None if this is no Triton or kernel that is known here."""
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction

    if not isinstance(kernel, JITFunction) or not isinstance(made, CompiledKernel) or kernel.pre_run_hooks:
        return None
    if made.metadata.target.backend != "cuda" or not _is_known(type(made.run).__call__):
        return None
    constant = kernel.params[runtime:]
    if not {p.name for p in constant} <= set(constants) or not all(p.is_constexpr for p in constant):
        return None
    return _Compiled(made.run, made.function, made.packed_metadata, (None,) * len(constant))


@functools.cache
def _is_known(call: Callable[..., None]) -> bool:
    """Whether Triton's launcher is called as one of the known ones."""
    return list(inspect.signature(call).parameters) in _CALLS


def _keep(memory: dict[_Key, Any], key: _Key, value: Any) -> None:
    if len(memory) >= _LIMIT:
        memory.clear()
    memory[key] = value


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note every launch of the process in the list that it yields, while the block runs; for tests and benchmarks.

    The notes keep the launched tensors alive; `launch(*note)` launches the same again.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
