"""Run the kernels around a GEMM in the interpreter against torch: `python -m tests.kernels.epilogue_cases`.

Prints one JSON line per mismatch, then a count. With a capability (`... 90`) it compiles them for that architecture
instead and prints a line for each. A process of its own, because TRITON_INTERPRET is read when jitted code is loaded.
"""

import json
import os
import sys

if len(sys.argv) == 1:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from microscale.kernels.cublas import exact, two_pass
from microscale.kernels.triton import epilogue


def splits() -> list[str]:
    bits = torch.randint(-(2**31), 2**31 - 1, (3001,), dtype=torch.int64).to(torch.int32)
    ends = torch.tensor([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, -(2**31), 0x00800000, 0x007FFFFF, 0x7FFFFFFF])
    cases = [torch.cat([bits, ends.to(torch.int32)]).view(torch.float32)]
    cases += [torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)]
    cases += [torch.randn(7, 2, 5), torch.randn(9, 6).t(), torch.empty(0, 3)]
    wrong = []
    for x in cases:
        for pieces in (2, 3) if x.dtype == torch.float16 else (3,):
            got, want = epilogue.split(x, pieces), exact.split(x, pieces)
            same = all(
                a.shape == b.shape and torch.equal(a.double().nan_to_num(3, 4, 5), b.double().nan_to_num(3, 4, 5))
                for a, b in zip(got, want, strict=True)
            )
            if not same or len(got) != pieces:
                wrong.append(f"split of {x.dtype} {list(x.shape)} in {pieces}")
    return wrong


def sums() -> list[str]:
    wrong = []
    for batch, rows, columns in ((1, 3, 5), (2, 4, 1100), (3, 1, 2048)):
        lefts = (
            None,
            torch.tensor(0.5),
            torch.randn(1, rows, 1),
            torch.randn(batch, 1, 1),
            torch.randn(batch, rows, 1),
        )
        rights = (None, torch.tensor(3.0), torch.randn(batch, 1, columns), torch.randn(1, columns, 1).mT)
        biases = (
            None,
            torch.randn(columns),
            torch.randn(rows, columns).half(),
            torch.randn(batch, 1, columns).bfloat16(),
        )
        for left in lefts:
            for right in rights:
                for bias in biases:
                    bias = None if bias is None else bias.expand(batch, rows, columns)
                    whole = torch.randn(batch, rows + 2, columns + 3)
                    kept, place = whole.clone(), whole[:, 1:-1, 2:-1]
                    wanted = torch.empty(batch, rows, columns)
                    two_pass.finish(place.clone(), left, right, bias, wanted)
                    narrow = torch.empty(batch, rows, columns, dtype=torch.float16)
                    epilogue.finish(place, left, right, bias, narrow)
                    epilogue.finish(place, left, right, bias, place)
                    kept[:, 1:-1, 2:-1] = wanted
                    if not torch.equal(whole, kept) or not torch.equal(narrow, wanted.half()):
                        wrong.append(f"finish {[batch, rows, columns]}")
    return wrong


def scales() -> list[str]:
    wrong = []
    values = (0.0, 1.0, 3e-7, 2e-19, 1e-30, 1e-44, 5e17, 3e30, float("inf"), float("nan"))
    for one in values:
        for other in values:
            pair = torch.tensor(one), torch.tensor(other)
            got, want = torch.stack(epilogue.combined(*pair)), torch.stack(two_pass.combined(*pair))
            if not torch.equal(got.nan_to_num(7, 8), want.nan_to_num(7, 8)):
                wrong.append(f"combined {one} {other}")
    return wrong


def compiled(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from microscale.kernels.triton import jit_epilogue

    tensors = {"sums": "*fp32", "left": "*fp32", "right": "*fp32", "bias": "*bf16", "out": "*bf16"}
    pairs = [
        (jit_epilogue.finish_sums, tensors, dict(epilogue._FINISH[True, True, True])),
        (jit_epilogue.combine_scales, dict.fromkeys(("first", "second", "alpha", "power"), "*fp32"), {}),
        (jit_epilogue.split_values, {"x": "*fp32", "pieces": "*i16"}, dict(epilogue._SPLIT[3])),
        (jit_epilogue.split_values, {"x": "*fp16", "pieces": "*i16"}, dict(epilogue._SPLIT[2])),
    ]
    for kernel, pointers, constants in pairs:
        names = [p.name for p in kernel.params]
        signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
        source = ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": epilogue.WARPS, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(
            json.dumps({"kernel": kernel.__name__, "bytes": len(made.asm["cubin"]), "fma": "fma.rn" in made.asm["ptx"]})
        )


def main() -> None:
    torch.manual_seed(20251122)
    cases = (splits, sums, scales)
    for case in cases:
        for text in case():
            print(json.dumps({"wrong": text}))
    print(json.dumps({"cases": len(cases)}))


if __name__ == "__main__":
    compiled(int(sys.argv[1])) if len(sys.argv) > 1 else main()
