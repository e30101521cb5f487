"""`compare` on outputs: a tiny Bert and a tiny Llama, against computations by torch and transformers."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import microscale as ms
from microscale.errors import InputError
from microscale.report import model as models
from microscale.report.compare import compare
from microscale.report.results import CompareReport

from .conftest import TEXTS, edit_config

pytest.importorskip("transformers")
RECIPES = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]


@pytest.fixture(scope="module")
def bert_report(bert):
    return compare(bert, ["mxfp8"], inputs=TEXTS)


@pytest.fixture(scope="module")
def llama_report(llama):
    return compare(llama, ["mxfp8"], inputs=TEXTS)


def by_name(report: CompareReport) -> dict[str, object]:
    return {row.recipe: row for row in report.recipes}


# -- encoder -----------------------------------------------------------------------------------------------------------


def test_every_inference_recipe_runs_or_says_why_not(bert_report, llama_report):
    for report in (bert_report, llama_report):
        assert sorted([*by_name(report), *(row.recipe for row in report.skipped)]) == sorted(RECIPES)
        assert all(row.reason for row in report.skipped)


def test_an_encoder_is_compared_on_its_last_hidden_state(bert_report):
    reference = bert_report.reference
    assert (reference.task, reference.output, reference.architecture) == ("encoder", "last hidden state", "BertModel")
    assert (reference.texts, reference.perplexity) == (len(TEXTS), None)
    assert all(row.kl is None and row.perplexity is None for row in bert_report.recipes)


def test_cosine_and_relative_error_text_by_text(bert, bert_report):
    import transformers

    plain = transformers.AutoModel.from_pretrained(bert, dtype=torch.float32).eval()
    quantized = transformers.AutoModel.from_pretrained(bert, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    ms.quantize_(quantized, "mxfp4_weight_only")
    cosines, errors = [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:16]])
        with torch.no_grad():
            a, b = (m(ids).last_hidden_state.double().flatten() for m in (plain, quantized))
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
        errors.append(float((a - b).norm() / a.norm()))
    row = by_name(bert_report)["mxfp4_weight_only"]
    assert row.cosine_mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert row.cosine_worst == pytest.approx(min(cosines), abs=1e-5)
    assert row.worst_text == cosines.index(min(cosines))
    assert row.relative_error == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_recipes_are_ranked_by_error(bert_report, llama_report):
    errors = [row.relative_error for row in bert_report.recipes]
    assert errors == sorted(errors) and errors[0] > 0
    kl = [row.kl for row in llama_report.recipes]
    assert kl == sorted(kl) and kl[0] > 0


def test_more_bits_are_better_here(bert_report):
    rows = by_name(bert_report)
    assert rows["mxfp8_weight_only"].cosine_mean > rows["nvfp4_weight_only"].cosine_mean
    assert rows["mxfp8_weight_only"].relative_error < rows["mxfp8_dynamic"].relative_error


def test_sizes_are_those_of_the_checkpoints_plan(llama, llama_report):
    """The model runs in FP32, but its checkpoint is bfloat16, and that is what a quantized one is measured against."""
    row, plan = by_name(llama_report)["nvfp4_dynamic"], ms.plan(llama, "nvfp4_dynamic")
    assert (row.layers, row.model_bytes) == (len(plan.quantized), plan.bytes_after)
    assert row.layer_bytes == sum(layer.bytes_after for layer in plan.quantized)
    assert (row.weight, row.input) == ("nvfp4", "nvfp4")
    assert llama_report.source_bytes == plan.bytes_before


def test_static_recipes_are_calibrated_with_the_inputs(bert, bert_report):
    static, dynamic = (by_name(bert_report)[f"nvfp4_{mode}"] for mode in ("static", "dynamic"))
    assert static.relative_error == pytest.approx(dynamic.relative_error, rel=0.3)


def test_long_texts_are_cut_and_counted(bert_report):
    assert bert_report.reference.truncated == 1  # one text has more than Bert's 16 positions
    assert bert_report.reference.tokens == sum(min(16, len(text.split())) for text in TEXTS)


def test_a_recipe_that_does_not_fit_is_skipped_with_its_reason(bert):
    body = {"quantizers": {"w": {"format": "mxfp8"}}}
    fits = {"name": "fits", **body, "rules": [{"match": "*.query", "fprop": {"weight": "w"}}]}
    misses = {"name": "misses", **body, "rules": [{"match": "*.qery", "fprop": {"weight": "w"}}]}
    report = compare(bert, [], recipes=[misses, fits], inputs=TEXTS[:2])
    assert [row.recipe for row in report.recipes] == ["fits"]
    assert report.recipes[0].layers == 2
    assert report.skipped[0].recipe == "misses" and "'*.qery' matches none" in report.skipped[0].reason
    assert report.formats == ()


def test_inputs_from_a_file_are_its_lines(bert, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["", *TEXTS[:2], "  "]), encoding="utf-8")
    reports = [compare(bert, [], ["mxfp8_weight_only"], inputs) for inputs in (path, str(path), TEXTS[:2])]
    rows = [dataclasses.replace(report.recipes[0], seconds=0) for report in reports]
    assert rows[0] == rows[1] == rows[2]


# -- causal language model ---------------------------------------------------------------------------------------------


def test_kl_and_perplexity_against_torch_and_transformers(llama, llama_report):
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, quantized = (load(llama, dtype=torch.float32).eval() for _ in range(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    ms.quantize_(quantized, "nvfp4_weight_only")
    kl, tokens, loss, predicted = 0.0, 0, [0.0, 0.0], 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            outputs = [m(ids, labels=ids) for m in (plain, quantized)]
        p, q = (output.logits.log_softmax(-1) for output in outputs)
        kl += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        count = ids.shape[1] - 1
        loss = [total + float(output.loss) * count for total, output in zip(loss, outputs, strict=True)]
        tokens, predicted = tokens + ids.shape[1], predicted + count
    row, reference = by_name(llama_report)["nvfp4_weight_only"], llama_report.reference
    assert (reference.task, reference.output, reference.tokens) == ("causal_lm", "logits", tokens)
    assert row.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert reference.perplexity == pytest.approx(math.exp(loss[0] / predicted), rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(loss[1] / predicted), rel=1e-5)


def test_json_round_trip_with_a_model(llama_report):
    data = json.loads(json.dumps(llama_report.to_dict(), allow_nan=False))
    assert CompareReport.from_dict(data) == llama_report
    assert data["reference"]["task"] == "causal_lm"
    assert "transformers" in data["environment"]


def test_a_model_that_gives_nan_is_last_and_still_json(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = compare(folder, ["mxfp8"], ["mxfp8_weight_only"], TEXTS[:2])
    row = report.recipes[0]
    assert (row.cosine_mean, row.relative_error, row.kl) == (None, None, None)
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.formats[0].lost == 31


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_the_copy_shares_weights_and_leaves_the_original_alone(bert):
    model = models.load(bert)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    copy = model.copy()
    pointers = {p.data_ptr() for p in model.module.parameters()}
    assert {p.data_ptr() for p in copy.parameters()} == pointers
    ms.quantize_(copy, "mxfp8_dynamic")
    assert all(type(m) is not type(n) for m, n in zip(_linears(copy), _linears(model.module), strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def _linears(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


def test_batches_hold_every_text_once_and_padding_is_masked(llama):
    model = models.load(llama)  # without a padding token
    batches, cut = model.batches(TEXTS, size=2)
    assert sorted(i for batch in batches for i in batch.texts) == list(range(len(TEXTS)))
    assert cut == 0
    alone = {}
    for index, text in enumerate(TEXTS):
        alone[index] = model.run(model.module, model.batches([text])[0][0])[0]
    for batch in batches:
        for index, output in zip(batch.texts, model.run(model.module, batch), strict=True):
            torch.testing.assert_close(output, alone[index], rtol=1e-4, atol=1e-5)


def test_kl_of_hand_made_logits(monkeypatch):
    monkeypatch.setattr(models, "_ROWS", 2)  # several pieces
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    q = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8]])
    ids = torch.tensor([[0, 1, 1, 0, 1]])
    errors = models.OutputErrors()
    errors.add(models.Batch((0,), ids, torch.ones_like(ids)), [p.log()], [q.log()], causal=True)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    third = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert (errors.tokens, errors.predicted) == (5, 4)
    assert errors.kl == pytest.approx(first + third, rel=1e-6)
    expected = -(math.log(0.75) + math.log(0.75) + math.log(0.5) + math.log(0.5)) / 4
    assert errors.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_the_reference_is_computed_again_where_it_is_too_large_to_keep(bert, bert_report, monkeypatch):
    monkeypatch.setattr(models, "_KEEP", 0)
    again = compare(bert, [], ["mxfp4_weight_only"], TEXTS).recipes[0]
    kept = by_name(bert_report)["mxfp4_weight_only"]
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(kept, seconds=0)


def test_a_single_token_has_no_perplexity(llama):
    report = compare(llama, [], ["mxfp8_weight_only"], ["cat"])
    assert report.reference.perplexity is None
    assert report.recipes[0].kl is not None


# -- what cannot be run ------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused(tmp_path):
    import transformers

    config = transformers.T5Config(
        vocab_size=20, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder-decoder"):
        compare(tmp_path, inputs=TEXTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_type", "architectures": ["NoSuchModel"]},
        {"hidden_size": "wide"},
        {"hidden_size": 48},
        {"num_hidden_layers": None},
    ],
    ids=str,
)
def test_what_transformers_cannot_load_is_an_input_error(tmp_path, bert, changes):
    folder = tmp_path / "odd"
    shutil.copytree(bert, folder)
    edit_config(folder, **changes)
    with pytest.raises(InputError, match="transformers cannot load") as error:
        compare(folder, inputs=TEXTS)
    assert "leave out the inputs" in error.value.hint


def test_a_model_without_a_tokenizer(tmp_path, bert):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, tmp_path / name)
    with pytest.raises(InputError, match="has no tokenizer"):
        compare(tmp_path, inputs=TEXTS)


def test_loading_leaves_the_settings_of_transformers_alone(bert):
    import transformers

    log = transformers.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    models.load(bert)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_older_causal_models_are_recognised():
    assert models._is_causal("GPT2LMHeadModel") and models._is_causal("LlamaForCausalLM")
    assert not models._is_causal("BertModel")
