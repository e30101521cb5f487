"""Tens to hundreds of rows times a prepared weight on Hopper: what can be run here of it, and the product on a GPU."""

import pytest
import torch

import microscale as ms
from microscale.kernels.triton import fragments, fragments_wide
from microscale.ops.late import late
from tests.kernels.processes import lines
from tests.kernels.products import check, parts
from tests.kernels.test_fragments import FITTING, chosen, weight
from tests.kernels.wgmma_hazards import hazards


def test_who_gets_which_rows():
    """From 17 to 2048 rows of prepared weights on Hopper; fewer are the decode GEMM's, more are decoded beforehand."""
    wide = "triton.matmul_fragments_wide"
    assert [chosen((m, 4096), "mxfp4") == wide for m in (1, 16, 17, 64, 256, 2048, 2049)] == [
        False, False, True, True, True, True, False
    ]  # fmt: skip
    assert [chosen((m, 4096), "mxfp6") == wide for m in (64, 1024, 1025)] == [True, True, False]
    assert [chosen((m, 4096), "mxfp4", outer="vector") == wide for m in (4096, 4097)] == [True, False]
    assert chosen((64, 4096), "mxfp4", capability=(8, 0)) == "triton.matmul_fragments"
    assert chosen((128, 4096), "mxfp4", "strided") != wide


@pytest.mark.parametrize("rows", [17, 32, 33, 64, 65, 128, 256, 500, 2048])
@pytest.mark.parametrize("columns", [64, 4096, 8192, 14336, 28672, 28736])
@pytest.mark.parametrize("depth", [64, 4096, 28672])
def test_cuts(rows, columns, depth):
    """No more programs than run at once, unless that is a program for each part of a tile."""
    for name in ("mxfp4", "mxfp6"):
        tile, programs = fragments_wide.cut_of(ms.find_format(name), rows, (columns, depth), 132)
        assert rows <= tile.rows or tile.rows in (128, 256)
        assert tile.units > 1 or name == "mxfp4"
        assert tile.columns in (128, 256) and 0 < programs <= 132 * tile.resident
        tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
        assert programs % tiles == 0 or programs == 132 * tile.resident


@pytest.mark.parametrize(("tiles", "steps", "programs", "share"), [
    (64, 448, 33, 896), (224, 128, 33, 896), (224, 128, 132, 218), (32, 64, 132, 16), (64, 448, 128, 224), (1, 5, 9, 1)
])  # fmt: skip
def test_shares(tiles, steps, programs, share):
    """Whole tiles where that is at most a ninth more steps; all steps are someone's, no program goes without."""
    found = fragments_wide.share_of(tiles * steps, steps, programs)
    assert found == share and -(-tiles * steps // found) <= programs


def test_before_and_after():
    """The order of x and the sums of shared tiles, by the interpreter."""
    found = lines("tests.kernels.wide_steps_cases", TRITON_INTERPRET="1")
    assert len(found) == 7 and all(f["good"] for f in found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", FITTING)
def test_it_compiles(name):
    """Without local memory; products in flight while the next operand is decoded, none of which loses its operand."""
    found = lines("tests.kernels.compiled_fragments_wide", name)
    assert len(found) == 12
    for f in found:
        assert not f["hazards"] and f["local"] == 0 and not f["serialized"] and f["mma"] >= 8 and f["copies"], f
        assert f["waits"], f
        resident = f["resident"]
        assert f["registers"] * f["threads"] * resident <= 65536 and (f["shared"] + 1024) * resident <= 228 << 10, f


HAZARD = """
/*0000*/ HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 ;
/*0008*/ {early} ;
/*0010*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
/*0020*/ {write} ;
/*0030*/ HGMMA.64x64x16.F32.BF16 R56, R104, gdesc[UR8], R56, gsb0 ;
/*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
/*0050*/ @P0 BRA 0x0 ;
"""


@pytest.mark.parametrize(
    ("early", "write", "bad"),
    [
        ("NOP", "LOP3.LUT R90, R1, R2", True), ("NOP", "LDS.128 R84, [R3]", False), ("NOP", "LDS.128 R85, [R3]", True),
        ("NOP", "IMAD R92, R1, R88", False), ("NOP", "STS.128 [R1], R88", False), ("NOP", "IMAD R104, R1, R2", False),
        ("IMAD R104, R1, R2", "NOP", True),
    ],
)  # fmt: skip
def test_hazards_are_seen(early, write, bad):
    """What the reading of machine code finds. Early, the product of the turn before still reads R104."""
    assert bool(hazards(HAZARD.replace("{write}", write).replace("{early}", early))) == bad


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITTING)
def test_on_a_gpu(name):
    """Against FP64 within the derived bound, whoever shares tiles; the same bits twice."""
    q = weight(name, 448, 1024, "cuda")
    made = ms.prepare(q)
    bias = torch.randn(448, device="cuda").to(torch.bfloat16)
    for rows, dtype in (
        (17, torch.bfloat16), (32, torch.float32), (64, torch.float16), (256, torch.bfloat16), (300, torch.float32),
        (470, torch.bfloat16),
    ):  # fmt: skip
        x = torch.randn(rows, 1024, device="cuda").to(torch.bfloat16)
        assert ms.explain("matmul", x, made).chosen == "triton.matmul_fragments_wide"
        got = ms.matmul(x, made.t(), bias, dtype)
        check(got, x, q.t(), bias, dtype)
        assert torch.equal(got, ms.matmul(x, made.t(), bias, dtype))
        for programs in (1, 3, 7, 1000):
            for sms in (1, 132):
                cut = fragments_wide.cut_of(q.format, rows, (448, 1024), sms)._replace(programs=programs)
                other = fragments_wide.run(x, late(parts(made.t()), -2), None, torch.float32, cut)
                check(other, x, q.t(), None, torch.float32)


@pytest.mark.gpu
def test_odd_operands_on_a_gpu():
    """Activations that are views, of three dimensions, and at odd addresses."""
    q = weight("mxfp4", 128, 256, "cuda")
    made = ms.prepare(q)
    flat = torch.randn(40 * 256 + 1, device="cuda").to(torch.bfloat16)
    for x in (flat[1:].view(40, 256), flat[:-1].view(256, 40).t(), flat[:-1].view(2, 20, 256)):
        got = ms.matmul(x, made.t())
        check(got.reshape(-1, 128), x.reshape(-1, 256), q.t())
    assert fragments.MOST_ROWS >= 40
