"""Experts on FP8 tensor cores: which call takes it, what torch's function is given, results within the bound."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.cublas import grouped_rows_e4m3, rows_e4m3
from microscale.kernels.reference import align_rows as reference
from microscale.numerics import codec
from microscale.ops import late
from tests.kernels.processes import lines
from tests.kernels.products import parts, wide
from tests.kernels.scaled_grouped_mm_double import ContractError, GroupedDouble

pytestmark = pytest.mark.usefixtures("small_experts")
KERNEL, HOPPER = "cublas.grouped_rows_e4m3", (9, 0)
FORMATS = [f for f in ms.list_formats() if reference.fits(ms.find_format(f))]
PAIRS = [("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("fp8_row", "mxfp4")]  # tokens, weights
SIZES = {"even": (32, 32, 32), "ragged": (50, 0, 7, 90, 1), "none first or last": (0, 21, 0), "nothing": (0, 0)}


def problem(a="mxfp8", b="mxfp4", tokens=4096, experts=8, n=256, k=512, capability=HOPPER, out="bfloat16", **changes):
    first = described((tokens, k), a, -1) if a else dispatch.Operand((tokens, k), "bfloat16")
    second = dataclasses.replace(described((experts, k, n), b, -2), **changes)
    return dispatch.Problem("grouped_matmul", (first, second), "cuda", capability, None, out)


def described(shape, fmt, axis):
    return late.describe(shape, ms.find_format(fmt).for_row(shape[axis]), axis, axis, "strided", None)


def told(**options):
    return dispatch.explain_problem(problem(**options))


def refusal(**options):
    return next(r.reason for r in told(**options).refused if r.kernel == KERNEL)


def ends_of(sizes, device="cpu"):
    return torch.tensor(sizes).cumsum(0).to(device, torch.int32)


# -- what runs where ---------------------------------------------------------------------------------------------------


def test_pairs_of_mx_formats_take_it_on_hopper():
    for a, b in itertools.product((*FORMATS, "fp8_row"), (*FORMATS, "fp8_row")):
        assert told(a=a, b=b).chosen == KERNEL, (a, b)
    assert told(k=100).chosen == told(layout="swizzle_32_4_4").chosen == KERNEL  # K is padded
    tokens = problem().operands[0].shape[0]  # of prepared experts twice as many
    assert "twice as many if prepared" in refusal(layout="fragments")
    assert told(layout="fragments", tokens=2 * tokens).chosen == KERNEL
    assert told(outer="vector").chosen == told(exact_rows=True).chosen == KERNEL


def test_what_it_refuses_and_why():
    assert "9.0" in refusal(capability=(8, 9)) and "9.0 or lower" in refusal(capability=(10, 0))
    assert "both block-scaled" in refusal(a=None) and "both block-scaled" in refusal(axis=-1)
    for other in ("nvfp4", "mxint8", "fp8_block128"):
        assert "E4M3 can hold" in refusal(a=other) and "E4M3 can hold" in refusal(b=other)
    assert "E4M3 can hold" in refusal(outer="mixed")
    assert "bfloat16 output" in refusal(out="float16") and "bfloat16 output" in refusal(out="float32")
    assert "multiples of 16" in refusal(n=264)
    assert "E4M3 can hold" in refusal(b="fp8_row", layout="fragments")  # codes in that order are no rows
    assert "prepare" in refusal(exact_rows=False)
    assert "at most 512 experts" in refusal(experts=513, tokens=2**20)


def test_few_tokens_stay_with_the_kernel_that_decodes():
    """By the shape class only, since selections are cached by it."""
    for tokens, experts, taken in (
        (512, 8, False),  # 64 for each
        (2048, 8, False),
        (2049, 8, True),  # counts as 4096
        (4096, 8, True),
        (2**15, 64, True),
        (2**14, 33, False),
        (512, 1, True),
        (256, 1, False),
    ):
        assert told(tokens=tokens, experts=experts).chosen == (KERNEL if taken else "triton.grouped_wgmma")
    assert told(tokens=0).chosen != KERNEL


def test_small_matrices_stay_with_the_kernel_that_decodes(monkeypatch):
    monkeypatch.setattr(grouped_rows_e4m3, "LARGE", 4096)
    for n, k, taken in (
        (4096, 4096, True),
        (14336, 4096, True),
        (2064, 3000, True),
        (2048, 4096, False),
        (1536, 2048, False),
    ):
        chosen = told(n=n, k=k, tokens=2**14).chosen
        assert chosen == KERNEL if taken else chosen != KERNEL, (n, k)
    assert "2048 by 2048" in refusal(n=1536, k=2048)


def test_exact_products_keep_it_out():
    p = problem()
    before = dispatch.select(p)
    assert before.name == KERNEL and not before.exact
    with dispatch.exact_products():
        assert dispatch.select(p).name == "triton.grouped_wgmma"
        assert "exact_products() is in force" in refusal()
    assert dispatch.select(p) is before


def test_the_bound_is_that_of_dense_products():
    named = {k.name: k for k in dispatch.kernels()}
    assert named[KERNEL].bound == named["cublas.rows_e4m3"].bound


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """The kernel on the CPU: the reference's `align_rows`, counted, and a double that keeps torch's contract."""
    double, aligned = GroupedDouble(), []

    def align_rows(*args):
        aligned.append(args[2].name)
        return reference.align_rows(*args)

    monkeypatch.setattr(rows_e4m3, "align_rows", align_rows)
    monkeypatch.setattr(grouped_rows_e4m3, "scaled_grouped_mm", double)
    monkeypatch.setattr(grouped_rows_e4m3, "zero_rows_after", lambda out, ends: out[int(ends[-1]) :].zero_())
    double.aligned = aligned
    return double


def run(a, b, offsets):
    return grouped_rows_e4m3.grouped_matmul(
        late.late(parts(a), -1), late.late(parts(b.mT), -2), offsets, torch.bfloat16
    )


def made(left, right, rows, experts, n, k, device="cpu", spread=2.0, **options):
    a = torch.randn(rows, k, device=device) * torch.exp(spread * torch.randn(rows, k, device=device))
    b = torch.randn(experts, n, k, device=device) * torch.exp(spread * torch.randn(experts, n, k, device=device))
    return ms.quantize(a.bfloat16(), left, **options), ms.quantize(b.bfloat16(), right, **options)


def row_scales(q):
    """What `align_rows` maps a row's largest exponent to, FP64 [..., R, 1]; 0 for rows that go as they lie."""
    if not reference.fits(q.format):
        return torch.zeros(*q.shape[:-1], 1, dtype=torch.float64, device=q.device)
    top = codec.decode(q.strided_scale(), q.format.scale).double().amax(-1, keepdim=True)
    found = torch.exp2(torch.log2(top) - reference.lift(q.format.element))
    return found if q.outer_scale is None else found * q.outer_scale.double()


def check(got, a, b, sizes, sums=0.0):
    """Within the bound of `rows_e4m3`, one rounding, and `sums` of sum |a| |b|; zeros after the last group."""
    assert got.shape == (a.shape[0], b.shape[1]) and got.dtype == torch.bfloat16
    a64, b64, s_a, s_b, start, most = wide(a), wide(b), row_scales(a), row_scales(b), 0, 0.0
    for expert, size in enumerate(sizes):
        rows, right, s_right = slice(start, start + size), b64[expert].t(), s_b[expert].t()
        exact, size_of = a64[rows] @ right, a64[rows].abs() @ right.abs()
        limit = 2.0**-10 * (s_a[rows] * right.abs().sum(0) + a64[rows].abs().sum(1, keepdim=True) * s_right)
        limit = limit + 2.0**-20 * a.shape[1] * s_a[rows] * s_right + (sums + 2.0**-22) * size_of
        error = (got[rows].double() - exact).abs() - 1.01 * 2.0**-8 * exact.abs()
        assert bool((error <= limit).all()), expert
        most = max(most, float((error / size_of).max()) if size else 0.0)
        start += size
    assert torch.equal(got[start:], torch.zeros_like(got[start:]))
    return most


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_groups_of_all_kinds(left, right, sizes, on_cpu):
    """Ragged, empty, rows left over; odd K is padded; both layouts of scales."""
    rows, experts = sum(sizes) + 5, len(sizes)
    for k, layout in ((72, "strided"), (96, "swizzle_32_4_4")):
        options = {} if left == "fp8_row" else {"layout": layout}
        a, b = made(left, right, rows, experts, 48, k, **options)
        check(run(a, b, ends_of(sizes)), a, b, sizes)
    assert on_cpu.calls == 2 * [(rows, experts, 48)]
    assert on_cpu.aligned == 2 * [name for name in (left, right) if name != "fp8_row"]


@pytest.mark.parametrize(("left", "right"), list(itertools.product(FORMATS, FORMATS)))
def test_every_pair_within_its_bound(left, right, on_cpu):
    a, b = made(left, right, 40, 3, 16, 64)
    check(run(a, b, ends_of((9, 0, 30))), a, b, (9, 0, 30))


def test_outer_scales_join_those_of_rows(on_cpu):
    """Of tokens, of columns, of experts, of everything."""
    a, b = made("mxfp8", "mxfp4", 40, 3, 16, 64)
    plain, sizes = run(a, b, ends_of((9, 0, 30))), (9, 0, 30)
    rows, columns, experts = torch.rand(40, 1) + 0.5, torch.rand(3, 16, 1) + 0.5, torch.tensor([2.0, 4, 8])
    for left, right in (
        (None, torch.tensor(3.0)),
        (rows, None),
        (rows, experts.view(3, 1, 1)),
        (torch.tensor(0.25), columns),
        (rows, columns.mT.contiguous().mT),
    ):
        check(run(a.replace(outer_scale=left), b.replace(outer_scale=right), ends_of(sizes)),
              a.replace(outer_scale=left), b.replace(outer_scale=right), sizes)  # fmt: skip
    doubled = run(a, b.replace(outer_scale=experts.view(3, 1, 1)), ends_of(sizes))
    assert torch.equal(doubled[:9], 2 * plain[:9]) and torch.equal(doubled[9:], 8 * plain[9:])


def test_weights_of_the_backward(on_cpu):
    """dy w contracts the weight's own rows: its blocks run along them, and codes lie column by column."""
    dy, w = torch.randn(40, 96).bfloat16(), torch.randn(3, 96, 48).bfloat16()
    a, b = ms.quantize(dy, "mxfp8"), ms.quantize(w, "mxfp8", axis=-2)
    got = grouped_rows_e4m3.grouped_matmul(parts(a), parts(b), ends_of((9, 0, 31)), torch.bfloat16)
    assert torch.equal(got, run(a, b.mT, ends_of((9, 0, 31))))
    check(got, a, b.mT, (9, 0, 31))


@pytest.mark.parametrize("left", ["mxfp8", "fp8_row"])
def test_prepared_experts_are_the_same_rows(left, on_cpu):
    """Bit for bit those of the plain layout; K and N are multiples of 64, each expert whole tiles."""
    for right, sizes in (("mxfp4", (9, 0, 30)), ("mxfp6", (40, 0, 0)), ("mxfp8", (0, 0, 5))):
        a, b = made(left, right, 40, 3, 64, 192)
        prepared = b.to_layout("fragments")
        assert prepared.scale_layout == "fragments"
        got = run(a, prepared, ends_of(sizes))
        assert torch.equal(got, run(a, b, ends_of(sizes)))
        check(got, a, b, sizes)


def test_nothing_to_multiply(on_cpu):
    """No tokens, no experts, no columns, nothing to contract: zeros, and nobody is called."""
    for rows, experts, n, k in ((0, 3, 16, 64), (5, 0, 16, 64), (5, 3, 0, 64), (5, 3, 16, 0)):
        a, b = ms.quantize(torch.zeros(rows, k), "mxfp8"), ms.quantize(torch.zeros(experts, n, k), "mxfp8")
        got = run(a, b, torch.zeros(experts, dtype=torch.int32))
        assert got.shape == (rows, n) and got.dtype == torch.bfloat16 and not got.any()
    assert on_cpu.calls == []


def test_nan_stays_in_its_row_and_expert(on_cpu):
    x, w = torch.randn(12, 64), torch.randn(2, 16, 64)
    x[1, 3], x[2, 40], x[11, 0], w[1, 5, 7] = torch.nan, torch.inf, torch.nan, torch.nan
    got = run(ms.quantize(x, "mxfp8"), ms.quantize(w, "mxfp8"), ends_of((6, 4)))
    assert got.isnan().any(1).tolist() == [r in (1, 2) or 6 <= r < 10 for r in range(12)]
    assert got[6:10].isnan().any(0).tolist() == [c == 5 for c in range(16)] and not got[10:].any()


def test_views_of_operands(on_cpu):
    """Rows cut from a larger tensor, offsets that are every other number."""
    a, b = made("mxfp8", "mxfp4", 40, 3, 16, 64)
    ends = torch.stack([ends_of((3, 4, 20)), ends_of((1, 1, 1))], 1)[:, 0]
    assert not ends.is_contiguous()
    check(run(a[5:35], b, ends), a[5:35], b, (3, 4, 20))
    rows = ms.quantize(torch.randn(40, 72), "fp8_row")[1:]
    narrow = ms.quantize(torch.randn(3, 16, 72), "mxfp4")
    check(run(rows, narrow, ends), rows, narrow, (3, 4, 20))


def test_the_double_refuses_other_layouts(on_cpu):
    a, b = torch.zeros(8, 32).to(torch.float8_e4m3fn), torch.zeros(2, 16, 32).to(torch.float8_e4m3fn)
    recipe = torch.nn.functional.ScalingType.RowWise
    good = (a, b.mT, torch.ones(8), recipe, torch.ones(2, 16), recipe)
    assert on_cpu(*good, offs=ends_of((4, 4))).shape == (8, 16)
    bad = ((1, b.mT.contiguous()), (2, torch.ones(8, 1)), (4, torch.ones(2, 1, 16)), (2, torch.ones(9)))
    for place, value in bad:
        with pytest.raises(ContractError):
            on_cpu(*(value if i == place else v for i, v in enumerate(good)), offs=ends_of((4, 4)))
    for options in ({"offs": torch.tensor([4, 8])}, {"use_fast_accum": True}, {"output_dtype": torch.float32}):
        with pytest.raises(ContractError):
            on_cpu(*good, **{"offs": ends_of((4, 4)), **options})


def test_rows_after_the_last_group_are_zeroed():
    assert lines("tests.kernels.rows_after_cases") == [{"cases": 60}]


@pytest.mark.slow
def test_zeros_are_stored_sixteen_bytes_at_a_time():
    assert lines("tests.kernels.rows_after_cases", "90") == [{"stores": ["st.global.v4.b32"]}]


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def hopper():
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs sm_90")


def spread_of(experts, rows):
    """Sizes of groups, one in four empty, some rows left over."""
    shares = torch.rand(experts, generator=torch.Generator().manual_seed(experts)) + 0.1
    if experts > 1:
        shares[1::4] = 0
    return (shares / shares.sum() * (rows - 3)).int().tolist()


# Of the 33 numbers that a step of FP8 tensor cores adds, 32 products and the sum so far, each loses up to 2**-13 of the
# largest, which is at most the sum of all |a| |b| of its 128 along K; four steps go into one FP32 sum. Where no product
# is much larger than the others, as without a spread, much less is lost.
STEPS, EVEN = 4 * 33 * 2.0**-13, 2.0**-10


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [1, 8, 64])
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_on_a_gpu(left, right, experts, record_property):
    """Chosen, within the bound and what 13 bits in each step of FP8 sums cost, and the same bits twice."""
    hopper()
    rows = 320 * experts  # counts as 512 for each
    for n, k in ((256, 512), (2048, 2080), (48, 1000), (1024, 96)):  # torch's three tiles, padded K
        sizes = spread_of(experts, rows)
        ends = ends_of(sizes, "cuda")
        for spread, sums in ((0.0, EVEN), (2.0, STEPS)):
            a, b = made(left, right, rows, experts, n, k, "cuda", spread)
            assert ms.explain("grouped_matmul", a, b).chosen == KERNEL
            got = ms.grouped_matmul(a, b.mT, ends)
            record_property(f"{n}x{k} spread {spread} over sum|a||b|", check(got, a, b, sizes, sums))
            assert torch.equal(got, ms.grouped_matmul(a, b.mT, ends))


@pytest.mark.gpu
@pytest.mark.parametrize("right", ["mxfp4", "mxfp6", "mxfp8"])
def test_prepared_experts_on_a_gpu(right):
    """The bytes are those of the plain layout, so the products are."""
    hopper()
    a, _ = made("mxfp8", right, 4096, 8, 256, 512, "cuda")
    b = ms.quantize(torch.randn(8, 256, 512, device="cuda").bfloat16() / 16, right)  # within what prepare takes
    prepared, ends = b.to_layout("fragments"), ends_of(spread_of(8, 4096), "cuda")
    given = late.late(parts(a), -1), late.late(parts(b.mT), -2), late.late(parts(prepared.mT), -2)
    plain, got = (grouped_rows_e4m3.grouped_matmul(given[0], w, ends, torch.bfloat16) for w in given[1:])
    assert torch.equal(got, plain)


@pytest.mark.gpu
def test_columns_that_are_no_multiple_go_elsewhere():
    hopper()
    a, b = made("mxfp8", "mxfp8", 4096, 8, 264, 512, "cuda")
    assert ms.explain("grouped_matmul", a, b).chosen != KERNEL
    sizes = spread_of(8, 4096)
    check(ms.grouped_matmul(a, b.mT, ends_of(sizes, "cuda")), a, b, sizes)


@pytest.mark.gpu
def test_groups_without_tokens_on_a_gpu():
    """All empty, all in the first or in the last group; no row is left as memory was."""
    hopper()
    a, b = made("mxfp8", "mxfp4", 4096, 8, 256, 512, "cuda")
    for sizes in ((0,) * 8, (4096, *(0,) * 7), (*(0,) * 7, 4096), (0, 1, 0, 0, 300, 0, 0, 0)):
        torch.full((4096, 256), torch.nan, dtype=torch.bfloat16, device="cuda")  # memory that the result may get
        check(ms.grouped_matmul(a, b.mT, ends_of(sizes, "cuda")), a, b, sizes, STEPS)


@pytest.mark.gpu
def test_graphs_follow_other_groups_and_nothing_waits():
    hopper()
    a, b = made("mxfp8", "mxfp8", 4096, 8, 256, 512, "cuda")
    ends = ends_of((4096, *(0,) * 7), "cuda")
    routes = [spread_of(8, 4096), [5, 0, 700, 0, 0, 100, 40, 0], [0] * 7 + [4096]]
    eager = [ms.grouped_matmul(a, b.mT, ends_of(sizes, "cuda")) for sizes in routes]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ms.grouped_matmul(a, b.mT, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ms.grouped_matmul(a, b.mT, ends)
    for sizes, wanted in zip(routes, eager, strict=True):
        ends.copy_(ends_of(sizes))
        graph.replay()
        assert torch.equal(got, wanted)
