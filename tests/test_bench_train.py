"""The train suite on a tiny block on the CPU: rows, breakdown, saved bytes, refusal to time what is wrong."""

import json

import pytest
import torch

from microscale.bench import train
from microscale.bench.blocks import TINY, TINY_EXPERTS, grouped, linears, make_block, torch_grouped
from microscale.bench.train import bench_train
from microscale.errors import InputError
from microscale.spec.registry import find_recipe, list_recipes

KEYS = {
    "block", "recipe", "tokens", "us", "us_spread", "bf16_us", "speedup", "saved_bytes", "saved_ratio", "weight_bytes",
    "breakdown", "kernels", "sqnr_db", "timed", "checked", "note",
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return bench_train("cpu", ["mxfp8_train", "nvfp4_train", "mxfp8_train_wgrad_hp"], [TINY], samples=2)


def test_rows(report):
    assert [row.recipe for row in report.rows] == ["bf16", "mxfp8_train", "nvfp4_train", "mxfp8_train_wgrad_hp"]
    base = report.rows[0]
    for row in report.rows:
        assert row.checked and row.block == "tiny" and row.tokens == 64 and row.timed == "wall" and not row.note
        assert row.us > 0 and row.bf16_us == base.us and row.speedup == pytest.approx(base.us / row.us)
        assert sum(row.breakdown.values()) == pytest.approx(row.us)
    assert base.speedup == 1 and base.sqnr_db == {} and set(base.breakdown) == {"fprop", "dgrad", "wgrad", "rest"}
    casts = {"cast input", "cast weight", "cast gradient"}
    assert set(report.rows[1].breakdown) == {*base.breakdown, *casts}
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data) == {"environment", "ceilings", "rows"} and all(set(row) == KEYS for row in data["rows"])


def test_levels_are_those_of_the_formats(report):
    levels = {row.recipe: row.sqnr_db for row in report.rows}
    assert levels["mxfp8_train"]["out"] > 18 > levels["nvfp4_train"]["out"] > 6
    assert levels["mxfp8_train_wgrad_hp"]["dw"] > levels["mxfp8_train"]["dw"]


@pytest.fixture(scope="module")
def experts():
    return bench_train("cpu", ["mxfp8_train", "nvfp4_train", "mxfp8_train_wgrad_hp"], [TINY_EXPERTS], samples=2)


def test_rows_of_experts(experts):
    base = experts.rows[0]
    for row in experts.rows:
        assert row.checked and row.block == "tiny_experts" and row.tokens == 128 and not row.note
        assert sum(row.breakdown.values()) == pytest.approx(row.us)
    assert set(base.breakdown) == {"fprop", "dgrad", "wgrad", "rest"}
    casts = {"cast input", "cast weight", "cast gradient"}
    assert set(experts.rows[1].breakdown) == {*base.breakdown, *casts}
    assert experts.rows[1].kernels == {
        "fprop": "reference.grouped_matmul", "dgrad": "reference.grouped_matmul", "wgrad": "reference.grouped_wgrad"
    }  # fmt: skip
    assert experts.rows[1].sqnr_db["out"] > experts.rows[2].sqnr_db["out"] > 6
    assert all(set(row) == KEYS for row in json.loads(json.dumps(experts.to_dict()))["rows"])


def test_saved_bytes_of_experts(experts):
    """The router stays in bf16; a token is saved for each of its experts."""
    rows = {row.recipe: row for row in experts.rows}
    layers = linears(make_block(TINY_EXPERTS, torch.device("cpu")))
    inputs = sum(m.in_features * 128 * (2 if "experts" in name else 1) for name, m in layers.items())
    assert set(layers) > {"layers.0.mlp.gate", "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"}
    assert rows["bf16"].saved_bytes == 2 * inputs and rows["bf16"].weight_bytes == 0
    kept = 128 * 64
    assert rows["mxfp8_train"].saved_bytes == (inputs - kept) * 33 / 32 + 2 * kept
    outers = 4 * (64 + 32)  # of pieces: at most one for 32 rows here, for two batches less one
    assert rows["nvfp4_train"].saved_bytes - ((inputs - kept) * 9 / 16 + 2 * kept) <= outers
    assert rows["mxfp8_train_wgrad_hp"].saved_ratio == 1


def test_bf16_experts_are_the_plain_product():
    layer = make_block(TINY_EXPERTS, torch.device("cpu")).layers[0].mlp.experts.down_proj
    x, offsets = torch.randn(64, 32, dtype=torch.bfloat16), torch.tensor([16, 16, 40, 64], dtype=torch.int32)
    wanted = layer(x, offsets)
    assert torch.equal(grouped(layer, x, offsets, 8), wanted)
    if hasattr(torch.nn.functional, "grouped_mm"):
        torch.testing.assert_close(torch_grouped(x, layer.weight.transpose(-1, -2), offsets), wanted)


def test_saved_bytes(report):
    """bf16 keeps its inputs; a recipe what wgrad multiplies, in its format."""
    rows = {row.recipe: row for row in report.rows}
    inputs = 64 * sum(m.in_features for m in linears(make_block(TINY, torch.device("cpu"))).values())
    assert rows["bf16"].saved_bytes == 2 * inputs and rows["bf16"].weight_bytes == 0
    assert rows["mxfp8_train"].saved_bytes == inputs * 33 / 32
    assert rows["mxfp8_train"].saved_ratio == pytest.approx(64 / 33)
    assert rows["nvfp4_train"].saved_bytes == inputs * 9 / 16
    assert rows["mxfp8_train_wgrad_hp"].saved_ratio == 1


def test_results_are_saved_and_an_interrupt_keeps_them():
    saved = []

    def save(report):
        saved.append(report)
        if len(saved) == 2:
            raise KeyboardInterrupt

    report = bench_train("cpu", ["mxfp8_train", "nvfp4_train"], [TINY], samples=1, save=save)
    assert [row.recipe for row in report.rows] == ["bf16", "mxfp8_train"] and report.environment["interrupted"]
    assert len(saved[0].rows) == 1


def test_a_wrong_step_gets_no_time(monkeypatch):
    right = train.prepare_training_

    def wrong(block, recipe, *, seed):
        right(block, recipe, seed=seed)
        with torch.no_grad():
            block.layers[0].mlp.down_proj.weight.neg_()

    monkeypatch.setattr(train, "prepare_training_", wrong)
    row = bench_train("cpu", ["mxfp8_train"], [TINY], samples=1).rows[1]
    assert row.us is None and row.speedup is None and not row.checked and row.note.startswith("differs from bf16")


def test_progress_and_default_recipes(monkeypatch):
    steps = []
    monkeypatch.setattr(train._Suite, "row", lambda self, spec: spec)
    bench_train("cpu", samples=1, progress=lambda *args: steps.append(args))
    training = [name for name in list_recipes() if find_recipe(name).is_training]
    assert [what for _, _, what in steps] == [f"{b} {r}" for b in ("tiny", "tiny_experts") for r in ["bf16", *training]]
    assert [done for done, _, _ in steps] == list(range(steps[0][1]))


def test_errors():
    with pytest.raises(InputError, match="for inference"):
        bench_train("cpu", ["mxfp8_dynamic"])
    with pytest.raises(InputError):
        bench_train("mps")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            bench_train("cuda")


@pytest.mark.gpu
def test_on_a_gpu_steps_are_captured_and_the_allocator_is_read():
    size = type(TINY)("small", 512, 1024, 8, 4, 64, 2, 256)
    rows = bench_train("cuda", ["mxfp8_train", "nvfp4_train"], [size], samples=3).rows
    assert [(row.checked, row.timed) for row in rows] == [(True, "cuda graph")] * 3
    assert rows[1].saved_ratio > 1.8 and rows[2].saved_ratio > 3.2


@pytest.mark.gpu
def test_experts_on_a_gpu():
    size = type(TINY)("small_experts", 512, 256, 8, 4, 64, 2, 256, 16, 4)
    rows = bench_train("cuda", ["mxfp8_train", "nvfp4_train"], [size], samples=3).rows
    assert [(row.checked, row.timed, row.note) for row in rows] == [(True, "cuda graph", "")] * 3
    assert set(rows[0].kernels.values()) == {"torch"}
    assert set(rows[1].kernels.values()) <= {"triton.grouped_matmul", "triton.grouped_two_pass", "triton.grouped_wgrad"}
