"""`quantize_checkpoint`: the same bytes as every other door, everything else copied, all or nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import microscale as ms
from microscale.errors import CheckpointError, RecipeError
from microscale.interop import folder as folders
from microscale.interop.checkpoint import Checkpoint
from microscale.interop.safetensors_stream import SafetensorsFile

INFERENCE = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]
DYNAMIC = [name for name in INFERENCE if not name.endswith("static")]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- the bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", DYNAMIC)
def test_the_file_is_the_one_that_quantize_and_save_write(tmp_path, checkpoint, tiny, recipe):
    plan = ms.quantize_checkpoint(checkpoint(), tmp_path / "a", recipe)
    model = tiny()
    assert {r.layer.name for r in ms.quantize_(model, recipe).quantized} == {r.layer.name for r in plan.quantized}
    ms.save(model, tmp_path / "b")
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("files", [1, 3])
def test_weights_are_those_of_quantize(tmp_path, checkpoint, tiny, same, files, dtype):
    source = checkpoint(files=files, dtype=dtype)
    plan = ms.quantize_checkpoint(source, tmp_path / "out", "nvfp4_weight_only")
    found, state = ms.load(tmp_path / "out"), tiny(dtype).state_dict()
    quantizers = {row.layer.parameter: row.weight for row in plan.quantized}
    assert set(found) == set(state) and len(quantizers) == 4
    for name, tensor in state.items():
        assert same(found[name], ms.quantize(tensor, quantizers[name]) if name in quantizers else tensor), name
    assert [f.path.name for f in Checkpoint(source).files] == [f.path.name for f in Checkpoint(tmp_path / "out").files]


def test_every_format_and_embeddings_by_a_recipe_of_ones_own(tmp_path, checkpoint, tiny, same):
    for name in ms.list_formats():
        rules = [{"match": "*", "types": ["linear", "embedding"], "fprop": {"weight": "w"}}]
        recipe = {"name": "all", "quantizers": {"w": {"format": name}}, "rules": rules}
        ms.quantize_checkpoint(checkpoint(), tmp_path / "out", recipe, overwrite=(tmp_path / "out").exists())
        found = ms.load(tmp_path / "out")
        for key in ("embed_tokens.weight", "lm_head.weight", "layers.1.up.weight"):
            assert same(found[key], ms.quantize(tiny().state_dict()[key], name)), (name, key)


def test_tensors_of_other_dtypes_pass_untouched(tmp_path, same):
    source = tmp_path / "src"
    source.mkdir()
    tensors = {
        "a.weight": torch.randn(4, 64),
        "f64.weight": torch.randn(4, 64, dtype=torch.float64),
        "i32.weight": torch.arange(64, dtype=torch.int32).reshape(2, 32),
        "f8.weight": torch.randn(4, 64).to(torch.float8_e4m3fn),
        "mask": torch.tensor([True, False]),
        "empty.weight": torch.empty(0, 64),
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt", "author": "someone"})
    ms.quantize_checkpoint(source, tmp_path / "out", "mxfp8_weight_only")
    found = ms.load(tmp_path / "out")
    assert all(same(found[n], t) for n, t in tensors.items() if n not in ("a.weight", "empty.weight"))
    assert same(found["empty.weight"], ms.quantize(tensors["empty.weight"], "mxfp8"))
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["author"] == "someone"


def test_a_single_file_becomes_a_folder(tmp_path, checkpoint):
    source = checkpoint() / "model.safetensors"
    ms.quantize_checkpoint(source, tmp_path / "out", "mxfp4_weight_only")
    assert sorted(tree(tmp_path / "out")) == ["microscale.json", "model.safetensors"]
    assert ms.inspect(tmp_path / "out").recipe == "mxfp4_weight_only"


# -- what lies beside the weights --------------------------------------------------------------------------------------


def test_everything_but_weights_is_copied(tmp_path, checkpoint):
    source = checkpoint(files=2)
    copied = {
        "tokenizer.json": b"{}", "vocab.txt": b"a\nb", "modeling_x.py": b"pass", "README.md": b"#",
        "1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": b"kept", "2_Dense/deep/x.txt": b"x",
        "3_Dense/pytorch_model.bin": b"kept",
    }  # fmt: skip
    left = {
        "pytorch_model.bin": b"", "pytorch_model.bin.index.json": b"{}", "model.gguf": b"", "tf_model.h5": b"",
        "stray.safetensors": b"", "onnx/model.onnx": b"", "openvino/openvino_model.bin": b"", ".git/config": b"",
        ".cache/x": b"", "1_Pooling/__pycache__/x.pyc": b"",
    }  # fmt: skip
    for name, data in (copied | left).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    ms.quantize_checkpoint(source, tmp_path / "out", "mxfp8_weight_only")
    found = tree(tmp_path / "out")
    written = {"config.json", "microscale.json", "model.safetensors.index.json"}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert set(found) == set(copied) | written | shards
    assert {name: found[name] for name in copied} == copied


def test_metadata_says_what_was_done(tmp_path, checkpoint):
    plan = ms.quantize_checkpoint(checkpoint(files=2), tmp_path / "out", "nvfp4_dynamic")
    data = json.loads((tmp_path / "out" / "microscale.json").read_text())
    assert data["library_version"] == ms.__version__ and data["dialect"] == "microscale"
    assert ms.find_recipe(data["recipe"]) == ms.find_recipe("nvfp4_dynamic")
    assert data["recipe"]["description"]
    assert data["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert data["inputs"] == dict.fromkeys((f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down")), "nvfp4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "microscale"
    assert config == {"model_type": "tiny"}


def test_the_index_lists_what_is_stored(tmp_path, checkpoint):
    ms.quantize_checkpoint(checkpoint(files=3), tmp_path / "out", "nvfp4_weight_only")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    opened = Checkpoint(tmp_path / "out")
    assert index["weight_map"] == {name: stored.file.path.name for name, stored in sorted(opened.tensors.items())}
    assert index["metadata"]["total_size"] == opened.nbytes


def test_each_shard_stands_on_its_own(tmp_path, checkpoint, same):
    ms.quantize_checkpoint(checkpoint(files=3), tmp_path / "out", "nvfp4_dynamic")
    whole = ms.load(tmp_path / "out")
    parts = [ms.load(f.path) for f in Checkpoint(tmp_path / "out").files]
    assert sum(map(len, parts)) == len(whole)
    assert all(same(whole[n], t) for part in parts for n, t in part.items())
    assert ms.inspect(Checkpoint(tmp_path / "out").files[0].path).inputs


def test_progress_counts_the_source_in_bytes(tmp_path, checkpoint):
    calls = []
    source = checkpoint(files=2)
    ms.quantize_checkpoint(source, tmp_path / "out", "mxfp8_weight_only", progress=lambda *a: calls.append(a))
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == calls[-1][1] == Checkpoint(source).nbytes
    assert {name for _, _, name in calls} == set(Checkpoint(source).tensors)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(kind: type[ms.MicroscaleError], reason: str, *args: object, **kwargs: object) -> ms.MicroscaleError:
    with pytest.raises(kind, match=reason) as caught:
        ms.quantize_checkpoint(*args, **kwargs)
    assert caught.value.hint
    return caught.value


def test_places_that_may_not_be_written(tmp_path, checkpoint):
    source, recipe = checkpoint(), "mxfp8_weight_only"
    before = tree(tmp_path)
    for overwrite in (False, True):
        refused(CheckpointError, "is the source itself", source, source, recipe, overwrite=overwrite)
        refused(CheckpointError, "contain one another", source, source / "out", recipe, overwrite=overwrite)
        refused(CheckpointError, "contain one another", source, tmp_path, recipe, overwrite=overwrite)
        refused(
            CheckpointError, "contain one another", source / "model.safetensors", source, recipe, overwrite=overwrite
        )
    (tmp_path / "file").write_text("x")
    refused(CheckpointError, "is a file", source, tmp_path / "file", recipe, overwrite=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    refused(CheckpointError, "exists", source, tmp_path / "papers", recipe)
    refused(CheckpointError, "is no checkpoint", source, tmp_path / "papers", recipe, overwrite=True)
    assert {n: d for n, d in tree(tmp_path).items() if n not in ("file", "papers/thesis.txt")} == before


def test_sources_that_cannot_be_quantized(tmp_path, checkpoint):
    source = checkpoint()
    refused(CheckpointError, "no file or folder", tmp_path / "nope", tmp_path / "out", "mxfp8_weight_only")
    refused(RecipeError, "needs calibration", source, tmp_path / "out", "nvfp4_static")
    refused(ms.MicroscaleError, "unknown recipe", source, tmp_path / "out", "nvfp5_weight_only")
    refused(
        ms.MicroscaleError, "unknown checkpoint dialect", source, tmp_path / "out", "mxfp8_weight_only", dialect="x"
    )
    ms.quantize_checkpoint(source, tmp_path / "q", "mxfp8_weight_only")
    refused(CheckpointError, "already quantized", tmp_path / "q", tmp_path / "out", "mxfp8_weight_only")
    (source / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    refused(CheckpointError, r"already quantized \(gptq\)", source, tmp_path / "out", "mxfp8_weight_only")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "src"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    refused(CheckpointError, "not enough space", checkpoint(), tmp_path / "out", "mxfp8_weight_only")


# -- all or nothing ----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Like KeyboardInterrupt."""


def stop_at(count):
    def progress(done, total, name, calls=[]):  # noqa: B006
        calls.append(name)
        if len(calls) == count:
            raise Stop

    return progress


@pytest.mark.parametrize("count", [1, 5, 13])
def test_an_interrupted_run_leaves_nothing(tmp_path, checkpoint, count):
    source = checkpoint(files=3)
    with pytest.raises(Stop):
        ms.quantize_checkpoint(source, tmp_path / "out", "mxfp8_weight_only", progress=stop_at(count))
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_overwriting_keeps_the_old_one_until_the_new_one_is_complete(tmp_path, checkpoint, monkeypatch):
    source, out = checkpoint(files=3), tmp_path / "out"
    ms.quantize_checkpoint(source, out, "mxfp8_weight_only")
    before = tree(out)
    refused(CheckpointError, "exists", source, out, "mxfp4_weight_only")
    with pytest.raises(Stop):
        ms.quantize_checkpoint(source, out, "mxfp4_weight_only", overwrite=True, progress=stop_at(9))
    assert tree(out) == before
    rename = Path.rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise PermissionError(13, "no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        refused(CheckpointError, "cannot write", source, out, "mxfp4_weight_only", overwrite=True)
    assert tree(out) == before
    ms.quantize_checkpoint(source, out, "mxfp4_weight_only", overwrite=True)
    assert set(ms.inspect(out).formats()) == {"mxfp4", "float32", "int64"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


KILLED = """
import os, signal, sys
import microscale as ms
calls = []
def progress(done, total, name):
    calls.append(name)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
ms.quantize_checkpoint(sys.argv[1], sys.argv[2], "nvfp4_weight_only", overwrite=True, progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process by SIGKILL")
@pytest.mark.parametrize(("files", "count"), [(1, 6), (3, 11)])
def test_a_killed_run_leaves_nothing_that_loads(tmp_path, checkpoint, files, count):
    source, out = checkpoint(files=files), tmp_path / "out"
    ms.quantize_checkpoint(source, out, "mxfp8_weight_only")
    before = tree(out)
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out, str(count)], check=False)
    assert killed.returncode == -9
    assert tree(out) == before
    (rest,) = (p for p in tmp_path.iterdir() if p.name not in ("src", "out"))
    assert rest.name.startswith(".out.partial-")
    with pytest.raises(CheckpointError):
        Checkpoint(rest)
    weights = list(rest.rglob("*.safetensors"))
    assert weights
    for path in weights:
        with pytest.raises(CheckpointError, match="did not finish"):
            SafetensorsFile(path)
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(path, "pt")
    ms.quantize_checkpoint(source, out, "nvfp4_weight_only", overwrite=True)  # what was left is in nobody's way
    assert ms.inspect(out).recipe == "nvfp4_weight_only"


def test_the_folder_has_ordinary_permissions(tmp_path, checkpoint):
    ms.quantize_checkpoint(checkpoint(), tmp_path / "deep" / "er" / "out", "mxfp8_weight_only")
    (tmp_path / "plain").mkdir()
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "deep/er/out")]
    assert modes[0] == modes[1]
    assert folders.check_target(tmp_path / "plain", overwrite=True)  # empty: nothing to lose
