"""Modules: what a recipe would do to a model (`plan`), and doing it (`quantize_`)."""

from microscale.nn.convert import quantize_
from microscale.nn.layers import QuantizedEmbedding, QuantizedLinear, to_quantized_
from microscale.nn.plan import Layer, LayerPlan, Plan, make_plan, plan

__all__ = [
    "Layer",
    "LayerPlan",
    "Plan",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "make_plan",
    "plan",
    "quantize_",
    "to_quantized_",
]
