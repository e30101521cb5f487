"""Compile the grouped kernels for one architecture without a GPU: `python -m tests.kernels.compiled_grouped 90`.

Prints one JSON line per kernel, format and tile with what its code contains, "loop" being the instructions of a thread
for each of its elements of b. One process and one cache folder per architecture, as for
`tests.kernels.compiled_blocks`.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import microscale as ms
from microscale.kernels.triton import grouped, jit_grouped

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSORS = {"a": "*bf16", "b": "*bf16", "codes": "*u8", "scales": "*u8", "a_outer": "*fp32", "b_outer": "*fp32"}
TENSORS |= {"offsets": "*i32", "out": "*bf16"}
FORMATS = ("mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxfp8_e5m2", "mxint8", "nvint4")
CODES = ((64, 64), (2048, 64), (4096, 64), (8192, 64), (16384, 64))  # tokens and experts, for each tile of codes


class Code(NamedTuple):
    """Instructions counted by class, bytes of shared memory, registers, instructions of the loop along K."""

    count: collections.Counter[str]
    shared: int
    registers: int
    loop: int


def compiled(kernel, constants, tile, capability, tensors=TENSORS):
    """What a kernel is compiled to."""
    names = [n for n in kernel.arg_names if n not in constants]
    signature = {n: tensors.get(n, "i32") if n in names else "constexpr" for n in kernel.arg_names}
    plain = [i for i, n in enumerate(kernel.arg_names) if n in names and not signature[n].startswith("tensordesc")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in plain}
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
        used = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    count = collections.Counter(name for _, name, _ in instructions(sass))
    registers = re.search(r"REG:(\d+)", used)
    return Code(count, made.metadata.shared, int(registers[1]) if registers else 0, len(loop(sass)))


def instructions(sass):
    """The address, class and text of each."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]+)([^;]*);", sass)
    return [(int(place, 16), name, rest) for place, name, rest in found if name != "NOP"]


def loop(sass):
    """The instructions of the smallest loop that multiplies."""
    found, best = instructions(sass), []
    for place, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target is not None and int(target[1], 16) < place:
            body = [n for at, n, _ in found if int(target[1], 16) <= at <= place]
            if any("MMA" in n for n in body) and (not best or len(body) < len(best)):
                best = body
    return best


def report(kernel, tile, capability, constants, tensors=TENSORS, **facts):
    count, shared, registers, looped = compiled(kernel, constants, tile, capability, tensors)
    matrix = sum(n for name, n in count.items() if re.search("MMA", name))
    print(json.dumps({
        "kernel": kernel.__name__, "tile": list(tile[:3]), **facts, "shared": shared, "registers": registers,
        "local": count["LDL"] + count["STL"], "mma": matrix, "instructions": sum(count.values()),
        "loop": round(looped * tile.warps * 32 / (tile.columns * tile.depth), 2),
        "copies": count["LDGSTS"] + count["UTMALDG"], "loads": count["LDG"],
        "kinds": sorted(n for n in count if "MMA" in n),
    }), flush=True)  # fmt: skip


def main(capability: int) -> None:
    target = (capability // 10, capability % 10)
    for tokens, experts in CODES:
        tile = grouped.codes_tile(tokens, experts, 4096, target)
        for name in FORMATS if tokens in (64, 16384) else FORMATS[:1]:
            fmt = ms.find_format(name)
            outers = (False, fmt.outer_scale is not None)
            known = grouped.codes_constants(fmt, tile, experts, True, outers, False)
            report(jit_grouped.grouped_codes, tile, capability, known, format=name)
    for tokens in (256, 2048, 65536):
        for across in (True, False):
            for copies in (False, True) if capability >= 90 else (False,):
                tile = grouped.values_tile(tokens, 64, 4096, target, copies)
                known = grouped.values_constants(tile, 64, True, (False, True), across, copies)
                tensors = dict(TENSORS)
                if copies:
                    block = [tile.columns, tile.depth] if across else [tile.depth, tile.columns]
                    tensors |= {"a": f"tensordesc<bf16{[tile.rows, tile.depth]}>", "b": f"tensordesc<bf16{block}>"}
                report(jit_grouped.grouped_values, tile, capability, known, tensors, across=across, engine=copies)
    tile = grouped.wgrad_tile(4096, 4096, target)
    for down in ((False, False), (True, True), (True, False), (False, True)):
        known = grouped.wgrad_constants(tile, down)
        report(jit_grouped.grouped_transposed, tile, capability, known, down=list(down))


if __name__ == "__main__":
    main(int(sys.argv[1]))
