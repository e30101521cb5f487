"""Counters of programs that share tiles: whose they are, in streams and in graphs. On a GPU: that they count."""

import functools
import types

import pytest
import torch

import microscale as ms
from microscale.kernels.triton import arrivals
from microscale.kernels.triton.arrivals import COUNT, counters


@pytest.fixture
def streams(monkeypatch):
    """A stand-in for torch's streams: which is current, and the number of the capture it takes part in (0: none)."""
    now = types.SimpleNamespace(stream=1, capture=0, refused=False)
    for name in ("_sets", "_spare", "_made"):
        monkeypatch.setattr(arrivals, name, {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda place: now.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capture > 0)
    monkeypatch.setattr(arrivals, "_capture_id", lambda stream: now.capture or None)
    zeros = functools.partial(torch.zeros, dtype=torch.int32)
    monkeypatch.setattr(arrivals, "_zeros", lambda place, count: None if now.refused else zeros(count))
    return now


def here(tiles=10):
    return counters(torch.device("cpu"), tiles)


def test_a_stream_keeps_its_own(streams):
    first = here()
    assert here() is first and first.numel() == COUNT and not first.any()
    streams.stream = 2
    assert here() is not first
    streams.stream = 1
    assert here() is first


def test_a_graph_keeps_its_own(streams):
    """Of the same stream too, since it may be replayed in any; what graphs have is never given out again."""
    made = [here()]
    for capture in (7, 8, 9):
        streams.capture = capture
        for stream in (1, 2, 1):
            streams.stream = stream
            found = here()
            assert here() is found
            made.append(found)
    assert len({t.data_ptr() for t in made}) == 7 and len(arrivals._sets) == 3


def test_where_no_set_is_left(streams, monkeypatch):
    """Zeros of the call's own: before anything ran, past the limit, for too many tiles, where graphs look the same."""
    own = (5,)
    streams.capture = 3
    assert here(5).shape == own
    streams.capture = 0
    monkeypatch.setattr(arrivals, "_MOST", arrivals._TOGETHER)
    assert here(5).shape == (COUNT,) and here(COUNT + 1).shape == (COUNT + 1,)
    for capture in range(1, arrivals._TOGETHER):
        streams.capture = capture
        assert here(5).shape == (COUNT,)
    streams.capture = 1000
    assert here(5).shape == own
    streams.capture = 0
    assert here(5).shape == (COUNT,)  # it has one
    streams.capture = 1001
    assert here(5).shape == own
    monkeypatch.setattr(arrivals, "_MOST", 1000)
    streams.capture = 0
    here()
    streams.capture = 1002
    assert here(5).shape == (COUNT,)
    monkeypatch.setattr(arrivals, "_capture_id", lambda stream: None)
    assert here(5).shape == own


def test_where_the_driver_gives_no_memory(streams):
    streams.refused = True
    assert here(5).shape == (5,) and here(5) is not here(5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_streams_and_graphs_at_once(rows):
    """Products in two streams and two graphs, all at the same time, are what they are alone; counters are 0 after."""
    w = ms.prepare(ms.quantize(torch.randn(1024, 4096, device="cuda").bfloat16(), "mxfp4"))
    inputs = [torch.randn(rows, 4096, device="cuda").bfloat16() for _ in range(4)]
    alone = [ms.matmul(x, w.t()) for x in inputs]
    graphs, results = [], [None] * 4
    for i in (2, 3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                results[i] = ms.matmul(inputs[i], w.t())
        graphs.append(graph)
    side = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(5):
        for i, stream in enumerate(side):
            with torch.cuda.stream(stream):
                if i < 2:
                    for _ in range(20):
                        results[i] = ms.matmul(inputs[i], w.t())
                else:
                    graphs[i - 2].replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, alone, strict=True))
    sets = [*arrivals._sets.values(), *(t for spare in arrivals._spare.values() for t in spare)]
    assert sets and not any(bool(t.any()) for t in sets)
    assert len({t.data_ptr() for t in sets}) == len(sets) and arrivals._driver() is not None


@pytest.mark.gpu
def test_a_compiled_model_in_graphs():
    """torch.compile's own graphs, which look for memory of theirs that something else keeps."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 1024))
    model = model.to("cuda", torch.bfloat16)
    ms.quantize_(model, "mxfp4_weight_only")
    ms.prepare_(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            for rows in (1, 8):
                x = torch.randn(rows, 1024, device="cuda").bfloat16()
                torch.compiler.cudagraph_mark_step_begin()
                torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
