"""Linear, grouped linear and embedding modules whose weight is block-scaled.

A module becomes quantized in place: its class changes, nothing else. So names, hooks, references to it and tied modules
stay what they were, `isinstance(module, torch.nn.Linear)` stays true, and its weight is an ordinary parameter that
happens to be a BlockScaledTensor (state_dict, pickling, `.to(...)` and torch.compile follow from that).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch

from microscale import ops
from microscale.errors import InputError
from microscale.nn.experts import GroupedLinear
from microscale.nn.grouped_inference import grouped_linear
from microscale.ops.api import INPUT_DTYPES
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.training import LayerGemms
from microscale.tensor import BlockScaledTensor

_AMAX, _ROWS = "input_amax", "weight_rows"


class _QuantizedModule(torch.nn.Module):
    """What the quantized layers share: dtype moves that keep the bytes, pickling of classes made on the fly, repr."""

    weight: torch.Tensor
    plain_class: type[torch.nn.Module] | None = None
    """The subclass of nn.Linear, GroupedLinear or nn.Embedding that a class made by `quantized_class` extends."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the module: `.to(...)`, `.half()`, `.cuda()`.

        A dtype move never changes stored bytes: the weight then decodes to the new dtype, because what it stands for is
        the exact decoded values; a calibrated amax stays FP32.
        """
        weight, amax = self.weight, self._buffers.get(_AMAX)
        if isinstance(weight, BlockScaledTensor):
            dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            if dtype != weight.dtype and dtype in INPUT_DTYPES:
                # Swapping keeps the parameter's identity, which tied modules and optimizers refer to.
                torch.utils.swap_tensors(weight, _parameter(weight.as_dtype(dtype)))
            rows = self._buffers.get(_ROWS)
            if isinstance(rows, BlockScaledTensor) and dtype in INPUT_DTYPES:  # the weight may be a tied module's, too
                self._buffers[_ROWS] = rows.as_dtype(dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self._buffers.get(_AMAX)
        if amax is not None and moved is not None and moved.dtype != amax.dtype:
            self._buffers[_AMAX] = amax.to(moved.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy; a class made on the fly is made again on the other side."""
        if self.plain_class is None:
            return super().__reduce_ex__(protocol)
        return _blank, (self.plain_class,), self.__getstate__()  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Add the formats to what the plain module shows."""
        weight = self.weight
        shown = f"weight={weight.format.name}" if isinstance(weight, BlockScaledTensor) else ""
        return ", ".join(part for part in (super().extra_repr(), shown) if part)


class _QuantizedInput(_QuantizedModule):
    """What quantized layers share that multiply: an `input_quantizer`, the calibration of a static one, kept rows.

    `weight_rows`: the weight as `microscale.align_rows` makes it, None unless kept; a buffer that is neither saved nor
    copied.
    """

    input_quantizer: QuantizerSpec | None
    input_amax: torch.Tensor | None
    _rows_of: tuple[object, ...] | None = None  # what the kept rows were made of, see `_state_of`

    def keep_rows(self, rows: BlockScaledTensor | None) -> None:
        """Keep rows of the weight, as it is now, for products with many rows of activations; None drops them."""
        self.register_buffer(_ROWS, rows, persistent=False)
        self._rows_of = None if rows is None else _state_of(self.weight)

    def kept_rows(self) -> BlockScaledTensor | None:
        """Return the kept rows; None if there are none, or the weight was written to since.

        Neither writes through `.data` are seen, nor any by compiled code: call `keep_rows(None)`, or `prepare_` again.
        """
        rows = self._buffers.get(_ROWS)
        if not isinstance(rows, BlockScaledTensor):
            return None
        if not torch.compiler.is_compiling() and self._rows_of != _state_of(self.weight):
            return None
        return rows

    def __setattr__(self, name: str, value: Any) -> None:
        """Drop kept rows with the weight that they were made of."""
        super().__setattr__(name, value)
        if name == "weight" and self._rows_of is not None:
            self.keep_rows(None)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have: all but kept rows."""
        state = self.__dict__.copy()
        state.pop("_rows_of", None)
        if _ROWS in self._buffers:
            state["_buffers"] = {name: t for name, t in self._buffers.items() if name != _ROWS}
            state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - {_ROWS}
        return state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the module; kept rows move along, but for "meta", where nothing has values."""
        current = self._rows_of is not None and self._rows_of == _state_of(self.weight)
        super()._apply(fn, recurse)
        if self._rows_of is not None:
            self._rows_of = _state_of(self.weight) if current else None
            if not current or self.weight.device.type == "meta":
                self.keep_rows(None)
        return self

    def calibrated_amax(self) -> torch.Tensor | None:
        """Return the calibrated magnitude of a static input quantizer, None if there is none; InputError if missing."""
        quantizer = self.input_quantizer
        if quantizer is None or quantizer.outer_scale_mode != "static":
            return None
        if self.input_amax is None:
            raise InputError(
                f"this layer's input quantizer, {quantizer.name}, was never calibrated: {self!r}",
                "quantize_(model, recipe, calibrate=batches), or a recipe whose outer scales are dynamic",
            )
        return self.input_amax

    def extra_repr(self) -> str:
        """Show shapes, and the formats of weight and input."""
        quantizer = self.input_quantizer
        if quantizer is None:
            return super().extra_repr()
        missing = quantizer.outer_scale_mode == "static" and self.input_amax is None
        return f"{super().extra_repr()}, input={quantizer.name}{', uncalibrated' if missing else ''}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept the calibration of a saved layer in one that has none yet."""
        saved = state_dict.get(f"{prefix}{_AMAX}")
        if saved is not None and self.input_amax is None:
            self.input_amax = torch.empty_like(saved, dtype=torch.float32, device=self.weight.device)
        if f"{prefix}weight" in state_dict and self._rows_of is not None:
            self.keep_rows(None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(_QuantizedInput, torch.nn.Linear):
    """`nn.Linear` with a block-scaled weight and, for recipes that quantize activations, an `input_quantizer`.

    `input_amax` (FP32 scalar buffer) is the calibrated magnitude of a static input quantizer, None before calibration.
    Made by `quantize_`; the state dict holds the weight as a BlockScaledTensor, the bias, and `input_amax` once set.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input [..., K] @ weight.T + bias: [..., N] of the input's dtype.

        Weight-only is exact in the gradient to the input; a quantized input is straight-through. Under autocast both
        operands take the autocast dtype, as nn.Linear's do. Raises InputError for a static input quantizer that was
        never calibrated.
        """
        weight, bias, quantizer = self._own("weight"), self._own("bias"), self.input_quantizer
        if quantizer is None:
            return ops.linear(input, weight, bias)
        amax = self.calibrated_amax()
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input = input.to(dtype)
            weight = weight.as_dtype(dtype) if isinstance(weight, BlockScaledTensor) else weight.to(dtype)
        rows = self.kept_rows()
        return ops.linear(input, weight, bias, input_quantizer=quantizer, amax=amax, rows=rows)

    def _own(self, name: str) -> Any:
        """What `getattr` gives, without its detour by `nn.Module.__getattr__` where that finds a parameter.

        A class may have a property of that name, as wrappers do that gather a weight.
        """
        parameters = self._parameters
        return parameters[name] if name in parameters and not hasattr(type(self), name) else getattr(self, name)


class QuantizedGroupedLinear(_QuantizedInput, GroupedLinear):
    """`GroupedLinear` with block-scaled weights, each expert quantized by itself, and maybe an `input_quantizer`.

    A dynamic outer scale is that of an expert's tokens; a static one, `input_amax`, all experts share. Otherwise as
    `QuantizedLinear`.
    """

    gemms: LayerGemms

    @property
    def input_quantizer(self) -> QuantizerSpec | None:
        """The quantizer of the tokens, None for weight-only."""
        return self.gemms.fprop_input

    @input_quantizer.setter
    def input_quantizer(self, quantizer: QuantizerSpec | None) -> None:
        self.gemms = LayerGemms(fprop_input=quantizer)
        hash(self.gemms)  # as `to_quantized_` does for the quantizer

    def forward(self, input: torch.Tensor, offsets: torch.Tensor, alignment: int = 1) -> torch.Tensor:
        """Return rows of input [T, K] times their expert's weight, transposed: [T, N] of the input's dtype.

        `offsets` as `GroupedLinear` takes them; `alignment` changes nothing here, where no blocks run along the tokens.
        Gradients, autocast and errors as in `QuantizedLinear`.
        """
        rows = self.kept_rows()
        return grouped_linear(input, self.weight, offsets, self.gemms, self.calibrated_amax(), rows)


class QuantizedEmbedding(_QuantizedModule, torch.nn.Embedding):
    """`nn.Embedding` with a block-scaled weight: looks rows up and decodes only those."""


def to_quantized_(
    module: torch.nn.Module,
    weight: torch.Tensor,
    input_quantizer: QuantizerSpec | None = None,
    input_amax: torch.Tensor | None = None,
) -> None:
    """Turn one nn.Linear, GroupedLinear or nn.Embedding into its quantized class, in place.

    `weight` becomes the module's parameter: a BlockScaledTensor (a Parameter is taken as it is, so tied modules can
    share one), or the module's own weight if only the input is quantized. `input_amax`: FP32 scalar of a static
    quantizer. Raises InputError for another kind of module, a weight of another shape, or an embedding's input.
    """
    if not isinstance(module, torch.nn.Linear | GroupedLinear | torch.nn.Embedding):
        hint = "pass an nn.Linear, a GroupedLinear or an nn.Embedding"
        raise InputError(f"cannot quantize a {type(module).__name__}", hint)
    if weight.shape != module.weight.shape:
        raise InputError(f"weight of shape {list(weight.shape)} for a module of {list(module.weight.shape)}")
    if isinstance(module, torch.nn.Embedding) and input_quantizer is not None:
        raise InputError("an embedding's input are indices", "leave out input_quantizer")
    module.__class__ = quantized_class(type(module))  # type: ignore[assignment]
    module.weight = weight if isinstance(weight, torch.nn.Parameter) else _parameter(weight)
    module.weight.requires_grad_(False)
    if isinstance(module, _QuantizedInput):
        module.input_quantizer = input_quantizer
        hash(input_quantizer)  # computes its key, behind a lock that torch.compile cannot trace on Python 3.11
        module.register_buffer(_AMAX, None if input_amax is None else input_amax.to(torch.float32))


_BASES: dict[type[torch.nn.Module], type[_QuantizedModule]] = {
    torch.nn.Linear: QuantizedLinear,
    GroupedLinear: QuantizedGroupedLinear,
    torch.nn.Embedding: QuantizedEmbedding,
}
_classes = dict(_BASES)  # and those of subclasses, made on the fly


def quantized_class(plain: type[torch.nn.Module]) -> type[_QuantizedModule]:
    """Return the quantized class of nn.Linear, GroupedLinear, nn.Embedding, or a subclass of one.

    It keeps the other methods of a subclass.
    """
    if issubclass(plain, _QuantizedModule):
        return plain
    if plain not in _classes:
        base = next(made for kind, made in _BASES.items() if issubclass(plain, kind))
        body = {"plain_class": plain, "__module__": plain.__module__, "__doc__": base.__doc__}
        _classes[plain] = type(f"Quantized{plain.__name__}", (base, plain), body)
    return _classes[plain]


def _blank(plain: type[torch.nn.Module]) -> torch.nn.Module:
    """Return an instance without state; pickle fills it."""
    made = quantized_class(plain)
    return made.__new__(made)


def _state_of(weight: torch.Tensor) -> tuple[object, ...]:
    """What differs once a weight or a part of it was written to, or another put in its place.

    Tensors of inference mode have no version: what was made of them is never taken for current.
    """
    parts = (weight.qdata, weight.scale) if isinstance(weight, BlockScaledTensor) else (weight,)
    versions = (object() if p.is_inference() else p._version for p in (weight, *parts))
    # No references to the weight itself, which `swap_tensors` would refuse.
    return *versions, *(p.data_ptr() for p in parts), *(weakref.ref(p) for p in parts if isinstance(p, torch.Tensor))


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
