"""Modules: what a recipe would do to a model (`plan`), doing it (`quantize_`), and training by one."""

from microscale.nn.convert import quantize_
from microscale.nn.diagnostics import Diagnosis, diagnose, read_diagnostics
from microscale.nn.layers import QuantizedEmbedding, QuantizedLinear, to_quantized_
from microscale.nn.plan import Layer, LayerPlan, Plan, make_plan, plan
from microscale.nn.schedule import set_progress
from microscale.nn.three_gemm import GemmState, observe, three_gemm
from microscale.nn.training import Training, finish_training_, prepare_training_
from microscale.nn.training_linear import TrainingLinear

__all__ = [
    "Diagnosis",
    "GemmState",
    "Layer",
    "LayerPlan",
    "Plan",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Training",
    "TrainingLinear",
    "diagnose",
    "finish_training_",
    "make_plan",
    "observe",
    "plan",
    "prepare_training_",
    "quantize_",
    "read_diagnostics",
    "set_progress",
    "three_gemm",
    "to_quantized_",
]
