"""Compile the kernels of `quantize_blocks` for one target: `python -m tests.kernels.compiled_blocks 90 [NAME ...]`.

Prints one JSON line per kernel and case with what its code contains, without a GPU. NAME:
only these cases. One process and one cache folder per architecture.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import microscale as ms
from microscale.kernels.triton import amax, groups, jit_blocks, jit_groups, quantize_blocks, quantize_both

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "x": "*bf16",
    "offsets": "*i32",
    "code_of": "*u8",
    "seed": "*i64",
    "t_seed": "*i64",
    "qdata": "*u8",
    "t_qdata": "*u8",
}
CONVERSIONS = r"cvt\.rn\.satfinite\S+|m[ai][xn]\.\w+16x2|fma\.rn\.bf16x2"
SCALES = ("scales", "t_scales")
NUMBERS = ("row_amax", "out", "source", "decode", "t_source", "t_decode", "thresholds", "multipliers")
CASES: dict[str, tuple[str, str, dict[str, object]]] = {  # name: (kernel, format, changes)
    **{f"rows {f}": ("rows", f, {}) for f in ms.list_formats()},
    "rows nvfp4 16x16": ("rows", "nvfp4", {"scale_tile": 16}),
    "rows nvfp4 hadamard": ("rows", "nvfp4", {"hadamard": 16}),
    "rows nvfp4 stochastic": ("rows", "nvfp4", {"rounding": "stochastic"}),
    **{f"swizzled {f}": ("swizzled", f, {}) for f in ("mxfp8", "mxfp4", "nvfp4")},
    **{f"columns {f}": ("columns", f, {}) for f in ("mxfp8", "mxfp4", "nvfp4", "mxint8")},
    **{f"both {f}": ("both", f, {}) for f in ("mxfp8", "mxfp4", "nvfp4")},
    "groups": ("groups", "nvfp4", {}),
}


def plan_of(case: str, capability: int):
    """The jitted kernel, its plan, the quantizer, and how many elements a program takes."""
    which, name, changes = CASES[case]
    spec, arch = ms.find_quantizer(name, **changes).for_row(128), (capability // 10, capability % 10)
    outer = spec.format.outer_scale
    code = amax.NONE if outer is None else amax.BY_ROW if outer.per == "row" else amax.FROM_AMAX
    kind = quantize_blocks.Kind(code, 256)
    if which == "groups":
        plan = quantize_blocks.Plan(groups.CONSTANTS, 4, 0, 0, torch.float32)
        return jit_groups.spread_group_amax, plan, spec, 1024
    if which == "columns":
        plan = quantize_blocks.columns_plan(spec, kind, False, arch)
        return jit_blocks.quantize_columns, plan, spec, plan.threads * plan.run * 2
    if which == "both":
        plan = quantize_both.plan_of(spec, spec, kind, kind, False, arch)
        return jit_blocks.quantize_both, plan, spec, plan.threads * plan.run * 2
    plan = quantize_blocks.rows_plan(spec, kind, which == "swizzled", True, arch)
    owned = plan.run * plan.constants["TILE_ROWS"] // plan.constants["PIECES"]
    return jit_blocks.quantize_runs, plan, spec, plan.threads * owned


def compiled(case: str, capability: int) -> dict[str, object]:
    """What the code of a case contains."""
    kernel, plan, spec, elements = plan_of(case, capability)
    pointers = POINTERS | dict.fromkeys(NUMBERS, "*fp32")
    pointers |= dict.fromkeys(SCALES, "*fp32" if spec.format.scale.width > 8 else "*u8")
    signature = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in plan.constants}
    signature |= dict.fromkeys(plan.constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t != "constexpr"
    }
    ordered = {n: signature[n] for n in kernel.arg_names}
    source = ASTSource(kernel, ordered, constexprs=plan.constants, attrs=aligned)
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    classes = [n.split(".")[0] for n in names if n != "NOP"]
    return {
        "case": case, "target": re.search(r"\.target (\S+)", made.asm["ptx"])[1],
        "instructions_per_element": round(len(classes) * plan.warps * 32 / elements, 2),
        "local": sum(c in ("LDL", "STL") for c in classes),
        "conversions": sorted(set(re.findall(CONVERSIONS, made.asm["ptx"]))),
    }  # fmt: skip


def main(capability: int, names: list[str]) -> None:
    """Compile the cases."""
    for case in names or CASES:
        print(json.dumps(compiled(case, capability)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
