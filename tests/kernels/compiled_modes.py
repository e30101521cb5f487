"""Compile what calls of `triton.quantize` launch, for one architecture, without a GPU.

`python -m tests.kernels.compiled_modes 90 [CASE ...]`: every shipped format as dense bf16, and one call of every mode.
Prints one JSON line per case and kernel with what its code contains. One process and one cache folder per architecture:
Triton fixes its table of float conversions at the first compilation of a process.
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
from microscale.kernels.triton import amax, hadamard, quantize, tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
CONVERSIONS = r"cvt\.rn\.satfinite\S+|max\.u16x2"
EXPERT = {
    "name": "by_expert", "element": "e2m1", "block": 16, "scale": "e4m3", "scale_rule": "nearest",
    "outer_scale": {"per": "expert"},
}  # fmt: skip


def dense(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape or (512, 4096), dtype=dtype)


CASES = {  # name: (format, changes, x)
    **{name: (name, {}, dense()) for name in ms.list_formats()},
    "fp16": ("nvfp4", {}, dense(dtype=torch.float16)),
    "fp32": ("mxfp6", {}, dense(dtype=torch.float32)),
    "ragged": ("nvfp4", {}, dense(512, 4100)),
    "transposed": ("nvfp4_row", {}, dense(4096, 512).t()),
    "permuted": ("mxfp8", {}, dense(8, 4096, 64).transpose(1, 2)),
    "small": ("nvfp4", {}, dense(1, 4096)),
    "by expert": (EXPERT, {}, dense(8, 512, 4096)),
    "stochastic": ("nvfp4", {"rounding": "stochastic"}, dense()),
    "stochastic codebook": ("nf4", {"rounding": "stochastic"}, dense()),
    "hadamard 16": ("nvfp4", {"hadamard": 16}, dense()),
    "hadamard 128, signed": ("mxfp8", {"hadamard": {"size": 128, "sign": [1, -1] * 64}}, dense(4096, 512).t()),
    "tile 16x16": ("nvfp4", {"scale_tile": 16}, dense()),
    "tile 128x128": ("fp8_block128", {"scale_tile": 128}, dense()),
    "tile 3x64": ("mxfp8", {"scale_tile": (3, 64)}, dense()),
    "search": ("mxfp4", {"scale_rule": "mse"}, dense()),
    "search over tiles": ("nvfp4_4over6", {"scale_tile": 16}, dense()),
    "scale of 16 bits": ("mxfp8", {"scale": "bf16", "scale_rule": "nearest"}, dense()),
    "no subnormals": ("mxfp4", {"element": {"exponent": 2, "mantissa": 1, "subnormals": False}}, dense()),
}


def calls_of(name: str, capability: int) -> list[tuple]:
    """What `launch` is called with, in order."""
    fmt, changes, x = CASES[name]
    calls: list[tuple] = []
    for module in (amax, hadamard, quantize, tiles):
        module.launch = lambda *args: calls.append(args)
    quantize._capability = lambda device: (capability // 10, capability % 10)
    seed = torch.tensor([1, 2])
    quantize.quantize(x, ms.find_quantizer(fmt, **changes).for_row(x.shape[-1]), None, None, seed, "strided")
    return calls


def compiled(kernel, args: tuple, constants: dict[str, object], warps: int, capability: int) -> tuple[str, list[str]]:
    """PTX text and the instructions of the SASS, specialised as Triton does for these arguments."""
    runtime = iter(args)
    signature, known, hints = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        arg = None if name in constants else next(runtime)
        if arg is None or (isinstance(arg, int) and arg == 1):
            signature[name] = "constexpr"
            known.setdefault(name, arg)
            continue
        signature[name] = POINTERS[arg.dtype] if isinstance(arg, torch.Tensor) else "i32"
        if isinstance(arg, torch.Tensor) or arg % 16 == 0:
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=known, attrs=hints)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    return made.asm["ptx"], re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass)


def main(capability: int, names: list[str]) -> None:
    """Compile the named cases, or all."""
    for name in names or CASES:
        for kernel, _, args, constants, warps in calls_of(name, capability):
            ptx, instructions = compiled(kernel, args, constants, warps, capability)
            lanes = constants["BLOCKS"] * constants["BLOCK_P2"] if "BLOCK_P2" in constants else 0
            count = sum(i != "NOP" for i in instructions)
            print(json.dumps({
                "case": name, "kernel": kernel.fn.__name__, "target": re.search(r"\.target (\S+)", ptx)[1],
                "instructions": count, "per_element": round(count * 32 * warps / lanes, 2) if lanes else None,
                "local": sum(i.split(".")[0] in ("LDL", "STL") for i in instructions),
                "conversions": sorted(set(re.findall(CONVERSIONS, ptx))),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
