"""`Checkpoint`: a folder of safetensors, or one such file, opened by its headers; no data is read until asked for.

A folder holds model.safetensors, or shards with their *.safetensors.index.json, or one other *.safetensors file.

Which tensors are layers? A file has names and shapes, but no modules, so `describe` goes by convention:
  - a rank-2 floating tensor NAME.weight is a layer called NAME; everything else (rank 1: norms and biases; rank 3 and
    more: convolutions, stacked experts) is counted in bytes only
  - it is an embedding if one component of NAME is in EMBEDDING_WORDS, otherwise linear
  - it stays as it is (`Layer.fixed`, with the reason) if it is already quantized, if it is no 16- or 32-bit float, if
    nn.MultiheadAttention owns it, or if it is stored as [in, out]: its bias is as long as its rows, or it is called as
    one such tensor of the checkpoint is (`c_proj`)
What the names cannot show is not seen: an nn.Linear subclass with a forward of its own counts as linear, and an output
layer tied to the embedding, which is not in the file, does not restrain the embedding. `microscale.plan` of the model
itself knows both.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from microscale.errors import CheckpointError, did_you_mean
from microscale.interop.dialect import Contents, Dialect, QuantizedEntry, dialect_of
from microscale.interop.safetensors_stream import SafetensorsFile, TensorSpec
from microscale.nn.plan import Layer, LayerKind
from microscale.ops.api import INPUT_DTYPES

EMBEDDING_WORDS = frozenset(
    {
        "embed", "embedding", "embeddings", "embed_tokens", "embed_positions", "embed_in", "wte", "wpe",
        "word_embedding", "word_embeddings", "position_embedding", "position_embeddings", "token_embedding",
        "token_type_embeddings", "tok_embeddings", "shared", "relative_attention_bias",
    }
)  # fmt: skip
INDEX = ".safetensors.index.json"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".npz", ".onnx")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    name: str
    spec: TensorSpec
    file: SafetensorsFile


class Checkpoint:
    """Headers of a checkpoint. `folder` is None for a single file; `tensors` are the stored ones, by name.

    Raises CheckpointError, naming the file and the way out, if files are missing, damaged or inconsistent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise CheckpointError(f"no file or folder {self.path}", _elsewhere(self.path))
        self.folder = self.path if self.path.is_dir() else None
        self.index: dict[str, Any] | None = None
        self.index_name = ""
        paths = [_single_file(self.path)] if self.folder is None else self._paths(self.folder)
        self.files = tuple(SafetensorsFile(p) for p in paths)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, entry in file.entries.items():
                if name in self.tensors:
                    message = f"{name!r} is in {self.tensors[name].file.path} and in {file.path.name}"
                    raise CheckpointError(message, "remove the files that do not belong together")
                self.tensors[name] = StoredTensor(name, entry.spec, file)
        self._check_index()

    # -- what is in it --

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The folder's config.json, or None without one."""
        path = None if self.folder is None else self.folder / "config.json"
        return read_json(path) if path is not None and path.is_file() else None

    @property
    def quant_method(self) -> str | None:
        """What config.json says the weights are quantized with, or None."""
        found = (self.config or {}).get("quantization_config")
        return str(found.get("quant_method")) if isinstance(found, dict) else None

    @functools.cached_property
    def dialect(self) -> Dialect | None:
        """The dialect this checkpoint is written in; None if it is not quantized, or by something unknown here."""
        return dialect_of(self)

    @functools.cached_property
    def contents(self) -> Contents:
        """What the checkpoint declares; every declared part is there, with the right dtype and shape."""
        if self.dialect is None:
            return Contents()
        contents = self.dialect.contents(self)
        for entry in contents.quantized.values():
            self._check_entry(entry)
        for alias, target in contents.aliases.items():
            if alias in self.tensors or (target not in self.tensors and target not in contents.quantized):
                raise CheckpointError(f"{self.path}: {alias!r} is said to be {target!r}, which is not so", _INCOMPLETE)
        return contents

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Logical names: plain tensors, quantized ones (not their parts), and aliases of tied weights."""
        contents = self.contents
        parts = {stored for entry in contents.quantized.values() for stored, _ in entry.parts.values()}
        plain = [name for name in self.tensors if name not in parts]
        return (*sorted([*plain, *contents.quantized]), *contents.aliases)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor by its logical name, in fresh memory: a BlockScaledTensor if it is stored as one.

        Raises CheckpointError if there is none.
        """
        name = self.contents.aliases.get(name, name)
        entry = self.contents.quantized.get(name)
        if entry is None or self.dialect is None:
            return self._stored(name).file.read(name)
        parts = {part: self._stored(stored).file.read(stored) for part, (stored, _) in entry.parts.items()}
        return self.dialect.unflatten(entry, parts)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a plain tensor, reading only their bytes. Raises InputError out of range."""
        return self._stored(name).file.read_rows(name, start, stop)

    def describe(self) -> tuple[list[Layer], int]:
        """Return every layer, in file order, and the bytes of all other tensors. See the module for what is a layer."""
        transposed = self._transposed_leaves()
        layers = [
            self._layer(name, stored.spec, transposed)
            for name, stored in self.tensors.items()
            if _names_layer(name) and len(stored.spec.shape) == 2 and _is_float(stored.spec)
        ]
        layers += [_quantized_layer(e) for e in self.contents.quantized.values() if _is_layer(e)]
        return layers, self.nbytes - sum(layer.bytes for layer in layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(stored.spec.nbytes for stored in self.tensors.values())

    # -- finding the files --

    def _paths(self, folder: Path) -> list[Path]:
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        indexes = sorted(folder.glob(f"*{INDEX}"))
        if len(indexes) > 1:
            indexes = [p for p in indexes if p.name == f"model{INDEX}"] or indexes
        if len(indexes) == 1:
            return self._indexed(indexes[0])
        files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
        if indexes or len(files) > 1 or any(_SHARD.fullmatch(p.name) for p in files):
            found = ", ".join(p.name for p in (indexes or files)[:4])
            raise CheckpointError(
                f"{folder} holds {found} and no model{INDEX} that says what belongs together",
                "add the index of the shards, or give the path of one file",
            )
        if not files:
            raise CheckpointError(f"{folder} holds no safetensors checkpoint", _instead(folder))
        return files

    def _indexed(self, path: Path) -> list[Path]:
        self.index, self.index_name = read_json(path), path.name
        weights = self.index.get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
            raise CheckpointError(f"{path} has no weight_map of tensor names to file names", _INCOMPLETE)
        names = sorted(set(weights.values()))
        for name in names:
            # An index is input from elsewhere: it may not point outside its folder.
            if Path(name).name != name or not name.endswith(".safetensors"):
                message = f"{path} names {name!r}, which is no safetensors file of its folder"
                raise CheckpointError(message, "an index may name files beside it only; do not trust this one")
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            count = f"{len(missing)} of the {len(names)} files of its index"
            raise CheckpointError(f"{path.parent} lacks {count}: {', '.join(missing[:4])}", _INCOMPLETE)
        return [path.parent / name for name in names]

    def _check_index(self) -> None:
        for name, file in (self.index or {}).get("weight_map", {}).items():
            stored = self.tensors.get(name)
            if stored is None or stored.file.path.name != file:
                message = f"{self.path / file} does not hold {name!r}, which {self.index_name} promises"
                raise CheckpointError(message, _INCOMPLETE)

    def _check_entry(self, entry: QuantizedEntry) -> None:
        if entry.name in self.tensors and entry.name not in {stored for stored, _ in entry.parts.values()}:
            raise CheckpointError(f"{self.path}: {entry.name!r} is there both plain and quantized", _INCOMPLETE)
        for part, (stored, spec) in entry.parts.items():
            found = self.tensors.get(stored)
            if found is None:
                raise CheckpointError(f"{self.path}: {entry.name!r} lacks its {part}, {stored!r}", _INCOMPLETE)
            if found.spec != spec:
                needed = f"{entry.meta.format.name} of {list(entry.shape)} needs {spec}"
                raise CheckpointError(f"{found.file.path}: {stored!r} is {found.spec}; {needed}", _INCOMPLETE)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            hint = did_you_mean(name, self.names) or f"it has {', '.join(self.names[:4])}, ..."
            raise CheckpointError(f"{self.path} has no tensor {name!r}", hint)
        return self.tensors[name]

    # -- layers --

    def _layer(self, parameter: str, spec: TensorSpec, transposed: set[str]) -> Layer:
        name = layer_name(parameter)
        owner, dot, leaf = name.rpartition(".")
        fixed = ""
        if name in self.contents.inputs:
            fixed = "already quantized"
        elif spec.torch_dtype not in INPUT_DTYPES:
            fixed = f"{spec.dtype} is not quantized, only 16- and 32-bit floats are"
        elif leaf in transposed:
            fixed = "stored as [in, out], unlike the weight of nn.Linear"
        elif leaf == "out_proj" and any(f"{owner}{dot}{part}" in self.tensors for part in _ATTENTION):
            fixed = "nn.MultiheadAttention reads its weight without calling it"
        dtype = str(spec.torch_dtype).removeprefix("torch.")
        return Layer(name, _kind(name), parameter, spec.shape, dtype, fixed=fixed)

    def _transposed_leaves(self) -> set[str]:
        """Last components of names whose bias shows that the weight is [in, out], as some older models store it."""
        leaves = set()
        for name, stored in self.tensors.items():
            layer, shape = layer_name(name), stored.spec.shape
            bias = self.tensors.get(f"{layer}.bias")
            if not _names_layer(name) or len(shape) != 2 or bias is None:
                continue
            if bias.spec.shape == shape[1:] != shape[:1]:
                leaves.add(layer.rpartition(".")[2])
        return leaves


_ATTENTION = ("in_proj_weight", "q_proj_weight")  # what nn.MultiheadAttention has beside its out_proj
_INCOMPLETE = "the checkpoint is incomplete or was changed; download or write it again"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file. Raises CheckpointError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "repair or replace the file") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object", "repair or replace the file")
    return data


def layer_name(parameter: str) -> str:
    """Return the name of the module that has a parameter called `weight`: empty for `weight` itself."""
    return parameter.removesuffix("weight").removesuffix(".")


def _names_layer(parameter: str) -> bool:
    return parameter == "weight" or parameter.endswith(".weight")


def _kind(name: str) -> LayerKind:
    return "embedding" if EMBEDDING_WORDS.intersection(name.split(".")) else "linear"


def _is_float(spec: TensorSpec) -> bool:
    return spec.torch_dtype is not None and spec.torch_dtype.is_floating_point


def _is_layer(entry: QuantizedEntry) -> bool:
    return _names_layer(entry.name) and len(entry.shape) == 2


def _quantized_layer(entry: QuantizedEntry) -> Layer:
    name = layer_name(entry.name)
    dtype = str(entry.dtype).removeprefix("torch.")
    return Layer(name, _kind(name), entry.name, entry.shape, dtype, (), "already quantized", entry.stored_bytes)


def _single_file(path: Path) -> Path:
    if path.name.endswith(INDEX):
        raise CheckpointError(f"{path} is the index of a checkpoint", f"give its folder: {path.parent}")
    if path.suffix in _OTHER_WEIGHTS:
        raise CheckpointError(f"{path} is not a safetensors file", _CONVERT)
    return path


_CONVERT = (
    "convert it first, for example with transformers: AutoModel.from_pretrained(folder).save_pretrained(new_folder), "
    "or with safetensors.torch.save_file(state_dict, path)"
)


def _elsewhere(path: Path) -> str:
    if len(path.parts) == 2 and not path.is_absolute():
        return "checkpoints are read from local folders; download it first and give the folder"
    near = did_you_mean(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
    return near or "give the path of a checkpoint folder or of a safetensors file"


def _instead(folder: Path) -> str:
    """Name what the folder has instead."""
    other = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_WEIGHTS)
    if other:
        return f"it has {other[0]}; {_CONVERT}"
    inside = sorted({p.parent.name for p in folder.glob("*/*.safetensors")})
    if inside:
        return f"give one of its subfolders: {', '.join(inside[:5])}"
    return "a checkpoint folder has model.safetensors, or shards and their index"
