"""`quantize_checkpoint`: from one checkpoint folder to another, shard by shard and tensor by tensor.

At any moment one tensor is in memory, with its quantized form and the temporaries of its quantization (bounded by the
kernel's chunks, see `kernels/reference/quantize.py`). Tensors that stay as they are pass through a small buffer. So the
peak follows from the largest quantized tensor, whatever the shard or the model is. The bytes are those of
`microscale.quantize(weight, quantizer)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from microscale import ops
from microscale.errors import CheckpointError, RecipeError
from microscale.interop.checkpoint import INDEX, Checkpoint
from microscale.interop.dialect import Contents, Dialect, QuantizedEntry, file_specs, find_dialect
from microscale.interop.folder import (
    atomic_folder,
    check_apart,
    check_space,
    check_target,
    copy_side_files,
    write_files,
    write_json,
)
from microscale.interop.safetensors_stream import SafetensorsFile, StreamWriter, TensorSpec
from microscale.nn.plan import LayerPlan, Plan, make_plan
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import RecipeLike

Progress = Callable[[int, int, str], None]
"""Called after each tensor with (bytes of the source done, bytes in all, name of the tensor just done)."""


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    recipe: RecipeLike,
    *,
    dialect: str = "microscale",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Quantize a checkpoint on disk by a recipe; returns the plan that was carried out.

    Args:
        src: a folder or a safetensors file, see `Checkpoint`.
        dst: the folder to write; shards keep their names, everything that is no weight is copied.
        recipe: a name, a YAML path, a mapping or a RecipeSpec, for inference and without calibration.
        dialect: how quantized tensors are stored, see `list_dialects`.
        overwrite: replace an existing checkpoint folder, once the new one is complete.
        progress: see `Progress`.

    `dst` appears when it is complete, under a temporary name until then, so a killed run leaves nothing that loads.
    Only 16- and 32-bit float weights of layers are quantized (see `Checkpoint.describe`); all else is copied unread.

    Raises CheckpointError: src is no complete checkpoint or is quantized already; dst exists, lies within src, or the
    disk is full. RecipeError and SpecError as `microscale.plan`; RecipeError for a recipe that needs calibration.
    """
    target, checkpoint, place = find_dialect(dialect), Checkpoint(src), Path(dst)
    _check_source(checkpoint)
    check_apart(checkpoint.path, place)
    check_target(place, overwrite=overwrite)
    layers, other_bytes = checkpoint.describe()
    made = make_plan(layers, recipe, other_bytes)
    _check_static(made)
    job = _Job(checkpoint, made, target, progress)
    check_space(place, sum(spec.nbytes for specs, _ in job.files.values() for spec in specs.values()))
    with atomic_folder(place, overwrite=overwrite) as work:
        _write_rest(work, checkpoint, made, target)
        write_files(work, job.files, job.fill, checkpoint.index_name or f"model{INDEX}")
    return made


def _check_source(checkpoint: Checkpoint) -> None:
    method = checkpoint.dialect.name if checkpoint.dialect is not None else checkpoint.quant_method
    if method is not None:
        hint = "start from the checkpoint it was made from, in 16- or 32-bit floats"
        raise CheckpointError(f"{checkpoint.path} is already quantized ({method})", hint)


def _check_static(made: Plan) -> None:
    for row in made.quantized:
        if row.input is not None and row.input.outer_scale_mode == "static":
            raise RecipeError(
                f"recipe {made.recipe.name!r} needs calibration, which a checkpoint without its model cannot have",
                "quantize_(model, recipe, calibrate=batches), then save(model, path); or a recipe with dynamic scales",
            )


def _write_rest(work: Path, checkpoint: Checkpoint, made: Plan, dialect: Dialect) -> None:
    """Write everything but weights: the source's files, its config with our mark, and the dialect's own files."""
    extra = dialect.folder_files(made)
    if checkpoint.folder is not None:
        copy_side_files(checkpoint.folder, work, skip=["config.json", *extra])
    if checkpoint.config is not None:
        write_json(work / "config.json", checkpoint.config | {"quantization_config": dialect.quantization_config(made)})
    for name, data in extra.items():
        write_json(work / name, data)


class _Job:
    """What each file will hold, known before any data is read, and how to fill it."""

    def __init__(self, checkpoint: Checkpoint, made: Plan, dialect: Dialect, progress: Progress | None) -> None:
        self.rows = {row.layer.parameter: row for row in made.quantized}
        self.sources = {file.path.name: file for file in checkpoint.files}
        self.dialect, self.progress = dialect, progress
        self.done, self.total = 0, checkpoint.nbytes
        self.files = {name: self._outline(file) for name, file in self.sources.items()}

    def _outline(self, file: SafetensorsFile) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        plain: dict[str, TensorSpec] = {}
        quantized: dict[str, QuantizedEntry] = {}
        inputs: dict[str, QuantizerSpec] = {}
        for name, entry in file.entries.items():
            row = self.rows.get(name)
            if row is not None and row.input is not None:
                inputs[row.layer.name] = row.input
            if row is not None and row.weight is not None:
                blank = torch.empty(entry.spec.shape, dtype=entry.spec.torch_dtype, device="meta")
                quantized[name] = QuantizedEntry.of(name, ops.quantize(blank, row.weight), self.dialect)
            else:
                plain[name] = entry.spec
        contents = Contents(quantized, inputs)
        return file_specs(plain, contents), file.metadata | self.dialect.metadata(contents)

    def fill(self, name: str, writer: StreamWriter) -> None:
        file = self.sources[name]
        for entry in file.entries.values():
            row = self.rows.get(entry.name)
            if row is not None and row.weight is not None:
                self._quantize(file, row, row.weight, writer)
            else:
                writer.write_chunks(entry.name, file.chunks(entry.name))
            self.done += entry.spec.nbytes
            if self.progress is not None:
                self.progress(self.done, self.total, entry.name)

    def _quantize(self, file: SafetensorsFile, row: LayerPlan, quantizer: QuantizerSpec, writer: StreamWriter) -> None:
        # A function of its own, so that nothing of one tensor is alive when the next is read.
        parameter = row.layer.parameter
        q = ops.quantize(file.read(parameter), quantizer)
        for stored, tensor in self.dialect.flatten(parameter, q).values():
            writer.write(stored, tensor)
