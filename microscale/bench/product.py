"""What the suites of matrix products share: rows, floors, and the check that a product must pass before it is timed.

The floor of a row is the least time that the device needs: the longer of its bytes at the copy bandwidth and its
floating-point operations at the rate of the tensor cores, both measured in the same run. Bytes are those of the
operands as they are stored or given, and of the result, once each; the rate is that of FP8 where both operands are
scaled floats of at most 8 bits, else that of bf16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch

from microscale import dispatch
from microscale.bench.timing import Timer
from microscale.errors import MicroscaleError
from microscale.spec.format import FormatSpec
from microscale.tensor import BlockScaledTensor

PLAIN = "bf16"  # activations that are not quantized
SAMPLE = (64, 256)  # rows and columns of a product that are compared
INEXACT = 1e-5  # of |A| @ |B|: what kernels may add that say of themselves that they are not exact
CEILINGS = {"cuda": (256 << 20, 8192), "cpu": (8 << 20, 256)}  # bytes of a copy, sides of a square product
_FP32, _UNLIKELY = 2.0**-24, 1e-16


@dataclasses.dataclass(frozen=True)
class ProductRow:
    """One measurement. `speedup` is over `bf16_us`, torch's bf16 product of the same sizes; `ratio` is floor over time.

    `format` is the weight's, `activations` the other operand's; `us` is None where nothing was timed, and `note` says
    why.
    """

    op: str
    case: str
    format: str
    activations: str
    m: int
    n: int
    k: int
    us: float | None
    us_spread: float | None
    bf16_us: float | None
    speedup: float | None
    ratio: float | None
    kernel: str
    checked: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Product:
    """One row to be measured: what is called, what torch does in bf16, and what is least to be done."""

    op: str
    case: str
    format: str
    activations: str
    sizes: tuple[int, int, int]  # m, n, k
    call: Callable[[], torch.Tensor]
    plain: Callable[[], torch.Tensor]
    chosen: tuple[dispatch.Explanation, ...]
    work: tuple[tuple[int, int], ...]  # bytes and operations of each product in it
    eighth: bool  # whether tensor cores of 8 bits can do it
    check: Callable[[], None]  # raises AssertionError
    plain_op: str = ""  # tells apart bf16 products of the same sizes
    like: str = ""  # the case of an earlier row, same op, formats and sizes apart: the note says how they compare


class Bench:
    """Measures products on one device, each bf16 product once."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self.timer = Timer(device, samples)
        copied, side = CEILINGS[device.type]
        name = f"{copied >> 20}MiB"
        self.copy = self.timer.copy_gb_per_s(copied)
        self.ceilings = {f"copy_{name}": self.copy, f"read_{name}": self.timer.read_gb_per_s(copied)}
        self.bf16 = self.ceilings[f"bf16_{side}_tflops"] = _bf16_tflops(self.timer, side)
        self.fp8 = _fp8_tflops(self.timer, side)
        if self.fp8 is not None:
            self.ceilings[f"fp8_{side}_tflops"] = self.fp8
        self._plain: dict[tuple[object, ...], float] = {}
        self._times: dict[tuple[object, ...], float] = {}

    def measure(self, product: Product) -> ProductRow:
        """Check a product and time it. A product that is wrong, fails, or has no kernel of its own gets no time."""
        fallbacks = [e for e in product.chosen if e.fallback or e.chosen is None]
        if fallbacks:  # seconds for what no one waits for
            refusals = dict.fromkeys(f"{r.kernel}: {r.reason}" for e in fallbacks for r in e.refused)
            return _untimed(product, "; ".join(refusals))
        try:
            product.check()
            timing = self.timer.time(product.call)
            plain = self._plain_us(product)
        except AssertionError as error:
            return _untimed(product, f"differs: {error}")
        except failures() as error:
            raise_if_lost(error)
            return _untimed(product, f"failed: {type(error).__name__}: {error}".splitlines()[0])
        m, n, k = product.sizes
        key = (product.format, product.activations, m, n, k)
        self._times[product.case, *key] = timing.us
        like = self._times.get((product.like, *key))
        note = "" if like is None else f"{like / timing.us:.2f} of the speed of: {product.like}"
        return ProductRow(
            product.op, product.case, product.format, product.activations, m, n, k, timing.us, timing.us_spread, plain,
            plain / timing.us, self.floor_us(product) / timing.us, _kernels(product), True, note,
        )  # fmt: skip

    def floor_us(self, product: Product) -> float:
        """Return the least time of a product, in microseconds; see the module."""
        rate = self.fp8 if product.eighth and self.fp8 is not None else self.bf16
        return sum(max(size / self.copy / 1e3, flops / rate / 1e6) for size, flops in product.work)

    def _plain_us(self, product: Product) -> float:
        key = (product.plain_op, *product.sizes)
        if key not in self._plain:
            self._plain[key] = self.timer.time(product.plain).us
        return self._plain[key]


def failures() -> tuple[type[Exception], ...]:
    """Return what a kernel that cannot do its work raises."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (MicroscaleError, RuntimeError)
    return (MicroscaleError, RuntimeError, TritonError)


def raise_if_lost(error: Exception) -> None:
    """Raise an error again if the device does nothing any more after it: every later row would fail too."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise error from None


def _untimed(product: Product, note: str) -> ProductRow:
    m, n, k = product.sizes
    return ProductRow(
        product.op, product.case, product.format, product.activations, m, n, k, None, None, None, None, None,
        _kernels(product), False, note,
    )  # fmt: skip


def _kernels(product: Product) -> str:
    return " + ".join(dict.fromkeys(e.chosen or "none" for e in product.chosen))


def normal(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return normally distributed bfloat16, the same for the same seed; operands of one product need different ones."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def is_eighth(*formats: FormatSpec | None) -> bool:
    """Return True if tensor cores of 8-bit floats can multiply operands of these formats (None: a plain operand)."""
    return all(f is not None and f.element.kind == "float" and f.element.width <= 8 for f in formats)


def stored(t: torch.Tensor) -> int:
    """Return the bytes of a plain or a quantized tensor."""
    return t.stored_bytes if isinstance(t, BlockScaledTensor) else t.numel() * t.element_size()


def _bf16_tflops(timer: Timer, side: int) -> float:
    a, b = (normal((side, side), timer.device, seed) for seed in range(2))
    return 2 * side**3 / timer.time(lambda: a @ b.T).us / 1e6


def _fp8_tflops(timer: Timer, side: int) -> float | None:
    """The rate with one scale a row and the fast accumulation, which is the most there is; None without such cores."""
    device = timer.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a, b = (normal((side, side), device, seed).to(torch.float8_e4m3fn) for seed in range(2))
    row, column = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(a, b.T, row, column, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        return 2 * side**3 / timer.time(multiply).us / 1e6
    except RuntimeError:  # this torch, or this cuBLAS, has no such product here
        return None


# -- the check ---------------------------------------------------------------------------------------------------------


def accumulation_error(terms: int) -> float:
    """Return how far a sum of so many FP32 terms may be off, as a share of the sum of their magnitudes.

    With u = 2**-24, any order of n roundings gives at most n * u / (1 - n * u) (Higham, Accuracy and Stability of
    Numerical Algorithms, lemma 3.1). Where roundings are independent of each other, as with the random data here, the
    share is at most sqrt(2 * log(2 / p)) * sqrt(n) * u but for a probability of n * p (Higham and Mary, SIAM J. Sci.
    Comput. 41, 2019); with p = 1e-16 that leaves 5e-8 for all elements that a row looks at. The smaller of the two is
    taken: for long sums the first is so wide that whole blocks of K could go missing.
    """
    worst = terms * _FP32 / (1 - terms * _FP32)
    return min(worst, math.sqrt(2 * math.log(2 / _UNLIKELY) * terms) * _FP32)


def error_bound(
    exact: torch.Tensor, magnitude: torch.Tensor, terms: int, dtype: torch.dtype, extra: float = 0.0
) -> torch.Tensor:
    """Return by how much each element of a product may differ from `exact`, float64.

    FP32 accumulation and one rounding to `dtype`: with g = `accumulation_error` + `extra` and magnitude = |A| @ |B|,
    the accumulator is off by at most d = g * magnitude, and rounding adds half an ulp of what it then is, at most
    eps / 2 * (|exact| + d), or half of the smallest subnormal. `terms` = K counts products and additions; three more
    are for products that FP32 does not hold exactly and for two outer scales.
    """
    info = torch.finfo(dtype)
    off = (accumulation_error(terms + 3) + extra) * magnitude
    rounding = (info.eps / 2 * (exact.abs() + off)).clamp_min(info.smallest_normal * info.eps / 2)
    return off + rounding


def strata(size: int, count: int, device: torch.device) -> torch.Tensor:
    """Return indices into `size`: all, or `count` of them, one in each of as many equal parts, the ends among them.

    So every tile of a result that is larger than such a part is looked into. int64, the same ones each time.
    """
    if size <= count:
        return torch.arange(size, device=device)
    starts = [i * size // count for i in range(count + 1)]
    generator = torch.Generator().manual_seed(size)
    shares = torch.rand(count, generator=generator).tolist()
    inside = zip(starts[:-1], starts[1:], shares, strict=True)
    found = [start + int(share * (stop - start)) for start, stop, share in inside]
    return torch.tensor([0, *found[1:-1], size - 1], device=device)


def decoded(t: torch.Tensor) -> torch.Tensor:
    """Return the exact values of an operand, float64, quantized ones by the reference."""
    if not isinstance(t, BlockScaledTensor):
        return t.to(torch.float64)
    with dispatch.use_backend("reference"):
        values = t.replace(outer_scale=None).dequantize(torch.float32).to(torch.float64)
    return values if t.outer_scale is None else values * t.outer_scale.to(torch.float64)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some columns of a product's right side, decoded: weight_CK in float64."""

    columns: torch.Tensor
    weight_CK: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> Sample:
        """Take some rows of a weight [N, K], which are columns of the product."""
        columns = strata(weight.shape[0], SAMPLE[1], weight.device)
        return Sample(columns, decoded(weight.index_select(0, columns)))

    def check(self, y: torch.Tensor, x: torch.Tensor, extra: float = 0.0) -> None:
        """Raise AssertionError unless y [M, N] is x [M, K] times the weight, where it is looked into, and finite."""
        rows = strata(x.shape[0], SAMPLE[0], x.device)
        x_RK = decoded(x.index_select(0, rows))
        exact, magnitude = x_RK @ self.weight_CK.T, x_RK.abs() @ self.weight_CK.T.abs()
        bound = error_bound(exact, magnitude, x.shape[1], y.dtype, extra)
        assert_within(y.index_select(0, rows).index_select(1, self.columns), exact, bound, (rows, self.columns))
        assert bool(torch.isfinite(y).all()), f"{int((~torch.isfinite(y)).sum())} elements are not finite"


def assert_within(
    y: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Raise AssertionError, naming the worst element, unless |y - exact| <= bound. `where`: rows and columns of y."""
    share = (y.to(torch.float64) - exact).abs() / bound
    share = share.where(torch.isfinite(y), torch.inf)
    outside = int((share > 1).sum())
    if outside:
        worst = int(share.argmax())
        r, c = worst // y.shape[1], worst % y.shape[1]
        at = [int(where[0][r]), int(where[1][c])]
        raise AssertionError(
            f"{outside} of {y.numel()} sampled elements are outside the bound; worst at {at}: {y[r, c].item()!r} "
            f"against {exact[r, c].item()!r}, bound {bound[r, c].item():.3g}"
        )


def assert_repeats(call: Callable[[], torch.Tensor], y: torch.Tensor) -> None:
    """Raise AssertionError unless a call gives y again, bit for bit."""
    differ = int((call() != y).sum())
    assert not differ, f"two calls differ in {differ} of {y.numel()} elements"


def extra_error(op: str, chosen: Iterable[dispatch.Explanation]) -> float:
    """Return what the records of the chosen kernels allow beyond FP32 accumulation, as a share of |A| @ |B|."""
    exact = {entry.name: bool(getattr(entry, "exact", True)) for entry in dispatch.kernels(op)}
    return 0.0 if all(exact.get(e.chosen or "", True) for e in chosen) else INEXACT
