"""Compile `align_fragments` without a GPU: `python -m tests.kernels.compiled_align_fragments 90 [NAME ...]`.

Prints one JSON line per format with what the code of both its launches contains.
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
from triton.experimental.gluon._runtime import GluonASTSource

import microscale as ms
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import align_fragments, jit_align_fragments, jit_align_rows
from microscale.numerics import fragments

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FORMATS = [
    f for f in ms.list_formats() if reference.fits(ms.find_format(f)) and fragments.fits(ms.find_format(f), 64, 64)
]


def compiled(kind, kernel, pointers, constants, warps, capability):
    """The instructions of one program, counted, what was compiled, and registers of a thread."""
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in pointers}
    source = kind(kernel, signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        run = [TOOLS / "cuobjdump", "-sass", "-res-usage", file.name]
        sass = subprocess.run(run, capture_output=True, text=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    return collections.Counter(n for n in names if n != "NOP"), made, int(re.findall(r"REG:(\d+)", sass)[0])


def facts(name, capability):
    """What the code of a format contains."""
    fmt = ms.find_format(name)
    pointers = dict.fromkeys(("words", "scales", "row_scales", "out"), "*i32")
    constants = align_fragments.constants_of(fmt)
    warps = align_fragments.WARPS
    count, made, registers = compiled(
        GluonASTSource, jit_align_fragments.align_fragments, pointers, constants, warps, capability
    )
    tops = {"scales": "*u8", "row_scales": "*fp32"}
    first, *_ = compiled(
        ASTSource, jit_align_rows.fragment_row_scales, tops, align_fragments.top_constants(fmt),
        align_fragments.TOP_WARPS, capability,
    )  # fmt: skip
    return {
        "format": name, "per_element": round(sum(count.values()) / 128, 2),
        "loads": {i: n for i, n in count.items() if i.startswith("LDG")},
        "stores": {i: n for i, n in count.items() if i.startswith("STG")},
        "local": sum(n for i, n in (*count.items(), *first.items()) if i[:3] in ("LDL", "STL")),
        "shared": sum(n for i, n in count.items() if i[:3] in ("LDS", "STS")),
        "native": "cvt.rn.satfinite.e4m3x2.f32" in made.asm["ptx"], "top": count.most_common(12),
        "scale_loads": {i: n for i, n in first.items() if i.startswith("LDG")}, "registers": registers,
    }  # fmt: skip


if __name__ == "__main__":
    for wanted in sys.argv[2:] or FORMATS:
        print(json.dumps(facts(wanted, int(sys.argv[1]))), flush=True)
