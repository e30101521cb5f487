"""`TrainingLinear`: an nn.Linear that trains with quantized GEMMs. Its weight stays a high-precision parameter.

`TrainingLayer` is what it shares with the form of `GroupedLinear` that trains.

A module becomes one in place: its class changes, so names, hooks, references and tied weights stay. Its state dict has
weight and bias as before and, where its recipe needs them, two small buffers: `rounding_state` (int64 [2]: seed and
offset of stochastic rounding) and `hadamard_sign` (int8 [128], one vector for the whole model). So a checkpoint of a
training model resumes bit for bit; a checkpoint of the plain model loads into it with strict=True (the buffers keep
what the seed gave); the way back is `finish_training_`, whose state dict is the plain model's.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from microscale.errors import InputError
from microscale.nn.three_gemm import GemmState, three_gemm
from microscale.nn.weight_cache import WeightCache
from microscale.spec.quantizer import HADAMARD_SIZES
from microscale.spec.recipe import RecipeSpec, Rule
from microscale.spec.training import LayerGemms

_BUFFERS = ("rounding_state", "hadamard_sign")
_PLAIN = LayerGemms()  # every operand in high precision


class TrainingLayer(torch.nn.Module):
    """What layers that train by a recipe share: its rule, their random numbers, main gradients, and state."""

    weight: torch.Tensor
    recipe: RecipeSpec
    rule: Rule
    gemms: LayerGemms
    layer_name: str
    high_precision: bool
    cache: WeightCache
    rounding_state: torch.Tensor | None
    hadamard_sign: torch.Tensor | None
    plain_class: type[torch.nn.Module]
    """The class that this one is the training form of."""

    def kept_weights(self) -> WeightCache | None:
        """Return the cache; none under FSDP, which gathers new weights to the same memory, the version kept."""
        return None if getattr(self, "_is_fsdp_managed_module", False) else self.cache

    def main_grad(self) -> torch.Tensor | None:
        """Return the FP32 tensor that weight gradients are added to, None if the recipe has none or the weight rests.

        It is `weight.main_grad`; where that is missing or on another device than the weight (after a copy or a move of
        the model), it is made or moved. Compiled code cannot do so: call `main_grad()` once before.
        """
        if self.recipe.main_grad is None or not self.weight.requires_grad:
            return None
        if not torch.compiler.is_dynamo_compiling():
            self._check_that_main_grad_is_reduced()
        found: torch.Tensor | None = getattr(self.weight, "main_grad", None)
        if found is None or found.device != self.weight.device:
            if torch.compiler.is_dynamo_compiling():
                hint = "call the layer's main_grad() once before"
                raise InputError(f"{self.layer_name}: weight.main_grad is not there", hint)
            if found is None:
                found = torch.zeros_like(self.weight, dtype=torch.float32, requires_grad=False)
            found = found.to(self.weight.device)
            self.weight.main_grad = found  # type: ignore[attr-defined]
        return found

    def _check_that_main_grad_is_reduced(self) -> None:
        if getattr(self, "_is_fsdp_managed_module", False):
            raise InputError(
                f"{self.layer_name}: fully_shard cannot reduce weight.main_grad",
                "take a recipe without main_grad; MixedPrecisionPolicy(reduce_dtype=torch.float32) sums in FP32",
            )
        ignored = getattr(self.weight, "_ddp_ignored", False)
        if torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None and not ignored:
            raise InputError(
                f"{self.layer_name}: DistributedDataParallel does not reduce weight.main_grad",
                "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [names of such weights]), "
                "and average their main_grad over processes before the optimizer's step",
            )

    def extra_repr(self) -> str:
        """Show shapes and the recipe."""
        phase = ", high precision" if self.high_precision else ""
        return f"{super().extra_repr()}, recipe={self.recipe.name}{phase}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load; a checkpoint without the buffers, that of a plain model, leaves them as they are."""
        own: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, own, unexpected_keys, error_msgs
        )  # fmt: skip
        missing_keys += [key for key in own if key.removeprefix(prefix) not in _BUFFERS]
        if self.hadamard_sign is not None and f"{prefix}hadamard_sign" in state_dict:
            self.gemms = self.recipe.gemms_of(self.rule, _signs_of(self.hadamard_sign))
        self.cache.drop()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy; a class made on the fly is made again on the other side."""
        if self.plain_class in _bases:
            return super().__reduce_ex__(protocol)
        return _blank, (self.plain_class,), self.__getstate__()  # type: ignore[no-untyped-call]


class TrainingLinear(TrainingLayer, torch.nn.Linear):
    """`nn.Linear` whose three GEMMs are quantized by a recipe's rule. Made by `prepare_training_`."""

    plain_class: type[torch.nn.Module] = torch.nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input [..., K] @ weight.T + bias: [..., N] of the input's dtype; see `three_gemm`."""
        main_grad = self.main_grad()
        if self.high_precision and main_grad is None:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        gemms = _PLAIN if self.high_precision else self.gemms
        if torch.compiler.is_dynamo_compiling():  # without what differs from layer to layer: alike ones share a graph
            return three_gemm(input, self.weight, self.bias, gemms, GemmState(self.rounding_state, main_grad))
        state = GemmState(self.rounding_state, main_grad, self.kept_weights(), self.layer_name)
        return three_gemm(input, self.weight, self.bias, gemms, state)


def to_training_(module: torch.nn.Module, recipe: RecipeSpec, rule: Rule, *, name: str = "", seed: int = 0) -> None:
    """Turn one nn.Linear or GroupedLinear into its training class, in place.

    `name` and `seed` decide its random numbers.
    """
    sign = random_sign(seed)
    module.__class__ = training_class(type(module))
    assert isinstance(module, TrainingLayer)
    module.recipe, module.rule, module.layer_name = recipe, rule, name
    module.gemms, module.high_precision = recipe.gemms_of(rule, _signs_of(sign)), False
    module.cache = WeightCache()
    device = module.weight.device
    counter = torch.tensor([_number(f"{seed} {name}"), 0], dtype=torch.int64, device=device)
    module.register_buffer("rounding_state", counter if module.gemms.is_stochastic else None)
    is_signed = module.gemms != recipe.gemms_of(rule)
    module.register_buffer("hadamard_sign", sign.to(device) if is_signed else None)
    module.main_grad()


def to_plain_(module: TrainingLayer) -> None:
    """Turn a training layer into the class it was, in place; `weight.main_grad` goes too."""
    for name in _BUFFERS:
        delattr(module, name)
    for name in ("recipe", "rule", "gemms", "layer_name", "high_precision", "cache"):
        del module.__dict__[name]
    if hasattr(module.weight, "main_grad"):
        del module.weight.main_grad
    module.__class__ = module.plain_class  # type: ignore[assignment]


def random_sign(seed: int) -> torch.Tensor:
    """Return the +-1 vector of a seed, int8 [128]; a Hadamard of size n uses its first n entries.

    One vector serves the whole model: a vector for each layer would compile each layer's kernels anew.
    """
    bits = hashlib.sha256(f"hadamard sign {seed}".encode()).digest()
    count = max(HADAMARD_SIZES)
    return torch.tensor([1 - 2 * (bits[i // 8] >> i % 8 & 1) for i in range(count)], dtype=torch.int8)


def _signs_of(vector: torch.Tensor) -> Any:
    values = tuple(vector.tolist())
    return lambda size: values[:size]


def _number(text: str) -> int:
    """63 bits that depend on a text alone: not on Python's hash seed, the device, or the order of layers."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


_bases: dict[type[torch.nn.Module], type[TrainingLayer]] = {torch.nn.Linear: TrainingLinear}
_classes: dict[type[torch.nn.Module], type[TrainingLayer]] = {}  # of subclasses of those, made on the fly


def add_training_class(plain: type[torch.nn.Module], training: type[TrainingLayer]) -> None:
    """Have `training_class` know another class of layers; `training` extends TrainingLayer and `plain`."""
    _bases[plain] = training


def training_class(plain: type[torch.nn.Module]) -> type[TrainingLayer]:
    """Return the training class of nn.Linear, GroupedLinear, or a subclass of one, whose other methods it keeps."""
    if issubclass(plain, TrainingLayer):
        return plain
    if plain in _bases:
        return _bases[plain]
    if plain not in _classes:
        base = next(training for kind, training in _bases.items() if issubclass(plain, kind))
        body = {"plain_class": plain, "__module__": plain.__module__, "__doc__": base.__doc__}
        _classes[plain] = type(f"Training{plain.__name__}", (base, plain), body)
    return _classes[plain]


def _blank(plain: type[torch.nn.Module]) -> torch.nn.Module:
    """Return an instance without state; pickle fills it."""
    made = training_class(plain)
    return made.__new__(made)
