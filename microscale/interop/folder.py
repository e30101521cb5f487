"""Checkpoint folders on disk: written beside their place and moved there when complete; side files copied along.

A folder is written as a hidden sibling, `.NAME.partial-xxxxxxxx`, and renamed at the end. An error removes it. A killed
run leaves it behind, and nothing in it loads: no safetensors file in it has its header before all have their data (see
`StreamWriter`). It can be deleted. A folder that is overwritten is moved aside only then, and removed last.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from microscale.errors import CheckpointError
from microscale.interop.checkpoint import INDEX
from microscale.interop.safetensors_stream import StreamWriter, TensorSpec

# Weights of other frameworks and duplicates in other formats; a quantized checkpoint replaces them.
_WEIGHTS = frozenset(
    {
        ".bin", ".ckpt", ".gguf", ".h5", ".mlmodel", ".msgpack", ".npz", ".onnx", ".onnx_data", ".ot", ".pb", ".pt",
        ".pth", ".safetensors", ".tflite",
    }
)  # fmt: skip
_NOT_COPIED = frozenset({".cache", ".git", "__pycache__"})


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a fresh folder to fill; it becomes `path` when the block ends, or is removed when the block raises.

    Raises CheckpointError if `path` exists and `overwrite` is not set, or if it is nothing that may be overwritten.
    """
    place = check_target(path, overwrite=overwrite)
    with _reporting(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        work = _sibling(place, "partial")
        work.mkdir()
    try:
        yield work
        with _reporting(place):
            _sync(work)
            _move(work, place)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def check_target(path: Path, *, overwrite: bool) -> Path:
    """Return the resolved path of a folder that may be written. Raises CheckpointError if it may not."""
    place = path.expanduser().resolve()
    if not place.exists():
        return place
    if not place.is_dir():
        raise CheckpointError(f"{path} is a file", "a checkpoint is written as a folder: give another path")
    if not overwrite:
        raise CheckpointError(f"{path} exists", "give another path, or overwrite it (overwrite=True, --overwrite)")
    # Overwriting removes everything in the folder, so it has to look like what this library writes.
    if any(place.iterdir()) and not any(place.glob("*.safetensors")):
        raise CheckpointError(f"{path} exists and is no checkpoint, so it is not overwritten", "give another path")
    return place


def check_apart(source: Path, place: Path) -> None:
    """Raise CheckpointError if one of two paths contains the other, or they are the same."""
    first, second = source.expanduser().resolve(), place.expanduser().resolve()
    if first == second:
        raise CheckpointError(f"{place} is the source itself", "give another path for the result")
    if first in second.parents or second in first.parents:
        raise CheckpointError(
            f"{source} and {place} contain one another", "give a path outside the source for the result"
        )


def check_space(path: Path, needed: int) -> None:
    """Raise CheckpointError if the disk of `path` has less than `needed` bytes free."""
    existing = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        sizes = f"{needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise CheckpointError(f"not enough space for {path}: it takes {sizes}", "free some, or write somewhere else")


def copy_side_files(source: Path, target: Path, skip: Iterable[str] = ()) -> None:
    """Copy everything but weights from one checkpoint folder to another: config, tokenizer, code, text, subfolders.

    Left out: at the top, all weight files, their indexes, and the names in `skip`; in subfolders, which hold further
    modules (a pooling or a dense layer), weights in formats other than safetensors and pytorch_model.bin, which are
    duplicates for other runtimes; hidden caches and version control everywhere.
    """
    left = frozenset(skip)
    for path in sorted(source.iterdir()):
        if path.name in left or path.name in _NOT_COPIED:
            continue
        if path.is_dir():
            with _reporting(target):
                shutil.copytree(path, target / path.name, ignore=_ignored, copy_function=shutil.copyfile)
        elif path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            with _reporting(target):
                shutil.copyfile(path, target / path.name)


def _ignored(folder: str, names: list[str]) -> set[str]:
    kept = {".safetensors"} | {Path(n).suffix for n in names if n.startswith("pytorch_model") and n.endswith(".bin")}
    weights = {n for n in names if Path(n).suffix in _WEIGHTS - kept}
    return {n for n in names if n in _NOT_COPIED} | weights


def write_json(path: Path, data: Any) -> None:
    """Write data as indented JSON. Raises CheckpointError if the system refuses."""
    with _reporting(path):
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_files(
    folder: Path,
    files: Mapping[str, tuple[Mapping[str, TensorSpec], Mapping[str, str]]],
    fill: Callable[[str, StreamWriter], None],
    index_name: str = f"model{INDEX}",
) -> None:
    """Write safetensors files {name: (tensors, metadata)}, calling `fill(name, writer)` for each, and their index.

    All become valid together at the end, the index before them. One file has no index.
    """
    writers = []
    for name, (specs, metadata) in files.items():
        with StreamWriter(folder / name, specs, metadata, hold=True) as writer:
            fill(name, writer)
        writers.append(writer)
    if len(files) > 1:
        total = sum(spec.nbytes for specs, _ in files.values() for spec in specs.values())
        weights = {tensor: name for name, (specs, _) in files.items() for tensor in specs}
        write_json(
            folder / index_name, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        )
    for writer in writers:
        writer.commit()


# -- the file system ---------------------------------------------------------------------------------------------------


def _sibling(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{kind}-{uuid.uuid4().hex[:8]}")


def _move(work: Path, place: Path) -> None:
    """Rename `work` to `place`; what stood there is moved aside first, and comes back if that fails."""
    old = None
    if place.exists():
        old = _sibling(place, "old")
        place.rename(old)
    try:
        work.rename(place)
    except BaseException:
        if old is not None:
            old.rename(place)
        raise
    _sync_one(place.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make everything below a folder durable, so that a power failure after the rename loses nothing."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no fsync of a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise CheckpointError(message, "check the path, its permissions and free space") from error
