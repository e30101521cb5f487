"""Rows of one block: `python -m tests.kernels.long_rows_cases interpret` against the reference, or `compile 90`."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1] == "interpret" else "0"

import torch
import triton

import microscale as ms
from microscale.kernels.reference import quantize as reference
from microscale.kernels.triton import long_rows, quantize
from microscale.kernels.triton.matrices import as_matrices

COLUMNS = (4608, 6144, 12800, 28672)
SPECS = ("fp8_row", "int8 row")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def spec_of(name, columns):
    """A quantizer for rows of so many elements."""
    if name == "fp8_row":
        return ms.find_quantizer(name).for_row(columns)
    made = {"name": "int8_row", "element": {"bits": 8}, "block": columns, "scale": "fp32", "scale_rule": "nearest"}
    return ms.find_quantizer(made)


def interpret():
    """Every byte, of ordinary and of special rows."""
    for name in SPECS:
        for columns in COLUMNS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = (torch.randn(6, columns, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
                x[1], x[2, 7], x[3, 5], x[4] = 0, torch.nan, -torch.inf, 1e-7
                spec = spec_of(name, columns)
                took = long_rows.takes(spec, as_matrices(x), True)
                args = (x, spec, None, None, None, "strided")
                pairs = zip(quantize.quantize(*args)[:2], reference.quantize(*args)[:2], strict=True)
                same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
                print(json.dumps({"case": f"{name} {columns} {dtype}", "took": took, "same": same}), flush=True)


def compiled(capability):
    """What the code contains, for many rows and for few."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from microscale.kernels.triton import jit_long_rows

    for columns in COLUMNS:
        plan = long_rows.plan_of(spec_of("fp8_row", columns), capability >= 90)
        kernel = jit_long_rows.quantize_long_rows
        types = {"x": "*bf16", "qdata": "*u8", "scales": "*fp32"}
        signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
        for warps in (plan.few, plan.many):
            known = {n: v for n, v in plan.constants.items() if n in signature}
            limit = {n: v for n, v in plan.constants.items() if n not in signature}
            source = ASTSource(kernel, signature, known, aligned)
            options = {"num_warps": warps, "enable_fp_fusion": False, **limit}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.asm["cubin"])
                file.flush()
                command = [TOOLS / "cuobjdump", "-sass", "-res-usage", file.name]
                done = subprocess.run(command, capture_output=True, text=True)
            said = done.stdout + done.stderr
            print(json.dumps({
                "columns": columns, "warps": warps, "registers": int(re.findall(r"REG:(\d+)", said)[0]),
                "local": len(re.findall(r"\b(?:LDL|STL)\b", said)), "fp8": "e4m3x2" in made.asm["ptx"],
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compiled(int(sys.argv[2]))
