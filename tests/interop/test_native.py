"""The dialect "microscale": every format comes back to the bit, and files say what they are."""

import json
import os
import struct

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import microscale as ms
from microscale.errors import CheckpointError, UnknownNameError
from microscale.interop.checkpoint import Checkpoint
from microscale.interop.dialect import find_dialect, list_dialects


class Holder(torch.nn.Module):
    """Parameters of any names, dots included."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            module: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize("name", ms.list_formats())
def test_every_format_comes_back_to_the_bit(tmp_path, same, name):
    torch.manual_seed(0)
    shapes = [(70,), (5, 70), (3, 5, 70), (4, 128), (1, 1), (0, 70), (3, 0)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    tensors = {
        f"r{len(shape)}.{i}.{str(dtype)[6:]}": ms.quantize((torch.randn(shape) * 3).to(dtype), name)
        for i, shape in enumerate(shapes)
        for dtype in dtypes
    }
    ms.save(Holder(tensors), tmp_path / "out")
    found = ms.load(tmp_path / "out")
    assert set(found) == set(tensors)
    assert all(same(found[n], t) for n, t in tensors.items())
    assert all(same(found[n].dequantize(), t.dequantize()) for n, t in tensors.items())


def test_axes_layouts_variants_and_given_outer_scales_come_back(tmp_path, same):
    torch.manual_seed(1)
    x = torch.randn(33, 70)
    row = ms.find_quantizer("nvfp4", outer_scale={"per": "row"})
    tensors = {
        "axis": ms.quantize(x, "mxfp4", axis=-2),
        "axis3": ms.quantize(torch.randn(2, 33, 70), "nvfp4_row", axis=1),
        "transposed": ms.quantize(x, "mxfp6").t(),
        "swizzled": ms.quantize(x, "nvfp4", layout="swizzle_32_4_4"),
        "tile": ms.quantize(torch.randn(32, 64), "nvfp4", scale_tile=(16, 16)),
        "inline": ms.quantize(x, {"format": "mxfp4", "scale_rule": "floor", "block": 16}),
        "element": ms.quantize(x, "mxfp8", element={"exponent": 3, "mantissa": 1, "bias": 3}),
        "amax": ms.quantize(x, "nvfp4", amax=torch.tensor(9.0)),
        "row": ms.quantize(x, row),
        "bf16 scale": ms.quantize(x, "fp8_block128", scale="bf16"),
        "nan": ms.quantize(torch.full((2, 64), torch.nan), "mxfp8"),
        "zero": ms.quantize(torch.zeros(2, 64), "nvfp4"),
    }
    ms.save(Holder(tensors), tmp_path / "out")
    found = ms.load(tmp_path / "out")
    assert all(same(found[n], t) for n, t in tensors.items())
    assert found["swizzled"].scale_layout == "strided"


def test_odd_names_and_a_format_that_no_registry_knows(tmp_path, same):
    base = ms.find_format("mxfp4")
    fields = {name: getattr(base, name) for name in ms.FormatSpec.model_fields}
    fmt = ms.FormatSpec(**{**fields, "name": "only here", "block": 16})
    tensors = {
        "weight": ms.quantize(torch.randn(4, 32), fmt),
        "a.b c/ü.☃": ms.quantize(torch.randn(4, 32), "mxfp8"),
        "x.qdata": torch.ones(3),
        "x.scale": ms.quantize(torch.randn(4, 32), "mxfp8"),
    }
    ms.save(Holder(tensors), tmp_path / "out")
    found = ms.load(tmp_path / "out")
    assert all(same(found[n], t) for n, t in tensors.items())
    assert found["weight"].format.name == "only here"


def test_names_of_parts_must_be_free(tmp_path):
    q = ms.quantize(torch.randn(4, 32), "mxfp8")
    clash = torch.nn.Module()
    clash.register_parameter("weight", torch.nn.Parameter(q, requires_grad=False))
    clash._parameters["weight.qdata"] = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match=r"weight\.qdata"):
        ms.save(clash, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_is_stored_is_what_the_documentation_says(tmp_path):
    q = ms.quantize(torch.randn(6, 70, dtype=torch.bfloat16), "nvfp4")
    ms.save(Holder({"layer.weight": q, "layer.bias": torch.ones(6)}), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        stored = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
    assert stored == {
        "layer.weight": ("U8", [0]),
        "layer.weight.qdata": ("U8", [6, 40]),
        "layer.weight.scale": ("U8", [6, 5]),
        "layer.weight.outer_scale": ("F32", []),
        "layer.bias": ("F32", [6]),
    }
    assert metadata["format"] == "pt"
    data = json.loads(metadata["microscale"])
    assert data["version"] == 1 and data["library"] == ms.__version__
    assert data["metas"] == [q.meta.pack()]
    assert data["tensors"] == {"layer.weight": {"meta": 0, "shape": [6, 70], "dtype": "bfloat16", "outer_scale": []}}


def test_scales_of_wide_dtypes_are_stored_as_such(tmp_path):
    tensors = {"f": ms.quantize(torch.randn(2, 128), "nf4"), "b": ms.quantize(torch.randn(2, 128), "nf4", scale="bf16")}
    ms.save(Holder(tensors), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["f.scale"].dtype == torch.float32 and found["b.scale"].dtype == torch.bfloat16


def test_torch_save_of_what_was_loaded(tmp_path, same):
    ms.save(Holder({"w": ms.quantize(torch.randn(4, 70), "nvfp4"), "b": torch.ones(2)}), tmp_path / "out")
    found = ms.load(tmp_path / "out")
    torch.save(found, tmp_path / "x.pt")
    again = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(same(again[n], t) for n, t in found.items())


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tensors = {"a.weight": ms.quantize(torch.randn(6, 70), "nvfp4"), "b.weight": torch.ones(3, 4)}
    ms.save(Holder(tensors), tmp_path / "out")
    return tmp_path / "out" / "model.safetensors"


def rewrite(path, change):
    """Change tensors and metadata of a file with the `safetensors` library."""
    tensors = load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    data = json.loads(metadata["microscale"])
    change(tensors, data)
    metadata["microscale"] = json.dumps(data)
    save_file(tensors, path, metadata)


def drop(name):
    return lambda tensors, data: tensors.pop(name)


def put(name, tensor):
    return lambda tensors, data: tensors.update({name: tensor})


def declare(**changes):
    return lambda tensors, data: data["tensors"]["a.weight"].update(changes)


def top(**changes):
    return lambda tensors, data: data.update(changes)


DAMAGE = {
    "no codes": (drop("a.weight.qdata"), "lacks its qdata"),
    "no scales": (drop("a.weight.scale"), "lacks its scale"),
    "no outer scale": (drop("a.weight.outer_scale"), "lacks its outer_scale"),
    "codes of another shape": (put("a.weight.qdata", torch.zeros(6, 39, dtype=torch.uint8)), r"qdata' is U8\[6, 39\]"),
    "scales of another dtype": (put("a.weight.scale", torch.zeros(6, 5)), r"scale' is F32\[6, 5\]"),
    "a plain weight too": (put("a.weight", torch.zeros(6, 70)), r"'a.weight' is F32\[6, 70\]"),
    "another shape": (declare(shape=[6, 90]), "needs U8"),
    "another rank": (declare(shape=[]), "damaged 'microscale' metadata"),
    "a dtype that is none": (declare(dtype="int3"), "damaged 'microscale' metadata"),
    "a meta that is not there": (declare(meta=7), "damaged 'microscale' metadata"),
    "an outer scale that does not fit": (declare(outer_scale=[7, 1]), "damaged 'microscale' metadata"),
    "a meta that is no meta": (top(metas=["nonsense"]), "damaged 'microscale' metadata"),
    "an impossible format": (top(metas=['-1|strided|{"name":"x"}']), "damaged 'microscale' metadata"),
    "no tensors": (top(tensors=None), "damaged 'microscale' metadata"),
    "the future": (top(version=2), "metadata version 2, this library reads 1"),
    "no version": (lambda tensors, data: data.pop("version"), "damaged 'microscale' metadata"),
    "an alias to nowhere": (top(aliases={"c.weight": "d.weight"}), "said to be 'd.weight'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_declared_must_be_there(saved, case):
    change, reason = DAMAGE[case]
    rewrite(saved, change)
    for path in (saved, saved.parent):
        for function in (ms.load, ms.inspect):
            with pytest.raises(CheckpointError, match=reason) as caught:
                function(path)
            assert caught.value.hint


def test_lost_metadata_is_noticed(saved):
    save_file(load_file(saved), saved, {"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        ms.load(saved.parent)


def test_truncation_anywhere_is_noticed(saved):
    raw = saved.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    for size in (0, 7, 8, length // 2, 8 + length, len(raw) - 1):
        saved.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            Checkpoint(saved.parent)


def test_dialects_have_names():
    assert "microscale" in list_dialects()
    assert find_dialect("microscale").summary
    with pytest.raises(UnknownNameError, match="unknown checkpoint dialect 'micorscale'") as caught:
        ms.save(torch.nn.Linear(2, 2), "nowhere", dialect="micorscale")
    assert "did you mean 'microscale'?" in caught.value.hint
    assert not os.path.exists("nowhere")  # noqa: PTH110
