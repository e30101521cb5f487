"""Safetensors files: equal to those of the `safetensors` library, in both directions; nothing damaged gets through."""

import json
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from microscale.errors import CheckpointError, InputError
from microscale.interop.safetensors_stream import HEADER_LIMIT, SafetensorsFile, StreamWriter, TensorSpec, dtype_code

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.uint64,
]  # fmt: skip
TENSORS = {
    **{f"t.{i}": torch.arange(24).reshape(2, 3, 4).to(dtype) for i, dtype in enumerate(DTYPES)},
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 5),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
    "odd.u8": torch.arange(7, dtype=torch.uint8),
    "ünï ☃.weight": torch.ones(2, 2),
}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with StreamWriter(path, {n: TensorSpec.of(t) for n, t in tensors.items()}, {"format": "pt", "k": "v"}) as out:
        for name in reversed(tensors):
            out.write(name, tensors[name])
    return path


def test_the_library_reads_what_we_write(tmp_path):
    path = written(tmp_path / "a.safetensors", TENSORS)
    found = load_file(path)
    assert set(found) == set(TENSORS)
    assert all(equal(found[n], t) for n, t in TENSORS.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "v"}


def test_we_read_what_the_library_writes(tmp_path):
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "a.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.entries) == set(TENSORS)
    assert all(equal(file.read(n), t) for n, t in TENSORS.items())


def test_every_tensor_is_aligned_to_its_values(tmp_path):
    file = SafetensorsFile(written(tmp_path / "a.safetensors", TENSORS))
    for entry in file.entries.values():
        assert entry.spec.torch_dtype is not None
        assert entry.offset % entry.spec.torch_dtype.itemsize == 0


def test_rows_are_read_alone(tmp_path):
    tensor = torch.arange(60.0, dtype=torch.bfloat16).reshape(10, 2, 3)
    file = SafetensorsFile(written(tmp_path / "a.safetensors", {"a": torch.ones(3), "t": tensor}))
    for start, stop in [(0, 10), (3, 7), (9, 10), (4, 4)]:
        assert torch.equal(file.read_rows("t", start, stop), tensor[start:stop])
    for start, stop in [(-1, 2), (5, 4), (0, 11)]:
        with pytest.raises(InputError, match="rows"):
            file.read_rows("t", start, stop)


def test_what_is_read_is_fresh_memory(tmp_path):
    path = written(tmp_path / "a.safetensors", {"t": torch.zeros(4)})
    SafetensorsFile(path).read("t").add_(1)
    assert not SafetensorsFile(path).read("t").any()


def test_bytes_of_dtypes_that_torch_lacks_can_be_copied(tmp_path):
    raw = bytes(range(12))
    with StreamWriter(tmp_path / "a.safetensors", {"f6": TensorSpec("F6_E2M3", (4, 4))}, {}) as out:
        out.write_chunks("f6", [raw[:5], raw[5:]])
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert b"".join(file.chunks("f6")) == raw
    with pytest.raises(CheckpointError, match="no such dtype"):
        file.read("f6")


def test_there_is_no_name_for_some_dtypes():
    with pytest.raises(InputError, match="cannot store"):
        dtype_code(torch.complex128)


# -- the writer keeps its word -----------------------------------------------------------------------------------------


SPECS = {"a": TensorSpec("F32", (2, 2)), "b": TensorSpec("U8", (3,))}


def test_unfinished_files_load_nowhere_and_do_not_stay(tmp_path):
    path = tmp_path / "a.safetensors"
    writer = StreamWriter(path, SPECS, {})
    writer.write("a", torch.ones(2, 2))
    writer.write("b", torch.ones(3, dtype=torch.uint8))  # complete, but not committed
    with pytest.raises(CheckpointError, match="did not finish"):
        SafetensorsFile(path)
    with pytest.raises(safetensors.SafetensorError):
        load_file(path)
    writer.abort()
    assert not path.exists()


def test_an_exception_removes_the_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), StreamWriter(tmp_path / "a.safetensors", SPECS, {}) as out:
        out.write("a", torch.ones(2, 2))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_held_file_becomes_valid_by_commit(tmp_path):
    path = tmp_path / "a.safetensors"
    with StreamWriter(path, {"b": SPECS["b"]}, {}, hold=True) as out:
        out.write("b", torch.ones(3, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="did not finish"):
        SafetensorsFile(path)
    out.commit()
    assert SafetensorsFile(path).read("b").tolist() == [1, 1, 1]


def test_missing_repeated_wrong_and_unannounced_tensors_are_refused(tmp_path):
    missing = "1 of 2 tensors were not written: 'b'"
    with pytest.raises(InputError, match=missing), StreamWriter(tmp_path / "a", SPECS, {}) as out:
        out.write("a", torch.ones(2, 2))
    with StreamWriter(tmp_path / "b", SPECS, {}) as out:
        out.write("a", torch.ones(2, 2))
        with pytest.raises(InputError, match="written already"):
            out.write("a", torch.ones(2, 2))
        with pytest.raises(InputError, match="announced as"):
            out.write("b", torch.ones(4, dtype=torch.uint8))
        with pytest.raises(InputError, match="announced as"):
            out.write("c", torch.ones(4))
        for short in ([b"xx"], [b"xx", b"xx"]):
            with pytest.raises(InputError, match="takes 3 bytes"):
                out.write_chunks("b", short)
        out.write("b", torch.ones(3, dtype=torch.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere"):
        StreamWriter(tmp_path / "nowhere" / "a.safetensors", SPECS, {})


# -- the reader believes nothing ---------------------------------------------------------------------------------------


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, dtype: str = "U8", shape: object = None) -> dict:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


DAMAGED = {
    "empty file": (b"", "too few"),
    "short file": (b"1234", "too few"),
    "header length 0": (bytes(8), "did not finish"),
    "header beyond the file": (struct.pack("<Q", 99) + b"{}", "its header alone is 99"),
    "header beyond the limit": (struct.pack("<Q", HEADER_LIMIT + 1) + b"{}", "the limit is"),
    "a pickle": (b"\x80\x02}q\x00(X\x01" + bytes(64), "the limit is"),
    "no JSON": (file_of(b"{nope}"), "not valid JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "nested beyond reason": (file_of(b"[" * 200_000), "not valid JSON"),
    "no object": (file_of([1]), "not a JSON object"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "text to text"),
    "a name twice": (file_of(b'{"a":1,"a":2}'), "in the header twice"),
    "no entry": (file_of({"a": 3}), "not dtype, shape and data_offsets"),
    "no offsets": (file_of({"a": {"dtype": "U8", "shape": [1]}}), "not dtype, shape and data_offsets"),
    "negative shape": (file_of({"a": entry(0, 1, shape=[-1])}, b"x"), "not dtype, shape and data_offsets"),
    "boolean shape": (file_of({"a": entry(0, 1, shape=[True])}, b"x"), "not dtype, shape and data_offsets"),
    "unknown dtype": (file_of({"a": entry(0, 1, "Q7")}, b"x"), "has dtype 'Q7'"),
    "wrong size": (file_of({"a": entry(0, 3, shape=[4])}, b"xxx"), "takes 4 bytes, but has 3"),
    "overlap": (file_of({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"), "overlaps"),
    "hole": (file_of({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"), "leaves a hole"),
    "hole at the start": (file_of({"a": entry(1, 2)}, b"xx"), "leaves a hole"),
    "truncated": (file_of({"a": entry(0, 4)}, b"xx"), "2 bytes are missing"),
    "too long": (file_of({"a": entry(0, 1)}, b"xxx"), "2 bytes follow"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_with_name_and_reason(tmp_path, case):
    raw, reason = DAMAGED[case]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=reason) as caught:
        SafetensorsFile(path)
    assert "damaged.safetensors" in caught.value.message
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*gone\.safetensors"):
        SafetensorsFile(tmp_path / "gone.safetensors")


def test_a_file_that_shrinks_while_open_is_noticed(tmp_path):
    path = written(tmp_path / "a.safetensors", {"t": torch.ones(100)})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="ends inside 't'"):
        file.read("t")
    with pytest.raises(CheckpointError, match="ends inside 't'"):
        list(file.chunks("t"))
    with pytest.raises(CheckpointError, match="has no tensor 'x'"):
        file.read("x")
