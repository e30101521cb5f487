"""Grouped products: within the derived bound of FP64, by the kernel meant for each call; schedules; what compiles."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.kernels.reference.grouped_wgrad import grouped_wgrad as reference_wgrad
from microscale.kernels.triton import grouped, ptx_tables
from microscale.numerics import codec
from microscale.ops.grouped import grouped_wgrad
from microscale.testing import assert_same_bits
from tests.kernels import ptx_emulator
from tests.kernels.processes import lines
from tests.kernels.products import wide

ARCHITECTURES = (80, 89, 90, 100, 103, 120)
EXACT = [f for f in ms.list_formats() if ms.find_format(f).scale.torch_dtype != "float32"]
ANYWHERE = ("triton.grouped_matmul", "triton.grouped_two_pass")
INTERPRETED = (
    ("mxfp4", "nvfp4"),
    ("mxfp6", "mxfp8", "nvfp4_row"),
    ("mxint8", "mxfp8_e5m2", "user"),
    ("plain",),
    ("columns",),
)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [*INTERPRETED, ("engine", "plain", "nvfp4")], ids=lambda f: " ".join(f))
def test_interpreted_kernels_are_within_the_bound(formats):
    """Ragged, empty and one group, rows left over, odd sizes, outer scales, layouts, NaN; nothing else is written."""
    rows = lines("tests.kernels.grouped_cases", "cpu", *formats)
    assert [r for r in rows if "error" in r] == []
    ran = set().union(*rows[-1]["kernels"].values())
    if formats == ("columns",):
        assert ran == {f"grouped_transposed{ways}" for ways in ("", " a_down", " b_down", " a_down b_down")}
        return
    assert {"grouped_values", "grouped_values across"} <= {" ".join(way.split()[:2]) for way in ran}
    if "plain" in formats:
        assert "grouped_transposed" in ran
    if "engine" in formats:
        assert {"grouped_values across copies even", "grouped_values copies even"} <= ran


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp6", "nvfp4", "user", "plain", "columns"])
def test_compiled_kernels_are_within_the_bound(name):
    rows = lines("tests.kernels.grouped_cases", "cuda", name)
    assert [r for r in rows if "error" in r] == []


# -- which kernel ------------------------------------------------------------------------------------------------------


def operand(shape, fmt=None, axis=-2, **facts):
    if fmt is None:
        return dispatch.Operand(shape, facts.pop("dtype", "bfloat16"))
    return dispatch.Operand(shape, "uint8", ms.find_format(fmt), axis, **facts)


def explained(a, b, capability=(8, 9)):  # on Hopper `wgmma` comes first
    return dispatch.explain_problem(dispatch.Problem("grouped_matmul", (a, b), "cuda", capability, None, "bfloat16"))


def test_every_format_that_bfloat16_holds_is_taken():
    for fmt in ms.list_formats():
        few = explained(operand((64, 4096)), operand((8, 4096, 1024), fmt))
        many = explained(operand((8192, 4096)), operand((8, 4096, 1024), fmt))
        if fmt in EXACT:
            assert (few.chosen, many.chosen) == ("triton.grouped_matmul", "triton.grouped_two_pass")
        else:
            assert few.chosen == many.chosen == "reference.grouped_matmul" and few.fallback
            assert all("bfloat16 numbers" in r.reason for r in few.refused if r.kernel in ANYWHERE)


def test_what_tiles_of_codes_do_not_serve_is_decoded_beforehand():
    x, w = operand((64, 4096)), operand((8, 4096, 1024), "mxfp8")
    assert explained(operand((64, 4096), "mxfp8", -1), w).chosen == "triton.grouped_matmul"
    for a, b in (
        (operand((64, 4096), "mxfp8", -1), operand((8, 4096, 1024))),
        (x, operand((8, 4096, 1024))),
        (x, operand((8, 4096, 1024), "mxfp8", -1)),
    ):
        assert explained(a, b).chosen == "triton.grouped_two_pass"


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (operand((64, 4096), dtype="float16"), operand((8, 4096, 1024), "mxfp8"), "needs bfloat16, not float16"),
        (operand((64, 4096)), operand((8, 4096, 1024), "nvfp4_row", outer="mixed"), "the same all along K"),
        (operand((64, 4096)), operand((8, 4096, 1024), "mxfp8", layout="fragments"), "needs scales in layout"),
    ],
)
def test_refusals_say_why(a, b, why):
    told = explained(a, b)
    assert told.chosen == ("triton.grouped_restored" if b.layout == "fragments" else "reference.grouped_matmul")
    assert all(why in r.reason for r in told.refused if r.kernel in ANYWHERE)


def test_old_devices_are_refused():
    told = explained(operand((64, 4096)), operand((8, 4096, 1024), "mxfp8"), (7, 5))
    assert told.chosen == "reference.grouped_matmul"


def test_the_threshold_looks_at_the_shape_class_only():
    """Selections are cached by it."""
    few, many = "triton.grouped_matmul", "triton.grouped_two_pass"
    for experts, tokens, chosen in (
        (8, 1024, few),
        (8, 1025, many),
        (5, 1024, few),
        (64, 2**13, few),
        (64, 2**14, many),
    ):
        assert explained(operand((tokens, 512)), operand((experts, 512, 512), "mxfp4")).chosen == chosen
    assert explained(operand((0, 512)), operand((8, 512, 512), "mxfp4")).chosen == few
    assert explained(operand((1, 512)), operand((1, 512, 512), "mxfp4")).chosen == few


# -- looking codes up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "fp4_ue5m3"])
def test_codes_are_looked_up(fmt, monkeypatch):
    """Every code with every scale, NaN too, in each place of a word."""
    element, scale = ms.find_format(fmt).element, ms.find_format(fmt).scale
    assert ptx_tables.has_table(element)
    apply = ptx_emulator._apply
    emulated = lambda name, v: ptx_emulator.permute(*v) if name.startswith("prmt") else apply(name, v)  # noqa: E731
    monkeypatch.setattr(ptx_emulator, "_apply", emulated)
    scales = codec.decode(torch.arange(2**scale.width, dtype=torch.uint8), scale)
    codes = torch.randint(16, (64, 8), dtype=torch.uint8)
    codes[:16] = torch.arange(16, dtype=torch.uint8)[:, None]
    words = (codes.numpy().astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(1).astype(np.uint32)
    half = scales.bfloat16().view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)
    given = {"$8": words[:, None], "$9": (half | half << 16)[None, :]}
    registers = ptx_emulator.run(ptx_tables.look_up(element)[0], given)
    wanted = (codec.decode(codes, element)[:, None, :] * scales[None, :, None]).bfloat16()
    for i in range(8):
        got = torch.from_numpy((registers[f"p{i // 2}"] >> 16 * (i % 2) & 0xFFFF).astype(np.int16)).view(torch.bfloat16)
        same = (got == wanted[..., i]) & (got.signbit() == wanted[..., i].signbit()) | got.isnan() & wanted[
            ..., i
        ].isnan()
        assert bool(same.all()), i


def test_which_elements_have_a_table():
    having = {name for name in ms.list_formats() if ptx_tables.has_table(ms.find_format(name).element)}
    assert having == {"mxfp4", "nvfp4", "nvfp4_1level", "nvfp4_4over6", "nvfp4_row", "fp4_ue5m3"}


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_grids_are_no_smaller_than_what_runs_at_once():
    """As many programs as tiles where the device holds them all, however tokens are spread."""
    tile = grouped.Tile(16, 64, 128, 4, 4, 10**6)
    torch.manual_seed(0)
    for experts, tokens in itertools.product((1, 4, 64), (1, 5, 16, 333)):
        grid = grouped._grid(tile, torch.empty(tokens, 200), experts)
        for _ in range(20):
            ends = torch.randint(tokens + 1, (experts,)).sort().values
            counts = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
            assert int((-(-counts // tile.rows)).sum()) * 4 <= grid
    assert grouped._grid(tile._replace(resident=2), torch.empty(10**4, 10**3), 64) == 2 * 3  # of the interpreter


def test_tiles_grow_with_the_tokens_of_an_expert():
    rows = [grouped.codes_tile(64 * each, 64, 4096, (9, 0)).rows for each in (1, 8, 17, 64, 65, 200, 900)]
    assert rows == sorted(rows) and rows[0] == 16 and rows[-1] == 256
    assert grouped.codes_tile(64, 64, 2880, (9, 0)).depth == 64  # 2880 is a multiple of 64, not of 128
    for capability, copies in itertools.product(((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), None), (False, True)):
        for tile in (
            grouped.values_tile(8192, 8, 4096, capability, copies),
            grouped.wgrad_tile(4096, 4096, capability),
        ):
            shared = (tile.rows + tile.columns) * tile.depth * 2 * tile.stages
            assert shared <= (200 if capability in ((9, 0), (10, 0)) else 96) * 1024


def test_constants_are_shared_by_calls():
    """`launch` knows constants by their identity."""
    fmt, tile = ms.find_format("nvfp4"), grouped.codes_tile(64, 8, 4096, (9, 0))
    made = grouped.codes_constants(fmt, tile, 8, True, (False, True), False)
    assert made is grouped.codes_constants(fmt, tile, 8, True, (False, True), False)


# -- the gradient of the matrices --------------------------------------------------------------------------------------


@pytest.fixture
def problem(device):
    dy, x = torch.randn(13, 6, device=device), torch.randn(13, 10, device=device)
    return dy, x, torch.tensor([3, 3, 9, 12], dtype=torch.int32, device=device)


def test_wgrad_is_what_autograd_gives(problem):
    dy, x, ends = problem
    w = torch.zeros(4, 6, 10, device=x.device, requires_grad=True)
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        ((x[start:stop] @ w[expert].t()) * dy[start:stop]).sum().backward()
        start = stop
    got = grouped_wgrad(dy, x, ends)
    torch.testing.assert_close(got, w.grad, rtol=1e-5, atol=1e-5)
    assert bool((got[1] == 0).all())
    assert grouped_wgrad(dy.bfloat16(), x.bfloat16(), ends, torch.float32).dtype == torch.float32


def test_wgrad_is_an_op(problem):
    dy, x, ends = problem
    args = (dy, x, ends, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.microscale.grouped_wgrad.default, args, test_utils=("test_schema", "test_faketensor")
    )
    assert str(ms.explain("grouped_wgrad", dy, x, ends)).splitlines()[0].startswith("grouped_wgrad(fp32[13, 6]")


def test_wgrad_compiles_into_a_graph(problem):
    dy, x, ends = problem
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: grouped_wgrad(*args) * 2, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(dy, x, ends), grouped_wgrad(dy, x, ends) * 2)


def test_wgrad_of_nothing(device):
    none = torch.zeros(0, 5, device=device)
    ends = torch.zeros(3, dtype=torch.int32, device=device)
    assert bool((grouped_wgrad(none, none[:, :2], ends) == torch.zeros(3, 5, 2, device=device)).all())
    assert grouped_wgrad(none, none[:, :2], ends[:0]).shape == (0, 5, 2)


def test_wgrad_says_what_it_takes(problem):
    dy, x, ends = problem
    for args, text in (
        ((dy[1:], x, ends), r"takes \[T, N\] and \[T, K\]"),
        ((dy.double(), x.double(), ends), "float32, bfloat16 or float16"),
        ((dy, x.bfloat16(), ends), "float32, bfloat16 or float16"),
        ((dy, x, ends.long()), "int32"),
        ((dy, x, ends, torch.float64), "convert the result"),
    ):
        with pytest.raises(InputError, match=text):
            grouped_wgrad(*args)


# -- compiled, without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_grouped_kernels_compile(capability, tmp_path):
    """For tensor cores of each kind, within shared memory; on Hopper without local memory, loads ahead of their use."""
    rows = lines("tests.kernels.compiled_grouped", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    limit = {80: 163, 90: 227, 100: 227, 103: 227}.get(capability, 99) * 1024
    assert [r for r in rows if r["shared"] > limit] == []
    assert all(r["mma"] and r["copies"] for r in rows)
    wide_tiles = [r for r in rows if r["tile"][0] >= 64]
    native = {90: ["HGMMA"], 100: ["UTCHMMA"]}
    if capability in native:
        assert all(r["kinds"] == native[capability] for r in wide_tiles)
    if capability == 90:
        assert [r for r in rows if r["local"]] == []
        per_code = {r["format"]: r["loop"] for r in rows if r["kernel"] == "grouped_codes" and r["tile"][0] == 16}
        assert per_code["mxfp4"] < 6 and max(per_code.values()) < 10, per_code


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def tokens_and_experts(fmt, tokens, sizes, **changes):
    experts, columns, depth = sizes
    x = torch.randn(tokens, depth, device="cuda").bfloat16()
    w = torch.randn(experts, columns, depth, device="cuda").bfloat16()
    return x, ms.quantize(w, fmt, **changes)


def within_bound(got, a, b, ends):
    """Every group against FP64 on the device; zeros after the last end."""
    a64, b64, start = wide(a), wide(b), 0
    for expert, stop in enumerate(ends):
        out, size = a64[start:stop] @ b64[expert], a64[start:stop].abs() @ b64[expert].abs()
        limit = (1.25 * a64.shape[1] + 8) * 2.0**-23 * size
        limit = limit + (out.abs() + limit) * torch.finfo(got.dtype).eps / 2
        assert bool(((got[start:stop].double() - out).abs() <= limit).all()), expert
        start = stop
    assert bool((got[start:] == 0).all())


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", EXACT)
def test_public_door(fmt):
    ends = [3, 3, 40, 90]
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    x, w = tokens_and_experts(fmt, 96, (4, 200, 256))
    with dispatch.strict():
        assert ms.explain("grouped_matmul", x, w).chosen in ("triton.grouped_matmul", "triton.grouped_wgmma")
        got = ms.grouped_matmul(x, w.mT, offsets)
    within_bound(got, x, w.mT, ends)
    assert_same_bits(ms.grouped_matmul(x, w.mT, offsets), got)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["strided", "swizzle_32_4_4"])
def test_many_tokens_and_large_tiles(layout, monkeypatch):
    """By the copy engine, in several rounds of decoding, rows and columns that are no multiple of a tile."""
    ends = [1000, 1000, 1001, 4100]
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    x, w = tokens_and_experts("nvfp4", 4200, (4, 1000, 1032), layout=layout)
    whole = ms.grouped_matmul(x, w.mT, offsets)
    assert ms.explain("grouped_matmul", x, w).chosen == "triton.grouped_two_pass"
    within_bound(whole, x, w.mT, ends)
    monkeypatch.setattr(grouped, "WORKSPACE", 2 * 2 * 1000 * 1032)
    assert_same_bits(ms.grouped_matmul(x, w.mT, offsets), whole)
    monkeypatch.setattr(grouped, "FLATTEN", False)
    grouped.values_constants.cache_clear()
    assert_same_bits(ms.grouped_matmul(x, w.mT, offsets), whole)
    grouped.values_constants.cache_clear()
    monkeypatch.setattr(grouped, "_has_copies", lambda *args: False)
    within_bound(ms.grouped_matmul(x, w.mT, offsets), x, w.mT, ends)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "fmt"), [(70, "mxfp4"), (8200, "mxfp8")])
def test_a_captured_graph_follows_the_offsets(tokens, fmt):
    """What experts get is decided on the device, when the graph runs."""
    x, w = tokens_and_experts(fmt, tokens, (8, 256, 256))
    offsets = torch.full((8,), tokens, dtype=torch.int32, device="cuda")
    ms.grouped_matmul(x, w.mT, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ms.grouped_matmul(x, w.mT, offsets)
        grad = grouped_wgrad(out, x, offsets)
    for _ in range(3):
        ends = torch.randint(tokens + 1, (8,)).sort().values
        offsets.copy_(ends)
        graph.replay()
        within_bound(out, x, w.mT, ends.tolist())
        assert_same_bits(grad, grouped_wgrad(out, x, offsets))


@pytest.mark.gpu
def test_256_experts():
    counts = torch.randint(0, 4, (256,))
    ends = counts.cumsum(0)
    offsets = ends.to("cuda", torch.int32)
    x, w = tokens_and_experts("mxfp4", int(ends[-1]) + 5, (256, 128, 128))
    within_bound(ms.grouped_matmul(x, w.mT, offsets), x, w.mT, ends.tolist())


@pytest.mark.gpu
def test_memory_of_decoding_beforehand_is_bounded(monkeypatch):
    x, w = tokens_and_experts("mxfp8", 16384, (16, 1024, 1024))
    offsets = torch.arange(1024, 16385, 1024, dtype=torch.int32, device="cuda")
    ms.grouped_matmul(x, w.mT, offsets)
    monkeypatch.setattr(grouped, "WORKSPACE", 2 * 2**20 * 3)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = ms.grouped_matmul(x, w.mT, offsets)
    # one round is let go of after the next was made
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2 + 2 * grouped.WORKSPACE + 2**20


@pytest.mark.gpu
def test_wgrad_on_the_device():
    ends = [0, 700, 700, 1900]
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    dy, x = (torch.randn(2000, n, device="cuda").bfloat16() for n in (384, 520))
    x[1900:] = torch.nan
    with dispatch.strict():
        got = grouped_wgrad(dy, x, offsets, torch.float32)
    torch.testing.assert_close(got, reference_wgrad(dy, x, offsets, torch.float32), rtol=1e-3, atol=1e-2)
    assert bool((got[0] == 0).all() & (got[2] == 0).all())


@pytest.mark.gpu
def test_dgrad_takes_the_weights_as_they_are():
    ends = [100, 100, 900]
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    dy = torch.randn(900, 256, device="cuda").bfloat16()
    w = torch.randn(3, 256, 384, device="cuda").bfloat16()
    within_bound(ms.grouped_matmul(dy, w, offsets), dy, w, ends)
    q = ms.quantize(w, "mxfp8", axis=-2)
    within_bound(ms.grouped_matmul(dy, q, offsets), dy, q, ends)
