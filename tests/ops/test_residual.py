"""A residual joins a product before its one rounding."""

import dataclasses

import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.errors import InputError
from microscale.ops import library
from microscale.testing import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(device="cpu", dtype=torch.bfloat16, m=5, n=48, k=64):
    x = torch.randn(m, k, device=device).to(dtype)
    return x, ms.quantize(torch.randn(n, k, device=device).to(dtype), "mxfp4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
def test_added_in_fp32_and_rounded_once(dtype, out_dtype, device):
    x, q = operands(device)
    bias, residual = torch.randn(48, device=device).to(dtype), torch.randn(5, 48, device=device).to(dtype)
    wide = ms.matmul(x, q.t(), out_dtype=torch.float32)
    for b in (None, bias):
        got = ms.matmul(x, q.t(), b, out_dtype, residual=residual)
        want = ((wide if b is None else wide + b.float()) + residual.float()).to(got.dtype)
        assert got.dtype == (torch.bfloat16 if out_dtype is None else out_dtype)
        if device.type == "cpu":
            assert_same_bits(got, want)
        else:  # cuBLAS may add in another order where it adds the bias as well
            torch.testing.assert_close(got, want, rtol=torch.finfo(got.dtype).eps, atol=1e-4)


def test_one_rounding_is_not_two():
    """The sum of a rounded product and a residual differs where this does not."""
    x, q = operands(m=64)
    residual = torch.randn(64, 48).bfloat16()
    once, twice = ms.matmul(x, q.t(), residual=residual), ms.matmul(x, q.t()) + residual
    exact = x.double() @ q.dequantize(torch.float32).double().t() + residual.double()
    assert not torch.equal(once, twice)
    assert float((once.double() - exact).abs().sum()) < float((twice.double() - exact).abs().sum())


def test_strides_ranks_and_vectors(device):
    x, q = operands(device)
    wide = ms.matmul(x, q.t(), out_dtype=torch.float32)
    turned = torch.randn(48, 5, device=device).bfloat16().t()
    assert_same_bits(ms.matmul(x, q.t(), residual=turned), (wide + turned.float()).bfloat16())
    some = torch.randn(1, 1, 48, device=device).bfloat16().expand(2, 5, 48)
    batch = x.expand(2, 5, 64).contiguous()
    assert_same_bits(ms.matmul(batch, q.t(), residual=some), (wide + some.float()).bfloat16())
    row, one = x[0], torch.randn(48, device=device).bfloat16()
    got = ms.matmul(row, q.t(), one, residual=one)
    alone = ms.matmul(row, q.t(), out_dtype=torch.float32)
    assert got.shape == (48,) and got.dtype == torch.bfloat16
    assert_same_bits(got, (alone + one.float() + one.float()).bfloat16())
    stack = ms.quantize(torch.randn(3, 48, 64, device=device).bfloat16(), "nvfp4")
    residual = torch.randn(3, 5, 48, device=device)
    wide = ms.matmul(batch[:1], stack.mT, out_dtype=torch.float32)
    assert_same_bits(ms.matmul(batch[:1], stack.mT, residual=residual), (wide + residual).bfloat16())


def test_empty(device):
    x, q = operands(device, m=0)
    assert ms.matmul(x, q.t(), residual=torch.zeros(0, 48, device=device)).shape == (0, 48)


def test_what_it_refuses():
    x, q = operands()
    for bad in (torch.zeros(48), torch.zeros(1, 48), torch.zeros(5, 48).double(), torch.zeros(5, 48).int()):
        with pytest.raises(InputError, match="residual") as caught:
            ms.matmul(x, q.t(), residual=bad)
        assert "just that shape" in caught.value.hint
    with pytest.raises(InputError, match="residual"):
        ms.matmul(x, q.t(), residual=ms.quantize(torch.zeros(5, 48), "mxfp4"))


def test_kernels_are_asked_for_fp32(monkeypatch):
    """Selection knows both dtypes: what the kernel writes, and what comes of it; neither is cached for the other."""
    seen, describe = [], library.product_problem
    monkeypatch.setattr(library, "product_problem", lambda *args: seen.append(describe(*args)) or seen[-1])
    monkeypatch.setattr(dispatch, "_by_facts", {})
    x, q = operands()
    ms.matmul(x, q.t(), out_dtype=torch.float32)
    ms.matmul(x, q.t(), residual=torch.zeros(5, 48).bfloat16())
    ms.matmul(x, q.t(), residual=torch.zeros(5, 48))
    ms.matmul(x, q.t(), out_dtype=torch.float16, residual=torch.zeros(5, 48))
    assert [(p.out_dtype, p.rounded) for p in seen] == [
        ("float32", None), ("float32", "bfloat16"), ("float32", "float16"),
    ]  # fmt: skip
    assert len({p.key() for p in seen}) == 3


def test_the_op(device):
    x, q = operands(device)
    bias, residual = torch.randn(48, device=device), torch.randn(5, 48, device=device).bfloat16()
    b = (q.qdata.t(), q.scale.t(), None, dataclasses.replace(q.meta, axis=-2).pack(), 64)
    args = (x, None, None, "", 0, *b, bias, torch.bfloat16, residual)
    torch.library.opcheck(torch.ops.microscale.matmul.default, args)
    assert_same_bits(torch.ops.microscale.matmul(*args), ms.matmul(x, q.t(), bias, residual=residual))


def test_compiled(device):
    torch.compiler.reset()
    x, q = operands(device)
    residual = torch.randn(5, 48, device=device).bfloat16()

    def block(t, r):
        return ms.matmul(t, q.t(), residual=r)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 3):
        assert_same_bits(compiled(x[:rows], residual[:rows]), block(x[:rows], residual[:rows]))


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("m", [1, 16, 300])
def test_large_on_a_gpu(m, prepared):
    """By the kernel for the product that there is, and one pass more; the same bits twice."""
    x, q = operands("cuda", m=m, n=1024, k=2048)
    weight = ms.prepare(q) if prepared else q
    residual = torch.randn(m, 1024, device="cuda").bfloat16()
    with dispatch.strict():
        got = ms.matmul(x, weight.t(), residual=residual)
        assert torch.equal(got, ms.matmul(x, weight.t(), residual=residual))
    wide = ms.matmul(x, weight.t(), out_dtype=torch.float32)
    assert_same_bits(got, (wide + residual.float()).bfloat16())
