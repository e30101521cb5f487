"""A few PTX instructions on NumPy arrays: enough to run what `ptx_decode.py` writes, all codes and scales at once."""

import re

import ml_dtypes
import numpy as np


def run(assembly: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run straight-line assembly; registers are uint32 arrays of one shape. Returns all registers."""
    registers = dict(inputs)

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0) & 0xFFFFFFFF)

    for line in assembly.replace("{", "").replace("}", "").split(";"):
        words = line.strip().split(None, 1)
        if not words or words[0].startswith(".reg"):
            continue
        operation, names = words[0], [n.strip() for n in words[1].split(",")]
        out, *given = names
        registers[out] = np.asarray(_apply(operation, [value(n) for n in given]), dtype=np.uint32)
    return registers


def _apply(operation: str, v: list[np.ndarray]) -> np.ndarray:
    if operation.startswith("mov"):
        return v[0]
    if operation.startswith("shl"):
        return v[0] << v[1]
    if operation.startswith("shr.u32"):
        return v[0] >> v[1]
    if operation.startswith("and"):
        return v[0] & v[1]
    if operation.startswith("mad.lo.u32"):
        return (v[0].astype(np.uint64) * v[1] + v[2]) & 0xFFFFFFFF
    if operation.startswith("lop3"):
        result = np.zeros_like(v[0] | v[1] | v[2])
        for i in range(8):
            if int(v[3]) >> i & 1:
                terms = [x if i >> (2 - j) & 1 else ~x for j, x in enumerate(v[:3])]
                result |= terms[0] & terms[1] & terms[2]
        return result
    if operation.startswith("prmt"):
        octets = [(v[0] >> 8 * i) & 0xFF for i in range(4)] + [(v[1] >> 8 * i) & 0xFF for i in range(4)]
        picks = [octets[int(v[2]) >> 4 * i & 7] for i in range(4)]
        return picks[0] | picks[1] << 8 | picks[2] << 16 | picks[3] << 24
    if operation.startswith("fma.rn.bf16x2"):
        halves = [_fma(*((x >> shift) & 0xFFFF for x in v)) for shift in (0, 16)]
        return halves[0] | halves[1] << 16
    raise NotImplementedError(operation)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One bfloat16 multiply-add: the product and sum of these operands are exact in FP64."""
    wide = [x.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64) for x in np.broadcast_arrays(a, b, c)]
    with np.errstate(all="ignore"):
        total = wide[0] * wide[1] + wide[2]
    return total.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)


def outputs(constraints: str) -> int:
    """How many output registers assembly has."""
    return len(re.findall("=", constraints))


def permute(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """PRMT with a selector for each element, and sign replication."""
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    octets = np.stack([x >> 8 * i & 0xFF for x in (a, b) for i in range(4)])
    out = np.zeros_like(selectors)
    for i in range(4):
        pick = selectors >> 4 * i & 0xF
        octet = np.take_along_axis(octets, (pick & 7)[None].astype(np.int64), 0)[0]
        out |= np.where(pick & 8, (octet >> 7) * 0xFF, octet).astype(np.uint32) << 8 * i
    return out.astype(np.uint32)
