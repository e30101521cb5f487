"""Compile `matmul_wide` for Hopper without a GPU: `python -m tests.kernels.compiled_fragments_wide [NAME ...]`.

Prints one JSON line for each format, tile and kind of result: "local" accesses (spills), whether ptxas put the tensor
cores' instructions one after the other (it says so), what is written while they read it ("hazards"), shared memory, and
what the code contains.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

import microscale as ms
from microscale.kernels.triton import fragments, fragments_wide, jit_fragments_wide
from microscale.spec.powers import with_powers
from tests.kernels.wgmma_hazards import hazards, machine_code

POINTERS = {"words": "*u8", "scales": "*u8", "outer": "*fp32", "bias": "*bf16", "out": "*bf16", "parts": "*fp32"}
FORMATS = ("mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8", "fp8_row")
SHAPES = (*((rows, 28672, 8192) for rows in (32, 64, 128, 256)), (64, 14336, 4096), (128, 14336, 4096))  # M, N, K


def compiled(name, shape, out, bias):
    """The facts of one kernel."""
    rows, columns, depth = shape
    fmt = ms.find_format(name).for_row(depth)
    outer = int(fmt.outer_scale is not None)
    if fragments.has_row_scales(fmt):  # as kernels get it
        fmt, outer = with_powers(fmt), 2
    tile = fragments_wide.cut_of(fmt, rows, (columns, depth), 132).tile
    known = fragments_wide.constants_of(fmt, tile, outer, bias)
    kernel, options = jit_fragments_wide.matmul_wide, {"num_warps": tile.warps, "enable_fp_fusion": False}
    options |= fragments_wide.CHAINED
    known = {name: value for name, value in known.items() if name not in fragments_wide.CHAINED}
    types = POINTERS | {"out": f"*{out}", "x": f"tensordesc<bf16[{tile.rows}, 64],{jit_fragments_wide.X_LAYOUT!r}>"}
    signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in kernel.arg_names}
    plain = [i for i, n in enumerate(kernel.arg_names) if n in POINTERS or n == "columns"]
    source = GluonASTSource(kernel, signature, known, {(i,): [["tt.divisibility", 16]] for i in plain})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    sass, said = machine_code(made)
    found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    names = [n.split(".")[0] for n in found]
    return {
        "format": name, "rows": tile.rows, "threads": 32 * tile.warps, "resident": tile.resident, "out": out,
        "hazards": hazards(sass),
        "local": names.count("LDL") + names.count("STL"),
        "serialized": "serialized" in said, "shared": made.metadata.shared, "mma": names.count("HGMMA"),
        "copies": names.count("UTMALDG"), "waits": waits(sass),
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
    }  # fmt: skip


def waits(sass):
    """Whether the wait for the kernel before comes before every copy of what that made, and stores come after it."""
    place = [sass.find(name) for name in ("ACQBULK", "UTMALDG", "STG")]
    return 0 <= place[0] < min(place[1:])


if __name__ == "__main__":
    for wanted in sys.argv[1:] or FORMATS:
        for shape in SHAPES:
            for kind in (("bf16", False), ("fp32", True)):
                print(json.dumps(compiled(wanted, shape, *kind)), flush=True)
