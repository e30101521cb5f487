"""Compile `dot_scaled` for one architecture without a GPU: `python -m tests.kernels.compiled_dot_scaled 100`.

Prints one JSON line per pair with its MMA instructions. A process and a cache folder per architecture: Triton fixes its
table of conversions at the first compilation of a process.
"""

import itertools
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import microscale as ms
from microscale.kernels.triton import dot_scaled, jit_dot_scaled
from tests.kernels.dot_scaled_cases import MX

PAIRS = (*itertools.product(MX, MX), ("nvfp4", "nvfp4"), ("nvfp4_row", "nvfp4_1level"))
OUTERS = {None: dot_scaled.NONE, "tensor": dot_scaled.SCALAR, "row": dot_scaled.BY_ROW}


def compiled(left: str, right: str, swizzle: bool, capability: int) -> list[str]:
    """The MMA instructions of one pair, with bias and bfloat16 output."""
    formats = [ms.find_format(name) for name in (left, right)]
    outers = tuple(OUTERS[f.outer_scale and f.outer_scale.per] for f in formats)
    constants = dict(dot_scaled.constants_of(*formats, (swizzle, swizzle), outers, True))
    tensors = {"a": "*u8", "a_scales": "*u8", "a_outer": "*fp32", "b": "*u8", "b_scales": "*u8", "b_outer": "*fp32"}
    signature = {**tensors, "bias": "*bf16", "out": "*bf16", **dict.fromkeys(
        ("m", "n", "blocks", "a_width", "b_width", "bias_row", "bias_column"), "i32"
    )}  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(13)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(jit_dot_scaled.dot_scaled, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": dot_scaled.WARPS, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return sorted(set(re.findall(r"((?:tcgen05\.mma|mma\.sync|wgmma\.mma_async)[\w.:]*)", made.asm["ptx"])))


def main(capability: int) -> None:
    for left, right in PAIRS:
        for swizzle in (False, True):
            found = compiled(left, right, swizzle, capability)
            print(json.dumps({"pair": [left, right], "swizzle": swizzle, "mma": found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
