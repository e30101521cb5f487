"""Compile the products of `wgmma.py` for Hopper without a GPU: `python -m tests.kernels.compiled_wgmma [NAME ...]`.

Prints one JSON line for each format and tile: registers, shared memory, "local" accesses (spills), whether ptxas put
the tensor cores' instructions one after the other (it says so), and the instructions of the loop along K.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

import microscale as ms
from microscale.kernels.triton import jit_wgmma, wgmma
from tests.kernels.compiled_grouped import instructions, loop
from tests.kernels.wgmma_hazards import hazards, machine_code

POINTERS = {"a_outer": "*fp32", "b_outer": "*fp32", "bias": "*bf16", "offsets": "*i32"}
FORMATS = ("mxfp4", "nvfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "mxint8", "nvint4", "fp8_block128", "nf4")


def compiled(name, tile, out="bf16", by_group=True, splits=1, bias=False, swizzle=False):
    """The facts of one kernel."""
    fmt = ms.find_format(name)
    wide = fmt.scale.torch_dtype == "float32"
    known = wgmma.constants(
        fmt, tile, 32, splits, by_group, (False, fmt.outer_scale is not None, bias), swizzle
    )  # fmt: skip
    x_layout, *code_layouts = wgmma.layouts(fmt, tile)
    unit = {4: "u8", 6: "i32", 8: "i16"}[fmt.element.width]
    types = POINTERS | {"scales": "*fp32" if wide else "*u8", "out": f"*{out}"}
    types["x"] = f"tensordesc<bf16[{tile.rows}, {tile.depth}],{x_layout!r}>"
    kernel, known = jit_wgmma.multiply_codes, dict(known)
    limit = {"maxnreg": known.pop("maxnreg")} if "maxnreg" in known else {}
    for n, box, layout in zip(("codes", "rest"), wgmma.boxes(fmt, tile), code_layouts, strict=True):
        if box is None:
            known[n] = None
        else:
            types[n] = f"tensordesc<{unit}{box},{layout!r}>"
    signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in kernel.arg_names}
    plain = [i for i, n in enumerate(kernel.arg_names) if n not in known and n not in ("x", "codes", "rest")]
    source = GluonASTSource(kernel, signature, dict(known), {(i,): [["tt.divisibility", 16]] for i in plain})
    options = {"num_warps": wgmma.WARPS, "enable_fp_fusion": False} | limit
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    sass, said = machine_code(made)
    names = [n for _, n, _ in instructions(sass)]
    registers = re.search(r"Used (\d+) registers", said)
    return {
        "format": name, "tile": list(tile), "out": out, "registers": int(registers[1]) if registers else 0,
        "shared": made.metadata.shared, "local": names.count("LDL") + names.count("STL"),
        "serialized": "serialized" in said, "hazards": hazards(sass), "mma": names.count("HGMMA"),
        "copies": names.count("UTMALDG"),
        "loop": len(loop(sass)), "code_loads": sum(n == "LDS" for n in loop(sass)),
    }  # fmt: skip


def main(formats):
    for name in formats or FORMATS:
        fmt, seen = ms.find_format(name), set()
        for rows in (1, 64, 128, 4096):
            tile = wgmma.tile_of(fmt, rows, 4096, torch.bfloat16)
            if tile not in seen:
                seen.add(tile)
                print(json.dumps(compiled(name, tile)), flush=True)
        tile = wgmma.tile_of(fmt, 4096, 4096, torch.float32)
        print(json.dumps(compiled(name, tile, "fp32", by_group=False, bias=True, swizzle=True)), flush=True)
        tile = wgmma.tile_of(fmt, 16, 4096, torch.float32)
        print(json.dumps(compiled(name, tile, "fp32", by_group=False, splits=4)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
