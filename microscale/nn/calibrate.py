"""Calibration: run a model on example inputs and record the magnitude of what static input quantizers will see."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from microscale.errors import InputError, RecipeError
from microscale.numerics.hadamard import hadamard
from microscale.numerics.scaling import finite_amax
from microscale.spec.quantizer import QuantizerSpec

Calibration = Iterable[Any] | Callable[[torch.nn.Module], object]
"""Batches (a tensor is the model's one argument, a tuple or list its positional ones, a mapping its named ones), or a
function that runs the model itself."""


def record_amax(
    model: torch.nn.Module, layers: Mapping[str, QuantizerSpec], calibrate: Calibration
) -> dict[str, torch.Tensor]:
    """Return the largest finite magnitude that reaches each layer: {module name: FP32 scalar on the input's device}.

    `layers` maps module names to their static input quantizers; a Hadamard transform is applied before measuring, as
    quantization does. The model runs in eval mode without gradients, and is left as it was found, also on errors.
    Raises InputError for a `calibrate` that is no collection of batches, RecipeError for layers that no batch reached.
    """
    if isinstance(calibrate, torch.Tensor | Mapping | str):
        raise InputError(f"calibrate is one {type(calibrate).__name__}", "pass a collection of batches: [batch]")
    if not callable(calibrate) and not isinstance(calibrate, Iterable):
        raise InputError(
            f"cannot calibrate with a {type(calibrate).__name__}", "pass batches, or a function of the model"
        )
    found: dict[str, torch.Tensor] = {}
    with _hooks(model, layers, found), _eval_mode(model), torch.no_grad():
        if callable(calibrate):
            calibrate(model)
        else:
            for batch in calibrate:
                _run(model, batch)
    missed = [name for name in layers if name not in found]
    if missed:
        shown = ", ".join(missed[:4]) + (", ..." if len(missed) > 4 else "")
        raise RecipeError(
            f"calibration did not reach {len(missed)} of {len(layers)} layers: {shown}",
            "add batches that use them, or give them a rule that keeps high_precision or a dynamic outer scale",
        )
    return found


def _run(model: torch.nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


@contextlib.contextmanager
def _hooks(
    model: torch.nn.Module, layers: Mapping[str, QuantizerSpec], found: dict[str, torch.Tensor]
) -> Iterator[None]:
    handles = []
    try:
        for name, quantizer in layers.items():
            hook = functools.partial(_observe, found, name, quantizer)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(
    found: dict[str, torch.Tensor],
    name: str,
    quantizer: QuantizerSpec,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    x = args[0] if args else kwargs["input"]
    if quantizer.hadamard is not None:
        x = hadamard(x, quantizer.hadamard.size, quantizer.hadamard.sign)
    amax = finite_amax(x, "tensor")
    found[name] = torch.maximum(found[name], amax) if name in found else amax


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and running statistics off, and every module back to the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
