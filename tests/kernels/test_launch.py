"""The launcher: what Triton specialises by, the same compiled kernel as Triton's own launch, devices, hooks, fallbacks.

Without a GPU a stand-in plays Triton's driver: kernels are compiled for sm_90 as ever, and its launcher notes what it
gets.
"""
# ruff: noqa: E402

import contextlib
import itertools
import threading
import types
import typing

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from triton.backends.compiler import GPUTarget

from microscale.kernels.triton import launch as launching
from microscale.kernels.triton.launch import launch, recorded

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="Triton interprets in this process")


@triton.jit
def scaled_copy(x, y, n, stride, SIZE: tl.constexpr, FACTOR: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at * stride, tl.load(x + at, mask=at < n) * FACTOR, mask=at < n)


@triton.jit
def maybe_scaled(x, y, factor, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < n)
    if factor is not None:
        value *= tl.load(factor)
    tl.store(y + at, value, mask=at < n)


# -- a driver without a GPU --------------------------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """A CPU tensor that says it lies on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    place = 0

    def get_device(self):
        return self.place


def on_device(t, place=0):
    made = t.as_subclass(OnDevice)
    made.place = place
    return made


class Launcher:
    """Called as the launcher of Triton 3.6; notes what it gets."""

    calls: typing.ClassVar = []

    def __init__(self, src, metadata):
        pass

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        kernel_metadata, _, enter, leave, *values = args
        addresses = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values[:4]]
        Launcher.calls.append(((gridX, gridY, gridZ), stream, function, kernel_metadata, addresses, len(values)))
        for hook in (enter, leave):
            if hook is not None:
                hook(None)


class OtherLauncher(Launcher):
    """Called in another way, as some later Triton might."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *arguments):
        super().__call__(gridX, gridY, gridZ, stream, function, *arguments)


class Driver:
    def __init__(self, launcher):
        functions = itertools.count(1000)
        self.launcher_cls, self.device = launcher, 0
        self.utils = types.SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, next(functions), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        )

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7000 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch):
    """The stand-in for the driver, and a kernel that nothing was compiled of."""
    made = Driver(Launcher)
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(scaled_copy, "device_caches", type(scaled_copy.device_caches)(scaled_copy.create_binder))
    monkeypatch.setattr(launching, "_sites", {})
    monkeypatch.setattr(Launcher, "calls", [])

    @contextlib.contextmanager
    def guard(device):
        before, made.device = made.device, device
        yield
        made.device = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    return made


@pytest.fixture
def through_triton(monkeypatch):
    """Counts the launches that went through Triton's own."""
    seen = []
    run = scaled_copy.run

    def counted(*args, **kwargs):
        seen.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(scaled_copy, "run", counted)
    return seen


def plain(grid, args, constants, warps=4):
    """Triton's own launch, as the stand-in noted it."""
    scaled_copy[(grid,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)
    return Launcher.calls[-1]


CONSTANTS = {"SIZE": 128, "FACTOR": 2}
bytes_ = torch.zeros(4096, dtype=torch.uint8)
BASE = on_device(bytes_[-bytes_.data_ptr() % 16 :])  # starts on 16 bytes


def at(offset, dtype=torch.float32, place=0):
    """A tensor that starts `offset` bytes after a multiple of 16."""
    return on_device(BASE[offset : offset + 1024].view(dtype), place)


# -- tests -------------------------------------------------------------------------------------------------------------

INTS = (
    *(0, 1, 2, 8, 15, 16, 17, 32, -1, -15, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1),
    *(-(2**31) - 16, 2**32, 2**63 - 16, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 16, -(2**63)),
)


def test_ints_are_told_apart_as_triton_does():
    native = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    base = pytest.importorskip("triton.backends.compiler").BaseBackend
    for a, b in itertools.product(INTS, INTS):
        theirs = native(base, a, False, True, True) == native(base, b, False, True, True)
        ours = launching._by_class((a, 0)) == launching._by_class((b, 0))
        constant = a == 1 or b == 1  # as a constant, 1 is itself only
        assert ours == theirs or (constant and a == b), (a, b)


def test_tensors_are_told_apart_as_triton_does():
    native = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    base = pytest.importorskip("triton.backends.compiler").BaseBackend
    dtypes = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64)
    tensors = [at(o, d) for d in dtypes for o in range(0, 40, d.itemsize)]
    for a, b in itertools.product(tensors, tensors):
        theirs = native(base, a, False, True, True) == native(base, b, False, True, True)
        ours = launching._by_value((a,))[0] == launching._by_value((b,))[0]
        assert ours == theirs, (a.dtype, a.data_ptr() % 16, b.dtype, b.data_ptr() % 16)


def test_descriptors_are_told_apart_as_triton_does():
    """Of the copy engine: by dtype, block and layout; sizes, strides, and where they lie do not count."""
    native = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    base = pytest.importorskip("triton.backends.compiler").BaseBackend
    gluon = pytest.importorskip("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.tools.tensor_descriptor import TensorDescriptor

    made = []
    for dtype, (rows, columns), start in itertools.product(
        (torch.bfloat16, torch.float16, torch.uint8), ((64, 128), (32, 128), (64, 256)), (0, 256)
    ):
        x, shape = at(start, dtype), [2, 64 + start]
        made.append(TensorDescriptor(x, shape, [512, 1], [rows, columns]))
        for width in (128, 64):
            layout = NVMMASharedLayout(width, 8 * dtype.itemsize, 2)
            made.append(gluon(x, shape, [512, 1], [rows, columns], layout))
    for a, b in itertools.product(made, made):
        theirs = native(base, a, False, True, True) == native(base, b, False, True, True)
        ours = launching._by_value((a,))[0] == launching._by_value((b,))[0]
        assert ours == theirs, (a, b)
    assert launching._by_value((made[0],))[1] == [made[0]]
    elsewhere = gluon(at(0, torch.bfloat16, place=1), [2, 64], [64, 1], [64, 128], NVMMASharedLayout(128, 16, 2))
    assert launching._by_value((made[0], elsewhere))[0] is None  # two devices


def test_order_and_place_of_arguments_count():
    """Keys are sequences: what one argument gives cannot be taken for what another gives."""
    a, b, odd = at(0), at(0, torch.int32), at(4)
    calls = [(a, b, 1), (b, a, 1), (a, odd, 1), (odd, a, 1), (a, 1, b), (a, b, 1, 1), (a, b), (a, b, 16), (a, b, 15)]
    keys = [launching._by_class(launching._by_value(args)[0]) for args in calls]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("launcher", [Launcher, OtherLauncher])
def test_the_same_launch_as_triton(driver, through_triton, launcher):
    """Function, grid, stream, metadata and arguments, for every kind of alignment and int; straight from the second on,
    or never, where the launcher is called in a way that is not known."""
    driver.launcher_cls = launcher
    kinds = [
        (x, y, n, stride)
        for x, y in [(at(0), at(512)), (at(4), at(512)), (at(0), at(520)), (at(0, torch.float16), at(512))]
        for n, stride in [(128, 1), (100, 1), (100, 16), (1, 1), (2**31, 1)]
    ]
    for _ in range(2):
        for args in kinds:
            launch(scaled_copy, 3, args, CONSTANTS, 4)
            ours = Launcher.calls[-1]
            assert ours == plain(3, args, CONSTANTS)
    assert len({call[2] for call in Launcher.calls}) == len(kinds)
    through_triton.clear()
    for args in kinds:
        launch(scaled_copy, 3, args, CONSTANTS, 4)
    assert len(through_triton) == (0 if launcher is Launcher else len(kinds))


def test_the_launcher_of_this_triton_is_known():
    """Where this fails, launches are right but slow: add how the new launcher is called to `_CALLS`."""
    from triton.backends.nvidia.driver import CudaLauncher

    assert launching._is_known(CudaLauncher.__call__)


def test_other_sizes_of_a_class_need_no_triton(driver, through_triton):
    for n in (17, 18, 19):
        launch(scaled_copy, 1, (at(0), at(512), n, 1), CONSTANTS, 4)
    assert len(through_triton) == 1 and [call[4][2] for call in Launcher.calls] == [17, 18, 19]


def test_constants_and_warps_are_told_apart(driver):
    args = (at(0), at(512), 100, 1)
    for turn in range(3):
        for size, warps in itertools.product((64, 128), (1, 4)):
            constants = {"SIZE": size, "FACTOR": 2}  # a fresh object each time, as a caller should not
            launch(scaled_copy, 1, args, constants, warps)
            assert Launcher.calls[-1] == plain(1, args, constants, warps), turn


def test_options_of_the_compiler_are_among_the_constants(driver, through_triton):
    args, limits = (at(0), at(512), 100, 1), (CONSTANTS | {"maxnreg": 128}, CONSTANTS)
    for constants in limits * 2:
        launch(scaled_copy, 3, args, constants, 4)
    assert len(through_triton) == 2 and Launcher.calls[:2] == Launcher.calls[2:] == [plain(3, args, c) for c in limits]
    made = {k.function: k.metadata.maxnreg for k in scaled_copy.device_caches[0][0].values()}
    assert [made[call[2]] for call in Launcher.calls[:2]] == [128, None]


def test_the_memory_is_bounded(driver, monkeypatch):
    monkeypatch.setattr(launching, "_LIMIT", 4)
    for n in range(17, 31):
        launch(scaled_copy, 1, (at(0), at(512), n, 1), dict(CONSTANTS), 4)
        assert len(launching._sites) <= 4
    constants = dict(CONSTANTS)
    for n in range(17, 31):
        launch(scaled_copy, 1, (at(0), at(512), n, 1), constants, 4)
    assert all(len(site.by_value) <= 4 for site in launching._sites.values())
    assert Launcher.calls[-1][4][2] == 30


def test_each_device_has_its_own(driver):
    """A launch goes to the device of its tensors, with its stream, whichever is current."""
    functions = {}
    for _ in range(2):
        for place in (0, 1):
            launch(scaled_copy, 1, (at(0, place=place), at(512, place=place), 100, 1), CONSTANTS, 4)
            _, stream, function, *_ = Launcher.calls[-1]
            assert stream == 7000 + place and driver.device == 0
            assert functions.setdefault(place, function) == function
    assert functions[0] != functions[1]


def test_tensors_of_two_devices_are_left_to_triton(driver, through_triton):
    for _ in range(2):
        launch(scaled_copy, 1, (at(0), at(512, place=1), 100, 1), CONSTANTS, 4)
        launch(scaled_copy, 1, (at(0), on_device(torch.zeros(9), place=-1), 100, 1), CONSTANTS, 4)
        launch(scaled_copy, 1, (on_device(torch.zeros(9), place=-1), at(0), 100, 1), CONSTANTS, 4)
    assert len(through_triton) == 6


def test_none_is_an_argument(driver, monkeypatch):
    """A constant to Triton, and told apart from a tensor in its place."""
    monkeypatch.setattr(maybe_scaled, "device_caches", type(maybe_scaled.device_caches)(maybe_scaled.create_binder))
    constants = {"SIZE": 128}
    kinds = [(at(0), at(512), None, 100), (at(0), at(512), at(0), 100)]
    for _ in range(2):
        for args in kinds:
            launch(maybe_scaled, 1, args, constants, 4)
            ours = Launcher.calls[-1]
            maybe_scaled[(1,)](*args, **constants, num_warps=4, enable_fp_fusion=False)
            assert ours == Launcher.calls[-1] and (ours[4][2] is None) == (args[2] is None)
    assert len({call[2] for call in Launcher.calls}) == 2


@pytest.mark.parametrize("other", [True, 2.0, (1, 2), "text"])
def test_other_arguments_are_left_to_triton(other):
    assert launching._by_value((at(0), 1, other))[0] is None
    assert launching._by_value((1, 2))[0] is None


def test_hooks_see_every_launch(driver):
    args, seen = (at(0), at(512), 100, 1), []
    launch(scaled_copy, 1, args, CONSTANTS, 4)
    chain = triton.knobs.runtime.launch_enter_hook
    chain.add(seen.append)
    try:
        launch(scaled_copy, 1, args, CONSTANTS, 4)
        launch(scaled_copy, 1, args, CONSTANTS, 4)
    finally:
        chain.remove(seen.append)
    launch(scaled_copy, 1, args, CONSTANTS, 4)
    assert len(seen) == 2 and len(Launcher.calls) == 4 and len({call[2] for call in Launcher.calls}) == 1


def test_recorded_launches_can_be_launched_again(driver):
    args = (at(0), at(512), 100, 1)
    with recorded() as outer:
        launch(scaled_copy, 2, args, CONSTANTS, 4)
        with recorded() as inner:
            launch(scaled_copy, 3, args, CONSTANTS, 4)
    launch(scaled_copy, 4, args, CONSTANTS, 4)
    assert [c.grid for c in outer] == [2] and [c.grid for c in inner] == [3]
    launch(*inner[0])
    assert Launcher.calls[-1][0] == (3, 1, 1)


def test_threads(driver):
    def work(offset):
        for n in range(200):
            launch(scaled_copy, 1, (at(offset), at(512), 16 + n % 40, 1), CONSTANTS, 4)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 4, 8, 16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(Launcher.calls) == 800
    kinds = {(c[4][0] % 16 == 0, c[4][2] % 16 == 0, c[2]) for c in Launcher.calls}
    assert len({kind[:2] for kind in kinds}) == 4
    assert len({function for *_, function in kinds}) == len(kinds)  # of one kind only; two threads may compile it


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1, 4, 5])
def test_values_on_the_gpu(offset):
    """Right whatever the alignment, in another stream, and in a CUDA graph; each straight and through Triton."""
    source = torch.randn(4096, device="cuda")[offset:]
    constants = {"SIZE": 256, "FACTOR": 3}
    for n in (1000, 1024, 1, 16) * 2:
        out = torch.zeros(4096, device="cuda")[offset:]
        launch(scaled_copy, -(-n // 256), (source, out, n, 1), constants, 4)
        assert torch.equal(out[:n], source[:n] * 3) and not out[n:].any()
    stream, out = torch.cuda.Stream(), torch.zeros_like(source)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(scaled_copy, 4, (source, out, 1000, 1), constants, 4)
    stream.synchronize()
    assert torch.equal(out[:1000], source[:1000] * 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(scaled_copy, 4, (source, out, 1000, 1), constants, 4)
    source += 1
    graph.replay()
    assert torch.equal(out[:1000], source[:1000] * 3)


@pytest.mark.gpu
def test_the_device_of_the_tensors_on_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    constants = {"SIZE": 256, "FACTOR": 3}
    for _ in range(2):
        for place in range(2):
            source = torch.randn(1000, device=f"cuda:{place}")
            out = torch.zeros_like(source)
            launch(scaled_copy, 4, (source, out, 1000, 1), constants, 4)
            assert torch.equal(out, source * 3)
