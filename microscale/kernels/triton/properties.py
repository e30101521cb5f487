"""What the jitted code is specialised by: the properties of elements and scales, as constexpr arguments."""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import torch

from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec

KINDS = {"float": 0, "int": 1, "codebook": 2}
RULES = {"floor": 0, "ceil": 1, "rceil": 2, "even": 3, "nearest": 4}


def fp32(value: float) -> float:
    """Return a number rounded to FP32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def is_fp8(element: ElementSpec) -> bool:
    """Return True if an element is OFP8 E4M3 or E5M2, which the hardware converts to and from."""
    facts = (element.exponent, element.mantissa, element.bias, element.nan, element.inf)
    return element.sign and facts in ((4, 3, 7, "all_ones", False), (5, 2, 15, "ieee", True))


def is_e2m1(element: ElementSpec) -> bool:
    """Return True if an element is OCP E2M1, which `packed.py` encodes."""
    facts = (element.exponent, element.mantissa, element.bias, element.nan, element.inf, element.max)
    return element.sign and element.subnormals and facts == (2, 1, 1, "none", False, None)


def _top_code(element: ElementSpec) -> int:
    """The largest magnitude code that is a finite number."""
    magnitudes = element.table[: 2 ** (element.width - int(element.sign))]
    return max(code for code, value in enumerate(magnitudes) if math.isfinite(value))


def element_constants(prefix: str, element: ElementSpec) -> dict[str, Any]:
    """Return the constexpr arguments of the encoder and decoder for one element, names starting with `prefix`."""
    is_float = element.kind == "float"
    nan = element.nan_code if element.nan_code is not None else element.max_code
    constants = {
        "KIND": KINDS[element.kind],
        "WIDTH": element.width,
        "MANTISSA": (element.mantissa or 0) if is_float else (element.fraction or 0),
        "LOWEST": (1 if element.subnormals else 0) - (element.bias or 0) if is_float else 0,
        "MAX": element.max_value,
        "NAN": {"none": 0, "all_ones": 1, "ieee": 2}[element.nan],
        "TOP": _top_code(element) if is_float and element.width <= 8 else 0,
        "MAX_CODE": element.max_code if element.width <= 8 else 0,
        "NAN_CODE": nan if element.width <= 8 else 0,
        "SIGNED": int(element.sign),
    }
    return {prefix + name: value for name, value in constants.items()}


@functools.lru_cache(maxsize=1024)
def format_constants(fmt: FormatSpec) -> dict[str, Any]:
    """Return the constexpr arguments that describe a format: element E_*, scale S_*, block and rule."""
    element, scale = fmt.element, fmt.scale
    return {
        **element_constants("E_", element),
        **element_constants("S_", scale),
        "BLOCK": fmt.block,
        "BLOCK_BYTES": fmt.block_bytes,
        "GROUP": element.pack_group,
        "EXPONENT_ONLY": scale.exponent_only,
        "S_BIAS": scale.bias or 0,
        "S_WIDE": scale.width > 8,
        "S_IS_E4M3": is_fp8(scale) and scale.mantissa == 3,
        "RULE": RULES[fmt.scale_rule.base or "nearest"],
        "E_INVERSE": fp32(1.0 / element.max_value),
        "OUTER_TOP": fp32(element.max_value * fmt.scale_max) if fmt.outer_scale is not None else 0.0,
        "E_EMAX": element.max_exponent,
        "E_PRECISION": element.precision or 0,
    }


def dequantize_constants(fmt: FormatSpec) -> dict[str, Any]:
    """Return the constexpr arguments of the dequantize kernel."""
    unused = {"RULE", "OUTER_TOP", "E_EMAX", "E_PRECISION", "E_INVERSE", "S_KIND", "S_IS_E4M3"}
    unused |= {p + n for p in ("E_", "S_") for n in ("MAX", "MAX_CODE", "NAN_CODE")}
    return {k: v for k, v in format_constants(fmt).items() if k not in unused}


@functools.cache
def interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def power_of_two_at_least(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many SMs a device has; for the interpreter few, so that programs take several tiles."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return a CUDA device's compute capability, None of another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
