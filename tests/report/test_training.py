"""What seeds come to: means, spreads, ratios to bf16 of the same seed, and runs that came to nothing."""

import pytest

from microscale.report.training import over_seeds, over_seeds_text


def row(recipe, seed, value, ratio=None):
    return {"recipe": recipe, "seed": seed, "loss": value, "ratio_to_bf16": ratio}


def test_pairs_are_better_known_than_means():
    rows = [row("a", 0, 1.0), row("b", 0, 1.01, 1.01), row("a", 1, 2.0), row("b", 1, 2.06, 1.03)]
    a, b = over_seeds(rows, "loss")
    assert (a["recipe"], a["seeds"], a["mean"], a["ratio"], a["ratio_se"]) == ("a", 2, 1.5, None, None)
    assert a["std"] == pytest.approx(0.5**0.5)
    assert b["ratio"] == pytest.approx(1.02) and b["ratio_se"] == pytest.approx(0.01)
    assert over_seeds_text(b) == ("1.5350 ± 0.7425", "+2.00 ± 1.00 %")


def test_one_seed_has_no_spread():
    (found,) = over_seeds([row("a", 0, 1.0, 0.995)], "loss")
    assert (found["std"], found["ratio_se"]) == (None, None)
    assert over_seeds_text(found) == ("1.0000", "-0.50 %")


def test_runs_that_are_not_finite_are_counted_and_left_out():
    rows = [row("a", 0, None), row("a", 1, 1.0, 1.0), row("b", 0, None)]
    a, b = over_seeds(rows, "loss")
    assert (a["seeds"], a["not_finite"], a["mean"]) == (2, 1, 1.0)
    assert over_seeds_text(a)[0] == "1.0000 (1 not finite)"
    assert over_seeds_text(b) == ("not finite", "")


def test_rows_belong_together_by_several_keys():
    rows = [{**row("a", 0, 1.0), "by": "x"}, {**row("a", 0, 2.0), "by": "y"}, {**row("a", 1, 3.0), "by": "x"}]
    found = over_seeds(rows, "loss", ("recipe", "by"))
    assert [(r["recipe"], r["by"], r["seeds"], r["mean"]) for r in found] == [("a", "x", 2, 2.0), ("a", "y", 1, 2.0)]
    assert over_seeds([], "loss") == []
