"""The dialect "microscale": every format, nothing lost, and each file stands on its own.

    NAME.qdata         U8             packed codes
    NAME.scale         U8, F32, BF16  one a block, always in layout strided
    NAME.outer_scale   F32            only where there is one
    NAME               U8 [0]         a placeholder, so that other loaders refuse

`__metadata__` holds {"format": "pt", "microscale": JSON}; the JSON has
    version      1: of this layout                library      version of microscale that wrote the file
    metas        the distinct texts of Meta.pack(): block axis, scale layout, and the whole format definition
    tensors      {NAME: {"meta": index into metas, "shape": logical, "dtype": of dequantize(), "outer_scale": shape}}
    quantizers   the distinct input quantizers    inputs       {module name: index into quantizers}
    aliases      {name: NAME of the same parameter}, for tied weights
Nothing refers to a name in a registry, so a file reads the same whatever formats are installed or changed.

A folder also gets microscale.json (recipe and resolved plan, to be read by people and tools; loading does not need it)
and, in config.json, a `quantization_config` with a quant_method that no other loader knows. Not all refuse that:
transformers 5 warns, misses the weights, and starts from random ones. A weight of the wrong shape it does refuse, as do
`load_state_dict`, strict or not, and everything else that checks shapes: hence the placeholder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

import microscale
from microscale.errors import CheckpointError
from microscale.interop.checkpoint import Checkpoint, read_json
from microscale.interop.dialect import Contents, Dialect, QuantizedEntry
from microscale.interop.safetensors_stream import SafetensorsFile, TensorSpec, dtype_code
from microscale.nn.plan import Plan
from microscale.numerics import layout
from microscale.spec.format import FormatSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.tensor import BlockScaledTensor, Meta

VERSION = 1
KEY = "microscale"
FOLDER_FILE = "microscale.json"
_PLACEHOLDER = "placeholder"


class NativeDialect(Dialect):
    """See the module."""

    name = "microscale"
    summary = "every format; lossless; read by microscale only"

    def flatten(self, name: str, q: BlockScaledTensor) -> dict[str, tuple[str, torch.Tensor]]:
        """Return qdata, scale in layout strided, outer_scale if there is one, and the placeholder."""
        q = q.to_layout(layout.STRIDED)
        parts = {"qdata": q.qdata, "scale": q.scale}
        if q.outer_scale is not None:
            parts["outer_scale"] = q.outer_scale
        made = {part: (f"{name}.{part}", tensor) for part, tensor in parts.items()}
        return made | {_PLACEHOLDER: (name, q.qdata.new_empty(0))}

    def unflatten(self, entry: QuantizedEntry, parts: Mapping[str, torch.Tensor]) -> BlockScaledTensor:
        """Return the tensor of stored parts."""
        outer = parts.get("outer_scale")
        return BlockScaledTensor(parts["qdata"], parts["scale"], outer, entry.meta, entry.shape, entry.dtype)

    def metadata(self, contents: Contents) -> dict[str, str]:
        """Return the `__metadata__` of a file; the same contents give the same text."""
        metas, quantizers = _Table(), _Table()
        tensors: dict[str, Any] = {}
        for name, entry in sorted(contents.quantized.items()):
            dtype = str(entry.dtype).removeprefix("torch.")
            tensors[name] = {"meta": metas.index(entry.meta.pack()), "shape": list(entry.shape), "dtype": dtype}
            if "outer_scale" in entry.parts:
                tensors[name]["outer_scale"] = list(entry.parts["outer_scale"][1].shape)
        inputs = {name: quantizers.index(spec.key) for name, spec in sorted(contents.inputs.items())}
        data = {
            "version": VERSION,
            "library": microscale.__version__,
            "metas": metas.rows,
            "tensors": tensors,
            "quantizers": [json.loads(key) for key in quantizers.rows],
            "inputs": inputs,
            "aliases": dict(sorted(contents.aliases.items())),
        }
        return {"format": "pt", KEY: json.dumps(data, separators=(",", ":"))}

    def folder_files(self, plan: Plan | None) -> dict[str, Any]:
        """Return microscale.json: library version, the recipe in full, the resolved plan, the input quantizers."""
        data: dict[str, Any] = {"library_version": microscale.__version__, "dialect": self.name, "version": VERSION}
        if plan is not None:
            inputs = {row.layer.name: row.input.name for row in plan.quantized if row.input is not None}
            data |= {"recipe": plan.recipe.model_dump(mode="json"), "plan": plan.to_dict(), "inputs": inputs}
        return {FOLDER_FILE: data}

    def quantization_config(self, plan: Plan | None) -> dict[str, Any]:
        """Return the quant_method that no other loader knows, and where it came from."""
        made = {"quant_method": self.name, "version": VERSION, "library_version": microscale.__version__}
        return made if plan is None else made | {"recipe": plan.recipe.name}

    def recipe(self, checkpoint: Checkpoint) -> str | None:
        """Return the recipe's name from microscale.json; a single file does not know it."""
        path = None if checkpoint.folder is None else checkpoint.folder / FOLDER_FILE
        if path is None or not path.is_file():
            return super().recipe(checkpoint)
        recipe = read_json(path).get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return name if isinstance(name, str) else None

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Return True if a file, config.json or microscale.json says so."""
        if any(KEY in file.metadata for file in checkpoint.files):
            return True
        if checkpoint.folder is None:
            return False
        return checkpoint.quant_method == self.name or (checkpoint.folder / FOLDER_FILE).is_file()

    def contents(self, checkpoint: Checkpoint) -> Contents:
        """Return what the files declare. That the declared parts are there is checked by `Checkpoint.contents`."""
        quantized: dict[str, QuantizedEntry] = {}
        inputs: dict[str, QuantizerSpec] = {}
        aliases: dict[str, str] = {}
        version = ""
        for file in checkpoint.files:
            data = _metadata_of(file)
            try:
                metas = [Meta.unpack(text) for text in data.metas]
                quantized |= {name: _entry(name, row, metas[row.meta]) for name, row in data.tensors.items()}
                inputs |= {name: data.quantizers[i] for name, i in data.inputs.items()}
            except (ValueError, IndexError) as error:
                raise _damaged(file, error) from None
            aliases |= data.aliases
            version = data.library
        return Contents(quantized, inputs, aliases, version)


class _Table:
    """Distinct texts in order of first use: thousands of tensors share a few formats."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self._known: dict[str, int] = {}

    def index(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.rows)
            self.rows.append(text)
        return self._known[text]


class _Tensor(BaseModel):
    meta: int = Field(ge=0)
    shape: tuple[int, ...] = Field(min_length=1)
    dtype: Literal["float32", "bfloat16", "float16"]
    outer_scale: tuple[int, ...] | None = None


class _Metadata(BaseModel):
    version: int
    library: str
    metas: list[str]
    tensors: dict[str, _Tensor]
    quantizers: list[QuantizerSpec]
    inputs: dict[str, int]
    aliases: dict[str, str]


def _metadata_of(file: SafetensorsFile) -> _Metadata:
    if KEY not in file.metadata:
        hint = "a tool that rewrites files dropped it; use the file as microscale wrote it"
        raise CheckpointError(f"{file.path} has no {KEY!r} metadata, so its tensors cannot be told apart", hint)
    try:
        raw = json.loads(file.metadata[KEY])
        version = raw["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from None
    if version != VERSION:
        hint = "upgrade microscale: pip install -U microscale"
        raise CheckpointError(f"{file.path} has metadata version {version}, this library reads {VERSION}", hint)
    try:
        return _Metadata.model_validate(raw)
    except ValueError as error:
        raise _damaged(file, error) from None


def _damaged(file: SafetensorsFile, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{file.path}: damaged {KEY!r} metadata ({reason})", "write the checkpoint again")


def _entry(name: str, row: _Tensor, meta: Meta) -> QuantizedEntry:
    """Derive what the parts must be from the format and the logical shape."""
    fmt = meta.format
    if meta.layout != layout.STRIDED or not -len(row.shape) <= meta.axis < 0:
        raise ValueError(f"{name}: axis {meta.axis}, layout {meta.layout} for shape {row.shape}")
    blocks = -(-row.shape[meta.axis] // fmt.block)
    parts = {
        "qdata": TensorSpec("U8", _with(row.shape, meta.axis, blocks * fmt.block_bytes)),
        "scale": TensorSpec(_scale_code(fmt), _with(row.shape, meta.axis, blocks)),
    }
    if row.outer_scale is not None:
        whole = parts["scale"].shape
        fits = len(row.outer_scale) == len(whole)
        fits = fits and all(n in (1, size) for n, size in zip(row.outer_scale, whole, strict=True))
        if row.outer_scale and not fits:
            raise ValueError(f"{name}: an outer scale of shape {row.outer_scale} for scales of shape {whole}")
        parts["outer_scale"] = TensorSpec("F32", row.outer_scale)
    stored = {part: (f"{name}.{part}", spec) for part, spec in parts.items()}
    stored[_PLACEHOLDER] = (name, TensorSpec("U8", (0,)))
    return QuantizedEntry(name, meta, row.shape, getattr(torch, row.dtype), stored)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    index = len(shape) + axis
    return (*shape[:index], size, *shape[index + 1 :])


def _scale_code(fmt: FormatSpec) -> str:
    return "U8" if fmt.scale.torch_dtype is None else dtype_code(getattr(torch, fmt.scale.torch_dtype))
