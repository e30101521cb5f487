"""`inspect`: what is in a checkpoint, from headers alone."""

import json

import pytest
import torch

import microscale as ms


def test_a_quantized_checkpoint(tmp_path, checkpoint):
    plan = ms.quantize_checkpoint(checkpoint(files=2), tmp_path / "out", "nvfp4_dynamic")
    report = ms.inspect(tmp_path / "out")
    assert (report.dialect, report.quant_method, report.recipe) == ("microscale", "microscale", "nvfp4_dynamic")
    assert report.version == ms.__version__
    assert report.stored_bytes == plan.bytes_after
    assert {t.name for t in report.quantized} == {row.layer.parameter for row in plan.quantized}
    tensors = {t.name: t for t in report.tensors}
    up = tensors["layers.0.up.weight"]
    assert (up.format, up.dtype, up.shape, up.values) == ("nvfp4", "float32", (70, 40), 2800)
    assert up.stored_bytes == 70 * (24 + 3) + 4
    assert up.bits_per_value == pytest.approx(8 * up.stored_bytes / 2800)
    assert tensors["lm_head.weight"].format is None and tensors["lm_head.weight"].bits_per_value == 32
    assert report.inputs == dict.fromkeys((f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down")), "nvfp4")
    assert set(report.formats()) == {"nvfp4", "float32", "int64"}
    assert sum(count for count, _, _ in report.formats().values()) == len(report.tensors)
    for file in report.files:
        assert file.bytes == (tmp_path / "out" / file.name).stat().st_size


def test_a_plain_checkpoint(checkpoint, tiny):
    for path in (checkpoint(), checkpoint() / "model.safetensors"):
        report = ms.inspect(path)
        assert (report.dialect, report.version, report.recipe, report.quant_method) == (None, None, None, None)
        assert {t.name: (t.dtype, t.shape) for t in report.tensors} == {
            n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in tiny().state_dict().items()
        }
        assert not report.quantized


def test_the_quantization_of_others_is_named(tmp_path, write_checkpoint):
    tensors = {"a.qweight": torch.zeros(2, 2, dtype=torch.int32), "none": torch.empty(0)}
    write_checkpoint(tmp_path / "x", tensors, quantization_config={"quant_method": "gptq"})
    report = ms.inspect(tmp_path / "x")
    assert (report.dialect, report.quant_method) == (None, "gptq")
    assert next(t for t in report.tensors if t.name == "none").bits_per_value is None


def test_it_is_plain_data(tmp_path, checkpoint):
    ms.quantize_checkpoint(checkpoint(files=2), tmp_path / "out", "mxfp6_dynamic")
    report = ms.inspect(tmp_path / "out")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["stored_bytes"] == report.stored_bytes
    assert data["formats"]["mxfp6"]["tensors"] == 4
    assert data["tensors"][0]["name"] == report.tensors[0].name
    with pytest.raises(AttributeError):
        report.path = "other"
