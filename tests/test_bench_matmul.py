"""The matmul suite on small CPU problems: rows, floors, the check and what it catches, the command, the docs table."""

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import microscale as ms
from microscale import dispatch
from microscale.bench import bench_matmul, bench_overhead, default_plan, product
from microscale.bench import matmul as suite
from microscale.bench.grouped import SPREADS
from microscale.bench.product import Sample, error_bound, normal, strata
from microscale.cli import docs
from microscale.cli.app import app
from microscale.errors import InputError, MicroscaleError
from microscale.kernels.reference import matmul as reference

CPU = torch.device("cpu")


def plan(*cases):
    return dataclasses.replace(default_plan("cpu"), cases=cases)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    return bench_matmul("cpu", ["mxfp8", "nvfp4"], samples=3)


def test_rows_and_ceilings(report):
    rows = [(r.op, r.case, r.activations, r.m) for r in report.rows if r.format == "nvfp4"]
    assert rows == [
        ("matmul", "weight-only, plain", "bf16", 1),
        ("matmul", "weight-only, plain", "bf16", 8),
        ("matmul", "both scaled, cast included", "nvfp4", 8),
        ("matmul", "both scaled, GEMM alone", "nvfp4", 8),
        ("matmul", "dense, as 4 experts", "bf16", 24),
        ("grouped_matmul", "4 experts, balanced", "bf16", 24),
        ("grouped_matmul", "4 experts, skewed", "bf16", 24),
        ("matmul", "dense, as 4 experts", "nvfp4", 24),
        ("grouped_matmul", "4 experts, balanced", "nvfp4", 24),
        ("grouped_matmul", "4 experts, skewed", "nvfp4", 24),
        ("mlp", "weight-only, plain", "bf16", 1),
        ("mlp", "weight-only, plain", "bf16", 8),
    ]
    assert ("mlp", "both scaled, cast included", "mxfp8") in {(r.op, r.case, r.activations) for r in report.rows}
    for row in report.rows:
        assert row.checked and row.us > 0 and row.us_spread >= 0 and row.kernel.startswith("reference.")
        assert row.speedup == row.bf16_us / row.us and row.ratio > 0
        assert ("of the speed of: dense" in row.note) == (row.op == "grouped_matmul")
    assert set(report.ceilings) == {"copy_8MiB", "read_8MiB", "bf16_256_tflops"} and report.environment["torch"]
    assert [f.name for f in dataclasses.fields(report.rows[0])][:-1] == [
        "op", "case", "format", "activations", "m", "n", "k", "us", "us_spread", "bf16_us", "speedup", "ratio",
        "kernel", "checked",
    ]  # fmt: skip


def test_bf16_is_measured_once_for_each_size(report):
    by_size = {}
    for r in report.rows:
        by_size.setdefault((r.op == "mlp", r.m, r.n, r.k), set()).add(r.bf16_us)
    assert all(len(times) == 1 for times in by_size.values())


def test_defaults_measure_every_format():
    full, few = suite._specs(None)
    assert [s.name for s in full] == list(suite.FORMATS) and len(few) >= 10
    assert {s.name for s in (*full, *few)} == set(ms.list_formats())
    labels = [g.label for g in suite._groups(CPU, suite.PLANS["cuda"], full, few)]
    assert len(labels) == len(set(labels)) and sum("MLP" in text for text in labels) == len(ms.list_formats())
    assert "nf4 28672x8192" in labels and "nf4 8192x28672" not in labels and "mxint8 4096x14336" in labels
    partners = {w: [s.name for s in suite.partners_of(ms.find_quantizer(w), suite.PAIRS)] for w in ms.list_formats()}
    wanted = {"mxfp8": ["mxfp8"], "mxfp4": ["mxfp8", "fp8_row"], "nvfp4": ["nvfp4"]}
    assert {w: a for w, a in partners.items() if a} == wanted


def test_a_prepared_weight_is_used_for_few_rows(monkeypatch):
    """What `prepare` makes is multiplied, and the sample comes from the plain layout."""
    seen = []

    def prepare(weight):
        seen.append(weight.shape)
        return weight.to_layout("swizzle_32_4_4")

    monkeypatch.setattr(suite, "PREPARED_ON", ("cpu",))
    monkeypatch.setattr(ms, "prepare", prepare, raising=False)
    small = dataclasses.replace(plan("weight_only", "mlp"), rows=(1, 2049), mlp_rows=(1, 2049))
    rows = bench_matmul("cpu", ["mxint8"], small, samples=3).rows
    assert [(r.op, r.m, r.case) for r in rows] == [
        ("matmul", 1, "weight-only, prepared"),
        ("matmul", 2049, "weight-only, plain"),
        ("matmul", 2049, "weight-only, prepared"),
        ("mlp", 1, "weight-only, prepared"),
        ("mlp", 2049, "weight-only, plain"),
    ]
    assert len(seen) == 3 and all(r.checked for r in rows)

    def refuses(weight):
        raise InputError("not this one")

    monkeypatch.setattr(ms, "prepare", refuses)
    assert bench_matmul("cpu", ["mxint8"], small, samples=3).rows[0].case == "weight-only, plain"


def test_changed_plans():
    changed = suite.PLANS["cuda"].changed(cases=["mlp"], shapes=[(64, 32)], rows=[3])
    assert changed.cases == ("mlp",) and changed.shapes == changed.pair_shapes == ((64, 32),)
    assert changed.rows == changed.pair_rows == changed.mlp_rows == (3,)
    assert suite.PLANS["cuda"].changed() == suite.PLANS["cuda"]
    with pytest.raises(MicroscaleError, match="unknown case 'grouqed'"):
        changed.changed(cases=["grouqed"])
    with pytest.raises(InputError):
        changed.changed(shapes=[(1, 2, 3)])


@pytest.mark.parametrize("tokens, experts", [(4096, 8), (4096, 64), (24, 4), (1, 8), (7, 3)])
def test_spreads(tokens, experts):
    for spread in SPREADS.values():
        counts = spread(tokens, experts)
        assert len(counts) == experts and sum(counts) == tokens and min(counts) >= 0
    assert max(SPREADS["balanced"](tokens, experts)) - min(SPREADS["balanced"](tokens, experts)) <= 1
    if tokens > experts:
        assert SPREADS["skewed"](tokens, experts)[-1] == 0


def test_floor():
    bench = product.Bench(CPU, 3)
    bench.copy, bench.bf16, bench.fp8 = 4000.0, 800.0, 1300.0
    w = ms.quantize(torch.randn(96, 64).bfloat16(), "mxfp4")
    x = torch.randn(8, 64).bfloat16()
    ((size, flops),) = suite.work(x, w)
    assert size == 96 * 64 // 2 + 96 * 2 + 8 * 64 * 2 + 8 * 96 * 2 and flops == 2 * 8 * 96 * 64
    made = next(suite.weight_products(CPU, plan("weight_only"), ms.find_quantizer("mxfp4"), (96, 64), (8,)))
    assert made.work == ((size, flops),) and not made.eighth
    assert bench.floor_us(made) == pytest.approx(size / 4e6)
    large = dataclasses.replace(made, work=((10**6, 2 * 10**12), (4 * 10**9, 1)))
    assert bench.floor_us(large) == pytest.approx(2500 + 1000)
    assert bench.floor_us(dataclasses.replace(large, eighth=True)) == pytest.approx(2e12 / 1300e6 + 1000)
    assert product.is_eighth(ms.find_format("nvfp4"), ms.find_format("mxfp8"))
    assert not product.is_eighth(None, ms.find_format("mxfp8"))
    assert not product.is_eighth(ms.find_format("mxint8"), ms.find_format("mxfp8"))


# -- the check ---------------------------------------------------------------------------------------------------------


def test_strata_look_into_every_tile():
    assert strata(5, 8, CPU).tolist() == [0, 1, 2, 3, 4]
    for size, count in ((4096, 64), (28672, 256), (1000, 256), (57344, 256), (65, 64)):
        found = strata(size, count, CPU)
        assert found[0] == 0 and found[-1] == size - 1 and len(found.unique()) == count
        assert (found.diff() > 0).all() and (found.diff() < 2 * -(-size // count)).all()
        assert torch.equal(found, strata(size, count, CPU))


@pytest.mark.parametrize("k", [1, 17, 1024, 28672])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bound_holds_for_fp32_accumulation(k, dtype):
    """Also for the worst order, one term after the other; and it is near enough to see one block of K missing."""
    a, b = normal((4, k), CPU, 1).double(), normal((8, k), CPU, 2).double()
    exact, magnitude = a @ b.T, a.abs() @ b.T.abs()
    bound = error_bound(exact, magnitude, k, dtype)
    in_order = torch.zeros(4, 8)
    products = a.float()[:, None, :] * b.float()[None]
    for i in range(k):
        in_order += products[..., i]
    for y in (in_order, a.float() @ b.float().T):
        assert ((y.to(dtype).double() - exact).abs() <= bound).all()
    if k >= 1024:
        short = a[:, 32:].float() @ b[:, 32:].float().T
        assert ((short.to(dtype).double() - exact).abs() > bound).float().mean() > 0.5


def test_the_bound_is_what_it_says():
    one = torch.ones(1, dtype=torch.float64)
    u = 2.0**-24
    assert product.accumulation_error(16) == 16 * u / (1 - 16 * u)
    assert product.accumulation_error(2**20) == pytest.approx(math.sqrt(2 * math.log(2e16) * 2**20) * u)
    off = product.accumulation_error(64 + 3)
    assert error_bound(one, 5 * one, 64, torch.bfloat16).item() == pytest.approx(5 * off + 2**-8 * (1 + 5 * off))
    assert error_bound(one, one, 64, torch.float32, extra=1e-5).item() == pytest.approx(1e-5 + off + u, rel=1e-4)
    assert error_bound(0 * one, 0 * one, 64, torch.bfloat16).item() == 2.0**-134


def test_operands_are_decoded_exactly():
    w = torch.randn(40, 64).bfloat16()
    q = ms.quantize(w, "nvfp4", amax=w.abs().amax(-1, keepdim=True).float())
    rows = torch.tensor([3, 17, 39])
    expected = q.codes().long()
    table = torch.tensor(ms.find_format("nvfp4").element.table, dtype=torch.float64)
    scales = q.scales().double().repeat_interleave(16, -1)
    values = table[expected] * scales * q.outer_scale.double()
    assert torch.equal(product.decoded(q.index_select(0, rows)), values[rows])
    assert torch.equal(product.decoded(w), w.double())


@pytest.mark.parametrize("spoil, what", [
    (lambda y: y.index_fill_(1, torch.tensor([95]), torch.nan), "outside the bound"),
    (lambda y: y[-1:].zero_(), "outside the bound"),
    (lambda y: y.mul_(1.03), "64 of 64|[0-9]+ of 6144 sampled elements are outside the bound; worst at"),
])  # fmt: skip
def test_a_sample_sees_what_is_wrong(spoil, what):
    w, x = ms.quantize(normal((96, 64), CPU, 1), "mxfp6"), normal((64, 64), CPU)
    y = torch.nn.functional.linear(x, w)
    Sample.of(w).check(y, x)
    spoil(y)
    with pytest.raises(AssertionError, match=what):
        Sample.of(w).check(y, x)


def test_a_sample_wants_all_finite():
    w, x = normal((2000, 32), CPU, 1), normal((4, 32), CPU)
    y, sample = x @ w.T, Sample.of(w)
    unseen = next(c for c in range(2000) if c not in set(sample.columns.tolist()))
    y[2, unseen] = torch.inf
    with pytest.raises(AssertionError, match="1 elements are not finite"):
        sample.check(y, x)


@pytest.fixture
def replaced(monkeypatch):
    """Puts another function, or another record, in the place of a reference kernel."""

    def replace(op, **changes):
        entry = next(k for k in dispatch.kernels(op) if k.name == f"reference.{op}")
        monkeypatch.setitem(dispatch._kernels, op, [dataclasses.replace(entry, **changes)])
        dispatch._cache.clear()

    yield replace
    monkeypatch.undo()
    dispatch._cache.clear()


@pytest.mark.parametrize("op, case", [("matmul", "weight_only"), ("grouped_matmul", "grouped"), ("matmul", "mlp")])
def test_a_wrong_kernel_gets_no_time(replaced, op, case):
    right = getattr(reference, op)
    replaced(op, run=lambda *args: right(*args) * 1.02)
    rows = [r for r in bench_matmul("cpu", ["mxfp8"], plan(case), samples=3).rows if r.op in (op, "mlp")]
    assert rows and all(r.us is None and not r.checked and r.note.startswith("differs: ") for r in rows)


def test_a_kernel_that_changes_its_mind_gets_no_time(replaced):
    calls = []

    def wavers(*args):
        calls.append(1)
        y = reference.matmul(*args)
        return torch.nextafter(y, torch.full_like(y, torch.inf)) if len(calls) % 2 == 0 else y

    replaced("matmul", run=wavers)
    row = bench_matmul("cpu", ["mxfp8"], plan("weight_only"), samples=3).rows[0]
    assert row.us is None and "two calls differ" in row.note


def test_what_fails_or_is_a_fallback_gets_no_time(replaced):
    def broken(*args):
        raise RuntimeError("out of resource\nand more")

    replaced("matmul", run=broken)
    row = bench_matmul("cpu", ["mxfp8"], plan("weight_only"), samples=3).rows[0]
    assert row.us is None and row.note == "failed: RuntimeError: out of resource"
    replaced("matmul", native=("tpu",))
    row = bench_matmul("cpu", ["mxfp8"], plan("weight_only"), samples=3).rows[0]
    assert row.us is None and not row.checked


def test_kernels_that_are_not_exact_have_a_wider_bound(replaced):
    x, w = normal((8, 64), CPU), ms.quantize(normal((96, 64), CPU, 1), "mxfp8")
    assert product.extra_error("matmul", (ms.explain("matmul", x, w),)) == 0
    replaced("matmul", exact=False)
    assert product.extra_error("matmul", (ms.explain("matmul", x, w),)) == product.INEXACT


def test_what_cannot_be_quantized_is_named(monkeypatch):
    made = suite.quantize

    def fails(x, spec, **more):
        if spec.name == "mxfp8":
            raise RuntimeError("no memory")
        return made(x, spec, **more)

    monkeypatch.setattr(suite, "quantize", fails)
    report = bench_matmul("cpu", ["mxfp8", "mxfp4"], plan("weight_only"), samples=3)
    assert {r.format for r in report.rows} == {"mxfp4"}
    assert report.environment["failed"] == {"mxfp8 96x64": "RuntimeError: no memory"}


# -- the run -----------------------------------------------------------------------------------------------------------


def test_results_are_kept_and_an_interrupt_ends_the_run():
    saved, steps = [], []
    report = bench_matmul(
        "cpu", ["mxfp8", "mxfp6"], plan("weight_only", "grouped"), samples=3, save=saved.append,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [s[:2] for s in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)] and "4 experts" in steps[-1][2]
    assert saved[-1].rows == report.rows and [len(s.rows) for s in saved] == [2, 4, 10, 13]

    def stop(report):
        raise KeyboardInterrupt

    report = bench_matmul("cpu", ["mxfp8", "mxfp6"], plan("weight_only"), samples=3, save=stop)
    assert {r.format for r in report.rows} == {"mxfp8"} and report.environment["interrupted"]


def test_compiling_first_calls_every_product(monkeypatch):
    called = []
    monkeypatch.setattr(suite, "matmul", lambda *args: called.append(args))
    suite._call_once("cpu", plan("both_scaled"), ms.find_quantizer("mxfp8").key, True)
    assert len(called) == 2
    suite._call_once("cpu", plan("both_scaled"), ms.find_quantizer("mxfp8").key, False)
    assert len(called) == 4


def test_command(tmp_path):
    out = tmp_path / "results" / "matmul.json"
    command = ["bench", "matmul", "--device", "cpu", "--formats", "mxfp8", "--samples", "3", "--shapes", "32x64"]
    done = CliRunner().invoke(app, [*command, "--m", "1,5", "--cases", "both_scaled", "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert set(data) == {"environment", "ceilings", "rows"} == set(json.loads(out.read_text()))
    assert [(r["m"], r["n"], r["k"]) for r in data["rows"]] == [(1, 32, 64)] * 2 + [(5, 32, 64)] * 2
    shown = CliRunner().invoke(app, [*command, "--m", "1", "--cases", "weight_only"]).stdout
    assert "weight-only, plain" in shown and "TFLOP/s" in shown


@pytest.mark.parametrize("more, text", [
    (["--m", "1,zero"], "--m"),
    (["--m", "0"], "positive"),
    (["--cases", "weight_onyl"], "did you mean 'weight_only'"),
    (["--shapes", "8"], "two sizes"),
    (["--recipes", "mxfp8"], "suite matmul has no --recipes"),
])  # fmt: skip
def test_command_errors(more, text):
    done = CliRunner().invoke(app, ["bench", "matmul", "--device", "cpu", *more])
    assert done.exit_code == 2 and text in done.output


def test_errors():
    with pytest.raises(InputError):
        bench_matmul("mps", ["mxfp8"])
    with pytest.raises(InputError):
        default_plan("mps")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            bench_matmul("cuda", ["mxfp8"])


def test_overhead_of_a_linear_layer():
    rows = [r for r in bench_overhead("cpu", ["nvfp4"], [(1, 128)], samples=3).rows if r.op == "linear"]
    assert [(r.mode, r.shape) for r in rows] == [("around the kernel", (1, 64, 128))]
    assert rows[0].checked and rows[0].us > 0 and rows[0].kernel == "reference.matmul"


def test_table_in_the_docs(report, tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "results" / "machine"
    folder.mkdir(parents=True)
    monkeypatch.setattr(docs, "_results", lambda: tmp_path / "benchmarks" / "results")
    assert docs.matmul_tables() == "No results are committed yet."
    data = json.loads(json.dumps(dataclasses.asdict(report)))
    data["rows"][0] |= {"us": None, "note": "differs: a | b"}
    (folder / "matmul.json").write_text(json.dumps(data))
    text = docs.matmul_tables()
    assert "bf16 256 " in text and "`grouped_matmul`:" in text and "not measured" in text
    line = next(n for n in text.splitlines() if n.startswith("| nvfp4 | bf16 | weight-only | 96x64 |"))
    assert line.count(" us, ") == 2 and line.endswith("| `reference.matmul` |")


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_run_on_a_gpu():
    """Everything that a full run does, at sizes that take seconds; nothing may fail, fallbacks apart."""
    small = dataclasses.replace(
        default_plan("cuda"), shapes=((512, 1024),), pair_shapes=((512, 1024),), rows=(1, 256), pair_rows=(256,),
        experts=((4, 256, 512),), tokens=128, mlp=(512, 1024), mlp_rows=(16,),
    )  # fmt: skip
    report = bench_matmul("cuda", ["mxfp4"], small, samples=3)
    assert "failed" not in report.environment and report.ceilings["bf16_8192_tflops"] > 100
    bad = [(r.op, r.case, r.m, r.note) for r in report.rows if r.note.startswith(("differs", "failed"))]
    assert bad == []
    for r in report.rows:
        assert r.us is None or (0 < r.ratio <= 1.2 and r.bf16_us > 0)
