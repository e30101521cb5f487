"""Experts in layout `fragments` on Hopper: which are taken, the schedule, what launches get, what compiles, a GPU."""

import dataclasses
import types

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.reference import dequantize as reference
from microscale.kernels.triton import fragments_wide, jit_wgmma
from microscale.kernels.triton import grouped_fragments_wide as grouped
from microscale.numerics import fragments
from microscale.testing import assert_same_bits
from tests.kernels.processes import fast, lines
from tests.kernels.products import check, parts
from tests.kernels.test_fragments import BLOCKED
from tests.kernels.test_wgmma import hopper, weights

NAME = "triton.grouped_fragments_wide"


def prepared(q):
    """Experts [E, N, K], transposed, as kernels get them in layout fragments."""
    codes, scale = fragments.order(q.qdata.flatten(0, 1), q.scale.flatten(0, 1), q.format, q.shape[-1])
    codes, scale = codes.view(q.qdata.shape).mT, scale.view(q.scale.shape).mT
    return dataclasses.replace(parts(q.mT), qdata=codes, scale=scale, layout="fragments")


# -- what is taken -----------------------------------------------------------------------------------------------------


def explained(tokens, experts, capability=(9, 0)):
    problem = dispatch.Problem("grouped_matmul", (tokens, experts), "cuda", capability, None, "bfloat16")
    return dispatch.explain_problem(problem)


def operand(shape, fmt=None, **facts):
    if fmt is None:
        return dispatch.Operand(shape, "bfloat16")
    return dispatch.Operand(shape, "uint8", ms.find_format(fmt), facts.pop("axis", -2), **facts)


def made(fmt, experts=8, **facts):
    return operand((experts, 4096, 1024), fmt, layout="fragments", **facts)


def test_it_is_chosen_on_hopper():
    for name in BLOCKED:
        for tokens in (1, 512, 65536):
            for outer in (None, "scalar", "vector"):
                assert explained(operand((tokens, 4096)), made(name, outer=outer)).chosen == NAME
        quantized = operand((512, 4096), "mxfp8", axis=-1, outer="vector")
        assert explained(quantized, made(name)).chosen == NAME
    assert explained(operand((512, 4096)), made("mxfp4"), (10, 0)).chosen != NAME
    assert explained(operand((512, 4096)), operand((8, 4096, 1024), "mxfp4")).chosen != NAME


def test_refusals_say_why():
    x = operand((512, 4096))
    for tokens, experts, why in (
        (x, operand((8, 4096, 1024), "mxfp4"), "microscale.prepare"),
        (x, made("fp8_block128"), "8-bit scales"),
        (operand((512, 4096), "mxfp4", axis=-2), made("mxfp4"), "along K"),
        (operand((512, 4096), "nvfp4", axis=-1, outer="mixed"), made("mxfp4"), "the same all along K"),
        (x, made("nvfp4", outer="mixed"), "the same all along K"),
        (x, made("mxfp4", 1025), "at most 1024 experts"),
        (operand((0, 4096)), made("mxfp4"), "needs tokens"),
        (operand((1 << 20, 4096)), made("mxfp4"), "2**31 elements"),
    ):
        told = explained(tokens, experts)
        assert any(why in r.reason for r in told.refused if r.kernel == NAME), (why, str(told))


def test_tiles():
    for name in BLOCKED:
        fmt = ms.find_format(name)
        six = fmt.element.width == 6
        for tokens, experts, rows in ((1, 8, 32), (256, 8, 32), (257, 8, 64), (1024, 8, 128), (1025, 8, 256)):
            assert grouped.tile_of(fmt, tokens, experts).rows == (min(rows, 128) if six else rows)
        assert grouped.tile_of(fmt, 1, 512).resident == grouped.tile_of(fmt, 1, 128).resident - 1


# -- the schedule ------------------------------------------------------------------------------------------------------


class Pointer:
    def __init__(self, held, at=0):
        self.held, self.at = held, at

    def __add__(self, n):
        return Pointer(self.held, self.at + n)


def _load(pointer, mask, other):
    at, mask = torch.as_tensor(pointer.at), torch.as_tensor(mask)
    return torch.where(mask, pointer.held[at.clamp(min=0)], other)


def _least(a, b):
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _most(a, b):
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


LANGUAGE = types.SimpleNamespace(
    load=_load, minimum=_least, maximum=_most, where=torch.where, sum=torch.sum, max=torch.amax, int32=torch.int32,
    arange=lambda start, stop, layout: torch.arange(start, stop), BlockedLayout=lambda *_: None,
    associative_scan=lambda values, axis, add: values.cumsum(axis),
)  # fmt: skip


@pytest.mark.parametrize(
    "ends", [[5, 5, 70, 333], [0, 0, 0, 0], [0, 400, 400, 400], [1, 2, 3, 4], [300, 350, 999, 999]]
)
@pytest.mark.parametrize("rows", [32, 256])
def test_the_schedule_covers_everything_once(ends, rows, monkeypatch):
    """By the jitted functions themselves, on torch: each row of each group, each tile of columns, by one program."""
    monkeypatch.setattr(jit_wgmma, "gl", LANGUAGE)
    for name in ("_end", "_add"):
        monkeypatch.setattr(jit_wgmma, name, getattr(jit_wgmma, name).fn)
    tokens, columns, experts = 400, 320, len(ends)
    tile = fragments_wide.Tile(rows, 8, 1, 1, 4)
    plan = grouped.plan_of(
        ms.find_format("mxfp4"), tile, (tokens, columns, 64, experts), (0, 0), (False, 0), sms=2
    )  # fmt: skip
    offsets, tiles = Pointer(torch.tensor(ends)), -(-columns // tile.columns)
    upto, row_tiles = jit_wgmma._summed_tiles.fn(offsets, experts, tokens, rows, plan.constants["LANES"], 8)
    total = int(row_tiles) * tiles
    seen = torch.zeros(tokens, tiles, dtype=torch.int32)
    owner = torch.full((tokens,), -1)
    start = 0
    for group, stop in enumerate(min(e, tokens) for e in ends):
        owner[start:stop] = group
        start = stop
    for program in range(plan.programs):
        for at in range(program, total, plan.programs):
            group, row, stop, column, *_ = jit_wgmma._place.fn(
                at, upto, offsets, experts, tokens, tiles, 1, rows, tile.columns, 8, True, 1
            )
            last = min(int(row) + rows, int(stop))
            assert last > row and int(row) + rows <= plan.room and int(column) % tile.columns == 0
            assert (owner[int(row) : last] == int(group)).all()
            seen[int(row) : last, int(column) // tile.columns] += 1
    assert torch.equal(seen, (owner >= 0).int()[:, None].expand_as(seen))
    past = jit_wgmma._place.fn(total + 7, upto, offsets, experts, tokens, tiles, 1, rows, tile.columns, 8, True, 1)
    assert 0 <= int(past[0]) < experts  # past the end only a group whose weight can be read


# -- what a launch is given --------------------------------------------------------------------------------------------


class Model:
    """What the two kernels do, read off their arguments, in FP64 on the CPU; rows that x has no values for are NaN."""

    def __init__(self, fmt):
        self.format, self.launched = fmt, []

    def __call__(self, kernel, grid, args, known, warps):
        self.launched.append((kernel.fn.__name__, grid))
        if self.launched[-1][0] == "order_pairs":
            x, held, pairs = args
            assert pairs * 2 == x.numel() and x.is_contiguous() and grid * known["SIZE"] >= pairs
            held.fill_(torch.nan).view(-1)[: 2 * pairs] = x.view(-1)
            return
        assert {*kernel.arg_names[len(args) :]} == {*known} - {"launch_pdl", "maxnreg"} and warps == known["WARPS"]
        given = dict(zip(kernel.arg_names, args, strict=False))
        x, out, rows, columns = (given[n] for n in ("x", "out", "rows", "columns"))
        assert x.block_shape == [known["N"], 64] and given["beyond"] == x.shape[0] == rows + known["N"]
        assert given["offsets"].is_contiguous() and given["offsets"].shape == (given["groups"],)
        w, start = self.matrices(given), 0
        out[:] = 0
        for group, stop in enumerate(given["offsets"].tolist()):
            sums = x.base[start:stop].double() @ w[group].T
            if known["A_OUTER"]:
                outer = given["a_outer"]
                sums *= outer.as_strided((rows,), (given["a_outer_row"],), outer.storage_offset())[start:stop, None]
            if known["OUTER"]:
                outer, shape = given["b_outer"], (given["groups"], columns)
                strides = given["b_outer_group"], known["OUTER"] - 1
                sums *= outer.as_strided(shape, strides, outer.storage_offset())[group]
            out[start:stop] = sums.to(out.dtype)
            start = max(start, stop)

    def matrices(self, given):
        flat = [given[n].as_strided((given["groups"] * given["columns"], given[n].shape[-1]), (given[n].shape[-1], 1))
                for n in ("words", "scales")]  # fmt: skip
        depth = given["steps"] * 64
        codes, scale = fragments.restore(*flat, self.format, depth)
        values = reference.dequantize(codes, scale, None, self.format, depth, "strided", torch.float32)
        return values.double().view(given["groups"], given["columns"], depth)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvfp4_row", "mxfp6", "mxfp8", "mxint8"])
def test_launches_get_what_the_kernels_take(name, monkeypatch):
    """Odd rows, views of tokens, outer scales of all, of experts, of rows and of tokens; ends past each other."""
    model = Model(ms.find_format(name))
    monkeypatch.setattr(fragments_wide, "launch", model)
    monkeypatch.setattr(grouped, "launch", model)
    for ends in ([3, 3, 20], [0, 0, 0], [21, 21, 24]):
        flat, q = torch.randn(24 * 128 + 1).bfloat16(), weights((3, 192, 128), name)
        offsets = torch.tensor(ends, dtype=torch.int32)
        for x in (flat[1:].view(24, 128), flat[:-1].view(128, 24).T):
            got = grouped.grouped_matmul(x, prepared(q), offsets, torch.float32)
            assert len(model.launched) == 2 and model.launched.pop()[1] > 0 and model.launched.pop()
            checked(got, x, q, ends)
    if name == "nvfp4":  # one number for all
        q = ms.quantize(torch.randn(3, 192, 128).bfloat16(), name)
        checked(grouped.grouped_matmul(x, prepared(q), offsets, torch.bfloat16), x, q, ends)
    factors = torch.rand(24, 1) + 0.5
    monkeypatch.setattr(grouped, "values_of", lambda a: (a, factors))
    plain = grouped.grouped_matmul(x.contiguous(), prepared(q), offsets, torch.float32)
    for outer in (factors, torch.tensor(2.0).expand(24, 1)):
        monkeypatch.setattr(grouped, "values_of", lambda a, outer=outer: (a, outer))
        got = grouped.grouped_matmul(x.contiguous(), prepared(q), offsets, torch.float32)
        torch.testing.assert_close(got * factors, plain * outer)


def checked(got, x, q, ends):
    """Each group's rows against its expert, and zeros after the last one."""
    start = 0
    for expert, stop in enumerate(ends):
        if stop > start:
            check(got[start:stop], x[start:stop], q.select(0, expert).mT)
        start = max(start, stop)
    assert not got[start:].any()


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", fast(["mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8"]))
def test_it_compiles(name):
    """Without local memory; products in flight while the next operand is decoded, none of which loses its operand."""
    found = lines("tests.kernels.compiled_grouped_fragments_wide", name)
    assert len(found) == 16
    for f in found:
        assert not f["hazards"] and f["local"] == 0 and not f["serialized"] and f["mma"] >= 8 and f["copies"], f
        assert f["waits"], f
        resident = f["resident"]
        assert f["registers"] * f["threads"] * resident <= 65536 and (f["shared"] + 1024) * resident <= 228 << 10, f


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.parametrize("name", BLOCKED)
def test_groups_are_within_the_bound(name):
    """Ragged and empty groups, tails of one row, rows after the end, plain and quantized rows; the same bits twice."""
    for ends, n, k, quantized in (
        ([40, 40, 340, 341, 430], 192, 320, None), ([3, 5, 6, 10, 16], 448, 512, "nvfp4_row")
    ):  # fmt: skip
        x, q = torch.randn(ends[-1] + 5, k, device="cuda").bfloat16(), weights((5, n, k), name, "cuda")
        on_a_gpu(x if quantized is None else ms.quantize(x, quantized), q, ends, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
def test_every_tile_is_within_the_bound(name):
    """Tiles for few and many rows; one step of K, one group, one row; no rows but after the end; FP32 results."""
    for ends, n, k, dtype in (
        ([0, 0, 0, 7, 7], 128, 64, torch.float32), ([1], 64, 256, torch.float16), ([0, 0, 0], 64, 128, torch.bfloat16),
        ([257, 514, 514, 1025, 2306], 320, 1024, torch.bfloat16), ([0, 130, 260], 192, 192, torch.float32),
    ):  # fmt: skip
        rows = ends[-1] + (5 if len(ends) > 1 else 0)
        x, q = torch.randn(rows, k, device="cuda").bfloat16(), weights((len(ends), n, k), name, "cuda")
        on_a_gpu(x, q, ends, dtype)


def on_a_gpu(x, q, ends, dtype):
    args = parts(x), prepared(q), torch.tensor(ends, dtype=torch.int32, device="cuda"), dtype
    got = grouped.grouped_matmul(*args)
    checked(got, x, q, ends)
    assert_same_bits(grouped.grouped_matmul(*args), got)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
def test_a_graph_takes_other_ends():
    """Ends are read on the device: a captured call is replayed with others. More tiles than programs, too."""
    q = weights((7, 1536, 256), "nvfp4", "cuda")
    x, made_of = torch.randn(3000, 256, device="cuda").bfloat16(), prepared(q)
    offsets = torch.tensor([100, 200, 300, 400, 500, 600, 3000], dtype=torch.int32, device="cuda")
    grouped.grouped_matmul(x, made_of, offsets, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = grouped.grouped_matmul(x, made_of, offsets, torch.bfloat16)
    for ends in ([1, 1, 1, 2990, 2990, 2999, 2999], [0, 700, 701, 702, 1500, 1500, 3000], [0] * 7):
        offsets.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        checked(got, x, q, ends)
