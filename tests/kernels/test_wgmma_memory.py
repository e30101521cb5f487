"""`wgmma`'s launches by how operands lie in memory: what it takes as it is, what it copies, and what it remembers."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale.kernels.triton import properties, wgmma
from tests.kernels.products import check, parts
from tests.kernels.test_wgmma import Model, weights

NAMES = ["mxfp4", "mxfp6", "nvfp4", "nvfp4_row", "fp8_block128", "nf4"]


def shifted(t, count=1):
    """The same values, `count` elements into their memory."""
    held = torch.zeros(t.numel() + count, dtype=t.dtype)[count:].view(t.shape)
    return held.copy_(t)


def padded(t, count):
    """The same values, `count` more elements between rows."""
    held = torch.zeros(*t.shape[:-1], t.shape[-1] + count, dtype=t.dtype)[..., : t.shape[-1]]
    return held.copy_(t)


def apart(t):
    """The same matrices, something between them."""
    return torch.cat([t, t], 1)[:, : t.shape[1]]


def launched(model, call):
    """The result of a call, and what its first launch was given."""
    before = len(model.calls)
    return call(), model.calls[before][1]


@pytest.fixture
def model(monkeypatch):
    return Model(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_x_and_matrices_lie_in_any_way(name, model):
    model.format = ms.find_format(name)
    x, q = torch.randn(6, 512).bfloat16(), weights((136, 512), name)
    b, swizzled = parts(q.mT), parts(q.to_layout("swizzle_32_4_4").mT)
    for given in (x, padded(x, 8), padded(x, 3), shifted(x), x.T.contiguous().T, x.view(2, 3, 512), x[0]):
        got, args = launched(model, lambda given=given: wgmma.matmul(given, b, None, torch.bfloat16))
        check(got.view(-1, 136), given.reshape(-1, 512), q.mT)
        assert got.shape == (*given.shape[:-1], 136)
        taken = given.stride(-1) == 1 and given.reshape(-1, 512).stride(0) % 8 == 0 and given.data_ptr() % 16 == 0
        assert (args["x"].base.data_ptr() == given.data_ptr()) == taken
    for field, kept, lies in (
        ("qdata", True, (padded(q.qdata, 16).mT,)),
        ("qdata", False, (shifted(q.qdata).mT, padded(q.qdata, 3).mT, b.qdata.contiguous())),
        ("scale", True, (padded(q.scale, 4).mT, shifted(q.scale, 4).mT)),
        ("scale", False, (b.scale.contiguous(),)),
        ("scale", q.scale.element_size() == 4, (padded(q.scale, 1).mT, shifted(q.scale).mT)),
    ):
        for lie in lies:
            other = dataclasses.replace(b, **{field: lie})
            got, args = launched(model, lambda other=other: wgmma.matmul(x, other, None, torch.bfloat16))
            check(got, x, q.mT)
            pointer = args["codes"].base if field == "qdata" else args["scales"]
            assert (pointer.data_ptr() == lie.data_ptr()) == kept, (field, lie.stride())
    other = dataclasses.replace(swizzled, scale=shifted(swizzled.scale))
    check(wgmma.matmul(x, other, None, torch.bfloat16), x, q.mT)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_experts_lie_in_any_way(name, model):
    model.format = ms.find_format(name)
    x, q = torch.randn(20, 256).bfloat16(), weights((3, 40, 256), name)
    b, swizzled = parts(q.mT), parts(q.to_layout("swizzle_32_4_4").mT)
    offsets, columns = torch.tensor([8, 8, 20], dtype=torch.int32), torch.arange(1.0, 41) / 16
    for given in (
        *(dataclasses.replace(b, qdata=t.mT) for t in (apart(q.qdata), shifted(q.qdata), padded(q.qdata, 16))),
        *(dataclasses.replace(b, scale=t.mT) for t in (apart(q.scale), shifted(q.scale), padded(q.scale, 1))),
        *(dataclasses.replace(swizzled, scale=t) for t in (padded(swizzled.scale, 16), padded(swizzled.scale, 1))),
        *(dataclasses.replace(b, outer_scale=t) for t in (torch.tensor(0.4), columns.expand(3, 1, 40))),
    ):
        got = wgmma.grouped_matmul(x, given, offsets, torch.bfloat16)
        outer = given.outer_scale
        for expert, rows in ((0, slice(0, 8)), (2, slice(8, 20))):
            w = b.dequantize(torch.float32, with_outer=False)[expert]
            if outer is not None:
                w = w * outer.broadcast_to(3, 1, 40)[expert] if outer.numel() in (1, 120) else w * outer[expert]
            check(got[rows], x[rows], w)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [512, 4096])  # the sums at once, or of parts of K
def test_outer_scales_and_biases_of_every_shape(name, k, model):
    model.format = ms.find_format(name)
    x, q = torch.randn(3, k).bfloat16(), weights((40, k), name)
    b, values = parts(q.mT), q.replace(outer_scale=None).dequantize(torch.float32).double()
    columns = torch.rand(40) + 0.5
    for outer in (
        None,
        torch.tensor(0.37),
        torch.tensor([[0.37]]),
        columns[None],
        columns.repeat_interleave(2)[None, ::2],
    ):
        for bias in (None, torch.randn(40).bfloat16(), torch.randn(1), torch.randn(80)[::2]):
            got = wgmma.matmul(x, dataclasses.replace(b, outer_scale=outer), bias, torch.float32)
            w = values if outer is None else values * outer.double().reshape(-1, 1)
            check(got, x, w.T, None if bias is None else bias.expand(40))
    assert {known["SPLITS"] > 1 for *_, known in model.calls} == {k == 4096}


def test_plans_are_kept_and_addresses_are_not(model):
    """The same plan for other tensors that lie alike; each launch is of its own tensors."""
    model.format = ms.find_format("fp8_block128")
    wgmma.plan_of.cache_clear()
    seen = []
    for _ in range(3):
        x, q = torch.randn(2, 4096).bfloat16(), weights((40, 4096), "fp8_block128")
        got, args = launched(model, lambda x=x, q=q: wgmma.matmul(x, parts(q.mT), None, torch.bfloat16))
        check(got, x, q.mT)
        assert args["x"].base is x and args["codes"].base.data_ptr() == q.qdata.data_ptr()
        seen.append((args, x, q))
    for args, x, q in seen:  # later calls leave earlier descriptors alone
        assert args["x"].base is x and args["codes"].base.data_ptr() == q.qdata.data_ptr()
    assert wgmma.plan_of.cache_info().misses == 1
    assert len({id(known) for *_, known in model.calls}) == 1  # `launch` knows constants by their identity
    plan = wgmma.plan_of.__wrapped__(
        model.format, wgmma.tile_of(model.format, 2, 4096, torch.bfloat16), (2, 40, 4096, 0),
        ((4096, 1), (2048, 1), (1, 32), (0, 0, 0)), False, (False, False, False), properties.multiprocessors(x.device),
    )  # fmt: skip
    held = [*plan, *plan.x.values(), *plan.codes.values(), *plan.constants.values()]
    assert not any(isinstance(t, torch.Tensor) for t in held)


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
def test_nothing_is_launched_for_no_rows_or_columns(shape, model):
    x, q = torch.randn(shape).bfloat16(), weights((8, 256), "mxfp8")
    assert wgmma.matmul(x, parts(q.mT), None, torch.float32).shape == (*shape[:-1], 8)
    b = parts(q.mT)
    none = dataclasses.replace(b, qdata=b.qdata[:, :0], scale=b.scale[:, :0])
    assert wgmma.matmul(torch.randn(3, 256).bfloat16(), none, None, torch.float32).shape == (3, 0)
    assert not model.calls
