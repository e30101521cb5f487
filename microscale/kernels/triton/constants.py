"""What the quantize kernels are specialised by, and the tables of codebooks; made once for each quantizer.

Beyond `properties.format_constants`, the corners of the registry: elements and scales without subnormals, integers that
use their lowest code, codebooks that list a value twice, scales of 16 bits, scale tiles, candidates.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from microscale.kernels.triton import properties
from microscale.numerics import codec
from microscale.spec.element import ElementSpec
from microscale.spec.format import ScaleRuleSpec
from microscale.spec.quantizer import QuantizerSpec

METRICS = {"mse": 0, "mae": 1, "max": 2}
_QUIET_NAN = {"float16": 0x7E00, "bfloat16": 0x7FC0}


@functools.lru_cache(maxsize=1024)
def quantizer_constants(spec: QuantizerSpec) -> dict[str, Any]:
    """Return all constexpr arguments that follow from a quantizer alone; `only` picks those of one kernel."""
    fmt = spec.format
    element, scale = fmt.element, fmt.scale
    height, width = spec.scale_tile or (1, 0)
    constants = {
        **properties.format_constants(fmt),
        "E_SUBNORMALS": element.subnormals,
        "E_SYMMETRIC": element.symmetric,
        "E_LEVELS": levels(element),
        "S_SUBNORMALS": scale.subnormals,
        "S_WIDE": scale.torch_dtype == "float32",
        "TILE_ROWS": height,
        "TILE_BLOCKS": width // fmt.block,
        "CANDIDATES": candidates(fmt.scale_rule),
        "METRIC": METRICS[fmt.scale_rule.metric or "mse"],
        "STOCHASTIC": spec.rounding == "stochastic",
    }
    constants["S_IS_E4M3"] = constants["S_IS_E4M3"] and scale.subnormals and scale.max is None
    if scale.torch_dtype in _QUIET_NAN:
        constants["S_NAN_CODE"] = _QUIET_NAN[scale.torch_dtype]
    return constants


def only(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Return the constants that a jitted kernel takes."""
    return {name: constants[name] for name in kernel.arg_names if name in constants}


# -- candidates --------------------------------------------------------------------------------------------------------


def candidates(rule: ScaleRuleSpec) -> int:
    """Return how many candidates kernels see: a power of two, filled up with the first, which wins its ties; or 0."""
    return properties.power_of_two_at_least(len(rule.candidates)) if rule.candidates else 0


@functools.lru_cache(maxsize=256)
def multipliers(rule: ScaleRuleSpec, device: torch.device) -> torch.Tensor:
    """Return the candidates' multipliers of the amax: FP32 [candidates(rule)]."""
    missing = candidates(rule) - len(rule.candidates)
    return torch.tensor([*rule.candidates, *rule.candidates[:1] * missing], dtype=torch.float32, device=device)


# -- codebooks ---------------------------------------------------------------------------------------------------------


def levels(element: ElementSpec) -> int:
    """Return how many different FP32 values a codebook has; 0 for other elements."""
    return codec.codebook_tables(element, "cpu")[1].numel() if element.kind == "codebook" else 0


@functools.lru_cache(maxsize=256)
def codebook(element: ElementSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what encodes a codebook: FP32 [2n-1], n-1 thresholds, then the n sorted values; uint8 [n], their codes."""
    thresholds, code_of = codec.codebook_tables(element, device)
    values = codec.decode_table(element, device)[code_of.long()] + 0.0  # no negative zero
    return torch.cat([thresholds, values]), code_of
