"""x to rows of E4M3 under one power of two, in one kernel: bit for bit what `quantize` and then `align_rows` give."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.dispatch import Operand, Problem
from microscale.kernels.reference import align_rows as two
from microscale.kernels.reference import quantize as one
from microscale.kernels.reference import quantize_rows as reference
from microscale.kernels.triton import quantize_rows
from microscale.numerics import scaling
from microscale.testing import assert_same_bits
from tests.kernels import ptx_emulator
from tests.kernels.processes import architectures, lines

FUSED, STEPS = "triton.quantize_rows", "triton.quantize_then_align"
FITTING = [f for f in ms.list_formats() if two.fits(ms.find_format(f))]
E4M3, E5M2 = ms.find_quantizer("mxfp8"), ms.find_quantizer("mxfp8_e5m2")


def problem(spec=E4M3, shape=(64, 8192), dtype="bfloat16", order="rows", device="cuda", capability=(9, 0)):
    return Problem("quantize_rows", (Operand(shape, dtype, order=order),), device, capability, spec)


def chosen(p):
    return dispatch.explain_problem(p).chosen


def refusal(p, name=FUSED):
    return next(r.reason for r in dispatch.explain_problem(p).refused if r.kernel == name)


def same(got, wanted):
    """Codes and powers, with their shapes and dtypes."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_same_bits(a.cpu().view(torch.uint8), b.view(torch.uint8))


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("mxfp8",), ("mxfp8_e5m2", "user")], ids=" ".join)
def test_it_equals_the_two_steps(names, device):
    """Every number of bf16, rows of every kind, every rule and block, programs full and not, between guards."""
    rows = lines("tests.kernels.quantize_rows_cases", device.type, *names)
    assert [r for r in rows if "error" in r] == []
    shapes = {"cpu": 8, "cuda": 4}[device.type]
    wanted = 4 * shapes + 4 if device.type == "cpu" else shapes + 4
    assert rows[-1]["checked"] == wanted + (5 * shapes if "user" in names else 0)


def halves(words):
    """The bits in the low and the high halves of words."""
    return [((words >> shift) & 0xFFFF).astype(np.uint16) for shift in (0, 16)]


def word(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def convert(values, dtype):
    """FP32 or FP16 to FP8 codes, saturating; NaN becomes the code without a sign."""
    top = float(ml_dtypes.finfo(dtype).max)
    codes = np.clip(values.astype(np.float32), -top, top).astype(dtype).view(np.uint8).astype(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7F), codes)


def emulated(text, inputs):
    """Run the encoder's PTX: conversions and pairs here, the rest by the emulator."""
    registers = dict(inputs)
    kinds = {"e4m3x2": ml_dtypes.float8_e4m3fn, "e5m2x2": ml_dtypes.float8_e5m2}
    for statement in text[1:-1].split(";"):
        line = statement.strip()
        name, _, rest = line.partition(" ")
        operands = re.findall(r"\$?\w+", rest)
        pair = re.match(r"mov\.b32 (\S+), \{(\w+), (\w+)\}", line)
        if pair:
            registers[pair[1]] = registers[pair[2]] | registers[pair[3]] << 16
        elif not name.startswith(("cvt", "mul.rn.f16x2")):
            registers = ptx_emulator.run(line + ";", registers)
        elif name == "cvt.rn.f16x2.f32":
            high, low = (registers[n].view(np.float32).astype(np.float16).view(np.uint16) for n in operands[1:])
            registers[operands[0]] = word(low, high)
        elif name.startswith("mul"):
            a, b = (halves(np.broadcast_to(registers[n], inputs["$2"].shape)) for n in operands[1:])
            made = [(x.view(np.float16) * y.view(np.float16)).view(np.uint16) for x, y in zip(a, b, strict=True)]
            registers[operands[0]] = word(*made)
        elif name.endswith(".f32"):
            high, low = (convert(registers[n].view(np.float32), kinds[name.split(".")[3]]) for n in operands[1:])
            registers[operands[0]] = low | high << 8
        elif name.endswith(".f16x2"):
            low, high = (convert(h.view(np.float16), kinds[name.split(".")[3]]) for h in halves(registers[operands[1]]))
            registers[operands[0]] = low | high << 8
        else:
            assert name.startswith("cvt.rn.f16x2.e"), line
            octets = [((registers[operands[1]] >> shift) & 0xFF).astype(np.uint8) for shift in (0, 8)]
            low, high = (o.view(kinds[name.split(".")[3]]).astype(np.float16).view(np.uint16) for o in octets)
            registers[operands[0]] = word(low, high)
    return registers


@pytest.mark.parametrize("spec", [E4M3, E5M2], ids=lambda s: s.name)
@pytest.mark.parametrize("code", [0, 1, 40, 119, 127, 200, 246, 255])
def test_the_assembly_rounds_twice(spec, code):
    """Every number of bf16 that a block of some scale can have, under every power of two that its row can have."""
    lift = two.lift(spec.format.element)
    x = torch.arange(65536).to(torch.int16).view(torch.bfloat16)
    limit = spec.format.element.max_value * 2.0 ** (code - 127) * 2
    x = x[x.isfinite() & (x.float().abs() <= limit)] if code < 255 else x
    x = torch.nn.functional.pad(x, (0, -len(x) % 32))
    words = x.view(torch.int32).numpy().view(np.uint32).reshape(-1, 4)
    text, constraints = quantize_rows.encoder(spec.format.element.mantissa, lift)
    assert ptx_emulator.outputs(constraints) == 2
    blocks = x.float().view(-1, 32)
    stored = torch.full((len(blocks), 1), code, dtype=torch.uint8)
    factor = scaling.multiplier(stored, spec.format, None)
    once = one.codec.encode(blocks * factor, spec.format.element).flatten()
    for top in {max(code, lift + 1) + more for more in (*range(28), 60, 254)} if code < 255 else (0, 130, 254):
        if top > 254:
            continue
        # as one row: a block that has the row's largest scale, and then these
        first = torch.zeros(32, dtype=torch.uint8)
        scales = torch.cat([torch.tensor([top], dtype=torch.uint8), stored.flatten()])
        wanted, row = two.align_rows(torch.cat([first, once]), scales, spec.format, len(once) + 32, "strided")
        exponent = int(torch.log2(row).item())
        power = np.float32(2.0 ** max(code - 127 - exponent - lift, -126)) if code < 255 else np.float32(np.inf)
        inputs = {f"${2 + i}": words[:, i] for i in range(4)}
        inputs["$6"] = np.full(len(words), factor[0].numpy().view(np.uint32), np.uint32)
        inputs["$7"] = np.full(len(words), power.view(np.uint32), np.uint32)
        with np.errstate(all="ignore"):
            made = emulated(text, inputs)
        got = torch.from_numpy(np.stack([made["$0"], made["$1"]], -1).astype(np.uint32).view(np.uint8).reshape(-1))
        assert_same_bits(got, wanted[32:].view(torch.uint8), f"row {exponent}")


@given(st.lists(st.integers(0, 0x7F7F), min_size=1, max_size=8), st.sampled_from(["floor", "ceil", "rceil", "even"]))
def test_the_largest_amax_has_the_largest_scale(bits, rule):
    """What the kernel takes the row's power of two from: stored scales never fall as the amax rises."""
    amax = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).float()
    for name in ("mxfp8", "mxfp8_e5m2"):
        fmt = ms.find_quantizer(name, scale_rule=rule).format
        scales = scaling.encode_scales(torch.cat([amax, amax.max()[None]])[None], fmt.scale_rule, fmt, None)[0]
        assert scales[:-1].max() == scales[-1]


def test_rounding_once_is_another_thing():
    """Codes of x itself under the row's power of two are not those of the quantized tensor."""
    x = torch.randn(64, 4096) * torch.exp2(torch.randint(-6, 1, (64, 128)).float()).repeat_interleave(32, 1)
    codes, powers = reference.quantize_rows(x, E4M3)
    assert not torch.equal(codes.float(), (x / powers).to(torch.float8_e4m3fn).float())


# -- how rows lie ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2048), st.sampled_from([16, 32, 64, 128, 256]), st.booleans())
def test_rows_have_room(count, block, few):
    """Every element has a thread, blocks are whole in a chunk, and few lanes are idle."""
    columns = min(count * block, quantize_rows.LONGEST)
    shape = quantize_rows.shape_of(columns, block, few)
    assert shape.threads % shape.lanes == 0 and 128 <= shape.threads <= 1024 and 1 <= shape.chunks <= 8
    assert shape.lanes * quantize_rows.PIECE % block == 0
    room = shape.lanes * shape.chunks * quantize_rows.PIECE
    assert room >= columns and (room - columns < shape.lanes * quantize_rows.PIECE)
    assert few or columns < 8 * block or room <= 1.25 * columns


def test_shapes_of_interest():
    assert quantize_rows.shape_of(28672, 32, False) == (512, 512, 7)
    assert quantize_rows.shape_of(8192, 32, False) == (256, 256, 4)
    assert quantize_rows.shape_of(28672, 32, True) == (1024, 1024, 4)
    assert quantize_rows.shape_of(128, 32, False) == (128, 4, 4)


# -- what runs where ---------------------------------------------------------------------------------------------------


def test_who_serves_what():
    """The fused kernel what it can, the two steps every other format that becomes rows, the reference the CPU."""
    assert [f for f in FITTING if chosen(problem(ms.find_quantizer(f))) == FUSED] == ["mxfp8", "mxfp8_e5m2"]
    assert {chosen(problem(ms.find_quantizer(f))) for f in FITTING} == {FUSED, STEPS}
    assert chosen(problem(device="cpu", capability=None)) == "reference.quantize_rows"
    for shape in ((32,), (1, 8192), (2, 3, 4, 96), (5, 65536)):
        assert chosen(problem(shape=shape)) == FUSED
    assert chosen(problem(capability=(8, 9))) == FUSED


@pytest.mark.parametrize(("changes", "why"), [
    ({"shape": (64, 8200)}, "whole blocks"), ({"shape": (0, 64)}, "whole blocks"),
    ({"shape": (64, 65568)}, "65536"), ({"dtype": "float32"}, "bfloat16"), ({"order": "columns"}, "dense rows"),
    ({"order": "strided"}, "dense rows"), ({"capability": (8, 0)}, "8.9"),
    ({"spec": ms.find_quantizer("mxfp8", hadamard=32)}, "Hadamard"),
    ({"spec": ms.find_quantizer("mxfp8", scale_tile=32)}, "scale tile"),
    ({"spec": ms.find_quantizer("mxfp4")}, "E4M3 or E5M2"),
])  # fmt: skip
def test_what_it_leaves_to_two_steps(changes, why):
    p = problem(**changes)
    assert why in refusal(p) and chosen(p) == STEPS


def test_what_nobody_takes():
    """Formats that become no rows of E4M3, and rounding that needs a seed."""
    for spec in (ms.find_quantizer("nvfp4"), ms.find_quantizer("mxint8")):
        assert chosen(problem(spec)) is None and "E4M3 can hold" in refusal(problem(spec))
    p = problem(ms.find_quantizer("mxfp8", rounding="stochastic"))
    assert chosen(p) is None and "seed" in refusal(p, STEPS)


@pytest.mark.parametrize("fmt", FITTING)
def test_two_steps_are_composed(fmt, monkeypatch):
    """By the dispatcher's quantize and `align_rows`, whatever the shape and the order; the reference stands in."""
    monkeypatch.setattr(quantize_rows.align_rows, "align_rows", two.align_rows)
    spec = ms.find_quantizer(fmt)
    made = [torch.randn(*shape) for shape in ((5, 70), (70,), (2, 3, 4, 32), (9, 64), (70, 5))]
    for x in (*made[:3], made[3][:, 1:50], made[4].t()):
        same(quantize_rows.quantize_then_align(x, spec), reference.quantize_rows(x, spec))


def test_nothing_gives_nothing():
    for shape in ((0, 64), (3, 0), (2, 0, 32)):
        x = torch.zeros(shape)
        same(quantize_rows.quantize_then_align(x, E4M3), reference.quantize_rows(x, E4M3))


# -- the code ----------------------------------------------------------------------------------------------------------

# Instructions for each element that a thread has room for, on sm_90; memory at full speed leaves time for 21.
BUDGET = {
    "mxfp8": {"8192": 10.8, "28672": 9.8, "256": 10.3, "masked": 11.9, "few": 11.3},
    "mxfp8_e5m2": {"8192": 11.3, "28672": 10.3, "256": 10.9, "masked": 12.3, "few": 11.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", architectures("triton.quantize_rows"))
def test_it_compiles_to_few_instructions(capability, tmp_path):
    """By the hardware's conversions, 16 bytes loaded and 8 stored at a time, all warps of an SM, nothing spilled."""
    rows = lines("tests.kernels.compiled_quantize_rows", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert {(r["format"], r["shape"]) for r in rows} == {(f, s) for f, shapes in BUDGET.items() for s in shapes}
    for r in rows:
        assert not r["local"] and len(r["native"]) == 2 and r["shared"] <= 128, r
        assert r["loads"] == {"LDG.E.128": r["chunks"]} and r["stores"] == {"STG.E": 1, "STG.E.64": r["chunks"]}, r
        assert r["registers"] <= (64 if r["chunks"] > 4 else 32 if capability == 90 and r["shape"] != "256" else 40), r
        if capability == 90:
            assert r["per_element"] <= 1.05 * BUDGET[r["format"]][r["shape"]], r


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [32, 4096, 8192, 11008, 28672])
def test_on_a_gpu(columns):
    """The reference's bits, for one row and many; and the two steps give the same."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs sm_89")
    for rows in (1, 17, 300):
        x = torch.randn(rows, columns, device="cuda") * torch.exp(3 * torch.randn(rows, columns, device="cuda"))
        x[rows // 2, columns - 1], x[rows // 3] = torch.nan, 0
        x = x.bfloat16()
        wanted = reference.quantize_rows(x.cpu(), E4M3)
        for run in (quantize_rows.quantize_rows, quantize_rows.quantize_then_align):
            same(run(x, E4M3), wanted)
