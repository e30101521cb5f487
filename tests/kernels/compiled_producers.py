"""Compile the producers for one architecture without a GPU: `python -m tests.kernels.compiled_producers 90`.

Prints one JSON line per kernel with what its code contains. One process and one cache folder per architecture, as for
`tests.kernels.compiled_blocks`.
"""

import collections
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
from microscale.kernels.triton import activations, jit_activations, jit_producers, producers
from microscale.kernels.triton import amax as outer_scales
from microscale.kernels.triton import quantize_blocks as blocks

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FORMATS = ("mxfp8", "mxfp4", "mxfp6", "nvfp4", "nvfp4_4over6", "mxint8", "fp8_block128")
COLUMNS = (128, 4096, 8192, 28672)
WORDS = dict.fromkeys(("gate", "up", "x", "weight", "qdata"), "*i32")
TENSORS = {"seed": "*i64", "code_of": "*u8", "scales": "*u8"}
TENSORS |= dict.fromkeys(("source", "decode", "thresholds", "multipliers", "parts"), "*fp32")


def compiled(kernel, constants, tensors, capability):
    """The instructions of a kernel, counted, and its PTX."""
    names = [n for n in kernel.arg_names if n not in constants]
    signature = {n: tensors.get(n, "i32") if n in names else "constexpr" for n in kernel.arg_names}
    places = [i for i, n in enumerate(kernel.arg_names) if n in names]
    aligned = {(i,): [["tt.divisibility", 16]] for i in places}
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": producers.WARPS, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)
    return collections.Counter(n.split(".")[0] for n in found if n != "NOP"), made.asm["ptx"]


def report(kernel, name, elements, constants, tensors, capability, **facts):
    count, ptx = compiled(kernel, constants, tensors, capability)
    print(json.dumps({
        "kernel": kernel.__name__, "format": name, **facts, "target": re.search(r"\.target (\S+)", ptx)[1],
        "per_element": round(sum(count.values()) * producers.WARPS * 32 / elements, 2),
        "local": count["LDL"] + count["STL"], "loads": count["LDG"], "shared": count["STS"],
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)), "approximate": sorted(set(re.findall(r"\w+\.approx\S*", ptx))),
    }), flush=True)  # fmt: skip


def main(capability: int) -> None:
    target = (capability // 10, capability % 10)
    for name in FORMATS:
        spec = ms.find_quantizer(name)
        kind = outer_scales.NONE if spec.format.outer_scale is None else outer_scales.FROM_AMAX
        outer = blocks.Kind(kind, outer_scales.PARTS)
        tensors = {**WORDS, **TENSORS, "scales": "*fp32" if spec.format.scale.width > 8 else "*u8"}
        for flat in (True, False):
            known = producers._silu_mul_constants(spec, outer, False, flat, False, target)
            kernel = jit_producers.silu_mul_quantize_runs
            report(kernel, name, known["T"] * known["RUN"], known, tensors, capability, flat=flat)
        for columns in COLUMNS if name == FORMATS[0] else COLUMNS[2:3]:
            chunks = -(-columns // producers.CHUNK)
            shape = (activations.lanes_of(columns), chunks, 1)
            known = producers._rms_norm_constants(spec, outer, False, False, shape, target)
            kernel = jit_producers.rms_norm_quantize_runs
            report(kernel, name, producers.CHUNK * chunks, known, tensors, capability, columns=columns)
    known = producers._amax_constants((activations.LANES, 2, 1), producers.PROGRAMS, target)
    report(jit_producers.rms_norm_amax_runs, "", 2 * producers.CHUNK, known, {**WORDS, **TENSORS}, capability)
    values = dict.fromkeys(("gate", "up", "x", "weight", "y"), "*bf16") | TENSORS
    known = {"SIZE": activations.SIZE, "AMAX": True, "INTERPRETED": False, "gate_column": 1, "up_column": 1}
    report(jit_activations.silu_mul_rows, "", activations.SIZE, known, values, capability)
    known = {"T": activations.LANES, "ROWS": 1, "LEVELS": 11, "HAS_WEIGHT": True, "AMAX": True, "INTERPRETED": False}
    report(jit_activations.rms_norm_rows, "", producers.CHUNK, {**known, "column_stride": 1}, values, capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
