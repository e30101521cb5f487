"""`inspect`: what a checkpoint is made of, from its headers: formats, bits, bytes, recipe. Quantized or not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from microscale.interop.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor. `format` is None for a plain one; `dtype` is torch's name, of what `dequantize()` gives if quantized.

    `bits_per_value` counts everything stored for it: codes with their padding, scales, outer scales.
    """

    name: str
    format: str | None
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int
    file: str

    @property
    def values(self) -> int:
        """Number of logical values."""
        return math.prod(self.shape)

    @property
    def bits_per_value(self) -> float | None:
        """Stored bits per logical value; None for an empty tensor."""
        return 8 * self.stored_bytes / self.values if self.values else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self) | {"shape": list(self.shape), "bits_per_value": self.bits_per_value}


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """One file: its size on disk and how many stored tensors (parts count) it holds."""

    name: str
    bytes: int
    tensors: int


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What `inspect` found.

    dialect: None for a checkpoint that is not quantized, or by something unknown here (then `quant_method` may say).
    version: of the library that wrote it. recipe: name, of a folder that records one. inputs: {layer: quantizer name}.
    aliases: {name: name of the tensor that is the same parameter}.
    """

    path: str
    dialect: str | None
    quant_method: str | None
    version: str | None
    recipe: str | None
    files: tuple[FileInfo, ...]
    tensors: tuple[TensorInfo, ...]
    inputs: dict[str, str]
    aliases: dict[str, str]

    @property
    def quantized(self) -> tuple[TensorInfo, ...]:
        """The quantized tensors."""
        return tuple(t for t in self.tensors if t.format is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(t.stored_bytes for t in self.tensors)

    @property
    def values(self) -> int:
        """Number of values in all tensors."""
        return sum(t.values for t in self.tensors)

    @property
    def bits_per_value(self) -> float | None:
        """Stored bits per value over the whole checkpoint; None if it is empty."""
        return 8 * self.stored_bytes / self.values if self.values else None

    def formats(self) -> dict[str, tuple[int, int, int]]:
        """Return {format name, or dtype of plain tensors: (tensors, values, stored bytes)}, largest first."""
        found: dict[str, tuple[int, int, int]] = {}
        for t in self.tensors:
            count, values, size = found.get(t.format or t.dtype, (0, 0, 0))
            found[t.format or t.dtype] = (count + 1, values + t.values, size + t.stored_bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][2]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        fields = ("tensors", "values", "stored_bytes")
        return {
            "path": self.path,
            "dialect": self.dialect,
            "quant_method": self.quant_method,
            "version": self.version,
            "recipe": self.recipe,
            "stored_bytes": self.stored_bytes,
            "values": self.values,
            "bits_per_value": self.bits_per_value,
            "formats": {name: dict(zip(fields, row, strict=True)) for name, row in self.formats().items()},
            "files": [dataclasses.asdict(f) for f in self.files],
            "tensors": [t.to_dict() for t in self.tensors],
            "inputs": dict(self.inputs),
            "aliases": dict(self.aliases),
        }


def inspect(path: str | Path) -> CheckpointReport:
    """Return what a checkpoint folder or safetensors file contains, reading headers only.

    Raises CheckpointError for a path that holds none, and for one that is incomplete or damaged.
    """
    checkpoint = Checkpoint(path)
    contents, dialect = checkpoint.contents, checkpoint.dialect
    tensors = []
    for name in checkpoint.names:
        entry = contents.quantized.get(name)
        if name in contents.aliases:
            continue
        if entry is None:
            stored = checkpoint.tensors[name]
            dtype = str(stored.spec.torch_dtype or stored.spec.dtype).removeprefix("torch.")
            where = stored.file.path.name
            tensors.append(TensorInfo(name, None, dtype, stored.spec.shape, stored.spec.nbytes, where))
        else:
            dtype = str(entry.dtype).removeprefix("torch.")
            where = checkpoint.tensors[entry.parts["qdata"][0]].file.path.name
            tensors.append(TensorInfo(name, entry.meta.format.name, dtype, entry.shape, entry.stored_bytes, where))
    return CheckpointReport(
        path=str(checkpoint.path),
        dialect=None if dialect is None else dialect.name,
        quant_method=checkpoint.quant_method,
        version=contents.version or None,
        recipe=None if dialect is None else dialect.recipe(checkpoint),
        files=tuple(FileInfo(f.path.name, f.path.stat().st_size, len(f.entries)) for f in checkpoint.files),
        tensors=tuple(tensors),
        inputs={name: spec.name for name, spec in contents.inputs.items()},
        aliases=dict(contents.aliases),
    )
