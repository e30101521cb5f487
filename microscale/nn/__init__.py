"""Modules: what a recipe would do to a model (`plan`), doing it (`quantize_`), and training by one."""

from microscale.nn.convert import quantize_
from microscale.nn.diagnostics import Diagnosis, diagnose, read_diagnostics
from microscale.nn.grouped_gemm import alignment_of, quantize_experts, three_grouped_gemm
from microscale.nn.layers import QuantizedEmbedding, QuantizedGroupedLinear, QuantizedLinear, to_quantized_
from microscale.nn.plan import Layer, LayerPlan, Plan, make_plan, plan
from microscale.nn.schedule import set_progress
from microscale.nn.three_gemm import GemmState, observe, three_gemm
from microscale.nn.token_groups import TokenGroups
from microscale.nn.training import Training, finish_training_, prepare_training_
from microscale.nn.training_experts import GroupedLinear, TrainingGroupedLinear
from microscale.nn.training_linear import TrainingLayer, TrainingLinear

__all__ = [
    "Diagnosis",
    "GemmState",
    "GroupedLinear",
    "Layer",
    "LayerPlan",
    "Plan",
    "QuantizedEmbedding",
    "QuantizedGroupedLinear",
    "QuantizedLinear",
    "TokenGroups",
    "Training",
    "TrainingGroupedLinear",
    "TrainingLayer",
    "TrainingLinear",
    "alignment_of",
    "diagnose",
    "finish_training_",
    "make_plan",
    "observe",
    "plan",
    "prepare_training_",
    "quantize_",
    "quantize_experts",
    "read_diagnostics",
    "set_progress",
    "three_gemm",
    "three_grouped_gemm",
    "to_quantized_",
]
