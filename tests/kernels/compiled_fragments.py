"""Compile the decode GEMM for one target: `python -m tests.kernels.compiled_fragments 90 [NAME ...]`; JSON lines."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

import microscale as ms
from microscale.kernels.triton import fragments, jit_fragments
from microscale.kernels.triton.fragment_tuning import by_rule
from microscale.spec.powers import with_powers

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"x": "*bf16", "words": "*u8", "scales": "*u8", "outer": "*fp32", "bias": "*bf16", "out": "*bf16"}
POINTERS |= {"parts": "*fp32", "arrived": "*i32"}
FORMATS = ("mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8", "fp8_row")
CASES = {
    **{f"matmul {f} {e}": (f, e) for f in FORMATS for e in (1, 8)},
    **{f"matmul {f} {e}": (f, e) for f in ("mxfp4", "nvfp4") for e in (2, 4)},
    **{f"dequantize {f}": (f, 0) for f in FORMATS},
}


def compiled(case: str, capability: int) -> dict[str, object]:
    """What the code of a case contains."""
    name, eights = CASES[case]
    fmt, pointers = ms.find_format(name).for_row(28672), dict(POINTERS)
    outer = 2 if fragments.has_row_scales(fmt) else int(fmt.outer_scale is not None)
    if eights:
        cut = by_rule(fmt, eights, 8192, 28672, 132, (capability // 10, capability % 10))
        operand = with_powers(fmt) if fragments.has_row_scales(fmt) else fmt  # as kernels get it
        plan = fragments.plan_of(operand, cut, eights, (8192, 28672), outer, False)
        kernel, constants, warps = jit_fragments.matmul_fragments, dict(plan.constants), plan.warps
        if eights == 1:
            constants["rows"] = 1  # as Triton has it for one token
    else:
        kernel, constants, warps = jit_fragments.dequantize_fragments, fragments._dequantize_constants(fmt), 4
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t != "constexpr"
    }
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    classes = [n.split(".")[0] for n in names if n != "NOP"]
    return {
        "case": case, "instructions": sorted(set(re.findall(r"mma\.sync\.aligned\.m16n8k16", made.asm["ptx"]))),
        "count": len(classes), "local": sum(c in ("LDL", "STL") for c in classes),
    }  # fmt: skip


if __name__ == "__main__":
    for wanted in sys.argv[2:] or CASES:
        print(json.dumps(compiled(wanted, int(sys.argv[1]))), flush=True)
