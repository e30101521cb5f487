"""`save`: a module with block-scaled parameters as a checkpoint folder. A shared parameter is stored once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from microscale.errors import InputError
from microscale.interop.dialect import Contents, Dialect, QuantizedEntry, file_specs, find_dialect
from microscale.interop.folder import atomic_folder, check_space, check_target, write_files, write_json
from microscale.interop.modules import Slot, slots, unwrapped
from microscale.interop.safetensors_stream import StreamWriter, TensorSpec
from microscale.nn.layers import QuantizedGroupedLinear, QuantizedLinear
from microscale.nn.plan import Plan
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor

SHARD_BYTES = 5_000_000_000
_Entry = TensorSpec | QuantizedEntry


def save(
    model: torch.nn.Module,
    path: str | Path,
    *,
    plan: Plan | None = None,
    dialect: str = "microscale",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model with block-scaled parameters as a checkpoint folder.

    Args:
        model: any module, on any device; its tensors come to the CPU one at a time.
        path: the folder; it appears when it is complete.
        plan: what `quantize_` returned; it is written along, with its recipe.
        dialect: how quantized tensors are stored, see `list_dialects`.
        overwrite: replace an existing checkpoint folder, once the new one is complete.
        shard_bytes: a file that would get larger is split (a single tensor never is).

    Input quantizers and calibrated amaxes of quantized layers are stored too. A `model.config` that has
    `to_json_string`, as in `transformers`, becomes config.json; tokenizers are not part of a model and not written.

    Raises InputError for a model on the meta device, for tensors that safetensors cannot store, and for modules with
    state beside tensors; CheckpointError if the folder exists or cannot be written; UnknownNameError for the dialect.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"save takes an nn.Module, got {type(model).__name__}", "for tensors: safetensors or torch.save"
        )
    target, place = find_dialect(dialect), Path(path)
    check_target(place, overwrite=overwrite)
    job = _Job(unwrapped(model), target, shard_bytes)
    check_space(place, job.nbytes)
    with atomic_folder(place, overwrite=overwrite) as work:
        config = _config(model)
        if config is not None:
            write_json(work / "config.json", config | {"quantization_config": target.quantization_config(plan)})
        for name, data in target.folder_files(plan).items():
            write_json(work / name, data)
        write_files(work, job.files, job.fill)


class _Job:
    """What each file will hold, known from shapes alone, and how to fill it."""

    def __init__(self, model: torch.nn.Module, dialect: Dialect, shard_bytes: int) -> None:
        self.slots, self.dialect = slots(model), dialect
        for name, slot in self.slots.items():
            _check_tensor(name, slot.tensor)
        owners: dict[int, str] = {}
        for name, slot in self.slots.items():
            owners.setdefault(id(slot.tensor), name)
        self.owner = {name: owners[id(slot.tensor)] for name, slot in self.slots.items()}
        entries = {name: self._entry(name) for name in owners.values()}
        self.nbytes = sum(_nbytes(entry) for entry in entries.values())
        parts = _split(entries, shard_bytes)
        self.shards = dict(zip(_file_names(len(parts)), parts, strict=True))
        self.files = {file: self._outline(shard) for file, shard in self.shards.items()}

    def _entry(self, name: str) -> _Entry:
        tensor = self.slots[name].tensor
        if isinstance(tensor, BlockScaledTensor):
            return QuantizedEntry.of(name, tensor, self.dialect)
        return TensorSpec.of(tensor)

    def _outline(self, shard: dict[str, _Entry]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        quantized = {name: entry for name, entry in shard.items() if isinstance(entry, QuantizedEntry)}
        plain = {name: entry for name, entry in shard.items() if isinstance(entry, TensorSpec)}
        here = {name: slot for name, slot in self.slots.items() if self.owner[name] in shard}
        aliases = {name: self.owner[name] for name in here if self.owner[name] != name}
        inputs = {slot.module_name: q for slot in here.values() if (q := _input_quantizer(slot)) is not None}
        contents = Contents(quantized, inputs, aliases)
        return file_specs(plain, contents), self.dialect.metadata(contents)

    def fill(self, file: str, writer: StreamWriter) -> None:
        for name in self.shards[file]:
            tensor = self.slots[name].tensor.detach()
            if isinstance(tensor, BlockScaledTensor):
                for stored, part in self.dialect.flatten(name, tensor).values():
                    writer.write(stored, part)
            else:
                writer.write(name, tensor)


def _input_quantizer(slot: Slot) -> QuantizerSpec | None:
    if slot.attribute != "weight" or not isinstance(slot.module, QuantizedLinear | QuantizedGroupedLinear):
        return None
    return slot.module.input_quantizer


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise InputError(f"{name} is not initialized yet", "run one batch first")
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device and has no data to save", "load the weights first")
    plain = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
    if not plain and not isinstance(tensor, BlockScaledTensor):
        kind = f"{type(tensor).__name__}, layout {tensor.layout}"
        raise InputError(f"{name} is no ordinary tensor ({kind})", "convert it to a dense tensor first")


def _nbytes(entry: _Entry) -> int:
    return entry.stored_bytes if isinstance(entry, QuantizedEntry) else entry.nbytes


def _split(entries: dict[str, _Entry], shard_bytes: int) -> list[dict[str, _Entry]]:
    """Fill files in the model's order; the parts of a tensor stay together, and so do most of a layer's."""
    shards: list[dict[str, _Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + _nbytes(entry) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += _nbytes(entry)
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _config(model: torch.nn.Module) -> dict[str, Any] | None:
    """Return a model's configuration as plain data, if it has one that knows how to become JSON."""
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    data = json.loads(to_json()) if callable(to_json) else None
    return data if isinstance(data, dict) else None
