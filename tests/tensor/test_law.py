"""The subclass law: for every accepted op, op(q).dequantize() equals op(q.dequantize()); otherwise it raises."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import microscale as ms
from microscale.errors import InputError, UnsupportedOpError
from microscale.spec.format import ROW
from microscale.tensor import BlockScaledTensor

FORMATS = ms.list_formats()
LAYOUTS = ("strided", "swizzle_32_4_4")
BY_ROW = {f for f in FORMATS if ms.find_format(f).block == ROW}


def same(actual, expected):
    """Equal in shape and value, NaN equal to NaN; the result must still be quantized."""
    assert isinstance(actual, BlockScaledTensor), type(actual)
    values = actual.dequantize()
    assert actual.shape == expected.shape and values.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@st.composite
def tensors(draw):
    fmt = draw(st.sampled_from(FORMATS))
    rank = draw(st.integers(1, 4))
    block = ms.find_format(fmt).for_row(32).block
    sizes = [draw(st.integers(1, 4)) for _ in range(rank)]
    axis = draw(st.integers(-rank, -1))
    if rank == 2 and draw(st.booleans()):
        sizes[-1 - (axis == -1)] = draw(st.sampled_from([128, 130]))  # more than one swizzle tile
    sizes[axis] = draw(st.sampled_from([block, 2 * block, 3 * block, block + 5, 7, 1]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    return ms.quantize(x, fmt, axis=axis, layout=draw(st.sampled_from(LAYOUTS)))


def _slice_args(draw, q):
    dim = draw(st.integers(0, q.dim() - 1))
    unit = q.format.block if dim == q.dim() + q.block_axis and draw(st.booleans()) else 1
    start = draw(st.integers(0, max(0, q.shape[dim] // unit))) * unit
    stop = draw(st.sampled_from([start, start + unit, start + 2 * unit, q.shape[dim]]))
    return dim, start, stop, draw(st.sampled_from([1, 1, 2]))


def _index(draw, q):
    dims = draw(st.lists(st.integers(0, q.dim() - 1), min_size=1, max_size=2, unique=True))
    key = [slice(None)] * q.dim()
    for d in dims:
        key[d] = torch.tensor(draw(st.lists(st.integers(0, q.shape[d] - 1), min_size=3, max_size=3)))
    return tuple(key)


def _view(draw, q):
    choices = [(-1,), (1, *q.shape), (*q.shape, 1), (q.numel() // q.shape[-1], q.shape[-1])]
    if q.shape[-1] % 2 == 0:
        choices += [(*q.shape[:-1], 2, q.shape[-1] // 2), (*q.shape[:-1], q.shape[-1] // 2, 2)]
    if q.dim() > 1:
        choices += [(q.shape[0] * q.shape[1], *q.shape[2:]), (q.shape[1], q.shape[0], *q.shape[2:])]
    return draw(st.sampled_from(choices))


def ops(draw, q):
    """(name, op) with arguments drawn for q."""
    dim = draw(st.integers(0, q.dim() - 1))
    dim, start, stop, step = _slice_args(draw, q)
    key = [slice(None)] * q.dim()
    key[dim] = slice(start, stop, step)
    size = draw(st.integers(1, 3))
    index, view = _index(draw, q), _view(draw, q)
    order = draw(st.permutations(range(q.dim())))
    bools = torch.arange(q.shape[0]) % 2 == 0
    unit = q.format.block if dim == q.dim() + q.block_axis else 1
    return {
        "detach": lambda t: t.detach(),
        "alias": torch.ops.aten.alias,
        "clone": lambda t: t.clone(),
        "contiguous": lambda t: t.contiguous(),
        "clone_contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
        "to_bf16": lambda t: t.to(torch.bfloat16),
        "to_fp16": lambda t: t.to(torch.float16),
        "to_fp32": lambda t: t.to(torch.float32),
        "to_cpu": lambda t: t.to("cpu", copy=True),
        "slice": lambda t: t[tuple(key)],
        "narrow": lambda t: t.narrow(dim, start, max(0, min(stop, t.shape[dim]) - start)),
        "select": lambda t: t.select(dim, min(start, t.shape[dim] - 1)),
        "select_negative": lambda t: t.select(dim, -1),
        "index": lambda t: t[index],
        "index_bool": lambda t: t[bools],
        "index_select": lambda t: t.index_select(dim, torch.tensor([0, 0])),
        "t": lambda t: t.t(),
        "transpose": lambda t: t.transpose(dim, -1),
        "mT": lambda t: t.mT,
        "permute": lambda t: t.permute(order),
        "movedim": lambda t: t.movedim(dim, 0),
        "unsqueeze": lambda t: t.unsqueeze(dim),
        "unsqueeze_last": lambda t: t.unsqueeze(-1),
        "squeeze": lambda t: t.squeeze(),
        "squeeze_dim": lambda t: t.squeeze(dim),
        "unsqueeze_squeeze": lambda t: t.unsqueeze(0).squeeze(0),
        "expand": lambda t: t.expand(3, *t.shape),
        "expand_one": lambda t: t[:1].expand(4, *t.shape[1:]),
        "view": lambda t: t.reshape(view),
        "flatten": lambda t: t.flatten(),
        "flatten_lead": lambda t: t.flatten(0, -2) if t.dim() > 1 else t.flatten(),
        "unflatten": lambda t: t.unflatten(0, (1, -1)),
        "permute_reshape": lambda t: t.permute(order).reshape(-1),
        "split": lambda t: t.split(size * unit, dim)[-1],
        "chunk": lambda t: t.chunk(2, dim)[0],
        "split_sizes": lambda t: t.split([unit, t.shape[dim] - unit], dim)[1],
        "unbind": lambda t: t.unbind(dim)[-1],
        "cat_self": lambda t: torch.cat([t, t], dim),
        "cat_split": lambda t: torch.cat(t.split(size * unit, dim), dim),
        "stack": lambda t: torch.stack([t, t], dim),
        "hsplit_like": lambda t: t.transpose(0, -1).transpose(0, -1),
    }


@settings(max_examples=600)
@given(st.data())
def test_structural_ops_obey_the_law(data):
    q = data.draw(tensors())
    name, op = data.draw(st.sampled_from(sorted(ops(data.draw, q).items(), key=lambda kv: kv[0])))
    plain = q.dequantize()
    try:
        expected = op(plain)
    except (RuntimeError, IndexError):  # torch itself refuses: so must we
        with pytest.raises((RuntimeError, IndexError, InputError, UnsupportedOpError)):
            op(q)
        return
    try:
        actual = op(q)
    except UnsupportedOpError as error:
        assert error.hint, f"{name}: an error that names no way out"
        return
    same(actual, expected)


@settings(max_examples=150)
@given(st.data())
def test_two_ops_in_a_row_obey_the_law(data):
    q = data.draw(tensors())
    expected = q.dequantize()
    for _ in range(3):
        if q.numel() == 0 or q.dim() > 5:
            break
        _, op = data.draw(st.sampled_from(sorted(ops(data.draw, q).items(), key=lambda kv: kv[0])))
        with contextlib.suppress(InputError, UnsupportedOpError, RuntimeError, IndexError):
            result = op(q)
            expected = op(expected)
            same(result, expected)
            q = result


# What must work, so that "it raises" is no way around the law.
MUST = {
    "slice_rows": lambda t: t[1:3],
    "slice_rows_step": lambda t: t[::2],
    "slice_blocks": lambda t: t[:, 128:256],
    "slice_tail": lambda t: t[:, 128:],
    "select": lambda t: t[2],
    "index": lambda t: t[torch.tensor([3, 1])],
    "t": lambda t: t.t(),
    "t_slice": lambda t: t.t()[:128],
    "permute": lambda t: t.permute(1, 0),
    "cat_rows": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack([t, t]),
    "cat_stack_select": lambda t: torch.stack([t, t]).transpose(1, 2)[0],
    "split": lambda t: t.split(2)[1],
    "chunk_columns": lambda t: t[:, :256].chunk(2, 1)[1],
    "expand": lambda t: t.expand(2, *t.shape),
    "flatten_lead": lambda t: torch.stack([t, t]).flatten(0, 1),
    "unflatten_lead": lambda t: t.unflatten(0, (2, -1)),
    "unflatten_blocks": lambda t: t[:, :256].unflatten(1, (2, 128)),
    "flatten_blocks": lambda t: t[:, :256].reshape(-1),
    "cat_blocks": lambda t: torch.cat([t[:, :128], t], 1),
    "unsqueeze": lambda t: t.unsqueeze(1).squeeze(1),
}
CUTS_ROWS = {
    *("slice_blocks", "slice_tail", "t_slice", "chunk_columns", "unflatten_blocks", "flatten_blocks", "cat_blocks"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", MUST)
@pytest.mark.parametrize("fmt", FORMATS)
def test_ops_that_must_work(fmt, op, layout, device):
    x = torch.randn(6, 300, device=device)
    q = ms.quantize(x, fmt, layout=layout)
    if fmt in BY_ROW and op in CUTS_ROWS:  # a row is one block
        with pytest.raises(UnsupportedOpError, match=r"300.*\n.*dequantize\(\)"):
            MUST[op](q)
        return
    same(MUST[op](q), MUST[op](q.dequantize()))


@pytest.mark.parametrize("fmt", FORMATS)
def test_join_of_different_tensors(fmt):
    """Each part keeps its own outer scale, also along the blocked dimension."""
    a, b = ms.quantize(torch.randn(4, 256), fmt), ms.quantize(100 * torch.randn(4, 256), fmt)
    for dim in (0, 1):
        same(torch.cat([a, b], dim), torch.cat([a.dequantize(), b.dequantize()], dim))
    same(torch.stack([a, b], 1), torch.stack([a.dequantize(), b.dequantize()], 1))


@pytest.mark.parametrize("fmt", FORMATS)
def test_empty_like_copy_and_equal(fmt):
    q = ms.quantize(torch.randn(5, 140), fmt)
    target = torch.empty_like(q)
    target.copy_(q)
    same(target, q.dequantize())
    assert torch.equal(q, target) and torch.equal(q, q.dequantize())
    assert not torch.equal(q, ms.quantize(-torch.randn(5, 140), fmt))
    assert torch.equal(q.to_layout("swizzle_32_4_4"), q)


def test_refusals_name_the_way_out():
    q = ms.quantize(torch.randn(4, 64), "mxfp4")
    for op in (
        lambda: q + 1,
        lambda: q[:, 3:9],
        lambda: q[:, 5],
        lambda: q.view(8, 2, 16),
        lambda: q.sum(),
        lambda: torch.zeros(4, 64).copy_(q),
        lambda: q.copy_(torch.zeros(4, 64)),
        lambda: torch.cat([q, torch.zeros(4, 64)]),
        lambda: q.to(torch.bfloat16).to(torch.float32),
    ):
        with pytest.raises(UnsupportedOpError, match=r"dequantize|quantize"):
            op()


def test_views_share_memory():
    """detach, slice and transpose are views of the bytes, as for plain tensors."""
    q = ms.quantize(torch.randn(4, 64), "mxfp8")
    for view in (q.detach(), q[1:], q.t(), q.unsqueeze(0)):
        assert view.qdata.untyped_storage().data_ptr() == q.qdata.untyped_storage().data_ptr()
    assert q.clone().qdata.data_ptr() != q.qdata.data_ptr()
