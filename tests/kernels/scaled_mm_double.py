"""A stand-in for `torch.nn.functional.scaled_mm` that refuses what the CUDA one refuses and computes by the reference.

What it enforces was read in torch 2.11's and 2.13's sources: dtypes, shapes and strides of the matrices, recipes with
their scales' dtypes, shapes, contiguity and counts (with the true K, where a byte holds two FP4 codes), swizzles,
output and bias dtypes, and which device has the recipe. The product is FP64 over the decoded operands, rounded to FP32
before the bias, and once more to the output.
"""

import dataclasses

import torch
from torch.nn.functional import ScalingType, SwizzleType

from microscale.numerics import codec, layout, packing
from microscale.spec.registry import find_element

E4M3, E2M1, E8M0 = (find_element(name) for name in ("e4m3", "e2m1", "e8m0"))
SWIZZLED = SwizzleType.SWIZZLE_32_4_4


class ContractError(Exception):
    """What CUDA would refuse, or take for something else."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise ContractError(message)


def tuple_of(value: object) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)


@dataclasses.dataclass
class Double:
    """`double(...)` is the call; `calls` the recipes of what was called. `major`: of the compute capability."""

    major: int
    calls: list[str] = dataclasses.field(default_factory=list)

    def __call__(
        self, mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None,
        bias=None, output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False,
    ):  # fmt: skip
        need(mat_a.dim() == mat_b.dim() == 2, "two matrices")
        need(mat_a.shape[1] == mat_b.shape[0], "inner sizes")
        need(mat_a.stride(1) == 1 and mat_a.stride(0) > 1, f"a is row-major, not {mat_a.stride()}")
        need(mat_b.stride(0) == 1 and mat_b.stride(1) > 1, f"b is column-major, not {mat_b.stride()}")
        need(mat_a.data_ptr() % 16 == 0 and mat_b.data_ptr() % 16 == 0, "matrices start on 16 bytes")
        need(mat_a.shape[1] % 16 == 0 and mat_b.shape[1] % 16 == 0, f"stored K and N: {mat_b.shape}")
        need(not contraction_dim and not use_fast_accum, "defaults")
        need(output_dtype in (torch.bfloat16, torch.float32, torch.float16), f"output {output_dtype}")
        if bias is not None:
            need(bias.is_contiguous() and bias.shape == mat_b.shape[1:], f"bias {bias.shape}")
            need(output_dtype == bias.dtype == torch.bfloat16, f"bias {bias.dtype} with output {output_dtype}")
        sides = (
            (mat_a, tuple_of(scale_a), tuple_of(scale_recipe_a), tuple_of(swizzle_a)),
            (mat_b.t(), tuple_of(scale_b), tuple_of(scale_recipe_b), tuple_of(swizzle_b)),
        )
        names = [self.recipe(*side) for side in sides]
        need(names[0] == names[1], f"two recipes: {names}")
        need(names[0] == "rowwise" or self.major >= 10, "block scales need Blackwell")
        need(names[0] != "mxfp4" or (self.major == 10 and bias is None), "MXFP4 needs major 10, and drops a bias")
        need(names[0] != "mxfp4" or output_dtype == torch.bfloat16, "MXFP4 writes bfloat16")
        need(names[0] != "rowwise" or self.major != 8 or output_dtype == torch.bfloat16, "CUTLASS writes bfloat16")
        self.calls.append(names[0])
        (a, a_factor), (b, b_factor) = (self.decode(names[0], *side[:2]) for side in sides)
        out = (a.double() @ b.double().t()).float() * (a_factor * b_factor.t())
        return (out if bias is None else out + bias.float()).to(output_dtype)

    def recipe(self, rows, scales, recipes, swizzles) -> str:
        need(all(s.is_contiguous() for s in scales), "contiguous scales")
        count, stored = rows.shape
        if recipes == (ScalingType.RowWise,):
            need(swizzles in ((), (SwizzleType.NO_SWIZZLE,)) and rows.dtype == torch.float8_e4m3fn, "row-wise: E4M3")
            need(len(scales) == 1 and scales[0].dtype == torch.float32 and scales[0].dim() == 2, "FP32 row scales")
            need(scales[0].numel() == count, "a scale a row")
            return "rowwise"
        fp4 = rows.dtype == torch.float4_e2m1fn_x2
        need(fp4 or rows.dtype == torch.float8_e4m3fn, f"FP8 or FP4, not {rows.dtype}")
        need(not fp4 or stored % 16 == 0, "FP4: real K in multiples of 32")
        block, dtype = {
            ScalingType.BlockWise1x32: (32, torch.float8_e8m0fnu), ScalingType.BlockWise1x16: (16, torch.float8_e4m3fn),
        }[recipes[0]]  # fmt: skip
        rows_full, columns_full = layout.padded(count, -(-stored * (1 + fp4) // block))
        need(scales[0].dtype == dtype, f"scales {scales[0].dtype}")
        need(scales[0].numel() == rows_full * columns_full, f"{scales[0].numel()} scales: whole tiles of the true K")
        need(swizzles[:1] == (SWIZZLED,), "swizzled scales")
        if recipes[1:]:
            need(recipes == (ScalingType.BlockWise1x16, ScalingType.TensorWise), f"levels {recipes}")
            need(swizzles == (SWIZZLED, SwizzleType.NO_SWIZZLE) and len(scales) == 2, "a swizzle a level")
            need(scales[1].dtype == torch.float32 and scales[1].numel() == 1, "an FP32 scalar")
            return "nvfp4 in two levels"
        need(len(scales) == len(swizzles) == 1, "one level")
        if block == 16:
            need(fp4, "1x16 is of FP4")
            return "nvfp4"
        return "mxfp4" if fp4 else "mxfp8"

    def decode(self, name: str, rows, scales) -> tuple[torch.Tensor, torch.Tensor]:
        """FP32 values [R, K] and what their products are multiplied by, [R, 1] or [1, 1]."""
        codes = rows.contiguous().view(torch.uint8)
        if name == "rowwise":
            return codec.decode(codes, E4M3), scales[0].reshape(-1, 1)
        fp4 = rows.dtype == torch.float4_e2m1fn_x2
        values = codec.decode(packing.unpack(codes, 4) if fp4 else codes, E2M1 if fp4 else E4M3)
        block, element = (16, E4M3) if "nvfp4" in name else (32, E8M0)
        blocks = -(-values.shape[1] // block)
        blob = scales[0].reshape(-1).view(torch.uint8)
        factors = codec.decode(layout.unswizzle(blob, len(codes), blocks), element)
        values = values * factors.repeat_interleave(block, 1)[:, : values.shape[1]]
        outer = scales[1] if len(scales) == 2 else torch.ones(())
        return values, outer.reshape(1, 1)
