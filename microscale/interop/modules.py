"""Where a model keeps the tensors that a checkpoint stores: what saving and loading share.

Names are those of `state_dict()`: parameters and persistent buffers, shared ones under each of their names.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch

from microscale.errors import InputError


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place in a model that holds a tensor."""

    module: torch.nn.Module
    module_name: str
    attribute: str
    is_parameter: bool
    tensor: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Replace the tensor; a parameter by a Parameter."""
        if self.is_parameter:
            self.module.register_parameter(self.attribute, cast(torch.nn.Parameter, tensor))
        else:
            self.module._buffers[self.attribute] = tensor


def slots(model: torch.nn.Module, *, persistent: bool = True) -> dict[str, Slot]:
    """Return every parameter and persistent buffer by name; or, with persistent=False, the non-persistent buffers.

    Raises InputError for modules with state beside tensors, which a checkpoint would lose.
    """
    found: dict[str, Slot] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            hint = "save and load that module in its own way, apart from the rest"
            raise InputError(f"{module_name or 'the model'} ({type(module).__name__}) keeps state beside tensors", hint)
        for name, parameter in module._parameters.items():
            if parameter is not None and persistent:
                found[prefix + name] = Slot(module, module_name, name, True, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and (name not in module._non_persistent_buffers_set) == persistent:
                found[prefix + name] = Slot(module, module_name, name, False, buffer)
    return found


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside a torch.compile wrapper, whose names a checkpoint has."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else model
