"""Grouped rows: each group's amax and outer scale are those of quantizing it alone; nothing asks the host."""

import pytest
import torch

import microscale as ms
from microscale.errors import InputError
from microscale.testing import assert_same_bits

ENDS = ([3, 3, 9, 12], [0, 13], [13], [5, 5, 5, 13], [])


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_group_amax(ends, dtype, device):
    x = torch.randn(13, 64, device=device) * torch.logspace(-3, 3, 13, device=device)[:, None]
    x[2, 5], x[7, 1] = torch.inf, torch.nan
    offsets = torch.tensor(ends, dtype=dtype, device=device)
    got = ms.group_amax(x.bfloat16(), offsets)
    assert got.shape == (13, 1) and got.dtype == torch.float32
    start = 0
    for stop in (*ends, 13):
        if stop > start:
            group = x[start:stop].bfloat16().float()
            amax = torch.where(group.isfinite(), group.abs(), 0).max()
            assert bool((got[start:stop] == amax).all())
        start = stop


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4_4over6", "nvint4"])
def test_groups_quantize_as_they_would_alone(fmt, device):
    x = torch.randn(96, 64, device=device).bfloat16() * torch.logspace(-2, 2, 96, device=device).bfloat16()[:, None]
    ends = torch.tensor([32, 32, 80, 96], dtype=torch.int32, device=device)
    whole = ms.quantize(x, fmt, amax=ms.group_amax(x, ends))
    for start, stop in ((0, 32), (32, 80), (80, 96)):
        alone = ms.quantize(x[start:stop], fmt)
        assert_same_bits(whole.qdata[start:stop], alone.qdata), assert_same_bits(whole.scale[start:stop], alone.scale)
        assert bool((whole.outer_scale[start:stop] == alone.outer_scale).all())


def test_empty_and_compiled(device):
    ends = torch.tensor([0, 0], dtype=torch.int32, device=device)
    assert ms.group_amax(torch.empty(0, 32, device=device), ends).shape == (0, 1)
    x = torch.randn(8, 32, device=device)
    compiled = torch.compile(ms.group_amax, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, ends), ms.group_amax(x, ends))


@pytest.mark.gpu
def test_no_host_sync():
    """It can be captured in a CUDA graph, which a synchronisation would break, and follows the offsets on replay."""
    x = torch.randn(64, 256, device="cuda").bfloat16()
    ends = torch.tensor([16, 64], dtype=torch.int32, device="cuda")
    ms.quantize(x, "nvfp4", amax=ms.group_amax(x, ends))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = ms.quantize(x, "nvfp4", amax=ms.group_amax(x, ends))
    ends.copy_(torch.tensor([48, 64], dtype=torch.int32, device="cuda"))
    graph.replay()
    wanted = ms.quantize(x, "nvfp4", amax=ms.group_amax(x, ends))
    assert_same_bits(q.qdata, wanted.qdata), assert_same_bits(q.outer_scale, wanted.outer_scale)


def test_errors(device):
    x, ends = torch.randn(4, 32, device=device), torch.tensor([4], device=device)
    for bad, offsets, what in (
        (x[None], ends, "rank"),
        (x, ends[None], "offsets"),
        (x, ends.float(), "offsets"),
        (x.double(), ends, "float32"),
    ):
        with pytest.raises(InputError, match=what):
            ms.group_amax(bad, offsets)
