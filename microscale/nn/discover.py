"""Which weights of a model can a recipe reach? Modules to `Layer` records, without touching or reading any data."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from microscale.nn.experts import GroupedLinear
from microscale.nn.layers import QuantizedEmbedding, QuantizedGroupedLinear, QuantizedLinear
from microscale.nn.records import Layer, LayerKind, Use
from microscale.tensor import BlockScaledTensor

_BASES: dict[type[torch.nn.Module], LayerKind] = {
    torch.nn.Linear: "linear",
    GroupedLinear: "linear",  # of several experts, as one layer
    torch.nn.Embedding: "embedding",
}
_QUANTIZED = (QuantizedLinear, QuantizedGroupedLinear, QuantizedEmbedding)


def describe(model: torch.nn.Module) -> tuple[list[Layer], int]:
    """Return every nn.Linear, GroupedLinear and nn.Embedding weight of a model as a Layer, and the bytes of all else.

    A weight that several modules use, or a module with several names, is one Layer. Tensors that no checkpoint would
    hold (non-persistent buffers) are not counted.
    """
    names = _names(model)
    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in names:
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    layers, seen = [], set()
    for module, (name, *_) in names.items():
        kind, weight = kind_of(module), module._parameters.get("weight")
        if kind is None or (weight is not None and id(weight) in seen):
            continue
        if weight is None:  # computed from other parameters, which are counted among the others
            layers.append(Layer(name, kind, _join(name, "weight"), (), "float32", (), _obstacle(module), 0))
            continue
        seen.add(id(weight))
        layers.append(_layer(weight, kind, owners[id(weight)], names))
    return layers, _other_bytes(names, seen)


def kind_of(module: torch.nn.Module) -> LayerKind | None:
    """Return "linear" for nn.Linear and GroupedLinear, "embedding" for nn.Embedding, subclasses included; else None."""
    base = _base(module)
    return None if base is None else _BASES[base]


def _base(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    return next((base for base in _BASES if isinstance(module, base)), None)


def _names(model: torch.nn.Module) -> dict[torch.nn.Module, list[str]]:
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _layer(
    weight: torch.nn.Parameter,
    kind: LayerKind,
    owners: list[tuple[torch.nn.Module, str]],
    names: dict[torch.nn.Module, list[str]],
) -> Layer:
    uses: list[Use] = []
    fixed = ""
    for owner, attribute in owners:
        other, first = kind_of(owner), names[owner][0]
        if other is None or attribute != "weight":
            fixed = fixed or f"shares its weight with {_join(first, attribute)}, which is no layer's weight"
            continue
        uses += [(name, other) for name in names[owner]]
        found = _obstacle(owner)
        fixed = fixed or (f"shares its weight with {first}: {found}" if found and owner is not owners[0][0] else found)
    name = uses[0][0]
    lazy = is_lazy(weight)
    shape = () if lazy else tuple(weight.shape)
    dtype = str(weight.dtype).removeprefix("torch.")
    stored = weight.stored_bytes if isinstance(weight, BlockScaledTensor) else 0 if lazy else None
    return Layer(name, kind, _join(name, "weight"), shape, dtype, tuple(uses[1:]), fixed, stored)


def _obstacle(module: torch.nn.Module) -> str:
    """Return why a module cannot take a block-scaled weight and keep computing what it computes; empty if it can."""
    cls = type(module)
    weight: Any = module._parameters.get("weight")  # of whatever tensor class
    if isinstance(weight, BlockScaledTensor) or isinstance(module, _QUANTIZED):
        return "already quantized"
    if weight is None:
        return "its weight is computed (a parametrization or weight norm), not stored"
    if is_lazy(weight):
        return "its weight is not initialized yet: run one batch first"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}"
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    base = _base(module)
    if base is None or cls.forward is not base.forward:
        plain = "" if base is None else f", not {'nn.' * (base is not GroupedLinear)}{base.__name__}'s"
        return f"{cls.__name__} has a forward of its own{plain}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, torch.nn.Embedding) and module.max_norm is not None:
        return "max_norm rescales its weight in place"
    return ""


def _other_bytes(names: dict[torch.nn.Module, list[str]], layer_weights: set[int]) -> int:
    total, seen = 0, set(layer_weights)
    for module in names:
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for tensor in (*module._parameters.values(), *buffers.values()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, BlockScaledTensor):
                total += tensor.stored_bytes
            elif not is_lazy(tensor):
                total += tensor.numel() * tensor.element_size()
    return total
