"""Layout `fragments`: nothing is lost, every code and scale is decoded exactly, and the product is the product."""

import dataclasses

import numpy as np
import pytest
import torch

import microscale as ms
from microscale import dispatch
from microscale.kernels.triton import fragment_tuning, ptx_decode
from microscale.kernels.triton import fragments as decode_gemm
from microscale.numerics import codec, fragments, layout
from microscale.ops.late import late
from microscale.testing import assert_same_bits, assert_same_quantized
from tests.kernels import ptx_emulator
from tests.kernels.processes import lines
from tests.kernels.products import parts

FITTING = [f for f in ms.list_formats() if fragments.fits(ms.find_format(f).for_row(1024), 64, 1024)]
BLOCKED = [f for f in FITTING if fragments.fits(ms.find_format(f), 64, 1024)]  # not with one scale for a row
ARCHITECTURES = (80, 90, 100, 120)


def weight(name: str, rows: int = 128, columns: int = 192, device: str = "cpu") -> ms.BlockScaledTensor:
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(rows, columns, generator=generator, device=device) * 0.05
    w[3] *= 30
    w[4] *= 1e-20
    w[5] = 0
    return ms.quantize(w.to(torch.bfloat16), name)


def test_which_formats_fit():
    """All shipped ones but codebooks and FP32 scales of less than a row."""
    assert set(ms.list_formats()) - set(FITTING) == {"fp8_block128", "nf4"}


@pytest.mark.parametrize("name", FITTING)
def test_reordering_loses_nothing(name):
    """Prepared and back is the same tensor; every reading of the prepared one is that of the plain one."""
    q = weight(name)
    made = ms.prepare(q)
    assert made.scale_layout == "fragments" and made.stored_bytes == q.stored_bytes
    assert_same_quantized(made, q)
    assert_same_bits(made.dequantize(), q.dequantize())
    assert_same_bits(made.t().dequantize(), q.t().dequantize())
    assert_same_bits(made[64:].dequantize(), q[64:].dequantize())
    assert_same_bits(made.scales(), q.scales())
    back = made.to_layout("strided")
    assert_same_bits(back.qdata, q.qdata)
    assert_same_bits(back.scale, q.scale)
    assert_same_quantized(made.to_layout("swizzle_32_4_4"), q)
    x = torch.randn(3, q.shape[1], dtype=q.dtype)
    assert_same_bits(torch.nn.functional.linear(x, made), torch.nn.functional.linear(x, q))


@pytest.mark.parametrize("name", BLOCKED)
def test_every_code_is_decoded_exactly(name):
    """All codes x all scale codes in the window, by the assembly itself in NumPy, against the reference."""
    fmt = ms.find_format(name)
    low, high = ptx_decode.window(fmt)
    scales = np.arange(low, high + 1)
    codes = torch.arange(2**fmt.element.width, dtype=torch.uint8)
    finite = torch.isfinite(codec.decode(codes, fmt.element))
    held, words = (4 if fmt.element.width == 6 else 2), fmt.element.width // 2
    for first in (0,) if held == 4 else (0, 2):
        made = ptx_decode.decoder(fmt, first)
        count, vectors = ptx_emulator.outputs(made.constraints), held * fmt.element.width // 8
        for start in range(0, len(codes), 16):
            lane = codes[start : start + 16]
            block = torch.zeros(64, 64, dtype=torch.uint8)  # every lane of every row the same 16 codes
            block[:] = lane.repeat(64 // len(lane))
            ordered = fragments.to_fragments(block, fmt.element).reshape(-1).numpy().view(np.uint32)
            ordered = ordered.reshape(-1, vectors, 32, 4)[0, :, 0].reshape(-1)
            inputs = {f"${count + i}": np.full(len(scales), ordered[i], np.uint32) for i in range(held * words)}
            inputs |= {f"${count + held * words + i}": scales.astype(np.uint32) * 0x01010101 for i in range(4)}
            registers = ptx_emulator.run(made.assembly, inputs)
            factor = codec.decode(torch.from_numpy(scales.astype(np.uint8)), fmt.scale).double()
            for row in range(held):
                for pair in range(8):
                    step, late = divmod(pair, 2)
                    got = registers[f"${(row // 2 * 4 + step) * 4 + late * 2 + row % 2}"]
                    for half in (0, 1):
                        code = lane[(2 * pair + half) % len(lane)]
                        if not finite[int(code)]:
                            continue
                        value = torch.from_numpy((got >> 16 * half & 0xFFFF).astype(np.int16)).view(torch.bfloat16)
                        wanted = codec.decode(code[None], fmt.element).double() * factor
                        assert torch.equal(value.double() * 2.0**made.drop, wanted), (name, int(code), row, pair)


def product(x: torch.Tensor, q: ms.BlockScaledTensor) -> torch.Tensor:
    """x @ w.T as the tensor cores of 32 lanes would form it: operands by lane and register, in FP64."""
    fmt = q.format
    held, words = (4 if fmt.element.width == 6 else 2), fmt.element.width // 2
    qdata, scale = fragments.order(q.qdata, q.scale, fmt, q.shape[1])
    vectors = held * fmt.element.width // 8
    blocks = qdata.numpy().view(np.uint32).reshape(q.shape[0] // 64, q.shape[1] // 64, 8 // held, vectors, 32, 4)
    scales = scale.numpy().reshape(q.shape[0] // 64, q.shape[1] // 64, 8, 64 // fmt.block, 8)
    lanes = np.arange(32)
    g, t = lanes >> 2, lanes & 3
    out = torch.zeros(x.shape[0], q.shape[0], dtype=torch.float64)
    for i, k, group in np.ndindex(blocks.shape[:3]):
        first = group * held % 4
        made = ptx_decode.decoder(fmt, first)
        count = ptx_emulator.outputs(made.constraints)
        flat = [blocks[i, k, group, n // 4, :, n % 4] for n in range(held * words)]
        bytes_of = scales[i, k, g, t * 16 // fmt.block].astype(np.uint32)
        which = group * held // 4 * 4
        word = sum(bytes_of[:, which + j] << 8 * j for j in range(4)).astype(np.uint32)
        inputs = {f"${count + n}": flat[n] for n in range(len(flat))} | {f"${count + len(flat)}": word}
        registers = ptx_emulator.run(made.assembly, inputs)
        for half in range(held // 2):
            for step in range(4):
                for register in range(4):
                    pair = registers[f"${(half * 4 + step) * 4 + register}"]
                    rows = i * 64 + group * held * 8 + half * 16 + g + 8 * (register % 2)
                    for one in (0, 1):
                        value = torch.from_numpy((pair >> 16 * one & 0xFFFF).astype(np.int16)).view(torch.bfloat16)
                        at = k * 64 + 16 * t + 4 * step + 2 * (register // 2) + one  # of x, as the B operand has it
                        for lane in range(32):
                            out[:, rows[lane]] += value[lane].double() * x[:, at[lane]].double()
    return out * 2.0**made.drop


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8"])
def test_lanes_hold_what_the_product_needs(name):
    """Rows, columns, scales and registers agree: the product of a small matrix, lane by lane."""
    q = weight(name, 64, 128)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    wanted = x.double() @ q.replace(outer_scale=None).dequantize(torch.float32).double().T
    torch.testing.assert_close(product(x, q), wanted, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_prepared():
    """Bad input gets a reason, and loses nothing."""
    for q, reason in (
        (ms.quantize(torch.randn(100, 64), "mxfp4"), "multiples of 64"),
        (weight("nf4", 64, 64), "4, 6 or 8 bits"),
        (weight("fp8_block128", 64, 256), "one FP32 scale for each row"),
        (weight("fp8_block128", 64, 64), "one FP32 scale for each row"),  # a part of a block
        (weight("mxfp4").t(), "blocks along K"),
        (ms.quantize(torch.full((64, 64), 1e30), "mxfp4"), "outside of codes"),
        (ms.quantize(torch.full((64, 64), float("nan")), "mxfp4"), "outside of codes"),
    ):
        with pytest.raises(ms.MicroscaleError, match=reason):
            ms.prepare(q)
    q = weight("mxfp8")
    broken = q.replace(qdata=q.qdata.clone())
    broken.qdata[0, 0] = 0x7F
    with pytest.raises(ms.MicroscaleError, match="NaN or infinite"):
        ms.prepare(broken)


def test_a_model_is_prepared_and_saved_as_it_was(tmp_path):
    """`prepare_` tells what it did; ties stay; saving writes the plain layout."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 100))
    ms.quantize_(model, "mxfp4_weight_only")
    plain = [m.weight.detach().clone() for m in model]
    done = ms.prepare_(model)
    assert done["0"] == "fragments" and "multiples of 64" in done["1"]
    assert model[0].weight.scale_layout == "fragments"
    ms.save(model, tmp_path / "saved", dialect="microscale")
    other = ms.load(tmp_path / "saved", model)
    assert_same_bits(dict(other.named_parameters())["0.weight"].qdata, plain[0].qdata)


def chosen(shape, name, scale_layout="fragments", capability=(9, 0), outer=None):
    left = dispatch.Operand(shape, "bfloat16")
    outer = "scalar" if ms.find_format(name).outer_scale is not None else outer
    right = dispatch.Operand((8192, 4096), "uint8", ms.find_format(name), -2, scale_layout, outer)
    problem = dispatch.Problem("matmul", (left, right), "cuda", capability, None, "bfloat16")
    return dispatch.explain_problem(problem).chosen


def test_few_rows_are_its_own():
    """The dispatcher gives it prepared weights and at most 64 rows, on Hopper 16."""
    assert chosen((1, 8192), "mxfp4") == chosen((4, 4, 8192), "nvfp4") == "triton.matmul_fragments"
    assert chosen((4, 16, 8192), "nvfp4", capability=(8, 0)) == "triton.matmul_fragments"
    assert chosen((65, 8192), "mxfp4") != "triton.matmul_fragments"
    assert chosen((1, 8192), "mxfp4", "strided") != "triton.matmul_fragments"


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_it_compiles(capability):
    """Without local memory, with the tensor cores' instruction, for every architecture: as the rule cuts it there."""
    rows = list(lines("tests.kernels.compiled_fragments", str(capability)))
    assert rows and all(r["local"] == 0 for r in rows)
    assert all("mma.sync.aligned.m16n8k16" in r["instructions"] for r in rows if r["case"].startswith("matmul"))


def test_tunings_are_whole():
    """Every cut of the rule and of the shipped table is one that the kernel takes."""
    for columns, depth in ((28672, 8192), (8192, 28672), (14336, 4096), (64, 64), (192, 320)):
        for eights in (1, 2, 4, 8):
            for name in FITTING:
                fmt = ms.find_format(name).for_row(depth)
                t = fragment_tuning.find(fmt, eights, columns, depth, torch.device("cpu"))
                assert t.units in (1, 2, 4) and 1 <= t.across * t.along <= 16 and 1 <= t.splits <= max(1, depth // 64)
                assert ms.find_format(name).element.width != 6 or t.units > 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITTING)
def test_on_a_gpu(name):
    """Against FP64 within the bound of FP32 accumulation; the same bits twice; decoding bit for bit."""
    q = weight(name, 256, 1024, "cuda")
    made = ms.prepare(q)
    assert_same_bits(made.dequantize(torch.float32), q.dequantize(torch.float32))
    w = q.dequantize(torch.float32).double()
    bias = torch.randn(256, device="cuda").to(torch.bfloat16)
    for rows in (1, 8, 9, 33, 64):
        x = torch.randn(rows, 1024, device="cuda").to(torch.bfloat16)
        got = decode_gemm.matmul(x, late(parts(made.t()), -2), bias, torch.float32)
        wanted = x.double() @ w.T + bias.double()
        bound = (1024 + 8) * 2.0**-24 * (x.double().abs() @ w.abs().T + bias.double().abs()) * 2
        assert bool(((got.double() - wanted).abs() <= bound).all())
        assert torch.equal(got, decode_gemm.matmul(x, late(parts(made.t()), -2), bias, torch.float32))


def test_layout_names():
    """`fragments` is no layout that quantize writes."""
    assert layout.FRAGMENTS not in layout.LAYOUTS
    with pytest.raises(ms.MicroscaleError, match="layout"):
        ms.quantize(torch.zeros(64, 64), "mxfp4", layout="fragments")
    assert dataclasses.is_dataclass(dispatch.Operand)
