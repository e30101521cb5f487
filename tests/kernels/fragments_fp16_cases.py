"""Cut, multiply, join: `python -m tests.kernels.fragments_fp16_cases` interprets, `... 90` compiles; JSON lines.

In the interpreter the decode GEMM itself, which is assembly, is replaced by an FP32 product of the pieces it is given.
"""

import json
import os
import sys

if len(sys.argv) == 1:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.triton import epilogue, fragments, fragments_fp16
from tests.kernels.products import parts


def every() -> torch.Tensor:
    """Every float16."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def stand_in(calls: list[tuple[torch.Size, torch.dtype]]):
    def matmul(a, b, bias, out_dtype):
        assert a.is_contiguous() and a.dtype == torch.bfloat16 and bias is None and out_dtype == torch.float32
        calls.append((a.shape, a.dtype))
        out = a.float() @ b.dequantize(torch.float32, with_outer=False)
        return out if b.outer_scale is None else out * b.outer_scale

    return matmul


def pieces() -> list[str]:
    """The sum of the pieces is the number; signs agree; what is not finite stands in the first."""
    x = every()
    first, rest = epilogue.stacked(x, 2).float()
    finite = x.isfinite()
    wrong = []
    if not torch.equal((first + rest * 2.0**-8)[finite], x.float()[finite]):
        wrong.append("sum of pieces")
    if not torch.equal((first.abs() + rest.abs() * 2.0**-8)[finite], x.float().abs()[finite]):
        wrong.append("magnitudes of pieces")
    other = ~finite
    same = torch.equal(first[other].nan_to_num(7), x.float()[other].nan_to_num(7))
    if not same or rest[other].any():
        wrong.append("infinities and NaN")
    return wrong


def products() -> list[str]:
    wrong, calls = [], []
    fragments.matmul = stand_in(calls)
    for name in ("mxfp4", "nvfp4", "nvfp4_row", "mxint8"):
        q = ms.quantize(torch.randn(64, 128), name)
        b = parts(q.t())
        for shape in ((1, 128), (3, 128), (2, 5, 128), (32, 128)):
            x = torch.randn(shape).half() * torch.exp(4 * torch.randn(shape)).half()
            for bias in (None, torch.randn(64).half(), torch.randn(1), torch.randn(64).bfloat16()):
                for dtype in (torch.float16, torch.float32, torch.bfloat16):
                    got = fragments_fp16.matmul(x, b, bias, dtype)
                    wide = q.replace(outer_scale=None).dequantize(torch.float32).double()
                    wide = wide if q.outer_scale is None else wide * q.outer_scale.double()
                    want, size = x.double() @ wide.t(), x.double().abs() @ wide.abs().t()
                    if bias is not None:
                        want, size = want + bias.double(), size + bias.double().abs()
                    limit = (1.25 * 128 + 8) * 2.0**-23 * size
                    limit = limit + (want.abs() + limit) * torch.finfo(dtype).eps / 2 + 2.0**-25
                    want = want.to(dtype).double() if dtype == torch.float16 else want  # beyond 65504 infinite
                    far = want.isfinite() & ~((got.double() - want).abs() <= limit * 2)
                    rows = x[..., 0].numel()
                    if far.any() or got.dtype != dtype or got.shape != want.shape or calls[-1][0] != (2 * rows, 128):
                        wrong.append(f"{name} {list(shape)} {dtype} {bias is not None}")
    x = torch.randn(4, 128).half()
    x[1, 3], x[2, 5], x[3, 9] = torch.nan, torch.inf, -torch.inf
    q = ms.quantize(torch.ones(64, 128), "mxfp4")
    got = fragments_fp16.matmul(x, parts(q.t()), None, torch.float16)
    if not (got[0].isfinite().all() and got[1].isnan().all() and (got[2] == torch.inf).all()):
        wrong.append("NaN and infinity")
    if not (got[3] == -torch.inf).all():
        wrong.append("negative infinity")
    return wrong


def compiled(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from microscale.kernels.triton import jit_epilogue

    for bias, out in ((True, "*fp16"), (False, "*fp32"), (True, "*bf16")):
        kernel, constants = jit_epilogue.join_pieces, dict(epilogue._JOIN[bias])
        pointers = {"sums": "*fp32", "bias": "*fp16" if bias else "*fp32", "out": out}
        names = [p.name for p in kernel.params]
        signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
        source = ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": epilogue.WARPS, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(json.dumps({"out": out, "bytes": len(made.asm["cubin"]), "fma": "fma.rn" in made.asm["ptx"]}))


def main() -> None:
    torch.manual_seed(20251122)
    wrong = [*pieces(), *products()]
    print(json.dumps({"wrong": wrong}))


if __name__ == "__main__":
    compiled(int(sys.argv[1])) if len(sys.argv) > 1 else main()
