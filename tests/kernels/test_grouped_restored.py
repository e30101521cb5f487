"""Kernels around prepared experts: the way out for grouped products, decoding, rows of E4M3; on doubles and a GPU."""

import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.reference import align_rows as reference_rows
from microscale.kernels.reference.dequantize import dequantize as reference_dequantize
from microscale.kernels.triton import align_fragments, dequantize, grouped, grouped_restored
from microscale.kernels.triton import fragments as decoded
from microscale.kernels.triton.align_rows import align_rows
from microscale.testing import assert_same_bits
from tests.kernels.products import parts
from tests.ops.test_prepared_experts import FITTING, HOPPER, ROWS, SOME, TOKENS, E, K, N, ends_of, experts

RESTORED = "triton.grouped_restored"


def told(name="mxfp4", axis=-2, capability=(8, 0), left="bfloat16", given=None, outer=None, out="bfloat16"):
    first = dispatch.Operand((64, 512), left)
    if given is not None:
        first = dispatch.Operand((64, 512), "uint8", ms.find_format(given), -1, "strided", None)
    second = dispatch.Operand((8, 512, 256), "uint8", ms.find_format(name), axis, "fragments", outer)
    return dispatch.explain_problem(dispatch.Problem("grouped_matmul", (first, second), "cuda", capability, None, out))


@pytest.mark.parametrize("name", FITTING)
def test_the_way_out_takes_them_on_every_gpu(name):
    """Of every format, contracted along either dimension, with tokens of any exact format; else the reference."""
    outer = None if ms.find_format(name).outer_scale is None else "vector"
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert told(name, capability=capability, outer=outer).chosen == RESTORED
        assert told(name, -1, capability, outer=outer, out="float32").chosen == RESTORED
        assert told(name, given="mxfp8", capability=capability, outer=outer).chosen == RESTORED
    assert told(name, outer="mixed").chosen == told(name, left="float16").chosen == "reference.grouped_matmul"
    assert told(name, capability=(7, 5)).chosen == "reference.grouped_matmul"
    assert told(name, -1, HOPPER, outer=outer).chosen == RESTORED  # the gradient of tokens


@pytest.fixture
def launches(monkeypatch):
    """What kernels for this layout are launched on, in the place of a GPU: by the reference, of each launch alone."""
    seen = []

    def decode(fmt, qdata, scale, out, total, half_depth):
        seen.append(out.shape[0])
        assert qdata.is_contiguous() and scale.is_contiguous() and qdata.shape[0] == out.shape[0]
        assert total == out.numel() // 4096 and half_depth == out.shape[1] // 2
        out.copy_(reference_dequantize(qdata, scale, None, fmt, out.shape[1], "fragments", torch.bfloat16))

    def of_format(fmt):
        def run(kernel, grid, args, constants, warps):
            if kernel.__name__ == "dequantize_fragments":
                return decode(fmt, *args)
            if kernel.__name__ == "fragment_row_scales":
                scale, powers, steps = args
                assert grid == powers.numel() // 64 and steps == scale.shape[-1] * fmt.block // 64
                shape = (*scale.shape[:-1], scale.shape[-1] * fmt.block_bytes)
                made = reference_rows.align_rows(scale.new_zeros(shape), scale, fmt, steps * 64, "fragments")
                return powers.copy_(made[1])
            words, scales, powers, out, steps, chunks = args
            seen.append(powers.shape[0])
            rows, columns = powers.shape[0], steps * 64
            assert grid == rows // 64 * chunks
            qdata, scale = (t.view(torch.uint8).view(rows, -1) for t in (words, scales))
            codes, made = reference_rows.align_rows(qdata, scale, fmt, columns, "fragments")
            assert torch.equal(made, powers.view(torch.float32))
            return out.view(torch.uint8).view(rows, columns).copy_(codes.view(torch.uint8))

        for module in (decoded, align_fragments):
            monkeypatch.setattr(module, "launch", run)
        return seen

    monkeypatch.setattr(decoded, "MOST_VALUES", 128 * K)  # of a launch, so that there are several
    return of_format


@pytest.mark.parametrize("name", SOME)
def test_dequantize_in_parts(name, launches):
    """`triton.dequantize_fragments` of experts, by launches that 32 bits can address; outer scales of experts."""
    q = experts(name, (E, 192, K))
    seen, made = launches(q.format.for_row(K)), q.to_layout("fragments")
    outers = [None, torch.tensor(3.0), torch.tensor([2.0, 0.5, 1.7]).view(E, 1, 1)]
    for outer in outers:
        for dtype in (torch.bfloat16, torch.float32):
            args = (outer, q.format, K, "fragments", dtype)
            got = decoded.dequantize(made.qdata, made.scale, *args)
            assert_same_bits(got, reference_dequantize(made.qdata, made.scale, *args))
    assert seen == 6 * [128, 128, 128, 128, 64]
    assert decoded.row_parts(64, 2**40) == [slice(0, 64)]


@pytest.mark.parametrize("name", ROWS)
def test_align_rows_in_parts(name, launches):
    """`align_fragments` of experts has the shape and bytes of the reference."""
    q = experts(name, (E, 64, K))
    seen, made = launches(q.format), q.to_layout("fragments")
    codes, powers = align_rows(made.qdata, made.scale, q.format, K, "fragments")
    want = reference_rows.align_rows(q.qdata, q.scale, q.format, K, "strided")
    assert codes.shape == (E, 64, K) and powers.shape == (E, 64, 1) and seen == [128, 64]
    assert_same_bits(codes.view(torch.uint8), want[0].view(torch.uint8))
    assert_same_bits(powers, want[1])


def test_rows_without_columns_have_the_smallest_scale():
    fmt = ms.find_format("mxfp4")
    for shape in ((3, 0), (2, 3, 0), (0, 0)):
        empty = torch.zeros(shape, dtype=torch.uint8)
        codes, powers = align_rows(empty, empty, fmt, 0, "strided")
        wanted = reference_rows.align_rows(empty, empty, fmt, 0, "strided")
        assert codes.shape == wanted[0].shape == shape
        assert_same_bits(powers, wanted[1])
        assert bool((powers == 2.0**-126).all())


def multiply(a, b, outers, offsets, out, first):
    """As `grouped._multiply`: the rows of some experts, by FP64 sums."""
    bounds = [0, *offsets.tolist()]
    for i in range(b.shape[0]):
        rows = slice(bounds[first + i], bounds[first + i + 1])
        sums = a[rows].double() @ b[i].double()
        sums = sums if outers.a is None else sums * outers.a[rows]
        out[rows] = (sums if outers.b is None else sums * outers.b[i]).to(out.dtype)


@pytest.mark.parametrize("name", SOME)
def test_the_way_out_on_doubles(name, launches, monkeypatch):
    """Decoded a few experts at a time, in both orientations, with outer scales of experts and of tokens."""
    monkeypatch.setattr(grouped, "_multiply", multiply)
    monkeypatch.setattr(grouped, "WORKSPACE", 2 * N * K * 2)  # two experts
    monkeypatch.setattr(dequantize, "dequantize", reference_dequantize)
    q = experts(name)
    launches(q.format)
    q = q.replace(outer_scale=torch.tensor([2.0, 0.5, 1.25]).view(E, 1, 1))
    made, ends = q.to_layout("fragments"), ends_of((5, 0, 25))
    x, dy = torch.randn(TOKENS, K).bfloat16(), torch.randn(TOKENS, N).bfloat16()
    qx = ms.quantize(x, "mxfp8").replace(outer_scale=torch.rand(TOKENS, 1) + 0.5)
    for a, b in ((x, made.mT), (dy, made), (qx, made.mT)):
        got = grouped_restored.grouped_matmul(parts(a), parts(b), ends, torch.float32)
        torch.testing.assert_close(got, ms.grouped_matmul(a, b, ends, torch.float32), rtol=1e-4, atol=1e-3)
    for shape in ((0, K), (TOKENS, K)):
        nothing = grouped_restored.grouped_matmul(x[: shape[0]], parts(made.mT), ends * 0, torch.bfloat16)
        assert nothing.shape == (shape[0], N)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITTING)
def test_reading_on_a_gpu(name):
    """Decoded bit for bit, in one launch and in several; E4M3 rows of those that have such; made there as here."""
    q = experts(name, (5, 192, 320), "cuda")
    made = q.to_layout("fragments")
    assert torch.equal(made.qdata.cpu(), experts(name, (5, 192, 320)).to_layout("fragments").qdata)
    for dtype in (torch.bfloat16, torch.float32):
        assert_same_bits(made.dequantize(dtype), q.dequantize(dtype))
        assert_same_bits(made.mT.dequantize(dtype), q.mT.dequantize(dtype))
    assert ms.explain("dequantize", made).chosen == "triton.dequantize_fragments"
    if name in ROWS and torch.cuda.get_device_capability() >= (8, 9):
        want, got = ms.align_rows(q), ms.align_rows(made)
        assert torch.equal(got.qdata, want.qdata) and torch.equal(got.scale, want.scale)


@pytest.mark.gpu
def test_reading_in_parts_on_a_gpu(monkeypatch):
    monkeypatch.setattr(decoded, "MOST_VALUES", 128 * 320)
    test_reading_on_a_gpu("mxfp4")
    test_reading_on_a_gpu("mxfp6")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITTING)
def test_the_way_out_on_a_gpu(name, monkeypatch):
    """Against FP64, within the bound of FP32 sums: tokens, their gradients, quantized tokens; in one part or more."""
    q = experts(name, (8, 192, 320), "cuda")
    made, sizes = q.to_layout("fragments"), (40, 0, 3, 100, 0, 17, 64, 1)
    w, ends = q.dequantize(torch.float32).double(), ends_of(sizes, "cuda")
    x, dy = (torch.randn(230, n, device="cuda").bfloat16() for n in (320, 192))
    qx = ms.quantize(x, "mxfp8")
    for workspace in (grouped.WORKSPACE, 3 * 2 * 192 * 320):
        monkeypatch.setattr(grouped, "WORKSPACE", workspace)
        by_row = made.outer_scale is not None and made.outer_scale.numel() > 8  # which is refused across the rows
        for a, b, w64 in ((x, made.mT, w.mT), (qx, made.mT, w.mT), *(() if by_row else ((dy, made, w),))):
            values = a.dequantize(torch.float32).double() if a is qx else a.double()
            got = grouped_restored.grouped_matmul(parts(a), parts(b), ends, torch.float32)
            start = 0
            for expert, size in enumerate(sizes):
                rows = values[start : start + size]
                limit = (1.25 * w64.shape[1] + 8) * 2.0**-23 * (rows.abs() @ w64[expert].abs()) + 1e-30
                assert bool(((got[start : start + size].double() - rows @ w64[expert]).abs() <= limit).all()), expert
                start += size
            assert not got[start:].any()
