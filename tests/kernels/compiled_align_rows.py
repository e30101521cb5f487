"""Compile `align_rows` for one architecture without a GPU: `python -m tests.kernels.compiled_align_rows 90`.

Prints one JSON line per format and program with what its code contains.
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
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import align_rows, jit_align_rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# rows, columns: full programs, of rows in several looks for the largest too, and ones with masks
SHAPES = {"full": (8192, 8192), "long": (8192, 28672), "part": (4096, 28672 - 32), "ragged": (300, 4000)}


def compiled(fmt: ms.FormatSpec, total: int, columns: int, capability: int) -> tuple[collections.Counter[str], str]:
    """The instructions of one program, counted, and the PTX."""
    blocks = -(-columns // fmt.block)
    _, constants = align_rows.plan(fmt, total, blocks, columns, False)
    tensors = {"qdata": "*u8", "scales": "*u8", "out": "*u8", "row_scales": "*fp32"}
    signature = {**tensors, **dict.fromkeys(("total", "rows", "blocks", "columns", "width"), "i32")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 6, 7, 8)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(jit_align_rows.align_rows, signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": align_rows.WARPS, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    return collections.Counter(n for n in names if n != "NOP"), made.asm["ptx"]


def main(capability: int) -> None:
    for fmt in map(ms.find_format, ms.list_formats()):
        if not reference.fits(fmt):
            continue
        for shape, (total, columns) in SHAPES.items():
            count, ptx = compiled(fmt, total, columns, capability)
            made = align_rows.plan(fmt, total, -(-columns // fmt.block), columns, False)[1]
            per_thread = align_rows.TILE * made["UNROLL"] / (32 * align_rows.WARPS)
            classes: collections.Counter[str] = collections.Counter()
            for name, n in count.items():
                classes[name.split(".")[0]] += n
            print(json.dumps({
                "format": fmt.name, "shape": shape, "loops": made["LOOPS"],
                "per_element": round(sum(count.values()) / per_thread, 2),
                "loads": {i: n for i, n in count.items() if i.startswith("LDG")},
                "stores": {i: n for i, n in count.items() if i.startswith("STG")},
                "shared": sum(classes[i] for i in ("STS", "LDS")), "local": classes["LDL"] + classes["STL"],
                "native": "cvt.rn.satfinite.e4m3x2.f16x2" in ptx, "top": classes.most_common(14),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
