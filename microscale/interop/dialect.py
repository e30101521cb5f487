"""What a checkpoint dialect is, and the registry of them: one module of this package a dialect.

A dialect decides under which names and in which dtypes the parts of a BlockScaledTensor are stored, and where the
facts about them are kept. Writing, reading, sharding, atomicity and verification are the same for all of them.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from microscale.errors import CheckpointError, unknown_name
from microscale.interop.safetensors_stream import TensorSpec
from microscale.nn.plan import Plan
from microscale.numerics import layout
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor, Meta

if TYPE_CHECKING:
    from microscale.interop.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class QuantizedEntry:
    """A block-scaled tensor of a checkpoint, without its data.

    `shape` is logical, `dtype` what `dequantize()` gives. `parts` maps qdata, scale, (if there is one) outer_scale, and
    whatever else the dialect stores, to the name and the kind each is stored under.
    """

    name: str
    meta: Meta
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, tuple[str, TensorSpec]]

    @classmethod
    def of(cls, name: str, q: BlockScaledTensor, dialect: Dialect) -> Self:
        """Return the entry that a tensor (also one on the meta device) gets in a dialect."""
        parts = {part: (key, TensorSpec.of(t)) for part, (key, t) in dialect.flatten(name, q).items()}
        meta = dataclasses.replace(q.meta, layout=layout.STRIDED)
        return cls(name, meta, tuple(q.shape), q.dtype, parts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(spec.nbytes for _, spec in self.parts.values())


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file or a whole checkpoint says about itself.

    quantized: by logical name. inputs: {module name: quantizer of its input}. aliases: {name: the stored name of the
    same parameter}, for tied weights. version: of the library that wrote it, or empty.
    """

    quantized: Mapping[str, QuantizedEntry] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, QuantizerSpec] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    version: str = ""


def file_specs(plain: Mapping[str, TensorSpec], contents: Contents) -> dict[str, TensorSpec]:
    """Return every tensor of a file, plain ones and the parts of quantized ones. Raises CheckpointError on a clash."""
    specs = dict(plain)
    for entry in contents.quantized.values():
        for stored, spec in entry.parts.values():
            if stored in specs:
                message = f"{stored!r} is a tensor of the model, and one of the parts of {entry.name!r}"
                raise CheckpointError(message, "rename the one in the model, or keep the layer in high precision")
            specs[stored] = spec
    return specs


class Dialect(abc.ABC):
    """One way to store block-scaled tensors. Subclass it in a module of this package, with a `name`, to add one."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abc.abstractmethod
    def flatten(self, name: str, q: BlockScaledTensor) -> dict[str, tuple[str, torch.Tensor]]:
        """Return {part: (stored name, tensor)}; q may be on the meta device, which tells the sizes in advance."""

    @abc.abstractmethod
    def unflatten(self, entry: QuantizedEntry, parts: Mapping[str, torch.Tensor]) -> BlockScaledTensor:
        """Return the tensor of stored parts: the inverse of `flatten`."""

    @abc.abstractmethod
    def metadata(self, contents: Contents) -> dict[str, str]:
        """Return the `__metadata__` of a safetensors file with these contents."""

    @abc.abstractmethod
    def folder_files(self, plan: Plan | None) -> dict[str, Any]:
        """Return further files of a checkpoint folder: {name: what is written there as JSON}."""

    @abc.abstractmethod
    def quantization_config(self, plan: Plan | None) -> dict[str, Any]:
        """Return the entry `quantization_config` of config.json."""

    def recipe(self, checkpoint: Checkpoint) -> str | None:
        """Return the name of the recipe a checkpoint was made by, if it says so."""
        found = (checkpoint.config or {}).get("quantization_config")
        name = found.get("recipe") if isinstance(found, dict) else None
        return name if isinstance(name, str) else None

    @abc.abstractmethod
    def detect(self, checkpoint: Checkpoint) -> bool:
        """Return True if a checkpoint is written in this dialect, however damaged."""

    @abc.abstractmethod
    def contents(self, checkpoint: Checkpoint) -> Contents:
        """Return what a checkpoint of this dialect declares. Raises CheckpointError where that cannot be read.

        That the declared parts are there, with the right dtypes and shapes, is checked by the caller.
        """


@functools.cache
def _dialects() -> dict[str, Dialect]:
    package = importlib.import_module("microscale.interop")
    for module in pkgutil.iter_modules(package.__path__, "microscale.interop."):
        importlib.import_module(module.name)
    return {kind.name: kind() for kind in sorted(Dialect.__subclasses__(), key=lambda kind: kind.name)}


def list_dialects() -> list[str]:
    """Return the names of all checkpoint dialects."""
    return list(_dialects())


def find_dialect(name: str) -> Dialect:
    """Return a dialect by name. Raises UnknownNameError with the nearest names."""
    if name not in _dialects():
        raise unknown_name("checkpoint dialect", name, _dialects())
    return _dialects()[name]


def dialect_of(checkpoint: Checkpoint) -> Dialect | None:
    """Return the dialect a checkpoint is written in, or None if it is not quantized by any that is known here."""
    return next((d for d in _dialects().values() if d.detect(checkpoint)), None)
