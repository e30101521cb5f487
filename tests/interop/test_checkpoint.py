"""`Checkpoint`: which files belong together, which tensors are layers, and errors that name the way out."""

import json

import pytest
import torch
from safetensors.torch import save_file

import microscale as ms
from microscale.errors import CheckpointError
from microscale.interop.checkpoint import EMBEDDING_WORDS, Checkpoint


def files_of(path):
    return [f.path.name for f in Checkpoint(path).files]


def test_a_file_a_folder_and_shards(checkpoint, tiny, same):
    one, many = checkpoint("one"), checkpoint("many", files=3)
    state = tiny().state_dict()
    for path in (one, one / "model.safetensors", many):
        opened = Checkpoint(path)
        assert opened.names == tuple(sorted(state))
        assert all(same(opened.read(name), tensor) for name, tensor in state.items())
        assert opened.nbytes == sum(t.numel() * t.element_size() for t in state.values())
    assert files_of(many) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert Checkpoint(many).config == {"model_type": "tiny"}
    assert Checkpoint(one / "model.safetensors").config is None


def test_rows_of_a_tensor(checkpoint, tiny):
    weight = tiny().state_dict()["layers.0.up.weight"]
    assert torch.equal(Checkpoint(checkpoint(files=2)).read_rows("layers.0.up.weight", 3, 9), weight[3:9])


def test_a_folder_with_one_file_of_another_name(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "diffusion_model.safetensors")
    assert files_of(tmp_path) == ["diffusion_model.safetensors"]


def test_the_whole_model_wins_over_an_index(checkpoint):
    folder = checkpoint(files=2)
    save_file({"a.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert files_of(folder) == ["model.safetensors"]


def error(path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path).contents  # noqa: B018
    assert caught.value.hint
    return caught.value


def test_paths_that_are_no_checkpoint(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    assert "holds no safetensors checkpoint" in error(tmp_path / "empty").message

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"x")
    caught = error(tmp_path / "old")
    assert "pytorch_model.bin" in caught.hint and "save_pretrained" in caught.hint
    assert "not a safetensors file" in error(tmp_path / "old" / "pytorch_model.bin").message

    checkpoint("pipe/unet")
    assert "unet" in error(tmp_path / "pipe").hint

    assert "did you mean 'empty'?" in error(tmp_path / "emty").hint
    assert "download" in error("someone/some-model").hint

    index = checkpoint("shards", files=2) / "model.safetensors.index.json"
    assert "give its folder" in error(index).hint


def test_shards_without_their_index(checkpoint):
    folder = checkpoint(files=2)
    (folder / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json" in error(folder).message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index.clear(), "no weight_map"),
        (lambda index: index.update(weight_map={"a": 3}), "no weight_map"),
        (lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"), "does not hold 'ghost'"),
        (lambda index: index["weight_map"].update(ghost="model-00009-of-00002.safetensors"), "lacks 1 of the 3 files"),
        (
            lambda index: index["weight_map"].update(ghost="../other/model.safetensors"),
            "no safetensors file of its folder",
        ),
    ],
)
def test_an_index_is_checked(checkpoint, change, reason):
    path = checkpoint(files=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert reason in error(path.parent).message


def test_other_damage(checkpoint):
    folder = checkpoint("a", files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002" in error(folder).message

    folder = checkpoint("b", files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first = next(n for n, f in index.items() if f.startswith("model-00001"))
    save_file({first: torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    assert f"{first!r} is in" in error(folder).message

    folder = checkpoint("c")
    (folder / "config.json").write_text("{oops")
    assert "config.json" in error(folder).message
    (folder / "config.json").write_text("[1]")
    assert "not a JSON object" in error(folder).message


def test_a_name_that_is_not_there(checkpoint):
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.wieght'") as caught:
        Checkpoint(checkpoint()).read("lm_head.wieght")
    assert "did you mean 'lm_head.weight'?" in caught.value.hint


# -- layers ------------------------------------------------------------------------------------------------------------


def layers_of(tmp_path, **shapes) -> dict[str, tuple[str, str]]:
    """Describe a checkpoint of float32 tensors with these shapes; a tensor stands for itself."""
    tensors = {n: s if isinstance(s, torch.Tensor) else torch.zeros(s) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    layers, other = Checkpoint(tmp_path).describe()
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert other + sum(layer.bytes for layer in layers) == total
    return {layer.name: (layer.type, layer.fixed) for layer in layers}


def test_the_file_agrees_with_the_model(checkpoint, tiny):
    """Planning the checkpoint is planning the model."""
    from_file, from_model = ms.plan(checkpoint(files=2), "nvfp4_dynamic"), ms.plan(tiny(), "nvfp4_dynamic")
    rows = [{row.layer.name: row for row in plan.layers} for plan in (from_file, from_model)]
    assert rows[0] == rows[1]
    assert from_file.bytes_before == from_model.bytes_before
    assert from_file.bytes_after == from_model.bytes_after


def test_what_is_a_layer(tmp_path):
    found = layers_of(
        tmp_path,
        **{
            "model.layers.0.mlp.up.weight": (4, 8),
            "model.layers.0.norm.weight": (8,),
            "model.layers.0.mlp.up.bias": (4,),
            "conv.weight": (4, 3, 2, 2),
            "experts.gate_up_proj": (2, 4, 8),
            "weight_of_nothing": (4, 8),
            "counts.weight": torch.zeros(2, 2, dtype=torch.int64),
            "f64.weight": torch.zeros(2, 2, dtype=torch.float64),
            "f8.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
            "weight": (3, 3),
        },
    )
    assert found == {
        "model.layers.0.mlp.up": ("linear", ""),
        "f64": ("linear", "F64 is not quantized, only 16- and 32-bit floats are"),
        "f8": ("linear", "F8_E4M3 is not quantized, only 16- and 32-bit floats are"),
        "": ("linear", ""),
    }


def test_what_is_an_embedding(tmp_path):
    names = ["model.embed_tokens", "bert.embeddings.word_embeddings", "transformer.wte", "shared", "embeddings.project"]
    linear = ["embed_out", "shared_expert.up", "h.0.attn.qkv", "pos_embedder.proj"]
    found = layers_of(tmp_path, **{f"{n}.weight": (4, 8) for n in names + linear})
    assert {n: kind for n, (kind, _) in found.items()} == dict.fromkeys(names, "embedding") | dict.fromkeys(
        linear, "linear"
    )
    assert all(word == word.lower() for word in EMBEDDING_WORDS)


def test_weights_that_are_stored_transposed_stay(tmp_path):
    """Square ones are known by the company they keep: c_proj is transposed somewhere else in the file."""
    found = layers_of(
        tmp_path,
        **{
            "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,),
            "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,),
            "h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,),
            "score.weight": (2, 8), "score.bias": (2,),
        },
    )  # fmt: skip
    transposed = {name for name, (_, fixed) in found.items() if "[in, out]" in fixed}
    assert transposed == {"h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"}


def test_attention_modules_that_never_call_their_projection(tmp_path):
    attention = torch.nn.TransformerEncoderLayer(8, 2).state_dict()
    found = layers_of(tmp_path, **attention)
    assert {name for name, (_, fixed) in found.items() if fixed} == {"self_attn.out_proj"}
    assert layers_of(tmp_path, **{"out_proj.weight": (4, 4)}) == {"out_proj": ("linear", "")}


def test_a_quantized_checkpoint_says_so_in_its_plan(tmp_path, checkpoint):
    ms.quantize_checkpoint(checkpoint(), tmp_path / "out", "mxfp8_dynamic")
    layers, _ = Checkpoint(tmp_path / "out").describe()
    fixed = {layer.name: layer.fixed for layer in layers}
    assert {n for n, f in fixed.items() if f == "already quantized"} == {
        f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down")
    }
    with pytest.raises(ms.MicroscaleError, match="already quantized"):
        ms.plan(tmp_path / "out", "mxfp4_weight_only")
