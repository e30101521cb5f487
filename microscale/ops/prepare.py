"""`prepare`, `prepare_`: put weights in the order in which the decode GEMM's tensor cores take them."""

from __future__ import annotations

import math

import torch

from microscale.errors import InputError, MicroscaleError
from microscale.kernels.triton import ptx_decode
from microscale.numerics import layout
from microscale.tensor import BlockScaledTensor


def prepare(weight: BlockScaledTensor) -> BlockScaledTensor:
    """Return a weight [N, K] in layout `fragments`, for activations of up to 64 rows on a GPU.

    The same bytes in another order, so nothing is lost and nothing takes more memory: `dequantize()`, slicing, saving
    and every matmul give what they gave (whatever is not a matmul or a transpose first restores the plain order).
    `weight.to_layout("strided")` undoes it. Reads the scales back to the host once: prepare before capturing graphs.

    Raises InputError, with the reason, for a weight that the kernel cannot decode exactly: sizes that are no multiples
    of 64, codebooks, blocks other than 16 or 32, FP32 scales, or a scale so large (or NaN) that bfloat16 lacks it.
    """
    if not isinstance(weight, BlockScaledTensor):
        raise InputError(f"prepare takes a BlockScaledTensor, got {type(weight).__name__}", "quantize it first")
    if weight.scale_layout == layout.FRAGMENTS:
        return weight
    if weight.block_axis != -1:
        raise InputError(f"prepare takes a weight [N, K] with its blocks along K, got {weight!r}", "transpose it")
    made = weight.to_layout(layout.FRAGMENTS)
    _check(weight)
    return made


def _check(weight: BlockScaledTensor) -> None:
    """Raise InputError for values that the decode kernel does not get exactly."""
    fmt = weight.format
    low, high = ptx_decode.window(fmt)
    scale, codes = weight.strided_scale(), weight.codes()
    odd = [code for code, value in enumerate(fmt.element.table) if not math.isfinite(value)]
    if odd and bool(torch.isin(codes, torch.tensor(odd, dtype=torch.uint8, device=weight.device)).any()):
        raise InputError(f"this {fmt.name} weight has NaN or infinite elements", "leave it: other kernels take it")
    small = scale < low
    if bool(small.any()):  # the scale of a block of zeros is the smallest there is
        zeros = torch.tensor([c for c, v in enumerate(fmt.element.table) if v == 0], device=weight.device)
        small &= ~torch.isin(codes.unflatten(-1, (-1, fmt.block)), zeros.to(torch.uint8)).all(-1)
    if bool((small | (scale > high)).any()):
        raise InputError(
            f"some scales of this {fmt.name} weight are outside of codes {low} to {high}, "
            "in which bfloat16 holds every value",
            "leave it as it is: other kernels take it",
        )


def prepare_(model: torch.nn.Module) -> dict[str, str]:
    """Prepare every block-scaled weight of a model's linear layers, in place.

    Returns {module name: "fragments", or why its weight stays as it was}.
    """
    done: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear) or not isinstance(weight, BlockScaledTensor):
            continue
        try:
            made = prepare(weight)
        except MicroscaleError as error:
            done[name] = str(error)
            continue
        if made is not weight:
            # Swapping keeps the parameter's identity, which tied modules refer to.
            torch.utils.swap_tensors(weight, torch.nn.Parameter(made, requires_grad=False))
        done[name] = layout.FRAGMENTS
    return done
