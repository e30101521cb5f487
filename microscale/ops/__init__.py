"""Public operations: each is a torch.library op with a fake, run by the kernel that the dispatcher selects."""

from microscale.ops.api import decode_table, dequantize, encode, explain, quantize
from microscale.ops.compute import embedding, grouped_matmul, linear, matmul

__all__ = [
    "decode_table",
    "dequantize",
    "embedding",
    "encode",
    "explain",
    "grouped_matmul",
    "linear",
    "matmul",
    "quantize",
]
