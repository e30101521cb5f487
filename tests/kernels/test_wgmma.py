"""Products on Hopper with codes decoded in registers: the assembly for every code, plans, what compiles, the bound."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale import dispatch
from microscale.kernels.triton import ptx_pairs, ptx_sixes, wgmma
from microscale.numerics import codec, packing
from microscale.testing import assert_same_bits
from tests.kernels import ptx_emulator
from tests.kernels.processes import lines
from tests.kernels.products import check, parts

FORMATS = [f for f in ms.list_formats() if wgmma._has_codes(ms.find_format(f))]


# -- the assembly ------------------------------------------------------------------------------------------------------


def test_which_formats_are_taken():
    assert set(ms.list_formats()) - set(FORMATS) == {"fp8_row"}


def run(assembly: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The emulator of the assembly of `ptx_decode`, and the instructions that only this assembly has."""
    registers = dict(inputs)
    for line in assembly[1:-1].split(";"):
        words = line.strip().split(None, 1)
        if not words or words[0].startswith(".reg"):
            continue
        operation, names = words[0], [n.strip(" {}") for n in words[1].split(",")]
        value = [registers[n] if n in registers else np.uint32(int(n, 0) if n[0].isdigit() else 0) for n in names]
        if operation == "mov.b32" and words[1].startswith("{"):
            registers[names[0]], registers[names[1]] = value[-1] & 0xFFFF, value[-1] >> 16
        elif operation == "mul.lo.u32":
            registers[names[0]] = (value[-2].astype(np.uint64) * value[-1]).astype(np.uint32)
        elif operation == "setp.eq.u32":
            registers[names[0]] = value[-2] == value[-1]
        elif operation == "setp.gt.u32":
            registers[names[0]] = value[-2] > value[-1]
        elif operation == "selp.b32":
            registers[names[0]] = np.where(value[-1], value[-3], value[-2]).astype(np.uint32)
        elif operation == "max.u32":
            registers[names[0]] = np.maximum(value[-2], value[-1])
        elif operation == "or.b32":
            registers[names[0]] = value[-2] | value[-1]
        elif operation == "prmt.b32":
            registers[names[0]] = ptx_emulator.permute(*value[-3:])
        elif operation.startswith("cvt.rn.f16x2"):
            kind = "float8_e4m3fn" if "e4m3" in operation else "float8_e5m2"
            halves = [_f16_of_fp8((value[-1] >> s) & 0xFF, kind) for s in (0, 8)]
            registers[names[0]] = halves[0] | halves[1] << 16
        elif operation == "cvt.f32.f16":
            registers[names[0]] = value[-1].astype(np.uint16).view(np.float16).astype(np.float32)
        elif operation == "cvt.rn.bf16x2.f32":
            high, low = (torch.from_numpy(v).bfloat16().view(torch.int16).numpy().astype(np.uint16) for v in value[-2:])
            registers[names[0]] = low.astype(np.uint32) | high.astype(np.uint32) << 16
        else:
            registers = ptx_emulator.run(line + ";", registers)
    return registers


def _f16_of_fp8(codes: np.ndarray, kind: str) -> np.ndarray:
    values = torch.from_numpy(codes.astype(np.uint8)).view(getattr(torch, kind))
    return values.half().view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(got + 0.0, wanted + 0.0)  # signs of zeros do not matter in products


@pytest.mark.parametrize("name", FORMATS)
def test_every_scale_is_decoded(name):
    fmt = ms.find_format(name)
    if fmt.scale.torch_dtype == "float32":
        return
    codes = np.arange(2**fmt.scale.width, dtype=np.uint32)
    got = run(ptx_pairs.scale(fmt), {"$1": codes | 0xABCDE00})["$0"]
    wanted = codec.decode_table(fmt.scale, torch.device("cpu")).numpy() * np.float32(2.0 ** ptx_pairs.lift(fmt.element))
    same(bfloat16(got & 0xFFFF), wanted)
    np.testing.assert_array_equal(got >> 16, got & 0xFFFF)


@pytest.mark.parametrize("name", FORMATS)
def test_every_pair_is_decoded(name):
    fmt = ms.find_format(name)
    width, table = fmt.element.width, codec.decode_table(fmt.element, torch.device("cpu")).numpy()
    pairs = np.arange(2 ** (2 * width), dtype=np.uint32)
    first, second = table[pairs & (2**width - 1)], table[pairs >> width]
    if width == 6:  # as they come out of `ptx_sixes.gather`; in every lane and place: `test_sixes.py`
        zero = np.zeros_like(pairs)
        given = {"$2": pairs, "$3": zero, "$4": zero, "$5": zero + 0x1010, "$6": zero + 0x3232}
        given["$7"] = zero + (1 << ptx_sixes.base(fmt.element))
        pairs = run(ptx_sixes.gather(fmt.element), given)["$0"]
    if fmt.element.kind == "codebook":
        made = run(ptx_pairs.look_up(fmt.element), {"$4": pairs})
        for high, low, wanted in (("$0", "$2", first), ("$1", "$3", second)):
            got = bfloat16(made[high]).astype(np.float64) + bfloat16(made[low])
            assert (np.abs(got - wanted) <= 2.0**-16 * np.abs(wanted)).all()
            assert (np.abs(bfloat16(made[low])) <= 2.0**-7 * np.abs(wanted)).all()
            for part in (high, low):  # so that infinity times a value is as infinite as it would be at once
                np.testing.assert_array_equal(np.sign(bfloat16(made[part])), np.sign(wanted))
        return
    alone = run(ptx_pairs.pair(fmt.element, False), {"$2": pairs})
    same(bfloat16(alone["$0"]), first)
    same(bfloat16(alone["$1"]), second)
    for scale in (1.0, 0.4375 if fmt.scale.mantissa else 0.5, 2.0**-100, np.nan):
        lifted = np.float32(scale) * np.float32(2.0 ** ptx_pairs.lift(fmt.element))
        bits = (np.array([lifted], np.float32).view(np.uint32) >> 16) * np.uint32(0x10001)
        made = run(ptx_pairs.pair(fmt.element, True), {"$2": pairs, "$3": np.broadcast_to(bits, pairs.shape)})
        same(bfloat16(made["$0"]), first * np.float32(scale))
        same(bfloat16(made["$1"]), second * np.float32(scale))


# -- what a launch is given --------------------------------------------------------------------------------------------


class Model:
    """What `multiply_codes` does, read off its arguments: in FP64, on the CPU."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(wgmma, "launch", self)

    def __call__(self, kernel, grid, args, known, warps):
        if kernel.fn.__name__ == "add_splits":
            parts, outer, bias, out, columns, _ = args
            sums = parts.view(known["SPLITS"], -1, columns).double().sum(0)
            assert known["OUTER"] != 2 or (outer.is_contiguous() and outer.numel() == columns)
            assert known["OUTER"] != 1 or outer.numel() == 1
            out.copy_(sums * (outer if known["OUTER"] else 1) + (bias if known["BIAS"] else 0))
            return
        assert [*kernel.arg_names[len(args) :]] == [n for n in known if n != "maxnreg"] and warps == known["WARPS"]
        assert known.get("maxnreg", 256) * 32 * warps <= wgmma.REGISTERS
        given = dict(zip(kernel.arg_names, args, strict=False))
        self.calls.append((grid, given, known))
        x, out, rows = given["x"], given["out"], given["rows"]
        for t in (given["x"], given["codes"], given["rest"]):  # all that Triton checks of them
            assert t is None or t == type(t)(t.base, [*t.base.shape], [*t.base.stride()], t.block_shape, t.layout)
        for block in (given["codes"], given["rest"]):
            if block is not None:
                assert block.base is given["codes"].base and block.block_shape[0] == known["BN"]
                line = block.block_shape[1] * block.base.element_size()
                assert line % 16 == 0 and block.layout.swizzle_byte_width in (line, 128, 0 if line < 32 else line)
        assert x.strides[0] * 2 % 16 == 0 and given["codes"].strides[0] * given["codes"].base.element_size() % 16 == 0
        ends = given["offsets"].tolist() if known["GROUPED"] else [rows]
        steps, splits = given["size"] // known["BK"], known["SPLITS"]
        each = -(-steps // splits)
        assert steps - each * (splits - 1) >= known["STAGES"] - 1
        out, start = out.view(splits, rows, given["columns"]), 0
        for group, stop in enumerate(ends):
            w = self.matrix(given, known, group)
            for split in range(splits):
                part = slice(split * each * known["BK"], (split + 1) * each * known["BK"])
                sums = x.base[start:stop, part].double() @ w[:, part].T
                out[split, start:stop] = self.finished(sums, given, known, group, slice(start, stop)).to(out.dtype)
            start = max(start, stop)
        out[:, start:] = 0

    def finished(self, sums, given, known, group, rows):
        if known["A_OUTER"]:
            sums = sums * given["a_outer"][rows, None]
        if known["B_OUTER"]:
            outer, step = given["b_outer"], given["b_outer_column"]
            place = outer.storage_offset() + group * given["b_outer_group"]
            sums = sums * outer.as_strided((given["columns"],), (step,), place)
        return sums + (given["bias"].double() if known["BIAS"] else 0)

    def matrix(self, given, known, group):
        """A group's matrix, FP64, its scales looked up as the kernel does."""
        columns, block = given["columns"], known["BLOCK"]
        pairs = given["codes"].base[group * columns : (group + 1) * columns].contiguous()
        width = self.format.element.width
        read = sum(t.block_shape[1] * pairs.element_size() for t in (given["codes"], given["rest"]) if t is not None)
        assert read * 8 == known["BK"] * width
        codes = packing.unpack(pairs.view(torch.uint8), width)
        n, b = torch.arange(columns)[:, None], torch.arange(given["blocks"])[None, :]
        if known["SWIZZLE"]:
            at = (n >> 7) * given["scale_row"] + (n & 31) * 16 + ((n >> 5) & 3) * 4 + (b >> 2) * 512 + (b & 3)
        else:
            at = n * given["scale_row"] + b
        held = given["scales"]
        flat = held.as_strided((held.untyped_storage().size() // held.element_size() - held.storage_offset(),), (1,))
        scale = flat[at + group * given["scale_group"]]
        if not known["WIDE"]:
            scale = codec.decode_table(self.format.scale, torch.device("cpu"))[scale.long()]
        values = codec.decode_table(self.format.element, torch.device("cpu"))[codes.long()].double()
        return values * scale.double().repeat_interleave(block, -1)


def weights(shape, name, device="cpu"):
    w, fmt = torch.randn(shape, device=device).bfloat16(), ms.find_format(name)
    if len(shape) == 3 and fmt.outer_scale is not None and fmt.outer_scale.per == "tensor":
        return ms.quantize(w, name, amax=w.abs().amax((1, 2)).float()[:, None, None])
    return ms.quantize(w, name)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8", "nvfp4", "nvfp4_row", "fp8_block128", "nf4"])
@pytest.mark.parametrize("way", ["plain", "swizzle_32_4_4"])
def test_launches_describe_the_operands(name, way, monkeypatch):
    """Strides, layouts of scales, outer scales, bias, parts of K, ends past each other, memory that is not dense."""
    model = Model(monkeypatch)
    model.format = ms.find_format(name)
    for m, n, k, dtype in ((1, 40, 4096, torch.bfloat16), (70, 136, 512, torch.float32), (0, 8, 256, torch.float16)):
        x, q = torch.randn(m, 2 * k).bfloat16()[:, ::2], weights((n, k), name)
        q = q if way == "plain" else q.to_layout(way)
        bias = torch.randn(n).bfloat16() if m == 70 else None
        check(wgmma.matmul(x, parts(q.mT), bias, dtype), x, q.mT, bias, dtype)
    assert {known["SPLITS"] for *_, known in model.calls} > {1}
    for ends in ([3, 3, 20, 12], [0, 0, 0, 0], [1, 2, 3, 22]):
        x, q = torch.randn(24, 512).bfloat16(), weights((4, 136, 512), name)
        q = q if way == "plain" else q.to_layout(way)
        got = wgmma.grouped_matmul(x, parts(q.mT), torch.tensor(ends, dtype=torch.int32), torch.bfloat16)
        start = 0
        for expert, stop in enumerate(ends):
            if stop > start:
                check(got[start:stop], x[start:stop], q.select(0, expert).mT)
            start = max(start, stop)
        assert not got[start:].any()


def test_tiles_fit():
    for name in FORMATS:
        fmt = ms.find_format(name)
        for rows in (1, 16, 33, 100, 5000):
            for size in (256, 320, 4096):
                for dtype in (torch.bfloat16, torch.float32):
                    tile = wgmma.tile_of(fmt, rows, size, dtype)
                    stage = tile.rows * tile.depth * 2 + wgmma.COLUMNS * tile.depth * fmt.element.width // 8
                    assert tile.resident * tile.stages * stage <= wgmma.SHARED or tile.stages == 2
                    assert tile.stages - 1 <= size // tile.depth
                    splits = wgmma.splits_of(tile, rows, 1000, size, 132)
                    assert 1 <= splits <= 16


# -- which kernel ------------------------------------------------------------------------------------------------------


def explained(op, a, b, capability=(9, 0)):
    return dispatch.explain_problem(dispatch.Problem(op, (a, b), "cuda", capability, None, "bfloat16"))


def operand(shape, fmt=None, **facts):
    if fmt is None:
        return dispatch.Operand(shape, "bfloat16")
    return dispatch.Operand(shape, "uint8", ms.find_format(fmt), -2, **facts)


def test_it_is_chosen_on_hopper():
    x, many = operand((256, 4096)), operand((8192, 4096))
    for name in FORMATS:
        w, experts = operand((4096, 1024), name), operand((8, 4096, 1024), name)
        assert explained("matmul", x, w).chosen == "triton.wgmma"
        assert explained("grouped_matmul", x, experts).chosen == "triton.grouped_wgmma"
        exact = ms.find_format(name).scale.torch_dtype != "float32"
        assert explained("matmul", many, w).chosen == ("cublas.two_pass" if exact else "triton.wgmma")
        for capability in ((8, 9), (10, 0)):
            assert explained("matmul", x, w, capability).chosen != "triton.wgmma"


def test_refusals_say_why():
    x, w = operand((256, 4096)), operand((4096, 1024), "fp8_row")
    for a, b, why in (
        (x, w, "4-, 6- or 8-bit codes"),
        (operand((256, 96)), operand((96, 1024), "mxfp8"), "whole steps"),
        (operand((256, 128)), operand((128, 1024), "nf4"), "at least 256"),
        (x, operand((4096, 1024), "nvfp4", outer="mixed"), "the same all along K"),
        (operand((4096, 4096)), operand((4096, 1024), "mxfp8"), "at most 1024 rows"),
    ):
        told = explained("matmul", a, b)
        assert any(why in r.reason for r in told.refused if r.kernel == "triton.wgmma"), (why, told)


# -- compiled ----------------------------------------------------------------------------------------------------------


INSTRUCTIONS = {"mxint8": 290, "mxfp8": 260, "mxfp4": 270, "nf4": 650}  # of a warp for 64 of K, at most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxint8", "fp8_block128", "nf4"])
def test_what_compiles_spills_nothing_and_overlaps(name):
    rows = lines("tests.kernels.compiled_wgmma", name)
    assert len(rows) >= 4
    most = INSTRUCTIONS.get(name, 330)
    for row in rows:
        assert row["local"] == 0 and not row["serialized"] and not row["hazards"] and row["shared"] <= 227 << 10, row
        assert row["mma"] and row["copies"] and row["loop"] * 64 <= most * row["tile"][1], row
        assert row["registers"] * row["tile"][3] <= 256 or row["out"] == "fp32", row


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_within_the_bound(name):
    """Dense, few and many rows, odd numbers of columns, layouts, every result dtype, a bias; twice the same bits."""
    for m, n, k, dtype in (
        (1, 201, 4096, torch.bfloat16),
        (77, 384, 1024, torch.float32),
        (300, 1000, 512, torch.float16),
    ):
        x, q = torch.randn(m, k, device="cuda").bfloat16(), weights((n, k), name, "cuda")
        q = q.to_layout("swizzle_32_4_4") if m == 77 else q
        bias = torch.randn(n, device="cuda").bfloat16() if m > 1 else None
        got = wgmma.matmul(x, parts(q.mT), bias, dtype)
        check(got, x, q.mT, bias)
        assert_same_bits(wgmma.matmul(x, parts(q.mT), bias, dtype), got)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.parametrize("name", FORMATS)
def test_groups_are_within_the_bound(name):
    """Ragged and empty groups, one expert with all, rows after the end, quantized rows, every tile; a graph."""
    for ends, n, k in (
        ([40, 40, 340, 341, 430], 200, 512),
        ([0, 0, 0, 7, 7], 128, 256),
        ([3, 5, 6, 10, 16], 136, 1024),
    ):
        offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
        x, q = torch.randn(ends[-1] + 5, k, device="cuda").bfloat16(), weights((5, n, k), name, "cuda")
        x = ms.quantize(x, "mxfp8") if n == 136 else x
        for tile in (None, wgmma.Tile(256, 64, 4, 1), wgmma.Tile(64, 64, 4, 2)):
            if tile is None or tile.rows == 64 or q.format.scale.torch_dtype != "float32":
                args = (parts(x), parts(q.mT), offsets, torch.bfloat16)
                got = wgmma.grouped_matmul(*args) if tile is None else with_tile(tile, args)
                start = 0
                for expert, stop in enumerate(ends):
                    if stop > start:
                        check(got[start:stop], x[start:stop], q.select(0, expert).mT)
                    start = stop
                assert not got[start:].any()
                again = wgmma.grouped_matmul(*args) if tile is None else with_tile(tile, args)
                assert_same_bits(again, got)


def with_tile(tile, args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma, "tile_of", lambda *_: tile)
        return wgmma.grouped_matmul(*args)


def not_finite(name, device):
    """x [20, 512] with NaN and infinity, and a matrix with NaN where its format has it."""
    x, q = torch.randn(20, 512, device=device).bfloat16(), weights((64, 512), name, device)
    x[3, 7], x[4, 9], x[5, 70], x[5, 300] = torch.nan, torch.inf, -torch.inf, torch.inf
    if q.format.element.nan != "none":
        q.qdata[5, 100] = 0x7F
    if q.scale.dtype == torch.float32:
        q.scale[9, 1] = torch.nan
    elif q.format.scale.exponent_only:
        q.scale[9, 1] = 0xFF
    return x, q


def check_not_finite(got, x, q):
    """NaN and infinity as exact products have them, and what is finite within the bound."""
    wanted = x.double() @ q.dequantize(torch.float32).double().T
    assert torch.equal(got.isnan(), wanted.isnan()) and not got[3].isfinite().any()
    infinite = wanted.isinf()
    assert infinite.any() and torch.equal(got.double()[infinite], wanted[infinite])
    whole = wanted.isfinite()
    rows, columns = whole.any(1), whole.any(0)
    assert torch.equal(got.isfinite(), whole) and torch.equal(whole, rows[:, None] & columns)
    check(got[rows][:, columns], x[rows], q.dequantize(torch.float32)[columns].mT)


def test_parts_of_tables_keep_infinity():
    """The kernel's arithmetic: products with the low and the high parts of values, then scales, sums in FP32."""
    x, q = not_finite("nf4", "cpu")
    tables = [torch.from_numpy(bfloat16(np.array(bits, np.uint32))) for bits in ptx_pairs.parts(q.format.element)]
    codes, block, acc = packing.unpack(q.qdata, 4).long(), q.format.block, torch.zeros(20, 64)
    for step in range(512 // block):
        part = slice(step * block, (step + 1) * block)
        high, low = (x[:, part].float() @ table[codes[:, part]].T for table in tables)
        acc = acc + (low + high) * q.scale[:, step]
    check_not_finite(acc, x, q)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.parametrize("name", ["mxfp6", "mxfp8", "mxfp8_e5m2", "nf4", "fp8_block128"])
def test_what_is_not_finite_stays_so(name):
    x, q = not_finite(name, "cuda")
    check_not_finite(wgmma.matmul(x, parts(q.mT), None, torch.float32), x, q)
