"""Compile dequantize for one architecture without a GPU: `python -m tests.kernels.compiled_dequantize 90`.

Prints one JSON line per format and, on sm_90, way of addressing with what the code for dense rows contains. One process
and one cache folder per architecture: Triton fixes its table of conversions at the first compilation of a process.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import microscale as ms
from microscale.kernels.triton import dequantize, jit_dequantize

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OUTERS = {None: dequantize.NONE, "tensor": dequantize.SCALAR, "row": dequantize.BY_ROW, "expert": dequantize.BY_ROW}


def compiled(constants: dict[str, object], capability: int) -> collections.Counter[str]:
    """The instructions of `dequantize_runs` to bfloat16, counted."""
    tensors = {"qdata": "*u8", "scales": "*fp32" if constants["S_WIDE"] else "*u8", "outer": "*fp32", "table": "*fp32"}
    signature = {**tensors, "out": "*bf16", **dict.fromkeys(("runs", "rows", "blocks"), "i32")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(jit_dequantize.dequantize_runs, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": dequantize.THREADS // 32, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    return collections.Counter(n for n in names if n != "NOP")


def main(capability: int) -> None:
    for name in ms.list_formats():
        fmt = ms.find_format(name).for_row(128)
        outer = OUTERS[None if fmt.outer_scale is None else fmt.outer_scale.per]
        plain = dequantize.WHOLE_ROWS if outer == dequantize.BY_ROW else dequantize.ANY_ROWS
        ways = (
            (False, True, plain),
            (False, False, plain),
            (True, True, dequantize.WHOLE_ROWS),
            (True, True, dequantize.PARTS_OF_ROWS),
        )
        for swizzle, even, way in ways if capability == 90 else ways[:1]:
            constants = dict(dequantize.run_constants(fmt, even, way, False, swizzle, outer))
            count = compiled(constants, capability)
            per_class: collections.Counter[str] = collections.Counter()
            for instruction, n in count.items():
                per_class[instruction.split(".")[0]] += n
            print(json.dumps({
                "format": name, "swizzle": swizzle, "even": even, "way": way,
                "per_element": round(sum(count.values()) * 32 / (dequantize.THREADS * dequantize.RUNS * 8) * 4, 2),
                "shared": sum(per_class[i] for i in ("STS", "LDS", "BAR")),
                "local": per_class["LDL"] + per_class["STL"],
                "stores": {i: n for i, n in count.items() if i.startswith("STG")},
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
