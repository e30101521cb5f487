"""Public operations: each is a torch.library op with a fake, run by the kernel that the dispatcher selects."""

from microscale.ops.api import decode_table, dequantize, encode, explain, quantize
from microscale.ops.both import quantize_both
from microscale.ops.compute import embedding, grouped_matmul, linear, matmul
from microscale.ops.grouped import grouped_wgrad
from microscale.ops.groups import group_amax
from microscale.ops.prepare import prepare, prepare_
from microscale.ops.producers import rms_norm_quantize, silu_mul_quantize
from microscale.ops.rows import align_rows

__all__ = [
    "align_rows",
    "decode_table",
    "dequantize",
    "embedding",
    "encode",
    "explain",
    "group_amax",
    "grouped_matmul",
    "grouped_wgrad",
    "linear",
    "matmul",
    "prepare",
    "prepare_",
    "quantize",
    "quantize_both",
    "rms_norm_quantize",
    "silu_mul_quantize",
]
