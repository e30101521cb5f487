"""`prepare`, `prepare_`: make weights ready for the kernels they will meet.

In the order in which the decode GEMM's tensor cores take them; and, for quantized activations, looked at once, whether
FP8 tensor cores get every value of a weight's rows, which may be kept beside it as they take them.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from microscale.errors import InputError, MicroscaleError
from microscale.kernels.cublas import rows_e4m3
from microscale.kernels.triton import fragments, grouped_fragments_wide, ptx_decode
from microscale.numerics import layout
from microscale.ops import library, rows, structure
from microscale.ops.rows import noted
from microscale.spec.powers import with_powers
from microscale.tensor import BlockScaledTensor

DECODING, BLACKWELL = (8, 0), (10, 0)  # from where on weights are decoded in registers, and hardware takes them scaled
HOPPER = (9, 0)  # where grouped products take experts in layout fragments


def prepare(weight: BlockScaledTensor, *, quantized_activations: bool = False) -> BlockScaledTensor:
    """Return a weight [N, K] in layout `fragments`, for 64 rows of activations, on Hopper thousands; or see the end.

    Experts [E, N, K] too, up to 1024 and on sm_90 alone: all matrices in that layout, for grouped products of bfloat16.

    The same bytes in another order, so nothing is lost and nothing takes more memory: `dequantize()`, slicing, saving
    and every matmul give what they gave (whatever is not a matmul or a transpose first restores the plain order).
    `weight.to_layout("strided")` undoes it. Waits for the device: prepare before capturing graphs.

    Raises InputError, with the reason, for a weight that the kernel cannot decode exactly: sizes that are no multiples
    of 64, codebooks, values of more digits than bfloat16 has, blocks other than 16, 32 or whole rows, FP32 scales of
    less than a row, or a scale of 8 bits so large (or NaN) that bfloat16 lacks it; and for experts, unless they are on
    sm_90 and without FP32 scales of rows.

    With `quantized_activations` nothing but four dimensions is refused. The weight has `meta.exact_rows` set where
    there is such a question (see `noted`), and layout `fragments` if it can have it and is on a GPU where that serves
    every number of rows: sm_80 to sm_90, for experts sm_90. Elsewhere, and on the CPU, it stays in a plain layout:
    Blackwell multiplies blocks and scales itself and takes them as they are, as FP8 tensor cores take rows of E4M3 with
    one scale each. Prepare weights on the device they will be used on.
    """
    if not isinstance(weight, BlockScaledTensor):
        raise InputError(f"prepare takes a BlockScaledTensor, got {type(weight).__name__}", "quantize it first")
    if weight.dim() > 3:
        raise InputError(f"prepare takes a weight [N, K] or experts [E, N, K], got {list(weight.shape)}")
    if quantized_activations:
        return _for_both(weight)
    if weight.scale_layout == layout.FRAGMENTS:
        return weight
    if weight.block_axis != -1:
        raise InputError(f"prepare takes a weight [N, K] with its blocks along K, got {weight!r}", "transpose it")
    if weight.dim() == 3 and not _is_served(weight):
        raise InputError(
            f"prepare takes experts on a GPU of compute capability 9.0, got {list(weight.shape)} on {weight.device}",
            "leave them as they are: grouped products take the plain layout",
        )
    made = weight.to_layout(layout.FRAGMENTS)
    check(weight)
    return made


def _for_both(weight: BlockScaledTensor) -> BlockScaledTensor:
    """Return a weight ready for quantized activations, and for plain ones if it could be reordered."""
    found = noted(weight.to_layout(layout.STRIDED) if weight.scale_layout == layout.FRAGMENTS else weight)
    if not _is_served(weight) or _is_for_fp8(weight):
        return found
    if weight.scale_layout == layout.FRAGMENTS:
        known = weight.meta.exact_rows == found.meta.exact_rows
        return weight if known else weight.replace(meta=dataclasses.replace(found.meta, layout=layout.FRAGMENTS))
    try:
        return prepare(found)
    except InputError:  # a format, a size or values that the layout is not for
        return found


def _is_for_fp8(weight: BlockScaledTensor) -> bool:
    """Return True for rows of E4M3 with one scale each where there are FP8 tensor cores, which take them so."""
    found, fmt = library.capability(weight.device), weight.format
    rows = fragments.has_row_scales(fmt) and rows_e4m3.is_aligned(with_powers(fmt), weight.shape[-1] <= fmt.block)
    return rows and found is not None and found >= rows_e4m3.ADA


def decodes_on(device: torch.device) -> bool:
    """Return True for a device whose kernels multiply quantized activations by weights in layout `fragments`."""
    found = library.capability(device)
    return found is not None and DECODING <= found < BLACKWELL


def _is_served(weight: BlockScaledTensor) -> bool:
    """Return True for a weight, or experts, where there are kernels that multiply it in layout `fragments`."""
    if weight.dim() < 3:
        return decodes_on(weight.device)
    return library.capability(weight.device) == HOPPER and weight.shape[0] <= grouped_fragments_wide.MOST_EXPERTS


def check(weight: BlockScaledTensor) -> None:
    """Raise InputError for values that the decode kernel does not get exactly."""
    if weight.dim() < 3:
        return _check_matrix(weight)
    plain = weight.to_layout(layout.STRIDED)
    for expert in range(weight.shape[0]):  # one by one, as codes are unpacked for it
        _check_matrix(structure.select(plain, 0, expert))


def _check_matrix(weight: BlockScaledTensor) -> None:
    fmt = weight.format
    scale, codes = weight.strided_scale(), weight.codes()
    odd = [code for code, value in enumerate(fmt.element.table) if not math.isfinite(value)]
    if odd and bool(torch.isin(codes, torch.tensor(odd, dtype=torch.uint8, device=weight.device)).any()):
        raise InputError(f"this {fmt.name} weight has NaN or infinite elements", "leave it: other kernels take it")
    if fragments.has_row_scales(fmt):  # which multiply sums
        return
    low, high = ptx_decode.window(fmt)
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


_FOUND = {None: "", True: ", rows exact in E4M3", False: ", rows not exact in E4M3"}


def prepare_(model: torch.nn.Module, *, keep_rows: bool = False) -> dict[str, str]:
    """Prepare every block-scaled weight of a model's linear layers, in place, for the activations that each takes.

    Experts stay as they are where `prepare` does not take them, which the result says too.

    With `keep_rows`, layers that quantize their activations also keep their weight as `align_rows` makes it, where that
    serves (sm_89 and sm_90): one more byte of memory per element, for many rows of activations at the speed of FP8
    tensor cores, which else get such rows made anew at every call. Kept rows are not saved, copied or loaded; setting
    or loading a weight drops them, and after one was written to they are not used. Not seen are writes through `.data`,
    nor any where torch.compile has traced the layer: prepare again after those.

    Returns {module name: "fragments", or why its weight stays as it was}; for layers that quantize their activations,
    the layout, "fragments" or a plain one, and what was found of a weight's rows: ", rows exact in E4M3" or ", rows not
    exact in E4M3"; with `keep_rows`, for every layer, also ", rows kept" or ", rows not kept: " and why.
    """
    done: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, BlockScaledTensor):
            continue
        if not isinstance(module, torch.nn.Linear) and weight.dim() != 3:  # which a stack of linear layers has
            continue
        quantized = getattr(module, "input_quantizer", None) is not None
        try:
            made = prepare(weight, quantized_activations=quantized)
        except MicroscaleError as error:
            done[name] = str(error)
        else:
            if made is not weight:
                # Swapping keeps the parameter's identity, which tied modules refer to.
                torch.utils.swap_tensors(weight, torch.nn.Parameter(made, requires_grad=False))
            done[name] = made.scale_layout + _FOUND[made.meta.exact_rows if quantized else None]
        if keep_rows:
            done[name] += _keep_rows(module, weight)
    return done


def _keep_rows(module: torch.nn.Module, weight: BlockScaledTensor) -> str:
    """Have a layer keep rows of its weight, if that serves; and say so."""
    refused = rows.why_not(weight, getattr(module, "input_quantizer", None))
    if refused is None:
        try:
            module.keep_rows(rows.align_rows(weight))  # type: ignore[operator]
        except MicroscaleError as error:
            refused = str(error)
    return ", rows kept" if refused is None else f", rows not kept: {refused}"
