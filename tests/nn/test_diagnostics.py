"""Diagnostics: numbers known by hand, schedule, files, and that training does not notice."""

import copy
import json
import math

import pytest
import torch

from microscale.errors import InputError
from microscale.nn import diagnostics
from microscale.nn.diagnostics import Diagnosis, diagnose, measure, read_diagnostics, summary
from microscale.report import weights
from microscale.spec.registry import find_quantizer


def numbers(x, spec):
    """What `measure` found, as a Diagnosis."""
    return diagnostics._diagnosis(0, ("layer", "fprop", "input", spec.name), measure(x, spec).tolist())


def test_values_by_hand(device):
    """Blocks of 32 e2m1 with scale 1: 7.5 is clipped to 6, 0.1 becomes 0, 1 and -3 are exact."""
    spec = find_quantizer("mxfp4", scale_rule="floor")
    x = torch.zeros(2, 32, device=device)
    x[0, :4] = torch.tensor([7.5, 0.1, 1.0, -3.0])
    found = numbers(x, spec)
    assert (found.values, found.nonfinite) == (64, 0)
    assert found.underflow == pytest.approx(1 / 4) and found.clipped == pytest.approx(1 / 64)
    assert found.amax == 7.5
    assert found.sqnr_db == pytest.approx(10 * math.log10((56.25 + 0.01 + 1 + 9) / (2.25 + 0.01)), rel=1e-6)


def test_zero_exact_and_nonfinite():
    spec = find_quantizer("mxfp8")
    zero = numbers(torch.zeros(4, 64), spec)
    assert (zero.underflow, zero.clipped, zero.sqnr_db, zero.amax) == (0, 0, None, 0)
    assert numbers(torch.ones(4, 64), spec).sqnr_db is None
    empty = numbers(torch.zeros(0, 64), spec)
    assert (empty.values, empty.underflow, empty.sqnr_db) == (0, 0, None)
    x = torch.ones(2, 32)
    x[0, 3] = torch.nan
    lost = numbers(x, spec)
    assert lost.nonfinite == 32 and lost.amax == 1 and lost.underflow == 0


def test_outer_scale_and_views():
    """What the outer scale leaves out of reach of the block scales counts; a transposed view is measured as it is."""
    x = torch.randn(96, 160) * torch.logspace(-6, 3, 96)[:, None]
    found = numbers(x, find_quantizer("nvfp4"))
    assert found.underflow > 0.1 and found.clipped < 0.01
    assert numbers(x[40:], find_quantizer("nvfp4")).underflow < 0.1 and numbers(x, find_quantizer("mxfp8")).clipped == 0
    for spec in (find_quantizer("nvfp4"), find_quantizer("nvfp4", scale_tile=16)):
        assert numbers(x.mT, spec) == numbers(x.mT.contiguous(), spec)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8", "mxint8"])
def test_agrees_with_the_report_of_weights(name, monkeypatch):
    """Two parts of the library count the same; in chunks and whole."""
    x = torch.randn(100, 72) * torch.logspace(-9, 2, 100)[:, None]
    spec, tally = find_quantizer(name), weights.measure(x, find_quantizer(name))
    whole = numbers(x, spec)
    monkeypatch.setattr(diagnostics, "_CHUNK", 500)
    parts = numbers(x, spec)
    for found in (whole, parts):
        layer = tally.layer("layer")
        assert (found.clipped, found.underflow) == pytest.approx((layer.clipped, layer.flushed), rel=1e-12)
        assert found.sqnr_db == pytest.approx(layer.sqnr_db, abs=1e-5)


def test_hadamard_is_measured_after_the_transform():
    """It spreads an outlier, so that nothing underflows; ragged rows are padded as in training."""
    x = torch.full((4, 32), 1e-3)
    x[:, 0] = 100.0
    plain, spread = (numbers(x, find_quantizer("nvfp4", hadamard=h)) for h in (None, 16))
    assert plain.underflow > 0.4 and spread.underflow < plain.underflow and spread.amax < 30
    assert numbers(torch.randn(4, 40), find_quantizer("nvfp4", hadamard=16)).values == 4 * 48


# -- with training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny, tokens):
    """Train copies of the tiny model for some steps; returns losses, final weights and the random state after it."""
    from microscale.nn.training import prepare_training_

    def train(steps=3, watch=None, recipe="nvfp4_train", accumulate=1):
        torch.manual_seed(0)
        model = copy.deepcopy(tiny)
        state = prepare_training_(model, recipe, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(steps):
            for _ in range(accumulate):
                loss = model(tokens).square().mean()
                loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            state.step((step + 1) / steps)
            if watch is not None:
                watch.step()
        return losses, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    return train


def test_training_does_not_notice(train):
    with diagnose(every=1) as watch:
        watched = train(watch=watch)
    plain = train()
    assert watched[0] == plain[0] and len(watch.rows) > 0
    assert all(map(torch.equal, watched[1], plain[1])) and torch.equal(watched[2], plain[2])


def test_rows_and_schedule(train, tmp_path):
    path = tmp_path / "logs" / "diagnostics.jsonl"
    with diagnose(every=2, to=path) as watch:
        train(steps=4, watch=watch)
        assert watch.current == 4 and watch.observing
    assert {row.step for row in watch.rows} == {0, 2} and not watch.observing
    assert read_diagnostics(path) == watch.rows
    assert set(json.loads(path.read_text().splitlines()[0])) == set(Diagnosis.__dataclass_fields__)
    step = [row for row in watch.rows if row.step == 2]
    operands = {("fprop", "input"), ("fprop", "weight"), ("dgrad", "grad_output"), ("dgrad", "weight"),
                ("wgrad", "grad_output"), ("wgrad", "input")}  # fmt: skip
    layers = {row.layer for row in step}
    assert layers == {"blocks.0.up", "blocks.0.down"}  # the last block and the head stay in high precision
    assert {(row.layer, row.gemm, row.operand) for row in step} == {(n, *o) for n in layers for o in operands}
    assert len(step) == 12
    for row in step:
        assert row.values > 0 and row.amax > 0 and row.nonfinite == 0 and row.sqnr_db > 5
        assert 0 <= row.clipped <= row.underflow + 1 <= 2
    weight = next(row for row in step if (row.layer, row.gemm, row.operand) == ("blocks.0.up", "fprop", "weight"))
    assert weight.values == 72 * 40 and "tile=16x16" in weight.quantizer
    assert "dgrad  grad_output" in summary(watch.rows) and len(summary(watch.rows).splitlines()) == 7


def test_an_unobserved_step_measures_nothing(train, monkeypatch):
    calls = []
    right = diagnostics.measure
    monkeypatch.setattr(diagnostics, "measure", lambda *a, **k: calls.append(1) or right(*a, **k))
    with diagnose(every=100, start=1) as watch:
        train(steps=3, watch=watch)
    assert not calls and not watch.rows
    train(steps=1)
    assert not calls  # nothing is left behind


def test_accumulated_gradients_are_one_row(train):
    with diagnose(every=1) as once:
        train(steps=1, watch=once)
    with diagnose(every=1) as twice:
        train(steps=1, watch=twice, accumulate=2)
    assert len(once.rows) == len(twice.rows)
    assert [2 * row.values for row in once.rows] == [row.values for row in twice.rows]
    for one, two in zip(once.rows, twice.rows, strict=True):
        assert one.amax <= two.amax
        if one.operand != "grad_output":  # gradients differ: what rounded the one before draws other numbers
            assert one.underflow == two.underflow and one.sqnr_db == pytest.approx(two.sqnr_db)


def test_a_failing_step_keeps_what_was_found_and_a_resumed_run_appends(train, tmp_path):
    path = tmp_path / "d.jsonl"
    with pytest.raises(RuntimeError), diagnose(every=1, to=path) as watch:
        train(steps=2, watch=watch)
        raise RuntimeError
    before = read_diagnostics(path)
    assert {row.step for row in before} == {0, 1}
    with diagnose(every=1, to=path, start=2) as watch:
        train(steps=1, watch=watch)
    assert read_diagnostics(path) == before + watch.rows
    with diagnose(every=1, to=path):
        pass
    assert read_diagnostics(path) == []


def test_autocast(tiny, tokens):
    from microscale.nn.training import prepare_training_

    prepare_training_(tiny, "mxfp8_train", seed=0)
    with diagnose(every=1) as watch, torch.autocast("cpu", torch.bfloat16):
        tiny(tokens).float().sum().backward()
        watch.step()
    assert all(row.sqnr_db is None or row.sqnr_db > 20 for row in watch.rows)


def test_errors(tmp_path):
    with pytest.raises(InputError, match="every 0 steps"):
        diagnose(every=0)
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"x.jsonl:1 is no line"):
        read_diagnostics(tmp_path / "x.jsonl")


def test_picture(tmp_path, train):
    pytest.importorskip("matplotlib")
    from microscale.report.training import diagnostics_to_png

    with diagnose(every=1) as watch:
        train(steps=3, watch=watch)
    path = diagnostics_to_png(watch.rows, tmp_path / "deep" / "d.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing to draw"):
        diagnostics_to_png([], path)
