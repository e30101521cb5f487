"""The benchmark suite on a small CPU problem: rows, ceilings, refusal to time what is wrong, the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

from microscale import dispatch
from microscale.bench import Timer, bench_quantize
from microscale.cli.app import app
from microscale.errors import InputError
from microscale.kernels.reference import dequantize as reference

SHAPE = (64, 256)


def test_rows_and_ceilings():
    report = bench_quantize("cpu", ["mxfp4", "nvfp4"], [SHAPE], samples=3)
    modes = [(r.op, r.format, r.mode) for r in report.rows]
    assert modes == [
        ("quantize", "mxfp4", "along K"),
        ("quantize", "mxfp4", "along K, swizzled"),
        ("dequantize", "mxfp4", "along K"),
        ("quantize", "nvfp4", "given outer scale"),
        ("quantize", "nvfp4", "given outer scale, swizzled"),
        ("quantize", "nvfp4", "dynamic"),
        ("dequantize", "nvfp4", "along K"),
    ]
    for row in report.rows:
        assert row.checked and row.us > 0 and row.gb_per_s > 0 and row.kernel.startswith("reference.")
    assert all(v > 0 for v in report.ceilings.values()) and report.environment["torch"] == torch.__version__
    size = 64 * 256 * 2 + 64 * (256 // 2 + 256 // 32)
    assert report.rows[0].gb_per_s == pytest.approx(size / report.rows[0].us / 1e3)


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    """A row that differs from the reference prints no number."""
    right = reference.dequantize
    calls = []

    def sometimes_wrong(*args):
        calls.append(1)
        return right(*args) * (1 + len(calls) % 2)

    kernel = next(k for k in dispatch.kernels("dequantize") if k.name == "reference.dequantize")
    monkeypatch.setattr(dispatch, "_kernels", {"dequantize": [replace(kernel, run=sometimes_wrong)]} | others())
    dispatch._cache.clear()
    try:
        report = bench_quantize("cpu", ["mxfp8"], [SHAPE], samples=3)
    finally:
        dispatch._cache.clear()
    row = report.rows[-1]
    assert row.op == "dequantize" and row.us is None and not row.checked and "differ" in row.note


def replace(kernel, **changes):
    import dataclasses

    return dataclasses.replace(kernel, **changes)


def others():
    return {op: rows for op, rows in dispatch._kernels.items() if op != "dequantize"}


def test_timer_counts_a_call_once_per_sample():
    calls = []
    timing = Timer("cpu", samples=5).time(lambda: calls.append(1))
    assert len(calls) == 5 and timing.us >= 0 and timing.us_spread >= 0


def test_command(tmp_path):
    out = tmp_path / "results" / "quantize.json"
    command = ["bench", "quantize", "--device", "cpu", "--formats", "mxfp8", "--shapes", "64x256", "--samples", "3"]
    done = CliRunner().invoke(app, [*command, "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) == {"environment", "ceilings", "rows"} == set(json.loads(out.read_text()))
    assert "along K" in CliRunner().invoke(app, command).stdout


def test_errors():
    with pytest.raises(InputError):
        bench_quantize("mps", ["mxfp8"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            bench_quantize("cuda", ["mxfp8"])
    assert CliRunner().invoke(app, ["bench", "quantise", "--device", "cpu"]).exit_code == 2
