"""Compile `multiply_groups` for Hopper: `python -m tests.kernels.compiled_grouped_fragments_wide [NAME ...]`.

Prints one JSON line for each format, tile and kind of result, with what `compiled_fragments_wide` says of its kernels.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

import microscale as ms
from microscale.kernels.triton import fragments_wide, grouped_fragments_wide, jit_fragments_wide, wgmma
from microscale.kernels.triton import jit_grouped_fragments_wide as jit
from tests.kernels.compiled_fragments_wide import waits
from tests.kernels.wgmma_hazards import hazards, machine_code

POINTERS = {
    "words": "*u8", "scales": "*u8", "a_outer": "*fp32", "b_outer": "*fp32", "offsets": "*i32", "out": "*bf16"
}  # fmt: skip
FORMATS = ("mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8")


def compiled(name, tile, out, of_rows, experts):
    """The facts of one kernel."""
    fmt = ms.find_format(name)
    outer = 0 if fmt.outer_scale is None else 2 if of_rows else 1
    known = dict(grouped_fragments_wide.constants_of(fmt, tile, wgmma.lanes_of(experts), (of_rows, outer)))
    kernel, options = jit.multiply_groups, {"num_warps": tile.warps, "enable_fp_fusion": False}
    for option in (*fragments_wide.CHAINED, "maxnreg"):
        if option in known:
            options[option] = known.pop(option)
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
        "hazards": hazards(sass), "local": names.count("LDL") + names.count("STL"),
        "serialized": "serialized" in said, "shared": made.metadata.shared, "mma": names.count("HGMMA"),
        "copies": names.count("UTMALDG"), "waits": waits(sass), "instructions": len(names),
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
    }  # fmt: skip


def main(formats):
    for name in formats:
        fmt = ms.find_format(name)
        for rows in (32, 64, 128, 512):
            for kind in (("bf16", False, 8), ("fp32", True, 128), ("bf16", True, 256), ("bf16", True, 1024)):
                tile = grouped_fragments_wide.tile_of(fmt, rows * kind[-1], kind[-1])
                print(json.dumps(compiled(name, tile, *kind)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or FORMATS)
