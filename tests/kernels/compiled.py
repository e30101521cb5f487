"""Compile the Triton kernels for one architecture without a GPU: `python -m tests.kernels.compiled 90`.

Prints one JSON line per kernel and configuration with what its code contains. One process and one cache folder per
architecture: Triton fixes its table of float conversions at the first compilation of a process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import microscale as ms
from microscale.kernels.triton import jit_dequantize, jit_quantize, properties
from microscale.kernels.triton.quantize import LANES, WARPS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(kernel, signature, constants, capability):
    """Return PTX text and the instructions of the SASS."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": WARPS, "enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    return made.asm["ptx"], re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)


def geometry(fmt):
    """BLOCKS and BLOCK_P2 as the host code chooses them."""
    lanes = properties.power_of_two_at_least(fmt.block)
    return {"BLOCKS": max(1, LANES // lanes), "BLOCK_P2": lanes}


def quantize(fmt, encoder, stochastic, capability):
    outer = 0 if fmt.outer_scale is None else 3 if fmt.outer_scale.per == "tensor" else 2
    constants = {
        **properties.quantize_constants(fmt), **geometry(fmt), "OUTER": outer, "STOCHASTIC": stochastic,
        "SWIZZLE": False, "FLAT": True, "WIDE": False, "ENCODER": encoder,
    }  # fmt: skip
    scale = "*fp32" if fmt.scale.width > 8 else "*u8"
    tensors = {"x": "*i32" if encoder > 1 else "*bf16", "qdata": "*u8", "scales": scale, "encode": "*fp32"}
    tensors |= {"decode": "*fp32", "seed": "*i64", "thresholds": "*fp32", "code_of": "*u8"}
    sizes = dict.fromkeys(("total", "rows", "columns", "blocks", "row_stride", "column_stride"), "i32")
    return compile_kernel(jit_quantize.quantize_rows, {**tensors, **sizes}, constants, capability)


def dequantize(fmt, capability):
    outer = 0 if fmt.outer_scale is None else 1
    constants = {
        **properties.dequantize_constants(fmt), **geometry(fmt), "OUTER": outer, "SWIZZLE": False, "FLAT": True,
        "WIDE": False, "INTERPRETED": False,
    }  # fmt: skip
    scale = "*fp32" if fmt.scale.width > 8 else "*u8"
    signature = {"qdata": "*u8", "scales": scale, "outer": "*fp32", "table": "*fp32", "out": "*bf16"}
    names = ("total", "rows", "columns", "blocks", "outer_row_stride", "outer_block_stride")
    signature |= dict.fromkeys(names, "i32")
    return compile_kernel(jit_dequantize.dequantize_rows, signature, constants, capability)


def main(capability: int) -> None:
    """Compile every shipped format; encoders as `choose_encoder` picks them for dense bf16."""
    from microscale.kernels.triton.quantize import encoder_for

    for name in ms.list_formats():
        spec = ms.find_quantizer(name)
        jobs = [("dequantize", 0, lambda f=spec.format: dequantize(f, capability))]
        if not spec.format.scale_rule.candidates:
            best = encoder_for(spec, (capability // 10, capability % 10), dense=True, packable=True)
            for encoder in sorted({0, best}):
                jobs.append(("quantize", encoder, lambda f=spec.format, e=encoder: quantize(f, e, False, capability)))
            if spec.format.element.kind != "codebook" and capability == 90:
                jobs.append(("stochastic", 0, lambda f=spec.format: quantize(f, 0, True, capability)))
        for op, encoder, job in jobs:
            ptx, instructions = job()
            elements = LANES / (WARPS * 32)
            print(json.dumps({
                "op": op, "format": name, "encoder": encoder, "target": re.search(r"\.target (\S+)", ptx)[1],
                "instructions_per_element": round(len([i for i in instructions if i != "NOP"]) / elements, 2),
                "local": sum(i.split(".")[0] in ("LDL", "STL") for i in instructions),
                "conversions": sorted(set(re.findall(r"cvt\.rn\.satfinite\S+|max\.u16x2", ptx))),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
