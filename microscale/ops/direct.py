"""Whether an op may go without torch's dispatcher.

It costs some 10 us on its way through that and back into Python. What is on that way may need to see it (modes,
functorch, a tracer, a profiler) or to prepare its tensors (subclasses, lazy negation and zeros); where nothing of this
is there, the kernel is called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


def _observers() -> tuple[Callable[[], object], ...]:
    """Functions with a true result while something on the way is active; all true if this torch keeps one elsewhere."""
    c = torch._C
    try:
        early = functools.partial(c._dispatch_tls_is_dispatch_key_included, c.DispatchKey.PreDispatch)
        return (
            c._len_torch_dispatch_stack, early, c._len_torch_function_stack, c._functorch.maybe_current_level,
            c._get_tracing_state, c._autograd._profiler_enabled,
        )  # fmt: skip
    except AttributeError:
        return (lambda: True,) * 6


_modes, _early_modes, _function_modes, _functorch_level, _tracer, _profiler = _observers()

# What autograd's other direction and autocast do to a layer, any of it; true too where this torch keeps them elsewhere.
_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_followed() -> bool:
    """Return True while a layer's forward gradient is asked for, or its operands' dtype is autocast's to say."""
    return _autocast() or getattr(forward_ad, "_current_level", 0) >= 0


def is_direct(*tensors: torch.Tensor | None) -> bool:
    """Return True if an op on these tensors need not pass through torch's dispatcher."""
    if _modes() or _early_modes() or _function_modes() or _functorch_level() or _tracer() or _profiler():
        return False
    for t in tensors:  # noqa: SIM110  (all() takes twice the time)
        if t is not None and (type(t) not in PLAIN or t.is_neg() or t._is_zerotensor()):
            return False
    return True
