"""Registers that tensor cores still read: what machine code for Hopper must not write.

`wgmma` with its A operand in registers reads them while later instructions run, until a wait that covers it. ptxas
keeps such registers apart within straight code, but was seen (CUDA 13.0) to give them to others across the back edge of
a loop, with products in flight there. So the suite reads the machine code.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
STORES = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "LDGSTS",
    "HGMMA",
    "WARPGROUP",
    "DEPBAR",
    "UTMA",
    "SYNCS",
    "ISETP",
    "UISETP",
    "NOP",
)
WIDTHS = {"64": 2, "128": 4}


def hazards(sass: str) -> list[str]:
    """Return what is written while it is read: instructions of the loop with products, as in `cuobjdump -sass`."""
    code = [(int(at, 16), name, rest) for at, name, rest in LINE.findall(sass)]
    found = []
    for first, last in _loops(code):
        body = [c for c in code if first <= c[0] <= last]
        if not any(name.startswith("HGMMA") for _, name, _ in body):
            continue
        flying: list[set[int]] = []  # register sets of committed groups, oldest first
        group: set[int] = set()
        for _ in range(3):  # until what is in flight at the end is what is at the start
            for at, name, rest in body:
                if name.startswith("HGMMA"):
                    start = re.match(r"R\d+, R(\d+)", rest)
                    if start:
                        group |= set(range(int(start[1]), int(start[1]) + 4))
                    if "gsb0" in rest:
                        flying.append(group)
                        group = set()
                elif name.startswith("WARPGROUP.DEPBAR"):
                    left = int(rest.rsplit(",", 1)[1], 16)
                    flying = flying[len(flying) - left :] if left else []
                else:
                    for register in _written(name, rest):
                        if register in group or any(register in held for held in flying):
                            found.append(f"{at:04x} {name} {rest}")
    return sorted(set(found))


def _loops(code):
    """Addresses of the innermost loops."""
    edges = [
        (int(m[1], 16), at) for at, name, rest in code if name == "BRA" and (m := re.search(r"0x([0-9a-f]+)", rest))
    ]
    back = [(to, at) for to, at in edges if to < at]
    return [e for e in back if not any(o != e and e[0] <= o[0] and o[1] <= e[1] for o in back)]


def _written(name, rest):
    if name.startswith(STORES):
        return ()
    target = re.match(r"R(\d+)\b", rest)
    if not target:
        return ()
    size = next((n for bits, n in WIDTHS.items() if f".{bits}" in name or (name.endswith("WIDE") and n == 2)), 1)
    size = 4 if name.startswith("LDSM") and ".4" in name else size
    return range(int(target[1]), int(target[1]) + size)


def machine_code(made: Any) -> tuple[str, str]:
    """The machine code of what Triton compiled for sm_90, and what ptxas says of it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(made.asm["cubin"])
        ptx.write_text(made.asm["ptx"])
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True).stdout
        command = [TOOLS / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", Path(folder, "again.cubin")]
        return sass, subprocess.run(command, capture_output=True, text=True).stderr
