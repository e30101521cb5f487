"""Quantized weights, kept from one call to the next until the weight changes: once a step, however many micro-batches.

A weight has changed if its version counter, its memory or its dtype has, or if any torch optimizer made a step (some
write through `.data`, which no counter sees). What else changes a weight has to say so: code that writes through
`.data` outside of an optimizer calls `drop`, and a loop that replays a CUDA graph, which bumps no counter and calls no
hook, calls `Training.step` (or `set_progress`) after each replay, lest an eager evaluation reads old weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from microscale.spec.quantizer import QuantizerSpec

Specs = tuple[QuantizerSpec | None, QuantizerSpec | None]
Quantize = Callable[[torch.Tensor, QuantizerSpec | None, QuantizerSpec | None], tuple[torch.Tensor, torch.Tensor]]

_steps = 0  # that optimizers of this process made
_counting = False


class WeightCache:
    """The quantized forms of one weight: blocks along its rows and along its columns. Not copied, not pickled."""

    def __init__(self) -> None:
        """Begin empty."""
        self._key: tuple[Any, ...] | None = None
        self._made: dict[tuple[int, QuantizerSpec], torch.Tensor] = {}
        _count_steps()

    def get(self, weight: torch.Tensor, specs: Specs, quantize: Quantize) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `quantize(weight, *specs)`, of which only what is missing is computed; None gives the weight itself.

        Nothing is kept where the result is not this weight's bytes for longer than this call: while torch.compile
        traces, while a CUDA graph is captured (its replays must quantize again), and for inference tensors.
        """
        if not _can_keep(weight):
            return quantize(weight, *specs)
        key = (weight._version, weight.data_ptr(), weight.dtype, weight.shape, _steps)
        if key != self._key:
            self.drop()
            self._key = key
        wanted = [None if spec is None else (i, spec) for i, spec in enumerate(specs)]
        missing = [None if k is None or k in self._made else k[1] for k in wanted]
        if missing != [None, None]:
            for i, (spec, made) in enumerate(zip(missing, quantize(weight, *missing), strict=True)):
                if spec is not None:
                    self._made[i, spec] = made
        first, second = (weight if k is None else self._made[k] for k in wanted)
        return first, second

    def drop(self) -> None:
        """Forget what was quantized; a backward that still needs it holds it by itself."""
        self._key = None
        self._made.clear()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        """Copy and pickle as an empty cache."""
        return WeightCache, ()


def _can_keep(weight: torch.Tensor) -> bool:
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.is_inference():
        return False
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _count_steps() -> None:
    global _counting
    if not _counting:
        _counting = True
        register_optimizer_step_post_hook(_count)


def _count(*args: Any) -> None:
    global _steps
    _steps += 1
