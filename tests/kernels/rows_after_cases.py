"""Run `zero_rows_after` in the interpreter: `python -m tests.kernels.rows_after_cases`; one JSON line per mismatch.

With a capability (`... 90`) it compiles it for that architecture instead, and prints what its stores are. A process of
its own, because TRITON_INTERPRET is read when jitted code is loaded.
"""

import itertools
import json
import os
import sys

if len(sys.argv) == 1:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from microscale.kernels.triton import rows_after


def interpreted() -> None:
    cases = 0
    for rows, columns, dtype in itertools.product((1, 7, 40), (16, 1040), (torch.bfloat16, torch.float32)):
        for ends in ((0,), (rows,), (0, rows // 2), (rows // 3, rows // 3, rows // 3), (0, 0, 0, max(rows - 1, 0))):
            whole = torch.full((rows + 2, columns + 16), torch.nan, dtype=dtype)
            wanted = whole.clone()
            wanted[1 + ends[-1] : 1 + rows, 8 : 8 + columns] = 0
            rows_after.zero_rows_after(whole[1:-1, 8:-8], torch.tensor(ends, dtype=torch.int32))
            if not torch.equal(whole.isnan(), wanted.isnan()):
                print(json.dumps({"wrong": [rows, columns, str(dtype), ends]}))
            cases += 1
    rows_after.zero_rows_after(torch.empty(0, 16), torch.zeros(3, dtype=torch.int32))
    print(json.dumps({"cases": cases}))


def compiled(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from microscale.kernels.triton import jit_rows_after

    kernel = jit_rows_after.zero_rows_after
    tensors = {"out": "*bf16", "offsets": "*i32", "WIDTH": "constexpr"}
    signature = {p.name: tensors.get(p.name, "i32") for p in kernel.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if p.name in ("out", "columns")}
    aligned |= {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if p.name == "stride"}
    source = ASTSource(kernel, signature, constexprs=dict(rows_after.CONSTANTS), attrs=aligned)
    options = {"num_warps": rows_after.WARPS, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    stores = sorted({w for line in ptx.splitlines() if "st.global" in line for w in line.split() if "st.global" in w})
    print(json.dumps({"stores": stores}))


if __name__ == "__main__":
    compiled(int(sys.argv[1])) if len(sys.argv) > 1 else interpreted()
