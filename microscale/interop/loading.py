"""`load`: a checkpoint, quantized or not, as a dictionary of tensors or into a model (also one on the meta device).

Everything that headers and modules can tell is checked before the model is touched: missing and unexpected names,
shapes, and whether each module can work with what it would get. Tensors are then read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, overload

import torch

from microscale.errors import CheckpointError, InputError, did_you_mean
from microscale.interop.checkpoint import Checkpoint
from microscale.interop.modules import Slot, slots, unwrapped
from microscale.interop.safetensors_stream import TensorSpec
from microscale.nn.convert import leave_fused_paths
from microscale.nn.discover import describe
from microscale.nn.experts import GroupedLinear
from microscale.nn.layers import QuantizedGroupedLinear, QuantizedLinear, to_quantized_
from microscale.tensor import BlockScaledTensor

Model = TypeVar("Model", bound=torch.nn.Module)
Device = torch.device | str
_AMAX = "input_amax"


@overload
def load(path: str | Path, model: None = None, *, device: Device | None = None) -> dict[str, torch.Tensor]: ...
@overload
def load(path: str | Path, model: Model, *, device: Device | None = None) -> Model: ...
def load(
    path: str | Path, model: Model | None = None, *, device: Device | None = None
) -> dict[str, torch.Tensor] | Model:
    """Read a checkpoint: a folder, or one safetensors file; quantized or plain.

    Args:
        path: see `Checkpoint`.
        model: a module with the checkpoint's names, in high precision (also on the meta device) or quantized already.
            Its parameters are replaced, with the checkpoint's dtypes; layers become quantized ones, with their input
            quantizers; tied parameters stay tied.
        device: where tensors go; default the CPU, or for a model where its tensors are (the CPU for meta ones).

    Returns:
        Without a model {name: tensor}, BlockScaledTensors where quantized; otherwise the model.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or does not fit the model: missing or unexpected
            names, shapes, modules that cannot use a quantized weight. The model is untouched then.
        InputError: the model has state beside tensors.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise InputError(f"load takes an nn.Module, got {type(model).__name__}", "leave it out to get tensors")
    checkpoint = Checkpoint(path)
    if model is not None:
        _Loader(checkpoint, unwrapped(model), device).run()
        return model
    aliases = checkpoint.contents.aliases
    made = {name: checkpoint.read(name).to(device or "cpu") for name in checkpoint.names if name not in aliases}
    return made | {name: made[target] for name, target in aliases.items()}


class _Loader:
    """One checkpoint and one model: which tensor goes where."""

    def __init__(self, checkpoint: Checkpoint, model: torch.nn.Module, device: Device | None) -> None:
        self.checkpoint, self.model, self.device = checkpoint, model, device
        self.contents = checkpoint.contents
        self.slots, self.transient = slots(model), slots(model, persistent=False)
        amaxes = {_tensor_of(name, _AMAX) for name in self.contents.inputs}
        # The calibration of a layer that is quantized already belongs to that quantizer, and goes with it.
        self.stale = {n for n, s in self.slots.items() if s.attribute == _AMAX and isinstance(s.module, _WITH_INPUT)}
        self.names = [name for name in checkpoint.names if name not in amaxes]
        self.sharers: dict[int, list[str]] = {}
        for name, slot in self.slots.items():
            self.sharers.setdefault(id(slot.tensor), []).append(name)

    def run(self) -> None:
        self._check_names()
        self._check_shapes()
        self._check_layers()
        self._check_meta()
        self._check_shared()
        done: set[str] = set()
        for name in self.names:
            if name in done:
                continue
            slot = self.slots.get(name) or self.transient[name]
            shared = self.sharers.get(id(slot.tensor), [name])
            done.update(shared)
            self._place(name, slot, shared)
        for name in self.contents.inputs:
            self._quantize_input(name)
        leave_fused_paths(self.model)

    # -- checks: nothing is changed before all of them pass --

    def _check_names(self) -> None:
        present = set(self.names)
        unexpected = [name for name in self.names if name not in self.slots and name not in self.transient]
        missing = [
            name
            for name, slot in self.slots.items()
            if name not in self.stale and not present.intersection(self.sharers[id(slot.tensor)])
        ]
        if missing or unexpected:
            parts = [f"{len(missing)} of the model's are missing: {_some(missing)}"] * bool(missing)
            parts += [f"{len(unexpected)} are unexpected: {_some(unexpected)}"] * bool(unexpected)
            message = f"{self.checkpoint.path} does not have the model's tensors; {'; '.join(parts)}"
            raise CheckpointError(message, _naming_hint(missing, unexpected))

    def _check_shapes(self) -> None:
        contents, tensors = self.contents, self.checkpoint.tensors
        for name in self.names:
            stored = contents.aliases.get(name, name)
            entry = contents.quantized.get(stored)
            shape, dtype = (entry.shape, entry.dtype) if entry is not None else _kind(tensors[stored].spec)
            wanted = (self.slots.get(name) or self.transient[name]).tensor
            hint = "build the model with the configuration that the checkpoint was made with"
            if tuple(wanted.shape) != shape:
                message = f"{self.checkpoint.path}: {name!r} is {list(shape)}, the model's is {list(wanted.shape)}"
                raise CheckpointError(message, hint)
            # Another float dtype is the checkpoint's choice; codes in the place of numbers are a mistake.
            if dtype is None or dtype.is_floating_point != wanted.is_floating_point():
                message = (
                    f"{self.checkpoint.path}: {name!r} is {dtype or 'no torch dtype'}, the model's is {wanted.dtype}"
                )
                raise CheckpointError(message, hint)

    def _check_layers(self) -> None:
        """Refuse weights that a module would read without calling its layer, and input quantizers of other modules."""
        layers, _ = describe(self.model)
        kinds = {name: kind for layer in layers for name, kind in layer.uses}
        fixed = {_tensor_of(name, "weight"): layer.fixed for layer in layers for name, _ in layer.uses}
        for name in self.names:
            reason = fixed.get(name, "")
            if self.contents.aliases.get(name, name) in self.contents.quantized and reason not in ("", _ALREADY):
                message = f"{self.checkpoint.path}: {name!r} is quantized, which the model cannot use: {reason}"
                raise CheckpointError(message, "give the layer a rule that keeps high_precision and quantize again")
        for name in self.contents.inputs:
            if kinds.get(name) != "linear":
                message = (
                    f"{self.checkpoint.path}: the input of {name!r} is quantized, "
                    "which is no nn.Linear or GroupedLinear of the model"
                )
                hint = "give it a rule that keeps high_precision, or use a weight-only recipe, and quantize again"
                raise CheckpointError(message, hint)

    def _check_meta(self) -> None:
        lost = [n for n, slot in self.transient.items() if slot.tensor.is_meta and n not in self.checkpoint.names]
        if lost:
            message = f"buffers that no checkpoint stores are on the meta device: {_some(lost)}"
            raise CheckpointError(message, "build the model on a real device; loading replaces its parameters anyway")

    def _check_shared(self) -> None:
        """Read what the checkpoint stores several times and the model has once: it has to be the same."""
        aliases, present = self.contents.aliases, set(self.names)
        for shared in self.sharers.values():
            stored = list(dict.fromkeys(aliases.get(name, name) for name in shared if name in present))
            first = self.checkpoint.read(stored[0]) if len(stored) > 1 else None
            for other in stored[1:]:
                if first is not None and not _same(first, self.checkpoint.read(other)):
                    message = f"{self.checkpoint.path}: {stored[0]!r} and {other!r} differ, but the model shares them"
                    raise CheckpointError(message, "untie them in the model, or load the checkpoint it was made from")

    # -- changes --

    def _place(self, name: str, slot: Slot, shared: list[str]) -> None:
        tensor = self._read(name, slot)
        if slot.is_parameter:
            trains = slot.tensor.requires_grad and not isinstance(tensor, BlockScaledTensor)
            tensor = torch.nn.Parameter(tensor, requires_grad=trains)
        for other in shared:
            place = self.slots.get(other) or self.transient[other]
            _forget_input(place.module)
            if (
                isinstance(tensor, BlockScaledTensor)
                and isinstance(place.module, _LAYERS)
                and place.attribute == "weight"
            ):
                to_quantized_(place.module, tensor)
            else:
                place.put(tensor)

    def _quantize_input(self, name: str) -> None:
        module = self.model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear | GroupedLinear)  # checked by _check_layers
        amax = None
        if _tensor_of(name, _AMAX) in self.checkpoint.tensors:
            amax = self.checkpoint.read(_tensor_of(name, _AMAX)).to(module.weight.device)
        to_quantized_(module, module.weight, self.contents.inputs[name], amax)

    def _read(self, name: str, slot: Slot) -> torch.Tensor:
        default = torch.device("cpu") if slot.tensor.is_meta else slot.tensor.device
        return self.checkpoint.read(name).to(self.device or default)


_LAYERS = (torch.nn.Linear, GroupedLinear, torch.nn.Embedding)
_WITH_INPUT = (QuantizedLinear, QuantizedGroupedLinear)
_ALREADY = "already quantized"


def _tensor_of(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _kind(spec: TensorSpec) -> tuple[tuple[int, ...], torch.dtype | None]:
    return spec.shape, spec.torch_dtype


def _forget_input(module: torch.nn.Module) -> None:
    """What a quantized layer did with its inputs before is not part of what it becomes."""
    if isinstance(module, _WITH_INPUT):
        module.input_quantizer = module.input_amax = None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if isinstance(a, BlockScaledTensor) and isinstance(b, BlockScaledTensor):
        pairs = [(a.qdata, b.qdata), (a.scale, b.scale), (a.outer_scale, b.outer_scale)]
        return a.meta == b.meta and all(x is y or (x is not None and y is not None and _same(x, y)) for x, y in pairs)
    plain = not isinstance(a, BlockScaledTensor) and not isinstance(b, BlockScaledTensor)
    return plain and a.dtype == b.dtype and torch.equal(a, b)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(repr(name) for name in listed[:4]) + (", ..." if len(listed) > 4 else "")


def _naming_hint(missing: list[str], unexpected: list[str]) -> str:
    for absent in missing:
        for extra in unexpected:
            if absent.endswith(f".{extra}"):
                prefix = absent.removesuffix(f".{extra}")
                return f"the checkpoint's names lack {prefix!r}: load into that part, model.{prefix}"
            if extra.endswith(f".{absent}"):
                prefix = extra.removesuffix(f".{absent}")
                return (
                    f"the checkpoint's names start with {prefix!r}: it belongs to a model that has this one as a part"
                )
    if missing and unexpected:
        close = did_you_mean(missing[0], unexpected)
        if close:
            return f"for {missing[0]!r}, {close}"
    return "build the model that the checkpoint was made from, or load(path) for the tensors alone"
