"""`save` and `load` with models: what was saved comes back, what does not fit changes nothing."""

import json

import pytest
import torch

import microscale as ms
from microscale.errors import CheckpointError, InputError
from microscale.interop.checkpoint import Checkpoint

IDS = torch.arange(12).reshape(2, 6)
EMBEDDINGS_TOO = {
    "name": "all",
    "quantizers": {"w": {"format": "mxfp8"}},
    "rules": [{"match": "*", "types": ["linear", "embedding"], "fprop": {"weight": "w"}}],
}


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items()}  # noqa: C416  (a plain dict)


def unlike(tiny, **kwargs) -> torch.nn.Module:
    """The model with other values, so that a load which does nothing shows."""
    model = tiny(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", ["mxfp8_weight_only", "mxfp6_dynamic", "nvfp4_dynamic", "nvfp4_static", EMBEDDINGS_TOO]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_computes_the_same_when_loaded(tmp_path, tiny, same, recipe, dtype):
    model = tiny(dtype)
    model.table = model.table.to(dtype)
    plan = ms.quantize_(model, recipe, calibrate=[IDS])
    expected = output(model)
    ms.save(model, tmp_path / "out", plan=plan)
    other = unlike(tiny, dtype=dtype)
    assert ms.load(tmp_path / "out", other) is other
    assert torch.equal(output(other), expected)
    assert all(same(other.state_dict()[n], t) for n, t in model.state_dict().items())
    assert str(other) == str(model)
    assert ms.inspect(tmp_path / "out").recipe == plan.recipe.name


def test_a_converted_checkpoint_is_a_quantized_model(tmp_path, checkpoint, tiny):
    ms.quantize_checkpoint(checkpoint(files=3), tmp_path / "out", "nvfp4_dynamic")
    model = tiny()
    ms.quantize_(model, "nvfp4_dynamic")
    assert torch.equal(output(ms.load(tmp_path / "out", unlike(tiny))), output(model))


def test_a_plain_checkpoint_loads_too(checkpoint, tiny):
    assert torch.equal(output(ms.load(checkpoint(files=2), unlike(tiny))), output(tiny()))


def test_a_model_on_the_meta_device(tmp_path, checkpoint, tiny):
    ms.quantize_checkpoint(checkpoint(), tmp_path / "out", "mxfp4_dynamic")
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(CheckpointError, match="no checkpoint stores are on the meta device: 'table'"):
        ms.load(tmp_path / "out", model)
    model.table = torch.arange(40.0)
    expected = tiny()
    ms.quantize_(expected, "mxfp4_dynamic")
    assert torch.equal(output(ms.load(tmp_path / "out", model)), output(expected))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_loading_into_a_model_that_is_quantized_already(tmp_path, checkpoint, tiny):
    """Nothing of what it was stays: neither formats nor input quantizers nor calibration."""
    source = checkpoint()
    ms.quantize_checkpoint(source, tmp_path / "weight_only", "mxfp8_weight_only")
    expected = {"weight_only": tiny(), "plain": tiny()}
    ms.quantize_(expected["weight_only"], "mxfp8_weight_only")
    for name, path in (("weight_only", tmp_path / "weight_only"), ("plain", source)):
        model = unlike(tiny)
        ms.quantize_(model, "nvfp4_static", calibrate=[IDS])
        assert torch.equal(output(ms.load(path, model)), output(expected[name]))


def test_dtypes_are_the_checkpoints_and_training_flags_the_models(checkpoint, tiny):
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    ms.load(checkpoint(dtype=torch.bfloat16), model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, tiny, same):
    model = tiny(tied=True)
    ms.quantize_(model, EMBEDDINGS_TOO)
    assert model.lm_head.weight is model.embed_tokens.weight
    ms.save(model, tmp_path / "out")
    assert ms.inspect(tmp_path / "out").aliases == {"lm_head.weight": "embed_tokens.weight"}
    found = ms.load(tmp_path / "out")
    assert found["lm_head.weight"] is found["embed_tokens.weight"]
    loaded = ms.load(tmp_path / "out", tiny(tied=True))
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert torch.equal(output(loaded), output(model))
    untied = ms.load(tmp_path / "out", tiny())
    assert torch.equal(output(untied), output(model))


def test_a_checkpoint_without_the_tied_copy(tmp_path, tiny, write_checkpoint):
    tensors = {n: t.clone() for n, t in tiny(tied=True).state_dict().items() if n != "lm_head.weight"}
    ms.quantize_checkpoint(write_checkpoint(tmp_path / "src", tensors), tmp_path / "out", EMBEDDINGS_TOO)
    model, expected = ms.load(tmp_path / "out", tiny(tied=True)), tiny(tied=True)
    ms.quantize_(expected, EMBEDDINGS_TOO)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(output(model), output(expected))


def test_two_different_tensors_cannot_become_one(checkpoint, tiny):
    refused(checkpoint(), tiny(tied=True), r"'embed_tokens.weight' and 'lm_head.weight' differ")


def test_the_same_tensor_stored_twice_becomes_one(tmp_path, tiny, write_checkpoint):
    tensors = {name: tensor.clone() for name, tensor in tiny(tied=True).state_dict().items()}
    ms.quantize_checkpoint(write_checkpoint(tmp_path / "src", tensors), tmp_path / "out", EMBEDDINGS_TOO)
    assert not ms.inspect(tmp_path / "out").aliases
    model = ms.load(tmp_path / "out", tiny(tied=True))
    assert model.lm_head.weight is model.embed_tokens.weight


def test_many_files_when_one_would_be_too_large(tmp_path, tiny, same):
    model = tiny()
    ms.quantize_(model, "nvfp4_dynamic")
    ms.save(model, tmp_path / "one")
    ms.save(model, tmp_path / "many", shard_bytes=5000)
    names = [f.path.name for f in Checkpoint(tmp_path / "many").files]
    assert len(names) > 2 and names[0] == f"model-00001-of-0000{len(names)}.safetensors"
    one, many = ms.load(tmp_path / "one"), ms.load(tmp_path / "many")
    assert set(one) == set(many) and all(same(one[n], t) for n, t in many.items())
    assert torch.equal(output(ms.load(tmp_path / "many", unlike(tiny))), output(model))


def test_devices(tmp_path, device):
    """From any device, to any device; without being told, to where the model is."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 8)).to(device), torch.randn(3, 64, device=device)
    ms.quantize_(model, "nvfp4_static", calibrate=[x])
    ms.save(model, tmp_path / "out")
    loaded = ms.load(tmp_path / "out", torch.nn.Sequential(torch.nn.Linear(64, 8)).to(device))
    assert torch.equal(loaded(x), model(x))
    moved = ms.load(tmp_path / "out", torch.nn.Sequential(torch.nn.Linear(64, 8)), device=device)
    assert torch.equal(moved(x), model(x))
    assert {t.device.type for t in ms.load(tmp_path / "out", device=device).values()} == {device.type}
    assert {t.device.type for t in ms.load(tmp_path / "out").values()} == {"cpu"}


def test_a_lone_linear(tmp_path):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 8), torch.randn(3, 64)
    ms.quantize_(layer, "nvfp4_static", calibrate=[x])
    ms.save(layer, tmp_path / "out")
    assert torch.equal(ms.load(tmp_path / "out", torch.nn.Linear(64, 8))(x), layer(x))


def test_a_compiled_model_has_the_names_of_its_module(tmp_path, tiny):
    model = tiny()
    ms.save(torch.compile(model, backend="eager"), tmp_path / "out")
    assert set(ms.load(tmp_path / "out")) == set(model.state_dict())


def test_saving_overwrites_only_when_told(tmp_path, tiny):
    ms.save(tiny(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        ms.save(tiny(), tmp_path / "out")
    ms.save(tiny(torch.bfloat16), tmp_path / "out", overwrite=True)
    assert ms.load(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_configuration_is_saved_with_our_mark(tmp_path, tiny):
    class Config:
        def to_json_string(self):
            return json.dumps({"model_type": "tiny"})

    model = tiny()
    model.config = Config()
    plan = ms.quantize_(model, "mxfp8_weight_only")
    ms.save(model, tmp_path / "out", plan=plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "tiny"
    assert config["quantization_config"]["quant_method"] == "microscale"
    assert config["quantization_config"]["recipe"] == "mxfp8_weight_only"


# -- what does not fit -------------------------------------------------------------------------------------------------


def refused(path, model, reason) -> CheckpointError:
    """Loading fails, and the model is what it was."""
    before = [(n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())]
    with pytest.raises(CheckpointError, match=reason) as caught:
        ms.load(path, model)
    assert [(n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())] == before
    assert caught.value.hint
    return caught.value


def test_names_that_are_missing_or_too_many(tmp_path, checkpoint, tiny):
    model = tiny()
    model.extra = torch.nn.Linear(2, 2)
    refused(checkpoint(), model, "2 of the model's are missing: 'extra.weight', 'extra.bias'")
    model = tiny()
    del model.lm_head
    refused(checkpoint(), model, "1 are unexpected: 'lm_head.weight'")
    model = tiny()
    model.head = model._modules.pop("lm_head")
    assert "did you mean 'lm_head.weight'?" in refused(checkpoint(), model, "missing.*unexpected").hint
    wrapper = torch.nn.Module()
    wrapper.model = tiny()
    assert "model.model" in refused(checkpoint(), wrapper, "missing").hint
    assert "'layers.0'" in refused(checkpoint(), tiny().layers[0], "missing").hint


def test_shapes_that_differ(checkpoint, tiny):
    model = tiny()
    model.lm_head = torch.nn.Linear(40, 51, bias=False)
    refused(checkpoint(), model, r"'lm_head.weight' is \[50, 40\], the model's is \[51, 40\]")


def test_codes_in_the_place_of_numbers(tmp_path, tiny, write_checkpoint):
    tensors = tiny().state_dict()
    tensors["lm_head.weight"] = torch.zeros(50, 40, dtype=torch.uint8)
    path = write_checkpoint(tmp_path / "codes", tensors)
    refused(path, tiny(), r"'lm_head.weight' is torch.uint8, the model's is torch.float32")


def test_modules_that_cannot_use_what_they_would_get(tmp_path, checkpoint, tiny):
    ms.quantize_checkpoint(checkpoint(), tmp_path / "out", "mxfp8_dynamic")

    class Odd(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.to(x.dtype).t()

    class NoLinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(40, 70))

    model = tiny()
    model.layers[0].down = Odd(70, 40, bias=False)
    refused(tmp_path / "out", model, "'layers.0.down.weight' is quantized, which the model cannot use: Odd")
    model = tiny()
    model.layers[1].down = NoLinear()
    refused(tmp_path / "out", model, "the input of 'layers.1.down' is quantized, which is no nn.Linear")


def test_models_that_cannot_be_saved(tmp_path, tiny):
    with torch.device("meta"):
        meta = tiny()
    lazy, sparse, extra = torch.nn.LazyLinear(3), torch.nn.Module(), tiny()
    sparse.register_buffer("s", torch.eye(3).to_sparse())

    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    extra.lm_head = Extra(2, 2)
    complex128 = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))])
    cases = [
        (meta, "meta device"), (lazy, "not initialized"), (sparse, "no ordinary tensor"),
        (extra, "state beside tensors"), (complex128, "cannot store"), ({"a": torch.ones(1)}, "takes an nn"),
    ]  # fmt: skip
    for model, reason in cases:
        with pytest.raises(InputError, match=reason) as caught:
            ms.save(model, tmp_path / "out")
        assert caught.value.hint
    with pytest.raises(InputError, match="takes an nn"):
        ms.load(tmp_path, {"a": 1})
    assert not any(tmp_path.iterdir())


# -- a model of transformers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    return transformers, transformers.BertModel(config).eval()


def test_a_model_of_transformers_and_back(tmp_path, bert):
    transformers, model = bert
    model.save_pretrained(tmp_path / "src")
    ms.quantize_checkpoint(tmp_path / "src", tmp_path / "out", "nvfp4_dynamic")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "src")
    loaded = ms.load(tmp_path / "out", transformers.AutoModel.from_config(config).eval())
    expected = transformers.AutoModel.from_pretrained(tmp_path / "src").eval()
    ms.quantize_(expected, "nvfp4_dynamic")
    with torch.no_grad():
        outputs = [m(IDS).last_hidden_state for m in (loaded, expected)]
    assert torch.equal(*outputs)
    ms.save(expected, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "bert"


def test_transformers_refuses_rather_than_start_from_random_weights(tmp_path, bert):
    transformers, model = bert
    model.save_pretrained(tmp_path / "src")
    ms.quantize_checkpoint(tmp_path / "src", tmp_path / "out", "mxfp8_weight_only")
    with pytest.raises(Exception, match=r"ignore_mismatched_sizes|Unknown quantization"):
        transformers.AutoModel.from_pretrained(tmp_path / "out")


def test_load_state_dict_refuses_even_when_not_strict(tmp_path, checkpoint, tiny):
    from safetensors.torch import load_file

    ms.quantize_checkpoint(checkpoint(), tmp_path / "out", "mxfp8_weight_only")
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny().load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
