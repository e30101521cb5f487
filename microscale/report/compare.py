"""`compare`: what each format and each recipe costs and gives on a checkpoint, measured.

Two parts. The weights part needs only safetensors files: every weight that a weight-only recipe would quantize is
quantized in every format, one tensor in memory at a time. The model part needs input texts and `transformers`: the
model runs unquantized and under every recipe, and the outputs are compared.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from microscale.errors import InputError, MicroscaleError, RecipeError
from microscale.interop import Checkpoint
from microscale.nn import Layer, make_plan, quantize_
from microscale.report import model as models
from microscale.report import results, weights
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.recipe import RecipeSpec
from microscale.spec.registry import (
    QuantizerLike,
    RecipeLike,
    find_quantizer,
    find_recipe,
    list_formats,
    list_recipes,
)

Progress = Callable[[int, int, str], None]
"""Called after each step with (steps done, steps in all, what was just done)."""

_LAYERS_OF = "mxfp8_weight_only"  # whose rules say which weights the formats are measured on


def compare(
    model_dir: str | Path,
    formats: Iterable[QuantizerLike] | None = None,
    recipes: Iterable[RecipeLike] | None = None,
    inputs: str | Path | Sequence[str] | None = None,
    *,
    progress: Progress | None = None,
) -> results.CompareReport:
    """Measure formats on a checkpoint's weights and, with input texts, recipes on the model's outputs.

    Args:
        model_dir: a folder with safetensors files, or one file; for `inputs`, a local `transformers` model folder.
        formats: names, YAML paths, mappings, variants or specs; default every format known by name. Empty: no weights
            part.
        recipes: names, YAML paths, mappings or specs; default every inference recipe known by name. Only with `inputs`.
        inputs: texts to run: a file with one text a line, or strings. They also calibrate recipes that need it.
        progress: called with (steps done, steps in all, what).

    Returns:
        A CompareReport, formats and recipes ranked, best first. A recipe that could not be run is in `skipped` with
        its reason.

    Raises:
        CheckpointError: no readable checkpoint there.
        UnknownNameError, SpecError: a format or recipe that is not known or not sound.
        RecipeError: a training recipe.
        InputError: no weight to measure, empty inputs, recipes without inputs, a model `transformers` cannot load.
        MissingDependencyError: inputs are given and `transformers` is not installed.
    """
    start, path = time.perf_counter(), Path(model_dir).expanduser()
    quantizers = [find_quantizer(f) for f in (list_formats() if formats is None else formats)]
    specs = _find_recipes(recipes, with_inputs=inputs is not None)
    texts = None
    if inputs is not None:
        texts = models.read_texts(inputs)
        models.require_transformers()

    source = _Source(path)
    if quantizers:
        source.check()
    # Loading first: a model that cannot be run is better reported before minutes of work than after.
    runner = None if texts is None else _Runner(models.load(path), texts)
    steps = _Steps(len(source.names) * len(quantizers) + (runner.steps(len(specs)) if runner else 0), progress)
    formats_found = _measure_weights(source, quantizers, steps)
    report = results.CompareReport(
        model=str(model_dir),
        layers=len(source.names),
        values=source.values,
        source_layer_bytes=source.layer_bytes,
        other_bytes=source.other_bytes,
        formats=results.rank_formats(formats_found),
        environment=results.environment(*(("transformers",) if runner else ())),
    )
    if runner is not None:
        report = runner.extend(report, specs, source, steps)
    return dataclasses.replace(report, seconds=time.perf_counter() - start)


def _find_recipes(recipes: Iterable[RecipeLike] | None, *, with_inputs: bool) -> list[RecipeSpec]:
    if recipes is None:
        found = [find_recipe(name) for name in list_recipes()] if with_inputs else []
        return [spec for spec in found if not spec.is_training]
    specs = [find_recipe(recipe) for recipe in recipes]
    if specs and not with_inputs:
        message = "recipes are compared by running the model, and there are no inputs to run it on"
        raise InputError(message, "give inputs: a text file with one text a line; or compare formats only")
    for spec in specs:
        if spec.is_training:
            raise RecipeError(f"recipe {spec.name!r} is for training", "compare runs inference recipes")
    return specs


class _Steps:
    """Progress over both parts."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def step(self, what: str, count: int = 1) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total, what)


# -- weights -----------------------------------------------------------------------------------------------------------


class _Source:
    """The checkpoint's weights that formats are measured on, without their data."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.layers, self.tensor_bytes = self.checkpoint.describe()
        rules = find_recipe(_LAYERS_OF)
        chosen = [layer for layer in self.layers if not layer.fixed and _is_quantized(rules, layer)]
        self.names = [(layer.name, layer.parameter) for layer in chosen]
        self.values = sum(math.prod(layer.shape) for layer in chosen)
        self.layer_bytes = sum(layer.bytes for layer in chosen)
        self.other_bytes = self.tensor_bytes + sum(layer.bytes for layer in self.layers) - self.layer_bytes

    def check(self) -> None:
        """Raise InputError, with the reasons, if there is nothing to measure."""
        if not self.names:
            reasons = sorted({layer.fixed for layer in self.layers if layer.fixed}) or ["it has no linear layer"]
            hint = "compare takes linear layers in 16- or 32-bit floats"
            raise InputError(f"{self.checkpoint.path} has no weight to measure: {'; '.join(reasons)}", hint)

    def read(self, parameter: str) -> torch.Tensor:
        """Return one weight; nothing else of the checkpoint is in memory."""
        return self.checkpoint.read(parameter)


def _is_quantized(recipe: RecipeSpec, layer: Layer) -> bool:
    rule = recipe.rule_for(layer.name, layer.type)
    return rule is not None and recipe.quantizer(rule.fprop, "weight") is not None


def _measure_weights(source: _Source, quantizers: list[QuantizerSpec], steps: _Steps) -> list[results.FormatResult]:
    if not quantizers:
        return []
    tallies = [weights.FormatTally(quantizer) for quantizer in quantizers]
    for name, parameter in source.names:
        weight = source.read(parameter)
        for tally in tallies:
            begin = time.perf_counter()
            measured = weights.measure(weight, tally.quantizer)
            tally.add(name, measured, time.perf_counter() - begin)
            steps.step(f"{tally.quantizer.name} {name}")
        del weight
    return [tally.result(source.other_bytes) for tally in tallies]


# -- the model ---------------------------------------------------------------------------------------------------------


class _Runner:
    """Runs the model unquantized and under recipes."""

    def __init__(self, model: models.TextModel, texts: list[str]) -> None:
        self.model, self.texts = model, texts
        self.batches, self.truncated = model.batches(texts)
        self.outputs = models.ReferenceOutputs(model, self.batches)

    def steps(self, recipes: int) -> int:
        return len(self.batches) * (1 + recipes)

    def extend(
        self, report: results.CompareReport, specs: list[RecipeSpec], source: _Source, steps: _Steps
    ) -> results.CompareReport:
        """Return the report with reference, recipes and skipped filled in."""
        reference = self._reference(steps)
        found: list[results.RecipeResult] = []
        skipped: list[results.SkippedRecipe] = []
        for spec in specs:
            try:
                found.append(self._run(spec, source, steps))
            except MicroscaleError as error:
                skipped.append(results.SkippedRecipe(spec.name, error.message, error.hint))
                steps.step(f"{spec.name} skipped", len(self.batches))
        ranked = results.rank_recipes(found)
        return dataclasses.replace(report, reference=reference, recipes=ranked, skipped=tuple(skipped))

    def _reference(self, steps: _Steps) -> results.Reference:
        begin, errors, causal = time.perf_counter(), models.OutputErrors(), self.model.causal
        for i, batch in enumerate(self.batches):
            errors.add(batch, self.outputs[i], self.outputs[i], causal)
            steps.step("unquantized")
        return results.Reference(
            architecture=self.model.architecture,
            task="causal_lm" if causal else "encoder",
            output="logits" if causal else "last hidden state",
            dtype="float32",
            texts=len(self.texts),
            tokens=errors.tokens,
            truncated=self.truncated,
            perplexity=errors.perplexity,
            seconds=time.perf_counter() - begin,
        )

    def _run(self, spec: RecipeSpec, source: _Source, steps: _Steps) -> results.RecipeResult:
        begin, causal = time.perf_counter(), self.model.causal
        sizes = make_plan(source.layers, spec, source.tensor_bytes)
        module = self.model.copy()
        quantize_(module, spec, calibrate=self._calibrate if _is_static(spec) else None)
        errors = models.OutputErrors()
        for i, batch in enumerate(self.batches):
            errors.add(batch, self.outputs[i], self.model.run(module, batch), causal)
            steps.step(spec.name)
        rows = [row for row in sizes.layers if row.weight is not None]
        layer_bytes = sum(row.bytes_after for row in rows)
        values = sum(math.prod(row.layer.shape) for row in rows)
        return results.RecipeResult(
            recipe=spec.name,
            description=spec.description,
            weight=_names(row.weight for row in rows) or "high precision",
            input=_names(row.input for row in sizes.layers),
            layers=len(sizes.quantized),
            stored_bits_per_value=8 * layer_bytes / max(1, values),
            layer_bytes=layer_bytes,
            model_bytes=sizes.bytes_after,
            cosine_mean=models.finite(sum(errors.cosine.values()) / len(errors.cosine)),
            cosine_worst=models.finite(errors.cosine[errors.worst]),
            worst_text=errors.worst,
            relative_error=models.finite(sum(errors.relative.values()) / len(errors.relative)),
            kl=models.finite(errors.kl / errors.tokens) if causal else None,
            perplexity=errors.perplexity if causal else None,
            seconds=time.perf_counter() - begin,
        )

    def _calibrate(self, module: torch.nn.Module) -> None:
        """Run the inputs through a module that is being calibrated."""
        for batch in self.batches:
            self.model.run(module, batch)


def _is_static(spec: RecipeSpec) -> bool:
    return any(quantizer.outer_scale_mode == "static" for quantizer in spec.quantizers.values())


def _names(quantizers: Iterable[QuantizerSpec | None]) -> str | None:
    """The distinct quantizers' names, or None if there is none."""
    return ", ".join(dict.fromkeys(q.name for q in quantizers if q is not None)) or None
