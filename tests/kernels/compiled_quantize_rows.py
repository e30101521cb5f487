"""Compile `quantize_rows` for one architecture without a GPU: `python -m tests.kernels.compiled_quantize_rows 90`.

Prints one JSON line per format and shape with what its code contains.
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
from microscale.kernels.triton import jit_quantize_rows, quantize_rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FORMATS = ("mxfp8", "mxfp8_e5m2")
# rows, columns: rows of many threads, of few (several in a program), and with masks; few rows of many threads
SHAPES = {"8192": (4096, 8192), "28672": (4096, 28672), "256": (4096, 256), "masked": (4096, 11008), "few": (16, 28672)}
SMS = 132


def compiled(name: str, total: int, columns: int, capability: int) -> dict[str, object]:
    """What the code of one program contains."""
    spec = ms.find_quantizer(name)
    shape = quantize_rows.shape_of(columns, spec.format.block, total <= SMS)
    even = columns == shape.lanes * shape.chunks * quantize_rows.PIECE
    constants, warps = quantize_rows.plan_of(spec, shape, even, (capability // 10, capability % 10))
    kernel = jit_quantize_rows.quantize_rows
    types = {"x": "*bf16", "codes": "*u8", "powers": "*fp32", "total": "i32", "pieces": "i32"}
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    known = {n: v for n, v in constants.items() if n in signature}
    source = ASTSource(kernel, signature, constexprs=known, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False, "maxnreg": constants["maxnreg"]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run([TOOLS / "cuobjdump", "-sass", "-res-usage", file.name], capture_output=True, text=True)
    said = done.stdout + done.stderr
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", said)
    count = collections.Counter(n for n in names if n != "NOP")
    registers = int(re.findall(r"REG:(\d+)", said)[0])
    return {
        "registers": registers, "warps": warps, "chunks": shape.chunks,
        "per_element": round(sum(count.values()) / (shape.chunks * quantize_rows.PIECE), 2),
        "loads": {n: c for n, c in count.items() if n.startswith("LDG")},
        "stores": {n: c for n, c in count.items() if n.startswith("STG")},
        "local": sum(c for n, c in count.items() if n.split(".")[0] in ("LDL", "STL")),
        "shared": made.metadata.shared, "top": count.most_common(12),
        "native": [n for n in ("e4m3x2.f32", "e5m2x2.f32", "e4m3x2.f16x2") if f"satfinite.{n}" in made.asm["ptx"]],
    }  # fmt: skip


def main(capability: int) -> None:
    for name in FORMATS:
        for shape, (total, columns) in SHAPES.items():
            found = compiled(name, total, columns, capability)
            print(json.dumps({"format": name, "shape": shape, **found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
