"""Rows re-encoded to one exponent: the codes bit for bit, the product within the bound that follows from them."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.dispatch import Operand, Problem
from microscale.errors import NoKernelError
from microscale.kernels.cublas import rows_e4m3
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.reference.matmul import Parts
from microscale.kernels.triton import align_rows
from tests.kernels.processes import lines
from tests.kernels.scaled_mm_double import Double

FORMATS = [f for f in ms.list_formats() if reference.fits(ms.find_format(f))]
HOPPER, KERNEL = (9, 0), "cublas.rows_e4m3"


def parts(q):
    """A tensor as a kernel gets it."""
    return Parts(q.qdata, q.scale, q.outer_scale, q.format, q.block_axis, q.shape[q.block_axis], q.scale_layout)


def problem(a="mxfp8", b="mxfp4", m=128, n=256, k=512, capability=HOPPER, out="bfloat16", **changes):
    first = Operand((m, k), "uint8", ms.find_format(a), -1) if a else Operand((m, k), "bfloat16")
    second = Operand((k, n), "uint8", ms.find_format(b), -2, **changes)
    return Problem("matmul", (first, second), "cuda", capability, None, out)


# -- align_rows --------------------------------------------------------------------------------------------------------


def test_which_formats_fit():
    assert FORMATS == ["mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2"]


@pytest.mark.parametrize("names", [FORMATS[:3], [*FORMATS[3:], "user"]], ids=" ".join)
def test_align_rows_equals_the_reference(names, device):
    """Every code under every shift, NaN blocks, ends of E8M0's range, layouts, ragged ends, one row and many."""
    on_cpu = device.type == "cpu"
    rows = lines("tests.kernels.align_rows_cases", device.type, *(n for n in names if on_cpu or n != "user"))
    assert [r for r in rows if "error" in r] == []
    formats = len(names) + (7 if on_cpu and "user" in names else -1 if "user" in names else 0)
    assert rows[-1]["checked"] == formats * (17 if on_cpu else 4)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_keeps_its_values(fmt):
    """To 2**-10 of the row's power of two, and that is at most 2**-7 of the top block's largest number."""
    x = torch.randn(37, 1000) * torch.exp(3 * torch.randn(37, 1000))
    q = ms.quantize(x, fmt)
    codes, scale = reference.align_rows(q.qdata, q.scale, q.format, 1000, "strided")
    assert codes.shape == (37, 1008) and not codes[:, 1000:].view(torch.uint8).any()
    error = (codes.float()[:, :1000] * scale - q.dequantize(torch.float32)).abs()
    assert bool((error <= 2.0**-10 * scale).all())
    top = q.scales().amax(1, keepdim=True) * max(v for v in q.format.element.table if v < 1e30)
    assert bool((scale <= 2.0**-7 * top).all()) and bool((448 * scale >= top).all())


def test_e2m1_is_exact_while_exponents_span_fourteen():
    exponents = torch.arange(100, 115)  # fifteen values, fourteen apart
    scale = exponents[torch.randint(15, (64, 40))].to(torch.uint8)
    scale[:, 0], scale[:, 1] = 100, 114
    qdata = torch.randint(256, (64, 40 * 16), dtype=torch.uint8)
    q = Parts(qdata, scale, None, ms.find_format("mxfp4"), -1, 1280, "strided")
    codes, row = reference.align_rows(qdata, scale, q.format, 1280, "strided")
    assert torch.equal(codes.float() * row, q.dequantize(torch.float32))
    scale[:, 1] = 116
    codes, row = reference.align_rows(qdata, scale, q.format, 1280, "strided")
    assert not torch.equal(codes.float() * row, q.dequantize(torch.float32))


def test_programs_cover_rows_and_constants_are_shared():
    """Rows of many are taken whole, those of few side by side."""
    for fmt, total, columns in itertools.product(map(ms.find_format, FORMATS), (1, 17, 4096), (16, 100, 4096, 28672)):
        blocks = -(-columns // fmt.block)
        grid, constants = align_rows.plan(fmt, total, blocks, columns, False)
        assert (
            grid * constants["ROWS"] * constants["BLOCKS"] * constants["UNROLL"] * constants["LOOPS"] >= total * blocks
        )
        assert constants["ROWS"] * constants["BLOCKS"] * fmt.block == align_rows.TILE
        assert align_rows.plan(fmt, total, blocks, columns, False)[1] is constants
        assert (constants["LOOPS"] > 1) == (total == 4096 and columns == 28672)


# Instructions of sm_90 for each element of full programs; memory at full speed leaves time for 11 (4-bit) to 14.5.
BUDGET = {"mxfp4": 8.4, "mxfp6": 11.3, "mxfp6_e3m2": 11.3, "mxfp8": 5.4, "mxfp8_e5m2": 8.1}


@pytest.mark.slow
@pytest.mark.parametrize("capability", (89, 90))
def test_align_rows_compiles_to_few_instructions(capability, tmp_path):
    """By the hardware's conversions, 16 bytes stored at a time, nothing spilled."""
    rows = lines("tests.kernels.compiled_align_rows", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert {r["format"] for r in rows} == set(FORMATS)
    for r in rows:
        assert r["native"] and not r["local"], r
        assert r["shape"] == "ragged" or set(r["stores"]) == {"STG.E", "STG.E.128"}, r  # a row scale, and codes
        if capability == 90 and r["shape"] == "full":
            assert r["per_element"] <= 1.05 * BUDGET[r["format"]], r


# -- what runs where ---------------------------------------------------------------------------------------------------


def chosen(p):
    return dispatch.explain_problem(p).chosen


def refusal(p):
    return next(r.reason for r in dispatch.explain_problem(p).refused if r.kernel == KERNEL)


def test_pairs_of_mx_formats_take_it_on_ada_and_hopper():
    for a, b in itertools.product(FORMATS, FORMATS):
        assert chosen(problem(a, b)) == chosen(problem(a, b, capability=(8, 9))) == KERNEL
    assert chosen(problem(m=7, k=100)) == KERNEL  # K is padded, and M is free


def test_what_it_refuses_and_why():
    assert "8.9" in refusal(problem(capability=(8, 0))) and "9.0 or lower" in refusal(problem(capability=(10, 0)))
    assert "both operands" in refusal(problem(a=None))
    for other in ("nvfp4", "mxint8", "fp8_block128"):
        assert "E4M3 can hold" in refusal(problem(a=other))
    assert "bfloat16 output" in refusal(problem(out="float16"))
    assert "multiples of 16" in refusal(problem(n=136))
    assert chosen(problem(m=257, layout="fragments")) == KERNEL  # a prepared weight; fewer rows have another kernel
    for shape, dtype in (((256,), "float32"), ((128, 256), "bfloat16"), ((1,), "bfloat16")):
        p = problem()
        assert "bias" in refusal(Problem(*(getattr(p, f) for f in ("op", "operands", "device", "capability")),
                                         out_dtype="bfloat16", bias=Operand(shape, dtype)))  # fmt: skip


def test_exact_products_keep_it_out():
    """One switch, part of the cache key, with the reason told."""
    p = problem()
    before = dispatch.select(p)
    assert before.name == KERNEL and not before.exact
    with dispatch.exact_products():
        assert dispatch.select(p).exact and chosen(p) != KERNEL
        assert "exact_products() is in force" in refusal(p)
        with dispatch.exact_products(False):
            assert dispatch.select(p) is before
    assert dispatch.select(p) is before


def test_exact_products_say_how_to_get_out(monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {"matmul": [before for before in dispatch.kernels("matmul")
                                                          if before.name == KERNEL]})  # fmt: skip
    with dispatch.exact_products(), pytest.raises(NoKernelError) as caught:
        dispatch.select(problem(m=129))
    assert caught.value.hint == "leave exact_products() to allow kernels with a wider bound"


def test_everything_else_is_exact():
    assert [k.name for k in dispatch.kernels() if not k.exact] == [KERNEL, "cublas.grouped_rows_e4m3"]


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """The kernel on the CPU: the reference's `align_rows`, and a double that keeps cuBLAS's contract."""
    double = Double(major=9)
    monkeypatch.setattr(rows_e4m3, "align_rows", reference.align_rows)
    monkeypatch.setattr(rows_e4m3, "scaled_mm", double)
    return double


def bound(a, b):
    """Of the module: what re-encoding adds to a product, FP64."""
    (a8, s_a), (b8, s_b) = (
        reference.align_rows(q.qdata, q.strided_scale(), q.format, q.shape[-1], "strided") for q in (a, b)
    )
    del a8, b8
    s_a, s_b = s_a.double(), s_b.double().t()
    a, b = a.dequantize(torch.float32).double().abs(), b.dequantize(torch.float32).double().abs().t()
    return 2.0**-10 * (s_a * b.sum(0) + a.sum(1, keepdim=True) * s_b) + 2.0**-20 * a.shape[1] * s_a * s_b


@pytest.mark.parametrize(("left", "right"), list(itertools.product(FORMATS, FORMATS)))
def test_every_pair_within_its_bound(left, right, on_cpu):
    """Odd M and K, both layouts of scales, leading dimensions."""
    a = ms.quantize(torch.randn(2, 9, 72) * torch.exp(2 * torch.randn(2, 9, 72)), left, layout="swizzle_32_4_4")
    b = ms.quantize(torch.randn(32, 72) * torch.exp(2 * torch.randn(32, 72)), right)
    got = rows_e4m3.matmul(parts(a), parts(b.t()), None, torch.bfloat16)
    assert got.shape == (2, 9, 32) and on_cpu.calls == ["rowwise"]
    flat = ms.quantize(a.dequantize(torch.float32).reshape(18, 72), left)  # has the same values
    exact = flat.dequantize(torch.float32).double() @ b.dequantize(torch.float32).double().t()
    limit = bound(flat, b) + 1.01 * 2.0**-8 * exact.abs()
    assert bool(((got.reshape(18, 32).double() - exact).abs() <= limit).all())


def test_bias_joins_before_the_one_rounding(on_cpu):
    a, b = ms.quantize(torch.randn(5, 64), "mxfp4"), ms.quantize(torch.randn(16, 64), "mxfp4")
    wide = a.dequantize(torch.float32) @ b.dequantize(torch.float32).t()  # exact for these
    for bias in (torch.randn(16).bfloat16(), torch.randn(16), torch.randn(5, 16).bfloat16(), torch.randn(1).half()):
        got = rows_e4m3.matmul(parts(a), parts(b.t()), bias, torch.bfloat16)
        assert torch.equal(got, (wide + bias.float()).bfloat16())


def test_empty_and_nan(on_cpu):
    a, b = ms.quantize(torch.randn(0, 64), "mxfp8"), ms.quantize(torch.randn(16, 64), "mxfp8")
    assert rows_e4m3.matmul(parts(a), parts(b.t()), None, torch.bfloat16).shape == (0, 16)
    x = torch.randn(5, 64)
    x[1, 3], x[2, 40] = torch.nan, torch.inf
    got = rows_e4m3.matmul(parts(ms.quantize(x, "mxfp8")), parts(b.t()), torch.zeros(16).bfloat16(), torch.bfloat16)
    assert got.isnan().any(1).tolist() == [False, True, True, False, False] and bool(got[1:3].isnan().all())


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("left", "right"), [("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp6", "mxfp8_e5m2")])
def test_on_a_gpu(left, right, record_property):
    """Within the bound of the operands and 13 bits in each step of FP8 sums; the same bits twice."""
    if torch.cuda.get_device_capability() not in ((8, 9), (9, 0)):
        pytest.skip("needs sm_89 or sm_90")
    for m, n, k in ((128, 256, 4096), (17, 1024, 1000), (1, 64, 8192)):
        a = ms.quantize(torch.randn(m, k, device="cuda").bfloat16(), left)
        b = ms.quantize(torch.randn(n, k, device="cuda").bfloat16(), right)
        bias = torch.randn(n, device="cuda").bfloat16()
        got = rows_e4m3.matmul(parts(a), parts(b.t()), bias, torch.bfloat16)
        a64, b64 = (t.dequantize(torch.float32).double() for t in (a, b))
        exact, size = a64 @ b64.t() + bias.double(), a64.abs() @ b64.abs().t()
        error = (got.double() - exact).abs() - 1.01 * 2.0**-8 * exact.abs()
        record_property(f"{m}x{n}x{k} over sum|a||b|", float((error / size).max()))
        assert bool((error <= bound(a, b) + 2.0**-10 * size).all())
        assert torch.equal(got, rows_e4m3.matmul(parts(a), parts(b.t()), bias, torch.bfloat16))
