"""x as E4M3 codes under one power of two per row, in one kernel: `quantize` to MX blocks, then `align_rows`.

What FP8 tensor cores of sm_89 and sm_90 multiply; see `kernels/reference/quantize_rows.py`. A row is held in registers
between the two roundings, so bytes per element of bf16 are 2 read and 1 written, against 2 + 1 + 1 + 1 of two kernels.
sm_90 takes some 10 instructions an element, 3.5 of them to round twice; in the time of 3 bytes an H200 issues 21.

The row's power of two follows from its largest block scale, and that from the largest amax of its blocks, because the
stored scale never falls as the amax rises: under every rule it is the exponent of the amax after adding something fixed
to its mantissa (`floor`, `ceil`, `even`, and `rceil` by way of a division by a constant, which keeps order as all
rounding does), plus a constant, clamped at both ends. So the maximum goes through the rule as it goes through each of
these steps. A block of zeros has the lowest scale there is, and zero as its amax; a row of nothing else, or of NaN
blocks alone, has that scale as its largest. NaN blocks, whose amax is not finite, are left out of the maximum of
amaxes, as the reference leaves out their scale.

The second rounding is exact up to its last step. A code of the first is an FP16 number, and times a power of two it is
one still, unless it falls below 2**-20; then it is below half of E4M3's smallest number, which is 2**-9. E5M2 is first
multiplied by 2**-7, exactly: its smallest number becomes 2**-23.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from microscale import dispatch
from microscale.dispatch import Problem, Requires, kernel
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.reference.quantize_rows import CHECKS
from microscale.kernels.triton import align_rows, constants, properties
from microscale.kernels.triton import quantize_blocks as blocks
from microscale.kernels.triton.launch import launch
from microscale.numerics import layout
from microscale.spec.quantizer import QuantizerSpec

PIECE = 8  # elements that a thread loads together: 16 bytes of bf16, and 8 to store
MOST_CHUNKS = 8  # pieces of a thread in a row: 32 registers
GOOD_CHUNKS = 4  # enough loads in flight, and few enough registers for all the warps that an SM holds
LEAST_THREADS, MOST_THREADS = 128, 1024
LONGEST = MOST_THREADS * MOST_CHUNKS * PIECE
E8M0_BIAS = 127
ADA, HOPPER = (8, 9), (9, 0)


# -- what it takes -----------------------------------------------------------------------------------------------------


def _spec(problem: Problem) -> QuantizerSpec:
    assert problem.quantizer is not None
    return problem.quantizer


def fits(spec: QuantizerSpec) -> bool:
    """Return True for OFP8 elements in blocks that neighbouring threads share, under scales of all FP32's exponents."""
    element, scale, block = spec.format.element, spec.format.scale, spec.format.block
    whole = properties.is_fp8(element) and element.subnormals and element.max is None
    return whole and scale.bias == E8M0_BIAS and 16 <= block <= 256 and block & (block - 1) == 0


def _is_plain(problem: Problem) -> bool:
    spec = _spec(problem)
    return spec.hadamard is None and spec.scale_tile is None and not spec.format.scale_rule.candidates


def _whole_rows(problem: Problem) -> bool:
    shape = problem.operands[0].shape
    return 0 not in shape and shape[-1] % _spec(problem).format.block == 0


_HERE = Requires(devices=("cuda",), packages=("triton",), checks=CHECKS)
FUSED = Requires(
    devices=("cuda",), packages=("triton",), dtypes=("bfloat16",), min_capability=ADA,
    checks=(
        *CHECKS,
        ("needs elements of E4M3 or E5M2 in blocks of 16 to 256, scales from 2**-127 on", lambda p: fits(_spec(p))),
        ("takes no Hadamard transform, scale tile or candidates", _is_plain),
        ("needs dense rows that start on 16 bytes", lambda p: p.operands[0].order == "rows"),
        ("needs rows of whole blocks", _whole_rows),
        (f"takes rows of up to {LONGEST} elements", lambda p: p.operands[0].shape[-1] <= LONGEST),
    ),
)  # fmt: skip


# -- fused -------------------------------------------------------------------------------------------------------------


@functools.cache
def encoder(mantissa: int, lift: int) -> tuple[str, str]:
    """Return PTX and constraints of what rounds PIECE elements twice (sm_89): E4M3 codes by way of E4M3 or E5M2.

    Operands: two words of codes out; four words of two bf16; the block's factor, FP32; the second power of two, FP32.
    `lift`: of `align_rows`, 0 for E4M3. NaN of the first factor makes all codes NaN, whatever the second is.
    """
    kind = {3: "e4m3x2", 2: "e5m2x2"}[mantissa]
    text = ["{ .reg .b32 a, b, f, k, s, z, h;  .reg .b16 p, q, r, t;  .reg .f32 v, w;  mov.b32 z, 0x80008000;"]
    text.append("\n    prmt.b32 f, $6, $6, 0x3232;  mov.b32 v, $7;  cvt.rn.f16x2.f32 s, v, v;")
    lifted = ""
    if lift:
        half = (15 + lift) << 10
        text.append(f"  mov.b32 k, 0x{half:04X}{half:04X};")
        lifted = "  mul.rn.f16x2 h, h, k;"
    for out in range(2):
        for i, code in enumerate("pq"):
            text.append(f"""
    fma.rn.bf16x2 a, ${2 + 2 * out + i}, f, z;  shl.b32 b, a, 16;  mov.b32 v, b;  and.b32 b, a, 0xFFFF0000;
    mov.b32 w, b;  cvt.rn.satfinite.{kind}.f32 r, w, v;  cvt.rn.f16x2.{kind} h, r;{lifted}
    mul.rn.f16x2 h, h, s;  cvt.rn.satfinite.e4m3x2.f16x2 {code}, h;""")
        text.append(f"\n    mov.b32 ${out}, {{p, q}};")
    return "".join([*text, "\n}"]), "=r,=r,r,r,r,r,r,r"


class Shape(NamedTuple):
    """How rows are laid over the threads of a program: `lanes` to a row, `chunks` pieces to each of them."""

    threads: int
    lanes: int
    chunks: int


@functools.lru_cache(maxsize=1024)
def shape_of(columns: int, block: int, few: bool) -> Shape:
    """Return the shape for rows of so many elements, LONGEST at most: the fewest idle lanes, then GOOD_CHUNKS.

    `few`: there are no more rows than SMs, so that each program has one to itself; then as many threads as there are.
    """
    pieces = columns // PIECE
    found = []
    for most in range(1, MOST_CHUNKS + 1):
        lanes = max(block // PIECE, properties.power_of_two_at_least(-(-pieces // most)))
        chunks = -(-pieces // lanes)
        if lanes <= MOST_THREADS:
            found.append(
                (0 if few else lanes * chunks - pieces, chunks if few else abs(chunks - GOOD_CHUNKS), chunks, lanes)
            )
    _, _, chunks, lanes = min(found)
    return Shape(max(LEAST_THREADS, lanes), lanes, chunks)


@functools.lru_cache(maxsize=1024)
def plan_of(
    spec: QuantizerSpec, shape: Shape, even: bool, capability: tuple[int, int] | None
) -> tuple[dict[str, Any], int]:
    """Return (constexpr arguments, warps); one object for the same ones. `capability`: None in the interpreter."""
    fmt, lift = spec.format, reference.lift(spec.format.element)
    text, constraints = encoder(fmt.element.mantissa or 0, lift)
    made = {
        **constants.quantizer_constants(spec), "T": shape.threads, "LANES": shape.lanes, "CHUNKS": shape.chunks,
        "SHARE": fmt.block // PIECE, "EVEN": even, "LIFT": lift, "PTX": text, "CONSTRAINTS": constraints,
        "NATIVE": capability is not None, "PORTABLE": blocks.is_portable(capability), "CARRY": blocks.carry_of(spec),
    }  # fmt: skip
    known = constants.only(_jit().quantize_rows, made)
    if capability is not None:  # registers: room for all warps of an SM if nothing is spilled then, for 48, or for half
        spare = shape.threads == shape.lanes and capability == HOPPER
        known["maxnreg"] = 64 if shape.chunks > GOOD_CHUNKS else 32 if spare else 40
    return known, shape.threads // 32


@kernel("quantize_rows", "triton.quantize_rows", priority=20, requires=FUSED)
def quantize_rows(x: torch.Tensor, spec: QuantizerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dense bf16 x [..., R, K] as (float8_e4m3fn [..., R, K], FP32 row powers [..., R, 1]); as the reference."""
    few = x.numel() // x.shape[-1] <= properties.multiprocessors(x.device)
    return laid_out(x, spec, shape_of(x.shape[-1], spec.format.block, few))


def laid_out(x: torch.Tensor, spec: QuantizerSpec, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel with rows laid over threads in a given way; tests and measurements call it too."""
    x, columns, lead = blocks.aligned(x), x.shape[-1], tuple(x.shape[:-1])
    codes = blocks.empty((*lead, columns), torch.uint8, x.device)
    powers = blocks.empty((*lead, 1), torch.float32, x.device)
    total, rows, pieces = x.numel() // columns, shape.threads // shape.lanes, columns // PIECE
    even = pieces == shape.lanes * shape.chunks and total % rows == 0
    known, warps = plan_of(spec, shape, even, blocks.capability_of(x.device))
    launch(_jit().quantize_rows, -(-total // rows), (x, codes, powers, total, pieces), known, warps)
    return codes.view(torch.float8_e4m3fn), powers


@functools.cache
def _jit() -> Any:
    from microscale.kernels.triton import jit_quantize_rows

    return jit_quantize_rows


# -- in two steps ------------------------------------------------------------------------------------------------------


@kernel("quantize_rows", "triton.quantize_then_align", priority=10, requires=_HERE)
def quantize_then_align(x: torch.Tensor, spec: QuantizerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., R, K] by the kernel that the dispatcher selects, and align what it gives; as the reference."""
    lead, columns = tuple(x.shape[:-1]), x.shape[-1]
    if not x.numel():
        codes = torch.empty(
            (*lead, -(-columns // reference.ALIGN) * reference.ALIGN), dtype=torch.uint8, device=x.device
        )
        powers = torch.full((*lead, 1), 2.0**reference.SMALLEST_ROW, device=x.device)
        return codes.view(torch.float8_e4m3fn), powers
    operand = dispatch.Operand(tuple(x.shape), str(x.dtype).removeprefix("torch."), order=_order(x))
    capability = properties.capability(x.device)
    problem = Problem("quantize", (operand,), x.device.type, capability, spec, None, layout.STRIDED)
    qdata, scale, _ = dispatch.select(problem).run(x, spec, None, None, None, layout.STRIDED)
    return align_rows.align_rows(qdata, scale, spec.format, columns, layout.STRIDED)


def _order(x: torch.Tensor) -> str:
    """How x lies in memory, as `dispatch.Operand.order`."""
    if x.data_ptr() % 16:
        return "strided"
    if x.is_contiguous():
        return "rows"
    return "columns" if x.dim() > 1 and x.mT.is_contiguous() else "strided"
