"""`explain`: which kernel would run an op, asked without data, for this machine or for a GPU that is not here."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from microscale.cli import options, output
from microscale.errors import InputError, unknown_name
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import find_quantizer

if TYPE_CHECKING:
    from microscale.dispatch import Operand, Problem

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SHAPES = {"quantize": 0, "dequantize": 0, "matmul": 3, "grouped_matmul": 4}
_MEANING = {
    "quantize": "[...]xRxK, blocks along K",
    "dequantize": "[...]xRxK, blocks along K",
    "matmul": "MxKxN: x is [M, K], the weight [N, K], as in a linear layer",
    "grouped_matmul": "ExTxKxN: x is [T, K], the weights of E experts [E, N, K]",
}
_DEFAULTS = {
    "quantize": "4096x4096",
    "dequantize": "4096x4096",
    "matmul": "64x4096x4096",
    "grouped_matmul": "8x64x4096x4096",
}


@dataclasses.dataclass(frozen=True)
class _Question:
    """The parsed options: what is multiplied or quantized, where."""

    op: str
    shape: tuple[int, ...]
    weight: QuantizerSpec
    input: QuantizerSpec | None
    dtype: str
    device: str
    capability: tuple[int, int] | None
    layout: str

    def problem(self) -> Problem:
        """Return the dispatcher's view of the call, as `microscale.ops.library` builds it from tensors."""
        from microscale.dispatch import Problem

        where = (self.device, self.capability)
        if self.op == "quantize":
            spec = self.weight.for_row(self.shape[-1])
            return Problem("quantize", (self._plain(self.shape),), *where, spec, None, self.layout)
        if self.op == "dequantize":
            return Problem("dequantize", (self._blocked(self.shape, -1),), *where, None, self.dtype, self.layout)
        lead, (m, k, n) = self.shape[:-3], self.shape[-3:]
        first = self._plain((m, k)) if self.input is None else self._blocked((m, k), -1, self.input)
        return Problem(self.op, (first, self._blocked((*lead, k, n), -2)), *where, None, self.dtype)

    def _plain(self, shape: tuple[int, ...]) -> Operand:
        from microscale.dispatch import Operand

        return Operand(shape, self.dtype)

    def _blocked(self, shape: tuple[int, ...], axis: int, quantizer: QuantizerSpec | None = None) -> Operand:
        from microscale.dispatch import Operand
        from microscale.ops import late

        fmt = (quantizer or self.weight).format.for_row(shape[axis])
        outer = None
        if fmt.outer_scale is not None and self.op != "dequantize":  # which does not select by the second level
            outer = "scalar" if fmt.outer_scale.per == "tensor" else "vector"
        if self.op == "dequantize":
            return Operand(shape, "uint8", fmt, axis, self.layout, outer)
        return late.describe(shape, fmt, axis, axis, self.layout, outer)


def explain(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(_SHAPES)}.")],
    format_: Annotated[
        str, typer.Option("--format", "-f", metavar="FORMAT", help="A format: name, YAML path or '{format: ..., ...}'.")
    ],
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="SIZES", help="; ".join(f"{k}: {v}" for k, v in _MEANING.items()))
    ] = None,
    input_format: Annotated[
        str | None, typer.Option("--input-format", metavar="FORMAT", help="Of x; high precision if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of plain operands and the result: bf16, fp16, fp32.")] = "bf16",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    capability: Annotated[
        str | None,
        typer.Option("--capability", metavar="X.Y", help="Ask about a GPU that is not here: 9.0, 10.0."),
    ] = None,
    layout: Annotated[str, typer.Option("--layout", help="Of the scales: strided or swizzle_32_4_4.")] = "strided",
    backend: Annotated[str | None, typer.Option("--backend", help="As under use_backend(NAME).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="As under strict(): a fallback is refused.")] = False,
    source: options.From = None,
    as_json: options.Json = False,
) -> None:
    """Say which kernel would run an op, and why no other.

    No data is touched; the GPU asked about need not be here.
    """
    from microscale import dispatch
    from microscale.ops import explain as explain_op

    if op not in _SHAPES:
        raise unknown_name("op", op, _SHAPES)
    options.register(source)
    question = _Question(
        op=op,
        shape=_shape(op, shape or _DEFAULTS[op]),
        weight=find_quantizer(options.format_like(format_, "--format")),
        input=None if input_format is None else find_quantizer(options.format_like(input_format, "--input-format")),
        dtype=_dtype(dtype),
        device=device.split(":")[0],
        capability=_capability(device, capability),
        layout=_layout(layout),
    )
    only = contextlib.nullcontext() if backend is None else dispatch.use_backend(backend)
    with only, dispatch.strict(strict):
        explanation = explain_op(op, question.problem())
    if as_json:
        output.emit_json(explanation)
    else:
        print(explanation)


def _shape(op: str, text: str) -> tuple[int, ...]:
    sizes = options.parse_shape(text)
    if _SHAPES[op] not in (0, len(sizes)):
        raise InputError(f"--shape {text!r} has {len(sizes)} sizes, {op} needs {_SHAPES[op]}", f"{_MEANING[op]}")
    return sizes


def _dtype(name: str) -> str:
    full = DTYPES.get(name, name.removeprefix("torch."))
    if full not in DTYPES.values():
        raise InputError(f"unknown dtype {name!r}", f"use {', '.join(DTYPES)}")
    return full


def _layout(name: str) -> str:
    from microscale.numerics.layout import LAYOUTS

    if name not in LAYOUTS:
        raise unknown_name("scale layout", name, LAYOUTS)
    return name


def _capability(device: str, given: str | None) -> tuple[int, int] | None:
    """Compute capability: as given, or of the device if it is here; CPUs have none."""
    import torch

    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"unknown device {device!r}", "use cpu or cuda")
    if given is not None:
        major, dot, minor = given.partition(".")
        if kind == "cpu" or not (dot and major.isdigit() and minor.isdigit()):
            raise InputError(f"--capability {given!r} with --device {device}", "write --device cuda --capability 9.0")
        return int(major), int(minor)
    if kind == "cpu":
        return None
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is here to ask about", "name one by its capability: --capability 9.0")
    return torch.cuda.get_device_capability(torch.device(device))
