"""Adding a format is one YAML: a file in a temporary folder goes through every door that the shipped formats have.

The formats differ in everything that a format can be: float, int and codebook elements of odd widths, exponent and
mantissa scales, an outer scale, a candidate search.
"""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file

import microscale as ms

FORMATS = {
    "user_e3m1": """
        element: {exponent: 3, mantissa: 1, bias: 3, nan: none, inf: false}
        block: 16
        scale: e8m0
        scale_rule: rceil
    """,
    "user_int5": """
        element: {bits: 5, fraction: 3}
        block: 24
        scale: {exponent: 4, mantissa: 4, sign: false, nan: all_ones}
        scale_rule: nearest
        outer_scale: {dtype: fp32, per: row}
    """,
    "user_ternaryish": """
        element: {values: [0.0, 1.0, -1.0, 0.4]}
        block: 8
        scale: bf16
        scale_rule: {candidates: [1.0, 0.8, 1.2], metric: mae}
    """,
    "user_e2m0": """
        element: {exponent: 2, mantissa: 0, bias: 1}
        block: 40
        scale: e4m3
        scale_rule: mse
        outer_scale: fp32
    """,
}


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    """The YAML of one user format: the only thing that is added."""
    name, body = request.param, FORMATS[request.param]
    lines = [f"name: {name}", "description: a user's", *(line.strip() for line in body.strip().splitlines())]
    target = tmp_path / "formats" / f"{name}.yaml"
    target.parent.mkdir()
    target.write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture
def weight():
    return torch.randn(12, 100, generator=torch.Generator().manual_seed(1))


def same_bytes(a, b):
    parts = [(a.qdata, b.qdata), (a.scale, b.scale)]
    parts += [(a.outer_scale, b.outer_scale)] if a.outer_scale is not None else []
    return a.meta == b.meta and all(torch.equal(x, y) for x, y in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_quantize(path, weight, dtype, layout, axis):
    x = weight.to(dtype)
    q = ms.quantize(x, path, axis=axis, layout=layout)
    assert q.shape == x.shape
    assert q.codes().shape == x.shape
    assert int(q.codes().max()) < 2**q.format.element.width
    error = (q.dequantize(torch.float32) - x.float()).norm() / x.float().norm()
    assert error < 0.6
    again = ms.quantize(q.dequantize(torch.float32), path, axis=axis, outer_scale=q.outer_scale)
    assert torch.isfinite(again.dequantize()).all()


def test_ordinary_inputs(path):
    zeros = ms.quantize(torch.zeros(3, 50), path)
    assert (zeros.dequantize() == 0).all()
    assert ms.quantize(torch.zeros(0, 50), path).dequantize().shape == (0, 50)
    poisoned = torch.ones(1, 3 * zeros.format.block)
    poisoned[0, 0] = torch.nan
    nan = ms.quantize(poisoned, path).dequantize().isnan()[0]
    assert nan[: zeros.format.block].all()
    assert not nan[zeros.format.block :].any()


def test_stochastic_rounding(path, weight):
    first, second = (ms.quantize(weight, path, rounding="stochastic", generator=3) for _ in range(2))
    assert same_bytes(first, second)
    assert not torch.equal(first.codes(), ms.quantize(weight, path).codes())


def test_linear_and_matmul(path, weight):
    q, x = ms.quantize(weight, path), torch.randn(5, 100, requires_grad=True)
    expected = x @ q.dequantize().T
    got = torch.nn.functional.linear(x, q)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(5, 100), rtol=1e-5, atol=1e-5)
    both = ms.matmul(ms.quantize(x.detach(), path), q.t())
    torch.testing.assert_close(
        both, ms.quantize(x.detach(), path).dequantize() @ q.dequantize().T, rtol=1e-5, atol=1e-5
    )


def test_tensor_operations(path, weight):
    q = ms.quantize(weight, path)
    values = q.dequantize()
    assert torch.equal(q[2:7].dequantize(), values[2:7])
    assert torch.equal(q.t().dequantize(), values.t())
    assert torch.equal(q.narrow(1, 0, 2 * q.format.block).dequantize(), values[:, : 2 * q.format.block])
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.clone()):
        assert same_bytes(q, other)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    assert same_bytes(q, torch.load(file, weights_only=True))


def test_by_name_path_mapping_and_spec(path, weight):
    spec = ms.find_format(path)
    by_path = ms.quantize(weight, path)
    ms.register_format(path)
    for source in (spec.name, str(path), spec, {"format": spec.name}, ms.find_quantizer(spec.name)):
        assert same_bytes(by_path, ms.quantize(weight, source))


def test_recipe_plan_quantize_save_load(path, weight, tmp_path):
    recipe = tmp_path / "user_dynamic.yaml"
    recipe.write_text(
        f"name: user_dynamic\nquantizers:\n  w: formats/{path.name}\n  x: {{format: formats/{path.name}}}\n"
        "rules:\n  - {match: '*', fprop: {input: x, weight: w}}\n"
    )
    make = lambda: torch.nn.Sequential(torch.nn.Linear(100, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))  # noqa: E731
    model, x = make(), torch.randn(3, 100)
    plain = copy.deepcopy(model[0].weight.detach())
    plan = ms.plan(model, recipe)
    assert [row.weight.format.name for row in plan.quantized] == [path.stem] * 2
    assert ms.quantize_(model, recipe) == plan
    assert same_bytes(model[0].weight, ms.quantize(plain, path))
    assert plan.quantized[0].bytes_after == model[0].weight.stored_bytes

    ms.save(model, tmp_path / "saved", plan=plan)
    loaded = ms.load(tmp_path / "saved", make())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_command_line(run, run_json, path, weight, tmp_path):
    source, out = tmp_path / "plain", tmp_path / "out"
    source.mkdir()
    save_file({"proj.weight": weight}, source / "model.safetensors")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nquantizers: {{w: {path.stem}}}\nrules: [{{match: '*', fprop: {{weight: w}}}}]\n")

    assert path.stem in run("formats", "--from", path).stdout
    assert run_json("formats", path)["name"] == path.stem
    assert f"{path.stem}[64, 100]" in run("explain", "dequantize", "-f", path, "--shape", "64x100").stdout
    assert path.stem in run("plan", source, "-r", recipe, "--from", path).stdout
    run("quantize", source, out, "-r", recipe, "--from", path.parent)
    assert run_json("inspect", out)["tensors"][0]["format"] == path.stem
    assert same_bytes(ms.load(out)["proj.weight"], ms.quantize(weight, path))
    (row,) = run_json("compare", source, "--formats", path)["formats"]
    assert row["format"] == path.stem
    assert row["bits_per_value"] == ms.find_format(path).bits_per_value
    assert row["sqnr_db_mean"] > 4


def test_a_checkpoint_carries_the_definition(run, path, weight, tmp_path):
    """It loads where the format's name was never heard of."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 12, bias=False))
    ms.quantize_(
        model, {"name": "r", "quantizers": {"w": str(path)}, "rules": [{"match": "*", "fprop": {"weight": "w"}}]}
    )
    ms.save(model, tmp_path / "saved")
    path.unlink()
    assert ms.load(tmp_path / "saved")["0.weight"].format.name == path.stem
    assert path.stem not in ms.list_formats()
