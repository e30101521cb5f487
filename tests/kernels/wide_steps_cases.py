"""What goes before and after `matmul_wide`, by Triton's interpreter: `python -m tests.kernels.wide_steps_cases`."""

import json

import torch

from microscale.kernels.triton import fragments_wide, jit_wide_steps


def order(rows, steps):
    """`order_pairs` against the permutation that `numerics/fragments.py` states."""
    x = torch.arange(rows * steps * 32, dtype=torch.int32)
    out = torch.empty_like(x)
    size = fragments_wide._ORDER["SIZE"]
    halves = x.view(torch.bfloat16), out.view(torch.bfloat16)
    jit_wide_steps.order_pairs[(-(-x.numel() // size),)](*halves, x.numel(), SIZE=size, CHAIN=False)
    lanes = x.view(rows, steps, 4, 4, 2)  # lane t, step of 16, half; the two codes of a pair stay together
    return torch.equal(out, lanes.permute(0, 1, 3, 4, 2).reshape(-1))


def add(rows, columns, steps, tile, warps, units, programs, outer, bias):
    """`add_tiles` against a sum of all steps, of tiles that programs share as `run` deals them out."""
    tiles_x, tiles_w = -(-rows // tile), -(-columns // (16 * warps * units))
    total = tiles_w * steps
    each = -(-total // max(1, programs // tiles_x))
    groups = -(-total // each)
    made = torch.Generator().manual_seed(0)
    values = torch.randn(tiles_w * tiles_x, steps, units, 16 * warps, tile, generator=made)
    parts = torch.full((groups * tiles_x, 2, units, 16 * warps, tile), float("nan"))
    for p in range(groups * tiles_x):
        group, x = divmod(p, tiles_x)
        at, end = group * each, min(group * each + each, total)
        while at < end:
            first = at % steps
            last = min(steps, first + end - at)
            parts[p, int(first == 0)] = values[at // steps * tiles_x + x, first:last].sum(0)
            at += last - first
    out = torch.zeros(rows, columns)
    factor, added = torch.rand(columns, generator=made) + 0.5, torch.randn(columns, generator=made)
    args = (parts, factor, added, out, rows, columns, steps, tiles_x, each)
    constants = {"N": tile, "WARPS": warps, "UNITS": units, "OUTER": 2 if outer else 0, "BIAS": bias}
    constants |= {"DROP": 2.0, "CHAIN": False}
    jit_wide_steps.add_tiles[(tiles_w * tiles_x * warps * units,)](*args, **constants)
    good = True
    for t in range(tiles_w * tiles_x):
        shared = t // tiles_x * steps // each != (t // tiles_x * steps + steps - 1) // each
        sums = values[t].sum(0).view(units, warps, 16, tile).permute(3, 1, 0, 2).reshape(tile, -1) * 2.0
        n, m = t // tiles_x * 16 * warps * units, t % tiles_x * tile
        there = slice(n, min(n + 16 * warps * units, columns))
        sums = sums[: rows - m, : columns - n]
        sums = sums * factor[there] if outer else sums
        sums = sums + added[there] if bias else sums
        wanted = sums if shared else torch.zeros_like(sums)
        good &= torch.allclose(out[m : m + tile, there], wanted, rtol=1e-4, atol=1e-4)
    return good


def main():
    """Print one JSON line for each case."""
    for shape in ((3, 2), (17, 5)):
        print(json.dumps({"case": f"order {shape}", "good": order(*shape)}), flush=True)
    for case in (
        (40, 192, 6, 32, 4, 2, 5, True, True), (32, 256, 4, 32, 4, 4, 4, False, True),
        (70, 320, 5, 64, 4, 2, 7, True, False), (16, 128, 7, 32, 4, 2, 3, False, False),
        (100, 320, 5, 64, 8, 1, 5, True, True),
    ):  # fmt: skip
        print(json.dumps({"case": f"add {case}", "good": add(*case)}), flush=True)


if __name__ == "__main__":
    main()
