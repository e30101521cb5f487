"""`compare` on weights: what is in the report, how it is ranked, how much memory it takes, and its errors."""

import dataclasses
import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import microscale as ms
from microscale.errors import (
    CheckpointError,
    InputError,
    MissingDependencyError,
    RecipeError,
    SpecError,
    UnknownNameError,
)
from microscale.interop.checkpoint import Checkpoint
from microscale.report.compare import compare
from microscale.report.results import CompareReport, decibels

TINY = """name: tiny3
description: three-bit floats
element: {exponent: 2, mantissa: 0, bias: 0}
block: 8
scale: e8m0
scale_rule: floor
"""


# -- the report --------------------------------------------------------------------------------------------------------


def test_every_shipped_format_appears_once_and_ranked(checkpoint):
    report = compare(checkpoint)
    assert sorted(row.format for row in report.formats) == sorted(ms.list_formats())
    levels = [decibels(row.sqnr_db_mean) for row in report.formats]
    assert levels == sorted(levels, reverse=True)
    assert (report.recipes, report.skipped, report.reference) == ((), (), None)


def test_only_what_a_weight_only_recipe_quantizes_is_measured(checkpoint):
    report = compare(checkpoint, ["mxfp8"])
    assert sorted(row.name for row in report.formats[0].layers) == ["layers.0.down", "layers.0.up"]
    assert (report.layers, report.values) == (2, 48 * 32 * 2)
    assert report.source_layer_bytes == 48 * 32 * (4 + 2)
    assert report.other_bytes == 20 * 32 * 4 * 2 + 48 * 4 + 32 * 4


@pytest.mark.parametrize("name", ms.list_formats())
def test_sizes_are_those_of_the_plan(checkpoint, name):
    row = compare(checkpoint, [name]).formats[0]
    recipe = {
        "name": "r",
        "quantizers": {"w": {"format": name}},
        "rules": [{"match": "lm_head", "keep": "high_precision"}, {"match": "*", "fprop": {"weight": "w"}}],
    }
    plan = ms.plan(checkpoint, recipe)
    assert row.layer_bytes == sum(layer.bytes_after for layer in plan.quantized)
    assert row.model_bytes == plan.bytes_after
    assert row.stored_bits_per_value == 8 * row.layer_bytes / (2 * 48 * 32)
    assert row.bits_per_value == ms.find_format(name).bits_per_value


def test_mean_overall_and_worst_follow_from_the_layers(checkpoint):
    row = compare(checkpoint, ["nvfp4"]).formats[0]
    tensors, signal, noise, levels = ms.load(checkpoint), 0.0, 0.0, {}
    for layer in row.layers:
        x = tensors[f"{layer.name}.weight"]
        error = x.double() - ms.dequantize(ms.quantize(x, "nvfp4"), torch.float32).double()
        s, n = float(x.double().square().sum()), float(error.square().sum())
        signal, noise, levels[layer.name] = signal + s, noise + n, 10 * math.log10(s / n)
    assert {r.name: r.sqnr_db for r in row.layers} == pytest.approx(levels, abs=1e-9)
    assert row.sqnr_db_mean == pytest.approx(sum(levels.values()) / 2, abs=1e-9)
    assert row.sqnr_db_overall == pytest.approx(10 * math.log10(signal / noise), abs=1e-9)
    assert row.worst_layer == min(levels, key=levels.__getitem__)
    assert row.sqnr_db_worst == pytest.approx(min(levels.values()), abs=1e-9)


def test_the_same_numbers_from_a_folder_a_file_and_shards(checkpoint, tmp_path):
    def numbers(path: Path) -> list[object]:
        return [dataclasses.replace(row, seconds=0.0) for row in compare(path, ["mxfp4", "nvfp4_row"]).formats]

    tensors = ms.load(checkpoint)
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(tensors)
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, shards / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert numbers(checkpoint) == numbers(checkpoint / "model.safetensors") == numbers(shards)


def test_formats_may_be_paths_mappings_specs_and_variants(checkpoint, tmp_path):
    path = tmp_path / "tiny3.yaml"
    path.write_text(TINY)
    variant = {"format": "mxfp4", "scale_rule": "floor", "block": 16}
    formats = [str(path), path, variant, ms.find_format("mxint8"), ms.find_quantizer("nvfp4", scale_tile=(16, 16))]
    report = compare(checkpoint, formats)
    assert {row.format for row in report.formats} == {
        "tiny3",
        "mxfp4[block=16,scale_rule=floor]",
        "mxint8",
        "nvfp4(tile=16x16)",
    }
    assert next(row for row in report.formats if row.format == "tiny3").stored_bits_per_value == 4.0


def test_json_round_trip(checkpoint):
    report = compare(checkpoint, ["mxfp8", "nvfp4"])
    data = report.to_dict()
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again == data
    assert CompareReport.from_dict(again) == report
    assert report.environment["torch"] == torch.__version__


def test_an_exact_format_has_no_level(tmp_path):
    save_file({"a.weight": torch.zeros(4, 32), "b.weight": torch.ones(4, 32)}, tmp_path / "model.safetensors")
    row = compare(tmp_path, ["mxfp8", "mxint8"]).formats[0]
    assert (row.sqnr_db_mean, row.sqnr_db_overall, row.sqnr_db_worst) == (None, None, None)


def test_progress_counts_to_the_end(checkpoint):
    seen = []
    compare(checkpoint, ["mxfp8", "nvfp4"], progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i, 4) for i in range(1, 5)]
    assert {step[2] for step in seen} == {f"{f} layers.0.{n}" for f in ("mxfp8", "nvfp4") for n in ("up", "down")}


# -- memory ------------------------------------------------------------------------------------------------------------


def test_one_weight_is_in_memory_at_a_time(checkpoint, monkeypatch):
    alive: list[weakref.ref[torch.Tensor]] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        assert all(ref() is None for ref in alive), "an earlier weight is still there"
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    compare(checkpoint, ["mxfp8", "nvfp4"])
    assert len(alive) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs resource.getrusage")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """32 weights of 8 MB: 256 MB on disk, in far less memory. Measured in a process of its own, after a warm-up."""
    tensors = {f"layers.{i}.weight": torch.randn(1024, 2048) for i in range(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"a.weight": torch.randn(1024, 2048)}, tmp_path / "one.safetensors")
    code = (
        "import resource, sys, torch\n"
        "from microscale.report.compare import compare\n"
        "torch.set_num_threads(1)\n"
        "def peak(path):\n"
        "    compare(path, ['mxfp8'])\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
        "one = peak(sys.argv[1])\n"
        "print(peak(sys.argv[2]) - one)"
    )
    paths = [str(tmp_path / name) for name in ("one.safetensors", "model.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64e6


# -- errors ------------------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no file or folder"):
        compare(tmp_path / "absent")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError) as error:
        compare(tmp_path)
    assert error.value.hint


def test_an_unknown_format_is_named_with_the_nearest_known(checkpoint):
    with pytest.raises(UnknownNameError, match="unknown format 'nvpf4'") as error:
        compare(checkpoint, ["mxfp8", "nvpf4"])
    assert "did you mean 'nvfp4'" in error.value.hint


def test_a_bad_format_file_fails_before_anything_runs(checkpoint, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(TINY.replace("tiny3", "bad").replace("floor", "nearest"))
    with pytest.raises(SpecError, match=r"bad\.yaml"):
        compare(checkpoint, [path], progress=lambda *_: pytest.fail("started"))


def test_nothing_to_measure(tmp_path):
    save_file({"norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no weight to measure: it has no linear layer"):
        compare(tmp_path)


def test_a_checkpoint_that_is_quantized_already(checkpoint, tmp_path):
    ms.quantize_checkpoint(checkpoint, tmp_path / "q", "mxfp8_weight_only")
    with pytest.raises(InputError, match="no weight to measure: already quantized"):
        compare(tmp_path / "q", ["nvfp4"])


def test_recipes_need_inputs(checkpoint):
    with pytest.raises(InputError, match="no inputs") as error:
        compare(checkpoint, recipes=["mxfp8_dynamic"])
    assert "inputs" in error.value.hint


def test_unknown_and_training_recipes(checkpoint):
    with pytest.raises(UnknownNameError, match="mxfp8_dynamik"):
        compare(checkpoint, recipes=["mxfp8_dynamik"], inputs=["a text"])
    training = {
        "name": "t",
        "quantizers": {"w": {"format": "mxfp8"}},
        "rules": [{"match": "*", "fprop": {"input": "w", "weight": "w"}, "dgrad": {"grad_output": "w", "weight": "w"}}],
    }
    with pytest.raises(RecipeError, match="for training"):
        compare(checkpoint, recipes=[training], inputs=["a text"])


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_inputs_file(checkpoint, tmp_path, content):
    path = tmp_path / "texts.txt"
    path.write_text(content)
    with pytest.raises(InputError, match="holds no text"):
        compare(checkpoint, inputs=path)


def test_unreadable_inputs(checkpoint, tmp_path):
    with pytest.raises(InputError, match="cannot read the inputs"):
        compare(checkpoint, inputs=tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        compare(checkpoint, inputs=tmp_path / "latin.txt")
    with pytest.raises(InputError, match="holds no text"):
        compare(checkpoint, inputs=[])


def test_inputs_without_transformers_name_the_command(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers") as error:
        compare(checkpoint, inputs=["a text"], progress=lambda *_: pytest.fail("started"))
    assert "pip install" in error.value.hint
    assert compare(checkpoint, ["mxfp8"]).formats  # weights need no transformers


def test_inputs_for_a_folder_that_is_no_model(checkpoint):
    with pytest.raises(InputError, match=r"config\.json") as error:
        compare(checkpoint, inputs=["a text"])
    assert "leave out the inputs" in error.value.hint
