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
    assert [m for m in modes if m[1] == "mxfp4"] == [
        ("quantize", "mxfp4", "along K"),
        ("quantize", "mxfp4", "along K, swizzled"),
        ("quantize", "mxfp4", "along M"),
        ("quantize", "mxfp4", "both axes"),
        ("quantize", "mxfp4", "2D 32x32"),
        ("quantize", "mxfp4", "Hadamard 16"),
        ("quantize", "mxfp4", "stochastic"),
        ("silu_mul_quantize", "mxfp4", "along K"),
        ("rms_norm_quantize", "mxfp4", "along K"),
        ("dequantize", "mxfp4", "along K"),
        ("dequantize", "mxfp4", "along K, swizzled"),
    ]
    assert {m[2] for m in modes if m[:2] == ("quantize", "nvfp4")} == {
        "given outer scale", "given outer scale, swizzled", "dynamic", "along M", "both axes", "2D 16x16",
        "Hadamard 16", "stochastic",
    }  # fmt: skip
    for row in report.rows:
        assert row.checked and row.us > 0 and row.gb_per_s > 0 and row.kernel.startswith("reference.")
    assert all(v > 0 for v in report.ceilings.values()) and report.environment["torch"] == torch.__version__
    size = 64 * 256 * 2 + 64 * (256 // 2 + 256 // 32)
    assert report.rows[0].gb_per_s == pytest.approx(size / report.rows[0].us / 1e3)


def test_later_shapes_have_the_plain_modes_and_results_are_kept(tmp_path):
    """Only the first shape has what training asks for; what is measured is saved after every format."""
    saved = []
    report = bench_quantize("cpu", ["mxfp8", "nvfp4_row"], [SHAPE, (32, 128)], samples=3, save=saved.append)
    later = {r.mode for r in report.rows if r.shape == (32, 128)}
    assert later == {"along K", "along K, swizzled"} and report.rows == saved[-1].rows
    assert [len(r.rows) for r in saved] == sorted({len(r.rows) for r in saved}) and len(saved) == 4


def test_an_interrupt_keeps_what_is_measured():
    def stop(report):
        raise KeyboardInterrupt

    report = bench_quantize("cpu", ["mxfp8", "mxfp4"], [SHAPE], samples=3, save=stop)
    assert {r.format for r in report.rows} == {"mxfp8"} and report.environment["interrupted"]


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
