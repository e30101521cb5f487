"""`prepare_training_`: a model that trains by a recipe, in place; `finish_training_`: the way back, or to inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.nn.parameter import is_lazy

from microscale.errors import InputError, RecipeError
from microscale.nn.convert import quantize_
from microscale.nn.discover import _obstacle, describe
from microscale.nn.grouped_gemm import alignment_of
from microscale.nn.plan import Plan, _check_rules
from microscale.nn.records import rule_text
from microscale.nn.schedule import set_progress
from microscale.nn.training_experts import GroupedLinear
from microscale.nn.training_linear import TrainingLayer, to_plain_, to_training_
from microscale.ops.api import INPUT_DTYPES
from microscale.spec.recipe import RecipeSpec, Rule
from microscale.spec.registry import RecipeLike, find_recipe, list_recipes
from microscale.spec.training import HIGH_PRECISION


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """What a training recipe does to one linear layer: the index of its rule, or the reason why it stays as it is."""

    name: str
    shape: tuple[int, ...]
    rule: int | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Training:
    """A model prepared for training. `layers` are its training layers by full name; `str()` is a table."""

    recipe: RecipeSpec
    seed: int
    layers: dict[str, TrainingLayer]
    rows: tuple[TrainingRow, ...]

    def step(self, progress: float) -> bool:
        """Say after each optimizer step what share of all steps is done (0 to 1); True if layers switched precision.

        Needed for recipes with a `schedule`, then also to capture CUDA graphs anew, and for steps that are replays of a
        CUDA graph: the layers forget the weights that they keep quantized, which no replay can tell them to. Harmless
        for others: it frees the weights quantized for this step.
        """
        return set_progress(self.layers.values(), progress)

    def zero_main_grad_(self) -> None:
        """Set every `weight.main_grad` to zero; with `main_grad: fp32`, do so where you zero the gradients."""
        for layer in self.layers.values():
            if (main_grad := layer.main_grad()) is not None:
                main_grad.zero_()

    def __str__(self) -> str:
        """Render one line per linear layer."""
        lines = []
        for row in self.rows:
            rule = "-" if row.rule is None else rule_text(self.recipe, row.rule, row.name)
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.name or '(the model)'}  {shape}  {rule}  {row.reason or _gemm_text(self.layers[row.name])}"
            )
        lines.append(f"{self.recipe.name}: {len(self.layers)} of {len(self.rows)} linear layers train quantized")
        return "\n".join(lines)


def prepare_training_(model: torch.nn.Module, recipe: RecipeLike, *, seed: int = 0) -> Training:
    """Make a model train by a recipe, in place; the training loop stays as it was.

    Args:
        model: any module; each nn.Linear that a rule names becomes a TrainingLinear, whose weight stays the parameter
            that it was (dtype, ties, optimizer state), and each GroupedLinear likewise. Names, hooks and references
            stay.
        recipe: a name, a YAML path, a mapping or a RecipeSpec, for training.
        seed: of stochastic rounding and of random Hadamard signs: the same seed gives the same run. Each layer draws
            numbers of its own, from the seed and its name.

    Returns:
        A Training: the layers by name, `step(progress)` for recipes with a schedule, a table of what was decided.

    Raises:
        RecipeError: a recipe for inference, a rule that is not optional and matches no layer, a recipe that reaches
            no layer here, a model that is prepared already.
        InputError: no module, weights on the meta device, or a recipe that cannot quantize the tokens of experts (see
            `three_grouped_gemm`). SpecError as `find_recipe` does.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"prepare_training_ takes an nn.Module, got {type(model).__name__}")
    spec = find_recipe(recipe)
    if not spec.is_training:
        usable = [name for name in list_recipes() if find_recipe(name).is_training]
        raise RecipeError(f"recipe {spec.name!r} has no backward GEMM", f"recipes for training: {', '.join(usable)}")
    if any(isinstance(module, TrainingLayer) for module in model.modules()):
        raise RecipeError(
            "the model is prepared for training already", "finish_training_(model, 'high_precision') first"
        )
    spec = spec.resolved(name for name, _ in _linears(model))
    _check_rules(spec, tuple(describe(model)[0]))
    decided = [(name, module, spec.rule_for(name, "linear")) for name, module in _linears(model)]
    rows = tuple(_row(name, module, rule, spec) for name, module, rule in decided)
    chosen = [(name, module, rule) for (name, module, rule), row in zip(decided, rows, strict=True) if not row.reason]
    if not chosen:
        hint = "recipes train nn.Linear and GroupedLinear layers"
        raise RecipeError(f"recipe {spec.name!r} reaches no layer here: {_why(rows)}", hint)
    for name, module, rule in chosen:
        if module.weight.is_meta:
            raise InputError(f"{name}.weight is on the meta device", "prepare the model once its weights are there")
        if isinstance(module, GroupedLinear) and rule is not None:
            alignment_of(spec.gemms_of(rule))  # raises where the tokens of experts cannot be quantized so
    for name, module, rule in chosen:
        assert rule is not None
        to_training_(module, spec, rule, name=name, seed=seed)
    _leave_fused_paths(model)
    return Training(spec, seed, {name: module for name, module, _ in chosen}, rows)  # type: ignore[misc]


def finish_training_(model: torch.nn.Module, recipe: RecipeLike | None = None) -> Plan | None:
    """Turn the training layers of a model back into what they were, in place, and quantize it for inference.

    Args:
        model: a model that `prepare_training_` prepared.
        recipe: for inference, as `quantize_` takes it; None: what the training recipe names as `inference` (for
            quantization-aware training the one with the same bytes); "high_precision": leave the model as trained.

    Returns:
        The plan that was carried out, None if the model stays in high precision.

    Raises RecipeError for a model without training layers, and as `quantize_` does.
    """
    layers = [module for module in model.modules() if isinstance(module, TrainingLayer)]
    if not layers:
        raise RecipeError("the model has no training layers", "quantize_(model, recipe) quantizes a plain model")
    wanted = layers[0].recipe.inference if recipe is None else recipe
    target = None if wanted is None or wanted == HIGH_PRECISION else find_recipe(wanted)
    for layer in layers:
        to_plain_(layer)
    return None if target is None else quantize_(model, target)


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear | GroupedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | GroupedLinear):
            yield name, module


def _row(name: str, module: torch.nn.Linear | GroupedLinear, rule: Rule | None, recipe: RecipeSpec) -> TrainingRow:
    weight = module._parameters.get("weight")
    shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
    index = None if rule is None else recipe.rules.index(rule)
    reason = _obstacle(module)
    if not reason and rule is None:
        reason = "no rule names it"
    if not reason and rule is not None and rule.keep is not None:
        reason = "kept in high precision"
    if not reason and weight is not None and weight.dtype not in INPUT_DTYPES:
        reason = f"its dtype is {weight.dtype}"
    return TrainingRow(name, shape, index, reason)


def _why(rows: tuple[TrainingRow, ...]) -> str:
    counts = {row.reason: sum(other.reason == row.reason for other in rows) for row in rows}
    shown = [f"{reason} ({count} layer{'s' * (count > 1)})" for reason, count in counts.items()]
    return "; ".join(shown) or "the model has no linear layer"


def _gemm_text(layer: TrainingLayer) -> str:
    text = []
    for gemm_name, gemm in layer.rule.gemms().items():
        for operand, written in gemm.operands().items():
            quantizer = layer.recipe.quantizer(gemm, operand)
            text.append(f"{gemm_name}.{operand}={written if quantizer is None else quantizer.name}")
    return " ".join(text)


def _leave_fused_paths(model: torch.nn.Module) -> None:
    """Keep torch's transformer encoders from reading weights past their modules, as `leave_fused_paths` does."""
    for encoder in model.modules():
        if any(isinstance(child, TrainingLayer) for child in encoder.modules()):
            if isinstance(encoder, torch.nn.TransformerEncoderLayer):
                encoder.activation_relu_or_gelu = 0
            elif isinstance(encoder, torch.nn.TransformerEncoder):
                encoder.use_nested_tensor = False
