"""What a training loop tells the layers after each step: how far it is, and that the weights are new.

Recipes with a `schedule` switch their layers to high precision on the way. The switch is a Python attribute of each
layer: it costs nothing on the device, compiled layers are compiled once more, and a captured CUDA graph has to be
captured again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from microscale.errors import InputError
from microscale.nn.training_linear import TrainingLayer


def set_progress(model: torch.nn.Module | Iterable[torch.nn.Module], progress: float) -> bool:
    """Tell the training layers of a model (or the given ones) what share of all steps is done, from 0 to 1.

    Layers whose recipe has `schedule: {high_precision_from: S}` compute in high precision from progress S on, and
    quantized before. Whatever their recipe, layers forget the weights that they keep quantized: replays of a CUDA graph
    change a weight behind Python's back, so that a loop that replays its steps has to call this (or `Training.step`)
    before anything eager reads the layers, such as an evaluation. Returns True if a layer switched. Raises InputError
    for another progress.
    """
    if not 0 <= progress <= 1:
        raise InputError(f"progress {progress}", "it is the share of all steps that is done, from 0 to 1")
    switched = False
    for layer in model.modules() if isinstance(model, torch.nn.Module) else model:
        if not isinstance(layer, TrainingLayer):
            continue
        layer.cache.drop()
        if layer.recipe.schedule is not None:
            high_precision = progress >= layer.recipe.schedule.high_precision_from
            switched = switched or high_precision != layer.high_precision
            layer.high_precision = high_precision
    return switched
