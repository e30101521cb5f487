"""Codes of 6 bits on their way to Hopper's tensor cores: every pair in every place, stages as lanes read them."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import microscale as ms
from microscale.kernels.triton import jit_sixes, ptx_pairs, ptx_sixes, wgmma
from microscale.numerics import codec, packing
from microscale.spec.element import ElementSpec
from tests.kernels import gluon_double
from tests.kernels.products import check, parts
from tests.kernels.test_wgmma import Model, bfloat16, hopper, run, same

ELEMENTS = {name: ms.find_format(name).element for name in ("mxfp6", "mxfp6_e3m2")}
ELEMENTS |= {
    "e1m4": ElementSpec(name="e1m4", kind="float", exponent=1, mantissa=4, bias=1, nan="none", subnormals=True),
    "e4m1": ElementSpec(name="e4m1", kind="float", exponent=4, mantissa=1, bias=7, nan="none", subnormals=True),
    "int6": ElementSpec(name="int6", kind="int", bits=6, fraction=4),
}


USERS = (
    {"name": "six_int", "scale": "e8m0", "scale_rule": "rceil", "block": 32,
     "element": {"name": "int6", "kind": "int", "bits": 6, "fraction": 4}},
    {"name": "six_e1m4", "scale": "e8m0", "scale_rule": "rceil", "block": 32,
     "element": {"name": "e1m4", "kind": "float", "exponent": 1, "mantissa": 4, "bias": 1, "nan": "none"}},
    {"name": "six_16", "scale": "e8m0", "scale_rule": "rceil", "block": 16, "element": "e3m2"},
    {"name": "six_64", "scale": "e4m3", "scale_rule": "nearest", "block": 64, "element": "e3m2",
     "outer_scale": {"dtype": "fp32", "per": "tensor"}},
    {"name": "six_wide", "scale": "fp32", "scale_rule": "nearest", "block": 128, "element": "e2m3"},
)  # fmt: skip


def decoded(element, units):
    """Values of pairs as `ptx_pairs` decodes them, without a scale."""
    made = run(ptx_pairs.pair(element, False), {"$2": units.numpy().astype(np.uint32)})
    return bfloat16(made["$0"]), bfloat16(made["$1"])


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("depth", [64, 128])
def test_lanes_find_their_pairs(name, depth):
    """A stage of words, as the copy engine leaves it, to pairs [rows, depth / 2] in the order of K."""
    element = ELEMENTS[name]
    assert ptx_pairs.has_pairs(element)
    rows = 4096 * 16 // depth
    every = torch.arange(4096 * 8) // 8  # every pair of codes in every place of 16 codes
    codes = torch.stack([every & 63, every >> 6], -1).to(torch.uint8).view(rows, depth)
    packed = packing.pack(codes, 6)
    assert packed.shape[1] == depth * 3 // 4
    words = packed.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    two_thirds = words.shape[1] * 2 // 3
    stage = [gluon_double.Stage(words[:, :two_thirds]), gluon_double.Stage(words[:, two_thirds:])]
    assert [s.shape[1] for s in stage] == [box[1] for box in wgmma.boxes(ms.find_format("mxfp6"), tile(depth))]
    six = gluon_double.functions(jit_sixes, run)
    lanes = six.lanes_of(rows, 8, ptx_sixes.base(element))
    units = six.pairs_of(*stage, lanes, None, 8, ptx_sixes.gather(element), ptx_sixes.GATHER)
    assert units.shape == (rows, depth // 2)
    table = codec.decode_table(element, torch.device("cpu")).numpy()
    first, second = decoded(element, units)
    same(first, table[codes[:, ::2].numpy()])
    same(second, table[codes[:, 1::2].numpy()])


def tile(depth):
    return wgmma.Tile(64, depth, 3, 2)


@pytest.mark.parametrize("name", ELEMENTS)
def test_gathered_pairs_take_few_instructions(name):
    """Seven for a pair of floats that bfloat16's layout holds at once; moves cost nothing."""
    text = ptx_sixes.gather(ELEMENTS[name])
    lines = [line for line in text.split(";") if line.strip(" {}\n") and ".reg" not in line and "mov" not in line]
    assert len(lines) <= 2 * (8 if ELEMENTS[name].mantissa == 4 else 7)


def test_what_is_not_taken():
    e3m2 = ELEMENTS["mxfp6_e3m2"]
    assert not ptx_pairs.has_pairs(e3m2.model_copy(update={"subnormals": False}))
    assert not ptx_pairs.has_pairs(ELEMENTS["int6"].model_copy(update={"fraction": 7}))


# -- formats of users --------------------------------------------------------------------------------------------------


def products(user, device):
    """Dense products with few and many rows, and a grouped one, each compared with FP64; the format, known first."""
    for m, n, k in ((1, 200, 1024), (100, 136, 512), (300, 264, 256)):
        x, q = torch.randn(m, k, device=device).bfloat16(), ms.quantize(torch.randn(n, k, device=device), user)
        assert wgmma._has_codes(q.format)
        yield q.format
        check(wgmma.matmul(x, parts(q.mT), None, torch.bfloat16), x, q.mT)
    x, q = torch.randn(24, 512, device=device).bfloat16(), ms.quantize(torch.randn(2, 136, 512, device=device), user)
    got = wgmma.grouped_matmul(x, parts(q.mT), torch.tensor([9, 20], dtype=torch.int32, device=device), torch.float32)
    for expert, rows in enumerate((slice(0, 9), slice(9, 20))):
        check(got[rows], x[rows], q.select(0, expert).mT)
    assert not got[20:].any()


@pytest.mark.parametrize("user", USERS, ids=lambda user: user["name"])
def test_formats_of_users(user, monkeypatch):
    """What launches are given, read as the kernel reads it."""
    model = Model(monkeypatch)
    for fmt in products(user, "cpu"):
        model.format = fmt
    assert len(model.calls) == 4 and all(given["rest"] is not None for _, given, _ in model.calls)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs compute capability 9.0")
@pytest.mark.parametrize("user", USERS, ids=lambda user: user["name"])
def test_products_of_formats_of_users(user):
    assert list(products(user, "cuda"))
