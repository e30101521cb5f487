"""The first launch of `align_fragments`, by Triton's interpreter: `python -m tests.kernels.align_fragments_cases`.

Prints a JSON line for each format and depth.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

import microscale as ms
from microscale.kernels.reference import align_rows as reference
from microscale.kernels.triton import align_fragments, jit_align_rows
from microscale.numerics import fragments

FORMATS = (
    "mxfp4",
    "mxfp8_e5m2",
    {"name": "user", "scale_rule": "floor", "element": "e2m1", "block": 16, "scale": "e8m0"},
)


def good(fmt: ms.FormatSpec, rows: int, columns: int) -> bool:
    """Whether row scales are the reference's: all codes of scales but NaN, and NaN, which counts for nothing."""
    scale = torch.randint(256, (rows, columns // fmt.block), dtype=torch.uint8)
    scale[3], scale[5, 0], scale[6] = 0, 255, 255
    scale[7] = torch.randint(100, 130, scale[7].shape)
    qdata = torch.randint(256, (rows, columns * fmt.element.width // 8), dtype=torch.uint8)
    _, wanted = reference.align_rows(qdata, scale, fmt, columns, "strided")
    got = torch.full((rows, 1), torch.nan)
    ordered = fragments.scale_to_fragments(scale, fmt.block)
    constants = align_fragments.top_constants(fmt)
    jit_align_rows.fragment_row_scales[(rows // 64,)](ordered, got, columns // 64, **constants)
    return torch.equal(got, wanted)


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in FORMATS:
        for shape in ((64, 64), (192, 4160), (64, 9984)):
            found = ms.find_format(name)
            print(json.dumps({"case": f"{found.name} {shape}", "good": good(found, *shape)}), flush=True)
