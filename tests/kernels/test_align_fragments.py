"""E4M3 rows of a prepared weight: those of the plain one, bit for bit."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import ml_dtypes

import microscale as ms
from microscale.kernels.cublas import rows_e4m3
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import align_fragments
from microscale.kernels.triton.align_rows import align_rows
from microscale.numerics import codec, fragments, packing
from microscale.testing import assert_same_bits
from tests.kernels import ptx_emulator
from tests.kernels.processes import lines
from tests.kernels.products import parts
from tests.kernels.scaled_mm_double import Double

FORMATS = [
    f for f in ms.list_formats() if reference.fits(ms.find_format(f)) and fragments.fits(ms.find_format(f), 64, 64)
]
WARPS = align_fragments.WARPS


def weight(name: str, rows: int, columns: int, device: str = "cpu") -> ms.BlockScaledTensor:
    """All finite codes, rows whose exponents span from none to many, blocks and rows of zeros of either sign."""
    fmt = ms.find_format(name)
    generator = torch.Generator().manual_seed(0)
    finite = torch.tensor([code for code, v in enumerate(fmt.element.table) if np.isfinite(v)], dtype=torch.uint8)
    codes = finite[torch.randint(len(finite), (rows, columns), generator=generator)]
    spans = torch.arange(rows)[:, None] % 40
    scale = 118 - (torch.rand(rows, columns // fmt.block, generator=generator) * spans).to(torch.uint8)
    scale[8:16] -= 70
    zeros = [code for code, v in enumerate(fmt.element.table) if v == 0]
    blocks = codes.view(rows, -1, fmt.block)
    blocks[1, 0], blocks[2], blocks[3, 1] = zeros[0], zeros[-1], zeros[-1]
    scale[1, 0], scale[2] = 0, 0
    qdata = packing.pack(codes, fmt.element.width)
    q = ms.quantize(torch.zeros(rows, columns), name)
    q = q.replace(qdata=qdata, scale=scale)
    return q.replace(qdata=q.qdata.to(device), scale=q.scale.to(device))


def emulate(assembly: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `ptx_emulator.run`, and what the encoder has besides."""
    before = ptx_emulator._apply

    def apply(operation, v):
        if operation.startswith("cvt.rn.satfinite.e4m3x2.f32"):
            return e4m3(v[1]) | e4m3(v[0]) << 8
        if operation == "mov.b32" and len(v) == 2:
            return v[0] | v[1] << 16
        return before(operation, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptx_emulator, "_apply", apply)
        return ptx_emulator.run(assembly, inputs)


def e4m3(words: np.ndarray) -> np.ndarray:
    """FP32 bits -> E4M3, to nearest even, saturating."""
    values = np.clip(np.asarray(words, np.uint32).view(np.float32), -448, 448)
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.uint32)


def by_lanes(q: ms.BlockScaledTensor, row_scales: torch.Tensor) -> torch.Tensor:
    """What the second launch writes: its programs, warps and lanes in NumPy, with the assembly that they run."""
    fmt, (rows, columns) = q.format, q.shape
    made = align_fragments.constants_of(fmt)
    held, width, block = made["HELD"], made["WIDTH"], made["BLOCK"]
    qdata, scale = fragments.order(q.qdata, q.scale, fmt, columns)
    words, scales = (t.numpy().reshape(-1).view(np.uint32) for t in (qdata, scale))
    powers = row_scales.view(torch.int32).numpy().reshape(-1)
    steps, out = columns // 64, np.zeros(rows * columns // 4, np.uint32)
    written = np.zeros(out.shape, int)
    chunks = -(-steps // WARPS)
    tid, four = np.arange(32 * WARPS), np.arange(4)[None, :]
    lane = tid & 31
    g, t = lane >> 2, lane & 3
    vectors = held * width // 8
    for program in range(rows // 64 * chunks):
        strip = program // chunks
        factors = [(254 - (powers[strip * 64 + r * 8 + g] >> 23)) * 0x00800080 for r in range(8)]
        step = program % chunks * WARPS + (tid >> 5)
        there = step < steps
        place = strip * steps + np.minimum(step, steps - 1)
        at = (place * (width * 128) + lane * 4)[:, None] + four
        scale_at = place * (1024 // block) + (g * (64 // block) + t * 16 // block) * 2
        target = ((strip * 64 + g) * (steps * 16) + t * 4 + step * 16)[:, None] + four
        for group in range(8 // held):
            given = [words[at + (group * vectors + v) * 128] for v in range(vectors)]
            decode = made["DECODE" if group * held % 4 == 0 else "DECODE_NEXT"]
            first = 8 * held
            inputs = {f"${first + 4 * v + n}": given[v][:, n] for v in range(vectors) for n in range(4)}
            inputs |= {f"${first + 4 * vectors}": scales[scale_at + group * held // 4]}
            pairs = emulate(decode, inputs)
            for r in range(held):
                taken = {f"${4 + p}": pairs[f"${8 * r + p}"] for p in range(8)}
                codes = emulate(made["ENCODE"], taken | {"$12": factors[group * held + r].astype(np.uint32)})
                address = target + (group * held + r) * 8 * steps * 16
                for n in range(4):
                    out[address[there, n]] = codes[f"${n}"][there]
                    written[address[there, n]] += 1
    assert (written == 1).all()
    return torch.from_numpy(out.view(np.uint8).copy()).view(rows, columns)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [192, 256, 640])
def test_bytes_are_those_of_the_plain_weight(name, columns):
    q = weight(name, 128, columns)
    codes, row_scales = reference.align_rows(q.qdata, q.scale, q.format, columns, "strided")
    assert_same_bits(by_lanes(q, row_scales), codes.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_under_every_shift(name):
    """Bfloat16 values of all codes, as they are decoded, times the row's power."""
    fmt = ms.find_format(name)
    values = codec.decode(torch.arange(2**fmt.element.width, dtype=torch.uint8), fmt.element)
    values = values[values.isfinite()]
    encode = align_fragments.encoder()[0]
    for block in (-60, -9, 0, 3):
        for shift in range(reference.lift(fmt.element), -40, -1):
            row = block - shift
            pairs = (values * 2.0**block).to(torch.bfloat16).view(torch.int16).numpy().astype(np.uint16)
            inputs = {f"${4 + p}": pairs * np.uint32(0x10001) for p in range(8)}
            got = emulate(encode, inputs | {"$12": np.full(len(pairs), (127 - row) * 0x00800080, np.uint32)})
            wanted = codec.encode(values * 2.0**shift, reference.TARGET)
            for word in range(4):
                assert (got[f"${word}"] == wanted.numpy() * np.uint32(0x01010101)).all(), (block, shift)


def test_row_scales_by_the_interpreter():
    found = lines("tests.kernels.align_fragments_cases")
    assert len(found) == 9 and all(f["good"] for f in found), found


@pytest.mark.parametrize("capability", (89, 90))
def test_it_compiles_to_few_instructions(capability):
    """By the hardware's conversion, 16 bytes loaded and stored at a time, nothing through memory."""
    names = () if capability == 90 else ("mxfp4",)
    rows = lines("tests.kernels.compiled_align_fragments", str(capability), *names)
    assert len(rows) == (len(names) or len(FORMATS))
    for r in rows:
        assert r["native"] and not r["local"] and not r["shared"], r
        assert r["stores"] == {"STG.E.128": 8} and set(r["scale_loads"]) == {"LDG.E.128"}, r
        assert any(i.endswith(".128") for i in r["loads"]), r
        assert r["per_element"] < (6 if capability == 90 else 7), r  # memory at full speed leaves time for 11


def test_the_reference_takes_the_layout():
    q = weight("mxfp4", 64, 128)
    made = q.to_layout("fragments")
    wanted = reference.align_rows(q.qdata, q.scale, q.format, 128, "strided")
    for got, want in zip(reference.align_rows(made.qdata, made.scale, q.format, 128, "fragments"), wanted, strict=True):
        assert_same_bits(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("left", ["mxfp8", "mxfp4", "fp8_row"])
def test_the_product_is_that_of_the_plain_weight(left, monkeypatch):
    """Through `rows_e4m3` on the CPU, bit for bit, in all its shapes."""
    from microscale.ops.late import late

    double = Double(major=9)
    monkeypatch.setattr(rows_e4m3, "align_rows", reference.align_rows)
    monkeypatch.setattr(rows_e4m3, "scaled_mm", double)
    a, q = ms.quantize(torch.randn(2, 9, 128), left), ms.quantize(torch.randn(64, 128), "mxfp4")
    made, bias = ms.prepare(q), torch.randn(64).bfloat16()
    got, wanted = (rows_e4m3.matmul(late(parts(a), -1), parts(b.t()), bias, torch.bfloat16) for b in (made, q))
    assert got.shape == (2, 9, 64) and torch.equal(got, wanted) and double.calls == ["rowwise"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name):
    """Codes and row scales of the plain weight, of programs that are full and not; the same bits twice."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs sm_89 or later")
    for rows, columns in ((64, 64), (128, 192), (448, 1088), (4096, 2048)):
        q = weight(name, rows, columns, "cuda")
        made = q.to_layout("fragments")
        wanted = align_rows(q.qdata, q.scale, q.format, columns, "strided")
        for _ in range(2):
            got = align_rows(made.qdata, made.scale, q.format, columns, "fragments")
            for one, other in zip(got, wanted, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (rows, columns)
