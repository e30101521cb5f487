"""The language model that is trained on Python's own source: it learns, twice the same, with bf16 and with recipes."""

import contextlib
import copy
import dataclasses
import importlib
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import optimizer

import microscale as ms
from microscale.nn.diagnostics import read_diagnostics

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN_KEYS = {
    "recipe", "seed", "steps", "tokens", "losses", "held_out", "final_loss", "tokens_per_s", "layers", "graphs",
    "ratio_to_bf16",
}  # fmt: skip


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("tiny_lm")
    model = importlib.import_module("tiny_lm_model")
    small = model.Config(dim=64, layers=2, heads=4, kv_heads=2, ffn=128, length=32)
    monkeypatch.setitem(module.SIZES, "tiny", module.Size(small, 8, 24, 16, 4e-3))
    yield module
    for name in ("tiny_lm", "tiny_lm_train", "tiny_lm_model"):
        sys.modules.pop(name, None)


def run(lm, tmp_path, *arguments):
    out = tmp_path / "tiny_lm.json"
    assert lm.main([*arguments, "--device", "cpu", "--size", "tiny", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def by_recipe(result):
    return {(r["recipe"], r["seed"]): r for r in result["runs"]}


@pytest.mark.slow
def test_recipes_learn_the_same_text(lm, tmp_path, capsys):
    picture = tmp_path / "losses.png"
    names = ["mxfp8_train", "nvfp4_train", "nvfp4_train-no_hadamard"]
    result = run(lm, tmp_path, "--recipes", ",".join([*names, "bf16"]))
    runs = by_recipe(result)
    assert [name for name, _ in runs] == ["bf16", *names]
    for (name, _), found in runs.items():
        first, last = found["losses"][0][1], found["final_loss"]
        assert first == pytest.approx(math.log(256), rel=0.05) and last < 0.8 * first, name
        assert found["ratio_to_bf16"] == pytest.approx(1, abs=0.05)
        assert set(found) == RUN_KEYS and found["tokens"] == 24 * 8 * 32 and found["tokens_per_s"] > 0
    assert runs["bf16", 0]["layers"] == 0 and runs["mxfp8_train", 0]["layers"] == 2 * 7
    assert runs["nvfp4_train", 0]["final_loss"] != runs["nvfp4_train-no_hadamard", 0]["final_loss"]
    assert not picture.exists()  # was not asked for
    inference = [name for name in ms.list_recipes() if not ms.find_recipe(name).is_training]
    assert [(row["recipe"], row["trained_by"]) for row in result["perplexities"]] == [
        (name, "bf16") for name in ["bf16", *inference]
    ]
    for row in result["perplexities"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"])) and abs(row["ratio_to_bf16"] - 1) < 0.05
    assert set(result) == {
        "environment", "model", "runs", "perplexities", "skipped", "summary", "perplexity_summary"
    }  # fmt: skip
    assert result["environment"]["corpus"]["files"][0] > 10 * result["environment"]["corpus"]["files"][1] > 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*names, *inference])


def test_the_same_seed_gives_the_same_run(lm, tmp_path):
    def losses(seed):
        found = run(lm, tmp_path, "--recipes", "nvfp4_train", "--seeds", seed, "--steps", "4")["runs"][0]
        return found["losses"], found["held_out"]

    assert losses("3") == losses("3") != losses("4")


def test_seeds_change_weights_and_order_for_every_recipe_alike(lm, tmp_path):
    result = run(lm, tmp_path, "--recipes", "bf16,mxfp8_train", "--seeds", "0,1", "--steps", "2")
    runs = by_recipe(result)
    assert list(runs) == [("bf16", 0), ("mxfp8_train", 0), ("bf16", 1), ("mxfp8_train", 1)]
    first = {key: found["losses"][0][1] for key, found in runs.items()}
    assert first["bf16", 0] != first["bf16", 1]
    for seed in (0, 1):
        assert first["bf16", seed] == pytest.approx(first["mxfp8_train", seed], rel=2e-3)


def test_quantization_aware_training_is_evaluated_as_it_will_run(lm, tmp_path):
    """The bytes of its forward are those of the inference recipe: under autocast and in bf16 the loss is nearly one."""
    result = run(lm, tmp_path, "--recipes", "qat_mxfp4", "--steps", "8")
    plain, quantized = result["perplexities"]
    assert (plain["recipe"], quantized["recipe"]) == ("bf16", ms.find_recipe("qat_mxfp4").inference)
    assert plain["trained_by"] == quantized["trained_by"] == "qat_mxfp4" and quantized["ratio_to_bf16"] is None
    assert quantized["loss"] == pytest.approx(result["runs"][0]["final_loss"], rel=5e-3)


def test_time_and_interrupts_keep_what_there_is(lm, tmp_path, monkeypatch):
    late = run(lm, tmp_path, "--recipes", "bf16,mxfp8_train", "--steps", "2", "--seconds", "0")
    assert not late["runs"] and [row["recipe"] for row in late["skipped"]] == ["bf16", "mxfp8_train"]

    calls = []
    train = lm.train

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return train(*args)

    monkeypatch.setattr(lm, "train", interrupted)
    result = run(lm, tmp_path, "--recipes", "bf16,mxfp8_train", "--steps", "2")
    assert [r["recipe"] for r in result["runs"]] == ["bf16"] and result["environment"]["interrupted"]


def test_runs_are_added_to_those_of_before(lm, tmp_path, monkeypatch):
    """Only what is missing is made, and related to what there was; nothing is added to runs of another kind."""
    arguments = ["--seeds", "0", "--losses-only"]
    before = run(lm, tmp_path, "--recipes", "bf16", *arguments, "--steps", "2", "--add")  # to no file yet
    made, train = [], lm.train
    monkeypatch.setattr(lm, "train", lambda setup, name, seed: made.append((name, seed)) or train(setup, name, seed))
    after = run(lm, tmp_path, "--recipes", "bf16,mxfp8_train", *arguments, "--steps", "2", "--add")
    assert made == [("mxfp8_train", 0)] and list(by_recipe(after)) == [("bf16", 0), ("mxfp8_train", 0)]
    kept, added = after["runs"]
    assert [kept] == before["runs"] and set(added) == RUN_KEYS
    assert added["ratio_to_bf16"] == pytest.approx(added["final_loss"] / kept["final_loss"])
    assert [(row["recipe"], row["seeds"]) for row in after["summary"]] == [("bf16", 1), ("mxfp8_train", 1)]
    for others in (["--steps", "3"], ["--steps", "2", "--lr", "0.001"]):
        with pytest.raises(SystemExit, match="another model"):
            run(lm, tmp_path, "--recipes", "nvfp4_train", *arguments, *others, "--add")
    assert json.loads((tmp_path / "tiny_lm.json").read_text()) == after and len(made) == 1
    run(lm, tmp_path, "--recipes", "bf16", "--seeds", "0", "--steps", "2", "--add")  # now its perplexities are wanted
    assert made[1:] == [("bf16", 0)]
    elsewhere = after | {"environment": after["environment"] | {"torch": "1.0"}}
    (tmp_path / "tiny_lm.json").write_text(json.dumps(elsewhere))
    with pytest.raises(SystemExit, match="device or version"):
        run(lm, tmp_path, "--recipes", "nvfp4_train", *arguments, "--steps", "2", "--add")
    with pytest.raises(SystemExit, match="goes with --out"):
        lm.main(["--device", "cpu", "--size", "tiny", "--add"])


def test_picture(lm, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plots" / "losses.png"
    run(lm, tmp_path, "--recipes", "bf16,mxfp8_train", "--steps", "8", "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_diagnostics(lm, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "diagnostics"
    arguments = ["--recipes", "bf16,nvfp4_train", "--steps", "8"]
    watched = run(lm, tmp_path, *arguments, "--diagnostics", str(folder))["runs"]
    rows = read_diagnostics(folder / "nvfp4_train-0.jsonl")
    assert {row.step for row in rows} == set(range(1, 9)) and {row.layer.split(".")[1] for row in rows} == {"0"}
    weight = next(row for row in rows if row.operand == "input" and row.layer.endswith("gate_proj"))
    assert weight.values == 8 * 32 * 64  # of the training step, without evaluations
    assert {path.name for path in folder.iterdir()} == {"nvfp4_train-0.jsonl", "nvfp4_train-0.png"}
    for one, other in zip(watched, run(lm, tmp_path, *arguments)["runs"], strict=True):
        assert one["losses"] == other["losses"]  # being watched changes nothing


def test_ablations_are_recipes_without_one_thing(lm):
    spec = lm.recipe_of("nvfp4_train-no_hadamard")
    assert all(q.hadamard is None for q in spec.quantizers.values()) and spec.random_signs == ()
    spec = lm.recipe_of("nvfp4_train-no_stochastic")
    assert {q.rounding for q in spec.quantizers.values()} == {"nearest_even"}
    assert any(q.hadamard is not None for q in spec.quantizers.values())
    assert all(q.scale_tile is None for q in lm.recipe_of("nvfp4_train-no_2d").quantizers.values())
    with pytest.raises(SystemExit, match="no ablation"):
        lm.recipe_of("nvfp4_train-no_luck")
    with pytest.raises(SystemExit, match="nothing that no_hadamard"):
        lm.recipe_of("mxfp8_train-no_hadamard")
    with pytest.raises(ms.MicroscaleError):
        lm.wanted("bf16,mxfp9_train")
    everything = lm.wanted("all")
    assert everything[0] == "bf16" and {"nvfp4_train-no_2d", "mxfp8_train"} <= set(everything)


def test_the_text_is_split_by_name(lm, tmp_path):
    model = importlib.import_module("tiny_lm_model")
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n" * 3)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("secret\n")
    one = model.read_corpus(8, torch.device("cpu"), tmp_path)
    files, held_out = one.facts["files"]
    assert files + held_out == 100 and 0 < held_out < 20
    assert bytes(one.train.tolist()).count(b"\0") == files - 1 and b"secret" not in bytes(one.train.tolist())
    held = one.held_out(3)
    assert held.shape == (3, 9) and torch.equal(held, model.read_corpus(8, torch.device("cpu"), tmp_path).held_out(3))
    batch = one.batch(one.order(2, 4, seed=0)[1])
    assert batch.shape == (4, 9) and torch.equal(batch, one.batch(one.order(2, 4, seed=0)[1]))
    with pytest.raises(SystemExit, match="too little"):
        model.read_corpus(10**6, torch.device("cpu"), tmp_path)


def test_large_model_has_kernel_sizes(lm):
    """About 30 M parameters, every width a multiple of 256, tied or not."""
    model = importlib.import_module("tiny_lm_model")
    with torch.device("meta"):
        big, tied = (model.TinyLM(model.Config(tied=tied)) for tied in (False, True))
    count = sum(p.numel() for p in big.parameters())
    assert 28e6 < count < 33e6 and count - sum(p.numel() for p in tied.parameters()) == 512 * 256
    assert all(size % 256 == 0 for p in big.parameters() if p.dim() > 1 for size in p.shape)


def test_positions_and_causality(lm):
    """A later byte changes no earlier logit, and the same byte elsewhere gives another one."""
    model = importlib.import_module("tiny_lm_model")
    net = model.TinyLM(model.Config(dim=64, layers=2, heads=4, kv_heads=2, ffn=128, length=16))
    tokens = torch.full((1, 16), 7)
    changed = tokens.clone()
    changed[0, -1] = 8
    a, b = net(tokens), net(changed)
    assert torch.equal(a[0, :-1], b[0, :-1]) and not torch.equal(a[0, -1], b[0, -1])
    x = torch.randn(1, 2, 16, 8)
    rotated = model.rotate(x, *model.rotations(16, 8, x.device))
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-5) and torch.equal(rotated[:, :, 0], x[:, :, 0])


def test_what_seeds_come_to(lm, tmp_path, capsys):
    result = run(lm, tmp_path, "--recipes", "mxfp8_train,bf16", "--seeds", "0,1,2", "--steps", "2", "--losses-only")
    assert not result["perplexities"] and [row["recipe"] for row in result["summary"]] == ["bf16", "mxfp8_train"]
    runs = by_recipe(result)
    for row in result["summary"]:
        found = torch.tensor([runs[row["recipe"], seed]["final_loss"] for seed in range(3)], dtype=torch.float64)
        ratios = found / torch.tensor([runs["bf16", seed]["final_loss"] for seed in range(3)], dtype=torch.float64)
        assert row["seeds"] == 3 and row["not_finite"] == 0
        assert (row["mean"], row["std"]) == pytest.approx((float(found.mean()), float(found.std())))
        assert (row["ratio"], row["ratio_se"]) == pytest.approx((float(ratios.mean()), float(ratios.std()) / 3**0.5))
    assert f"{result['summary'][1]['mean']:.4f} ± " in capsys.readouterr().out


def test_the_learning_rate(lm):
    train = importlib.import_module("tiny_lm_train")
    size = lm.Size(lm.SIZES["tiny"].model, 8, 100, 16, 1.0, warmup=0.2, floor=0.25)
    rates = [train.schedule(step, size) for step in range(100)]
    assert rates[0] == 1 / 20 and rates[19] == 1 == max(rates) and rates.index(1) == 19
    assert rates[19:] == sorted(rates[19:], reverse=True) and rates[-1] == pytest.approx(0.25, abs=1e-3)


def test_options_replace_what_the_size_says(lm, tmp_path):
    options = ["--lr", "0.001", "--warmup", "0.5", "--floor", "0.1", "--average", "0.5", "--batch", "4", "--steps", "4"]
    model = run(lm, tmp_path, "--recipes", "bf16", "--losses-only", *options)["model"]
    assert (model["learning_rate"], model["warmup"], model["floor"], model["average"]) == (0.001, 0.5, 0.1, 0.5)
    assert model["tokens_per_step"] == 4 * 32


def test_the_mean_of_the_last_weights_is_evaluated(lm):
    train, setup = importlib.import_module("tiny_lm_train"), setup_of(lm, steps=6, average=0.5)
    model = train.TinyLM(setup.size.model)
    steps, seen = train.Steps(setup, model, model, 0), []
    for _ in range(6):
        steps()
        seen.append([p.detach().clone() for p in model.parameters()])
    steps.finish()
    for p, *last in zip(model.parameters(), *seen[3:], strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(last).mean(0))


def setup_of(lm, device="cpu", **changes):
    size = dataclasses.replace(lm.SIZES["tiny"], **changes)
    return lm.Setup(size, lm.read_corpus(size.model.length, torch.device(device)), torch.device(device))


class Graph:
    """What a CUDA graph is to the host: replays do the step, and nothing in Python notices."""

    capturing = None

    def replay(self):
        before = [(p, p._version) for p in self.steps.parameters]
        hooks, optimizer._global_optimizer_post_hooks = optimizer._global_optimizer_post_hooks, {}
        self.steps.really()
        optimizer._global_optimizer_post_hooks = hooks
        for p, version in before:
            torch._C._autograd._unsafe_set_version_counter((p,), (version,))

    @contextlib.contextmanager
    def capture(self, stream):
        Graph.capturing = self
        yield
        Graph.capturing = None


@pytest.mark.parametrize(
    ("name", "steps", "captured"), [("bf16", 8, 1), ("mxfp8_train", 8, 1), ("nvfp4_then_bf16", 40, 2)]
)
def test_what_the_host_does_with_graphs(lm, monkeypatch, name, steps, captured):
    """Three eager steps, a capture, replays; the same losses; evaluations see the weights that replays changed."""
    train, setup = importlib.import_module("tiny_lm_train"), setup_of(lm, steps=steps)
    eager, _ = train.train(setup, name, 0)
    made = []

    class Captured(train.Steps):
        def __init__(self, *args):
            super().__init__(*args)
            self.captures = True
            made.append(0)

        really = train.Steps._step

        def _step(self):
            if Graph.capturing is None:
                made[-1] += 1
                self.really()
            else:
                Graph.capturing.steps = self

    monkeypatch.setattr(train, "Steps", Captured)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.capture)
    for function in ("current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, function, lambda *args: None)
    replayed, _ = train.train(setup, name, 0)
    assert (eager["graphs"], replayed["graphs"], made) == (0, captured, [3 * captured])
    for key in ("losses", "held_out", "final_loss"):
        assert eager[key] == replayed[key], key


@pytest.mark.slow
def test_runs_in_processes_of_their_own(lm, tmp_path, monkeypatch):
    """The same as one after the other; one that fails has its reason."""
    monkeypatch.undo()  # the processes have sizes of their own
    arguments = ["--recipes", "bf16,qat_mxfp4", "--steps", "2", "--batch", "2"]
    apart = run(lm, tmp_path, *arguments, "--jobs", "2")
    assert apart["environment"]["jobs"] == 2 and not apart["skipped"]
    here = run(lm, tmp_path, *arguments)
    for one, other in zip(apart["runs"], here["runs"], strict=True):
        assert one["tokens_per_s"] is None and other["tokens_per_s"] > 0
        assert {**one, "tokens_per_s": 0} == {**other, "tokens_per_s": 0}
    assert apart["perplexities"] == here["perplexities"] and apart["summary"] == here["summary"]


def test_a_failed_process_is_skipped(lm, tmp_path, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("import sys; print(1); sys.exit('no luck')")
    monkeypatch.setattr(lm, "__file__", str(script))
    result = run(lm, tmp_path, "--recipes", "bf16,mxfp8_train", "--jobs", "2")
    reasons = [(row["recipe"], row["reason"]) for row in result["skipped"]]
    assert not result["runs"] and sorted(reasons) == [(n, "exit code 1: no luck") for n in ("bf16", "mxfp8_train")]
    late = run(lm, tmp_path, "--recipes", "bf16", "--jobs", "2", "--seconds", "0")
    assert [row["reason"] for row in late["skipped"]] == ["out of time"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "mxfp8_train", "nvfp4_train", "nvfp4_then_bf16"])
def test_graphs_and_eager_steps_train_alike(lm, name):
    """Attention without atomics, so that nothing differs by chance; evaluations see the weights of the last replay."""
    train, setup = importlib.import_module("tiny_lm_train"), setup_of(lm, "cuda", steps=40)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        eager, _ = train.train(dataclasses.replace(setup, eager=True), name, 0)
        replayed, model = train.train(setup, name, 0)
        again = train.evaluate(setup, copy.deepcopy(model), setup.held_out)  # a copy has no cached weights
    assert (eager["graphs"], replayed["graphs"]) == (0, 2 if name == "nvfp4_then_bf16" else 1)
    for key in ("losses", "held_out"):
        one, other = (torch.tensor(run[key], dtype=torch.float64) for run in (eager, replayed))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=0)
    assert replayed["final_loss"] == again


@pytest.mark.gpu
def test_on_a_gpu(lm, tmp_path):
    out = tmp_path / "tiny_lm.json"
    names = "bf16,mxfp8_train,nvfp4_train"
    assert lm.main(["--recipes", names, "--device", "cuda", "--size", "tiny", "--out", str(out)]) == 0
    for found in json.loads(out.read_text())["runs"]:
        assert found["final_loss"] < 0.8 * found["losses"][0][1] and found["ratio_to_bf16"] == pytest.approx(1, abs=0.1)


def test_it_is_a_script(monkeypatch, lm, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny_lm.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "tiny_lm.py"), run_name="__main__")
    assert stop.value.code == 0 and "--recipes" in capsys.readouterr().out
