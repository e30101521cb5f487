"""Safetensors files one tensor at a time: headers, reads into fresh memory, and a writer that never holds a whole file.

    8 bytes   n, the length of the header, little-endian
    n bytes   JSON {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [start, stop]}, ...}
    rest      the tensors' bytes, offsets relative to here, without holes

Why not only the `safetensors` library? Its writer takes every tensor of a file at once, and its reader maps the file,
so that memory in use is whatever the kernel keeps of it. Here a checkpoint of any size is converted in the memory of
its largest tensor: sizes follow from shapes, so the writer lays out the file first and takes tensors in any order. The
files are ordinary ones; the tests write with one library and read with the other, both ways.

The writer puts the header in place last. Until then the file starts with a header of length 0, which no reader accepts:
a killed run leaves no file that loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from microscale.errors import CheckpointError, InputError

HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the `safetensors` library has the same limit."""
CHUNK = 1 << 23
"""Bytes moved at a time where no tensor is needed."""

# Name in the file: (bits of one value, torch dtype whose memory is laid out the same, if there is one).
_DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"), "U8": (8, "uint8"), "I8": (8, "int8"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "U16": (16, "uint16"), "I16": (16, "int16"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "U32": (32, "uint32"), "I32": (32, "int32"), "F32": (32, "float32"),
    "U64": (64, "uint64"), "I64": (64, "int64"), "F64": (64, "float64"), "C64": (64, "complex64"),
    "F4": (4, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None),
}  # fmt: skip
_NAMES = {
    getattr(torch, name): code for code, (_, name) in _DTYPES.items() if name is not None and hasattr(torch, name)
}


def dtype_code(dtype: torch.dtype) -> str:
    """Return the file's name of a torch dtype ("BF16"). Raises InputError for one that safetensors has no name for."""
    if dtype not in _NAMES:
        raise InputError(f"safetensors cannot store {dtype}", f"convert to one of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Dtype (the file's name: "BF16") and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return -(-math.prod(self.shape) * _DTYPES[self.dtype][0] // 8)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype, or None where torch has none of this layout."""
        name = _DTYPES[self.dtype][1]
        return None if name is None else getattr(torch, name, None)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return what a tensor is stored as."""
        return cls(dtype_code(tensor.dtype), tuple(tensor.shape))

    def __str__(self) -> str:
        """Render as `BF16[64, 4112]`."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is and where its bytes start, counted from the start of the file."""

    name: str
    spec: TensorSpec
    offset: int


# -- reading -----------------------------------------------------------------------------------------------------------


class SafetensorsFile:
    """One file's header, validated; the data stays on disk until `read`.

    Raises CheckpointError, naming the file and the way out, for anything that is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.entries, self.metadata = _parse(file, path)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}", "check the path") from None

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in fresh memory. Raises CheckpointError if it is not there or the file got shorter."""
        entry = self.entry(name)
        return self._load(entry, entry.spec.shape, entry.offset)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the first dimension, reading only their bytes.

        Raises InputError out of range, CheckpointError as `read` does.
        """
        entry = self.entry(name)
        rows = entry.spec.shape[0] if entry.spec.shape else 0
        if not 0 <= start <= stop <= rows:
            raise InputError(
                f"rows {start} to {stop} of {name!r}, which is {entry.spec}", "give 0 <= start <= stop <= rows"
            )
        shape = (stop - start, *entry.spec.shape[1:])
        size = TensorSpec(entry.spec.dtype, (1, *entry.spec.shape[1:])).nbytes
        return self._load(entry, shape, entry.offset + start * size)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes in order, `CHUNK` at a time; works for dtypes that torch does not have, too."""
        entry = self.entry(name)
        left = entry.spec.nbytes
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise self._shortened(entry)
                left -= len(data)
                yield data

    def entry(self, name: str) -> Entry:
        """Return a tensor's entry. Raises CheckpointError if the file has no such tensor."""
        if name not in self.entries:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}", f"it has {', '.join(sorted(self.entries)[:5])}, ..."
            )
        return self.entries[name]

    def _load(self, entry: Entry, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        spec = TensorSpec(entry.spec.dtype, shape)
        if spec.torch_dtype is None:
            message = f"{self.path}: {entry.name!r} is {entry.spec}, and torch {torch.__version__} has no such dtype"
            raise CheckpointError(message, "its bytes can be copied, not computed with; a newer torch may know it")
        memory = torch.empty(spec.nbytes, dtype=torch.uint8)
        view = memory.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise self._shortened(entry)
                view = view[count:]
        return memory.view(spec.torch_dtype).reshape(shape)

    def _shortened(self, entry: Entry) -> CheckpointError:
        return CheckpointError(
            f"{self.path} ends inside {entry.name!r}", "the file changed while it was read; get it again"
        )


def _parse(file: BinaryIO, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    again = "the file is incomplete or damaged; download or write it again"
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file", again)
    (length,) = struct.unpack("<Q", file.read(8))
    if length == 0:
        raise CheckpointError(f"{path} has no header: the run that wrote it did not finish", "write it again")
    if length > HEADER_LIMIT:
        hint = "is it a safetensors file? a .bin or .pt file has to be converted first"
        raise CheckpointError(f"{path} claims a header of {length} bytes; the limit is {HEADER_LIMIT}", hint)
    if length > size - 8:
        raise CheckpointError(f"{path} has {size} bytes, but its header alone is {length}", again)
    header = _parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a mapping of text to text", again)
    entries = [_entry(name, body, 8 + length, path) for name, body in header.items()]
    entries.sort(key=lambda e: (e.offset, e.spec.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: {entry.name!r} {what} (byte {entry.offset}, expected {end})", again)
        end += entry.spec.nbytes
    if end != size:
        what = f"{end - size} bytes are missing" if end > size else f"{size - end} bytes follow the last tensor"
        raise CheckpointError(f"{path} has {size} bytes, its header describes {end}: {what}", again)
    return {e.name: e for e in entries}, metadata


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: {twice!r} is in the header twice", "write the file again")
        return made

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: the header is not valid JSON ({reason})", "is it a safetensors file?") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", "is it a safetensors file?")
    return header


def _entry(name: str, body: Any, base: int, path: Path) -> Entry:
    try:
        dtype, shape, (start, stop) = body["dtype"], tuple(body["shape"]), body["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path}: the header entry of {name!r} is not dtype, shape and data_offsets", "write it again"
        )
    if dtype not in _DTYPES:
        message = f"{path}: {name!r} has dtype {dtype!r}, which this version of microscale does not know"
        raise CheckpointError(message, f"known are {', '.join(_DTYPES)}; upgrading microscale may help")
    spec = TensorSpec(dtype, shape)
    if stop - start != spec.nbytes:
        message = f"{path}: {name!r} is {spec}, which takes {spec.nbytes} bytes, but has {stop - start}"
        raise CheckpointError(message, "the file is damaged; download or write it again")
    return Entry(name, spec, base + start)


# -- writing -----------------------------------------------------------------------------------------------------------


class StreamWriter:
    """Writes one file whose tensors are known in advance, in any order, holding none of them.

        with StreamWriter(path, {"w": TensorSpec("BF16", (4, 8))}, {"format": "pt"}) as out:
            out.write("w", tensor)

    Leaving the block checks that every tensor came, makes the data durable (fsync), then the file valid (its header).
    With `hold` the header waits for `commit`, so that the files of one checkpoint become valid together. Leaving the
    block by an exception removes the file. Tensors lie in order of value size, largest first, then by name, so that
    each is aligned to its values, as in files of the `safetensors` library.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str], *, hold: bool = False
    ) -> None:
        self.path, self.hold = path, hold
        self.specs = dict(sorted(tensors.items(), key=lambda item: (-_DTYPES[item[1].dtype][0], item[0])))
        self._header = _header(self.specs, metadata, path)
        self._offsets: dict[str, int] = {}
        end = len(self._header)
        for name, spec in self.specs.items():
            self._offsets[name] = end
            end += spec.nbytes
        self.size = end
        self._missing = set(self.specs)
        with self._reporting():
            self._file = path.open("xb", buffering=0)
        self._put(bytes(8))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, from any device and of any strides. Raises InputError if it is not what was announced."""
        if TensorSpec.of(tensor) != self.specs.get(name):
            raise InputError(f"{name!r} was announced as {self.specs.get(name)}, and {TensorSpec.of(tensor)} came")
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy()
        self.write_chunks(name, [data.data])

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one tensor from its bytes in order. Raises InputError for a name or a length that was not announced."""
        if name not in self._missing:
            raise InputError(f"{name!r} was {'written already' if name in self.specs else 'not announced'}")
        expected, count = self.specs[name].nbytes, 0
        self._file.seek(self._offsets[name])
        for chunk in chunks:
            count += len(chunk)
            if count > expected:
                break
            self._put(chunk)
        if count != expected:
            raise InputError(f"{name!r} takes {expected} bytes, and {count} came")
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that nothing is missing (InputError), flush, and `commit` unless on hold."""
        if self._missing:
            one = sorted(self._missing)[0]
            raise InputError(f"{len(self._missing)} of {len(self.specs)} tensors were not written: {one!r}, ...")
        with self._reporting():
            self._file.truncate(self.size)
            os.fsync(self._file.fileno())
            self._file.close()
        if not self.hold:
            self.commit()

    def commit(self) -> None:
        """Put the header in place. The data is on disk by now, so a file with a header has all its data, always."""
        with self._reporting(), self.path.open("r+b", buffering=0) as file:
            view = memoryview(self._header)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())

    def abort(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finish()
        except BaseException:
            self.abort()
            raise

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._reporting():
            while view:
                view = view[self._file.write(view[:CHUNK]) :]

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn the system's errors (disk full, read-only) into ours."""
        try:
            yield
        except OSError as error:
            hint = "free some space, or write somewhere else"
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}", hint) from error


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], path: Path) -> bytes:
    """Return length and JSON, padded with spaces so that the data starts at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        hint = "spread the tensors over more files"
        raise CheckpointError(
            f"{path}: {len(specs)} tensors need a header of {len(text)} bytes, over {HEADER_LIMIT}", hint
        )
    return struct.pack("<Q", len(text)) + text
