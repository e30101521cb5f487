"""`quantize_`: carry out a plan on a model, in place, one weight at a time."""

from __future__ import annotations

import torch

from microscale.errors import InputError
from microscale.nn.calibrate import Calibration, record_amax
from microscale.nn.experts import GroupedLinear
from microscale.nn.grouped_gemm import quantize_experts
from microscale.nn.layers import QuantizedLinear, to_quantized_
from microscale.nn.plan import LayerPlan, Plan, Progress, plan
from microscale.nn.records import Use, quantizer_of_use
from microscale.ops import quantize
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.registry import RecipeLike


def quantize_(
    model: torch.nn.Module,
    recipe: RecipeLike,
    *,
    calibrate: Calibration | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Quantize a model in place by a recipe and return the plan that was carried out.

    Args:
        model: any module; its nn.Linear and nn.Embedding weights are replaced by BlockScaledTensors with the same bytes
            as `microscale.quantize(weight, quantizer)`, those of GroupedLinear by the bytes of each expert's by itself.
            Modules keep their identity, names and hooks.
        recipe: a name, a YAML path, a mapping or a RecipeSpec, for inference.
        calibrate: for recipes with static outer scales: batches (tensor, tuple or mapping each), or a function that
            runs the model. Ignored by other recipes. Without it a static recipe converts, and its layers raise when
            called.
        progress: called after each weight with (weights done, weights in all, module name).

    Raises RecipeError as `plan` does (also for a model that is quantized already), InputError for a model on the meta
    device or unusable `calibrate`. All of these come before anything changes. Each high-precision weight is released
    before the next one is quantized, so the peak is the model plus one layer.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"quantize_ takes an nn.Module, got {type(model).__name__}", "for a checkpoint there is quantize_checkpoint"
        )
    made = plan(model, recipe)
    _check_data(model, made)
    static = _static_inputs(made)
    amax = record_amax(model, static, calibrate) if static and calibrate is not None else {}
    for done, row in enumerate(made.quantized, 1):
        _convert(model, made, row, amax)
        if progress is not None:
            progress(done, len(made.quantized), row.layer.name)
    leave_fused_paths(model)
    return made


def _check_data(model: torch.nn.Module, made: Plan) -> None:
    for row in made.quantized:
        if _weight(model, row).is_meta:
            hint = "load the weights first (plan works without them), or quantize the checkpoint: quantize_checkpoint"
            raise InputError(f"{row.layer.parameter} is on the meta device and has no data to quantize", hint)


def _weight(model: torch.nn.Module, row: LayerPlan) -> torch.nn.Parameter:
    return model.get_parameter(row.layer.parameter)


def _static_inputs(made: Plan) -> dict[str, QuantizerSpec]:
    """Every module with a static input quantizer, by name."""
    found = {}
    for row in made.quantized:
        for use in row.layer.uses:
            quantizer = quantizer_of_use(made.recipe, use, "input")
            if quantizer is not None and quantizer.outer_scale_mode == "static":
                found[use[0]] = quantizer
    return found


def _convert(model: torch.nn.Module, made: Plan, row: LayerPlan, amax: dict[str, torch.Tensor]) -> None:
    """Quantize one weight and give it to every module that uses it."""
    modules: dict[torch.nn.Module, list[Use]] = {}
    for use in row.layer.uses:
        modules.setdefault(model.get_submodule(use[0]), []).append(use)
    weight = _weight(model, row)
    if row.weight is not None:
        is_grouped = any(isinstance(module, GroupedLinear) for module in modules)
        quantized = quantize_experts(weight, row.weight) if is_grouped else quantize(weight, row.weight)
        weight = torch.nn.Parameter(quantized, requires_grad=False)
    for module, uses in modules.items():
        seen = [amax[name] for name, _ in uses if name in amax]
        to_quantized_(module, weight, quantizer_of_use(made.recipe, uses[0], "input"), max(seen) if seen else None)


def leave_fused_paths(model: torch.nn.Module) -> None:
    """Keep torch's transformer encoders from reading quantized weights directly in their fused inference path.

    That path takes the weights of linear1 and linear2 and never calls the modules. Each encoder layer with a quantized
    child takes the ordinary path instead, as it does for activations that the fused one does not know.
    """
    for encoder in model.modules():
        if isinstance(encoder, torch.nn.TransformerEncoderLayer) and _has_quantized(encoder):
            encoder.activation_relu_or_gelu = 0
        elif isinstance(encoder, torch.nn.TransformerEncoder) and _has_quantized(encoder):
            encoder.use_nested_tensor = False


def _has_quantized(module: torch.nn.Module) -> bool:
    return any(isinstance(child, QuantizedLinear) for child in module.modules())
