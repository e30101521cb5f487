"""What quantizing does to a training run: on a schedule, per layer, GEMM and operand, measured where the tensor is.

    underflow = share of the nonzero values that became zero
    clipped   = share of the values beyond what their block's scale reaches, by more than half of the element's last
                step (rounding down to the largest code is no clipping)
    sqnr_db   = 10 log10( sum x**2 / sum (x - x_hat)**2 ), x_hat = what the codes and scales say, in FP32
    amax      = the largest finite magnitude

A step that is not observed costs one comparison on the host. On an observed one every operand is quantized once more,
with a seed of its own: neither the numbers nor the random state of training change. Results are read once, at the end
of that step, so nothing waits for the device in between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch

from microscale.errors import InputError
from microscale.nn.three_gemm import observe
from microscale.numerics import codec
from microscale.numerics.hadamard import hadamard
from microscale.ops import quantize
from microscale.spec.element import ElementSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor

SEED = 0  # of stochastic rounding here: not the training's own, which must not advance
_CHUNK = 1 << 24  # values in flight at once


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One operand of one layer's GEMM in one step. Shares are fractions of 1.

    `quantizer` is its short name, `values` counts elements (of all calls in the step together), `nonfinite` those that
    were NaN or infinite before or after. `sqnr_db` is None where there is no error, or no signal to hold it against.
    """

    step: int
    layer: str
    gemm: str
    operand: str
    quantizer: str
    values: int
    underflow: float
    clipped: float
    sqnr_db: float | None
    amax: float
    nonfinite: int = 0

    def to_json(self) -> str:
        """Return one line of JSON; `read_diagnostics` is the inverse."""
        return json.dumps(dataclasses.asdict(self))


class Diagnostics:
    """Watches training as a context manager; `step()` ends a training step. Made by `diagnose`.

    `rows` holds what was found so far. The file has one JSON line for each.
    """

    def __init__(self, every: int, to: str | Path | None, start: int) -> None:
        self.every, self.current = every, start
        self.rows: list[Diagnosis] = []
        self._path, self._append = None if to is None else Path(to), start > 0
        self._file: IO[str] | None = None
        self._sums: dict[tuple[str, str, str], tuple[str, torch.Tensor]] = {}
        self._watch: contextlib.ExitStack | None = None

    @property
    def observing(self) -> bool:
        """True while the step that runs is an observed one."""
        return self._watch is not None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a" if self._append else "w", encoding="utf-8")
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._file is not None:
            self._file.close()
            self._file = None

    def step(self) -> None:
        """End a training step: write what was found in it, if it was observed, and go on to the next."""
        self._end()
        self.current += 1
        self._begin()

    def _begin(self) -> None:
        if self.current % self.every == 0:
            self._watch = contextlib.ExitStack()
            self._watch.enter_context(observe(self._see))

    def _end(self) -> None:
        if self._watch is None:
            return
        self._watch.close()
        self._watch = None
        if not self._sums:
            return
        device = next(iter(self._sums.values()))[1].device
        read = torch.stack([sums.to(device) for _, sums in self._sums.values()]).tolist()
        for (layer, gemm, operand), (name, _), sums in zip(self._sums, self._sums.values(), read, strict=True):
            row = _diagnosis(self.current, (layer, gemm, operand, name), sums)
            self.rows.append(row)
            if self._file is not None:
                self._file.write(row.to_json() + "\n")
        if self._file is not None:
            self._file.flush()  # a run that is killed leaves what it found
        self._sums.clear()

    def _see(self, layer: str, gemm: str, operand: str, tensor: torch.Tensor, spec: QuantizerSpec) -> None:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError("diagnostics cannot watch while a CUDA graph is captured", "capture outside of diagnose")
        key = (layer, gemm, operand)
        found = measure(tensor, spec)
        if key in self._sums:  # gradient accumulation, shared layers: one row for the step
            before = self._sums[key][1].to(found.device)
            found = torch.cat((before[:-1] + found[:-1], torch.maximum(before[-1:], found[-1:])))
        self._sums[key] = (spec.name, found)


def diagnose(*, every: int = 100, to: str | Path | None = None, start: int = 0) -> Diagnostics:
    """Watch the quantizers of a training run, one step of every so many; a context manager.

        with ms.nn.diagnose(every=100, to="diagnostics.jsonl") as d:
            for batch in data:
                loss(model, batch).backward()
                optimizer.step()
                d.step()

    Args:
        every: observe the steps that are multiples of it.
        to: JSON lines file to write; None keeps the rows in `d.rows` only, which holds them in either case.
        start: number of the first step; above 0 (a resumed run) the file is appended to.

    Raises InputError for an `every` below 1. Layers inside a captured CUDA graph cannot be watched.
    """
    if every < 1:
        raise InputError(f"diagnose every {every} steps", "give a number of steps, at least 1")
    return Diagnostics(every, to, start)


def read_diagnostics(path: str | Path) -> list[Diagnosis]:
    """Read a file that `diagnose` wrote. Raises InputError for a line that is none of its own."""
    rows = []
    for i, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(Diagnosis(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}:{i} is no line of diagnostics: {error}", "give a file that diagnose wrote"
            ) from None
    return rows


def summary(rows: Iterable[Diagnosis]) -> str:
    """Return a table with one line for each GEMM and operand: medians over layers and steps, and the worst SQNR."""
    by_operand: dict[tuple[str, str, str], list[Diagnosis]] = {}
    for row in rows:
        by_operand.setdefault((row.gemm, row.operand, row.quantizer), []).append(row)
    lines = [f"{'gemm':<6} {'operand':<12} {'SQNR dB':>8} {'worst':>8} {'underflow':>10} {'clipped':>9}  quantizer"]
    for (gemm, operand, name), found in by_operand.items():
        levels = sorted(math.inf if row.sqnr_db is None else row.sqnr_db for row in found)
        underflow, clipped = (sorted(getattr(row, key) for row in found) for key in ("underflow", "clipped"))
        middle = len(found) // 2
        shares = f"{100 * underflow[middle]:>8.3f} % {100 * clipped[middle]:>7.3f} %"
        lines.append(f"{gemm:<6} {operand:<12} {levels[middle]:>8.2f} {levels[0]:>8.2f} {shares}  {name}")
    return "\n".join(lines)


# -- measuring ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def clipping_edges(element: ElementSpec) -> tuple[float, float]:
    """Return (low, high), in units of the scale: values outside are clipped. Half a step beyond the extreme values."""
    extremes = codec.encode(torch.tensor([-torch.inf, torch.inf]), element)
    bottom, top = codec.decode(extremes, element).tolist()
    table = [v for v in codec.decode_table(element).tolist() if math.isfinite(v)]
    below_top, above_bottom = max(v for v in table if v < top), min(v for v in table if v > bottom)
    return bottom - (above_bottom - bottom) / 2, top + (top - below_top) / 2


@torch.no_grad()
def measure(tensor: torch.Tensor, spec: QuantizerSpec) -> torch.Tensor:
    """Measure one operand [..., R, K] of any float dtype, quantized along its last axis: FP64 [8] on its device.

    In order: how many values there are, are nonzero, became zero, are clipped, are not finite; the sums of x² and of
    (x - x_hat)²; amax. All but amax add up over calls. With a Hadamard transform they are those of what it gives.
    """
    with torch.autocast(tensor.device.type, enabled=False):
        rows = tensor.detach()
        if spec.hadamard is not None and (ragged := rows.shape[-1] % spec.hadamard.size):
            rows = torch.nn.functional.pad(rows, (0, spec.hadamard.size - ragged))  # as training does
        stored = quantize(rows, spec, generator=SEED if spec.rounding == "stochastic" else None)
        total = torch.zeros(8, dtype=torch.float64, device=tensor.device)
        step = max(1, _CHUNK // max(1, rows[0].numel())) if rows.dim() > 1 and rows.numel() else len(rows)
        for start in range(0, len(rows), max(1, step)):
            part = slice(start, start + step)
            chunk = stored[part]
            assert isinstance(chunk, BlockScaledTensor)
            sums = _measure_chunk(rows[part].float(), chunk, spec)
            total = torch.cat((total[:-1] + sums[:-1], torch.maximum(total[-1:], sums[-1:])))
        return total


def _measure_chunk(x: torch.Tensor, q: BlockScaledTensor, spec: QuantizerSpec) -> torch.Tensor:
    if spec.hadamard is not None:
        x = hadamard(x, spec.hadamard.size, spec.hadamard.sign)
    values = q.dequantize(torch.float32)
    valid = torch.isfinite(x) & torch.isfinite(values)
    lost = (~valid).sum()
    x, values = torch.where(valid, x, 0.0), torch.where(valid, values, 0.0)
    low, high = clipping_edges(q.format.element)
    scale = q.scales() if q.outer_scale is None else q.scales() * q.outer_scale
    reach = scale.repeat_interleave(q.format.block, -1)[..., : x.shape[-1]]
    beyond = ((x > high * reach) | (x < low * reach)) & (reach > 0)
    nonzero = x != 0
    counts = (nonzero.sum(), (nonzero & (values == 0)).sum(), beyond.sum(), lost)
    sums = [v.square().sum(dtype=torch.float64) for v in (x, x - values)]
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    size = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
    return torch.stack([size, *(n.double() for n in counts), *sums, amax.double()])


def _diagnosis(step: int, where: tuple[str, str, str, str], sums: list[float]) -> Diagnosis:
    values, nonzero, underflown, clipped, lost, signal, noise, amax = sums
    return Diagnosis(
        step,
        *where,
        values=int(values),
        underflow=underflown / max(1.0, nonzero),
        clipped=clipped / max(1.0, values),
        sqnr_db=10 * math.log10(signal / noise) if signal and noise else None,
        amax=amax,
        nonfinite=int(lost),
    )
