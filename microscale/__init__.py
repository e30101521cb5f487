"""microscale: one framework for every microscaling format (MXFP8, MXFP6, MXFP4, MXINT8, NVFP4, and the next one).

    import microscale as ms

    q = ms.quantize(w, "nvfp4")                       # a BlockScaledTensor
    y = torch.nn.functional.linear(x, q)              # weight-only; the dispatcher chooses the kernel
    print(ms.explain("matmul", x, q))                 # what runs, and why not the others
    print(ms.plan(model, "nvfp4_dynamic"))            # per layer: rule, format, bytes before and after
    ms.quantize_(model, "nvfp4_dynamic")
    ms.prepare_training_(model, "nvfp4_train", seed=0)

Every public name is listed here and loaded on first use, so `import microscale` costs nothing and the command line can
list formats without importing torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    # spec: no torch
    "ElementSpec": "microscale.spec.element",
    "FormatSpec": "microscale.spec.format",
    "QuantizerSpec": "microscale.spec.quantizer",
    "RecipeSpec": "microscale.spec.recipe",
    "find_element": "microscale.spec.registry",
    "find_format": "microscale.spec.registry",
    "find_quantizer": "microscale.spec.registry",
    "find_recipe": "microscale.spec.registry",
    "list_elements": "microscale.spec.registry",
    "list_formats": "microscale.spec.registry",
    "list_recipes": "microscale.spec.registry",
    "register_format": "microscale.spec.registry",
    "register_recipe": "microscale.spec.registry",
    "schema": "microscale.spec.schema",
    "MicroscaleError": "microscale.errors",
    # tensors and operations
    "BlockScaledTensor": "microscale.tensor",
    "quantize": "microscale.ops.api",
    "dequantize": "microscale.ops.api",
    "encode": "microscale.ops.api",
    "decode_table": "microscale.ops.api",
    "explain": "microscale.ops.api",
    "matmul": "microscale.ops.compute",
    "grouped_matmul": "microscale.ops.compute",
    "grouped_wgrad": "microscale.ops.grouped",
    "linear": "microscale.ops.compute",
    "prepare": "microscale.ops.prepare",
    "prepare_": "microscale.ops.prepare",
    "align_rows": "microscale.ops.rows",
    "quantize_both": "microscale.ops.both",
    "group_amax": "microscale.ops.groups",
    "silu_mul_quantize": "microscale.ops.producers",
    "rms_norm_quantize": "microscale.ops.producers",
    "hadamard": "microscale.numerics.hadamard",
    "exact_products": "microscale.dispatch",
    "strict": "microscale.dispatch",
    "use_backend": "microscale.dispatch",
    # models and checkpoints
    "plan": "microscale.nn.plan",
    "quantize_": "microscale.nn.convert",
    "prepare_training_": "microscale.nn.training",
    "finish_training_": "microscale.nn.training",
    "save": "microscale.interop",
    "load": "microscale.interop",
    "inspect": "microscale.interop",
    "quantize_checkpoint": "microscale.interop",
    "compare": "microscale.report",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'microscale' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "torch" in sys.modules:
    # So that torch.load(weights_only=True) knows saved BlockScaledTensors before anything here has been used.
    importlib.import_module("microscale.tensor")

if TYPE_CHECKING:
    from microscale.dispatch import exact_products as exact_products
    from microscale.dispatch import strict as strict
    from microscale.dispatch import use_backend as use_backend
    from microscale.errors import MicroscaleError as MicroscaleError
    from microscale.interop import inspect as inspect
    from microscale.interop import load as load
    from microscale.interop import quantize_checkpoint as quantize_checkpoint
    from microscale.interop import save as save
    from microscale.nn.convert import quantize_ as quantize_
    from microscale.nn.plan import plan as plan
    from microscale.nn.training import finish_training_ as finish_training_
    from microscale.nn.training import prepare_training_ as prepare_training_
    from microscale.numerics.hadamard import hadamard as hadamard
    from microscale.ops.api import decode_table as decode_table
    from microscale.ops.api import dequantize as dequantize
    from microscale.ops.api import encode as encode
    from microscale.ops.api import explain as explain
    from microscale.ops.api import quantize as quantize
    from microscale.ops.both import quantize_both as quantize_both
    from microscale.ops.compute import grouped_matmul as grouped_matmul
    from microscale.ops.compute import linear as linear
    from microscale.ops.compute import matmul as matmul
    from microscale.ops.grouped import grouped_wgrad as grouped_wgrad
    from microscale.ops.groups import group_amax as group_amax
    from microscale.ops.prepare import prepare as prepare
    from microscale.ops.prepare import prepare_ as prepare_
    from microscale.ops.producers import rms_norm_quantize as rms_norm_quantize
    from microscale.ops.producers import silu_mul_quantize as silu_mul_quantize
    from microscale.ops.rows import align_rows as align_rows
    from microscale.report.compare import compare as compare
    from microscale.spec.element import ElementSpec as ElementSpec
    from microscale.spec.format import FormatSpec as FormatSpec
    from microscale.spec.quantizer import QuantizerSpec as QuantizerSpec
    from microscale.spec.recipe import RecipeSpec as RecipeSpec
    from microscale.spec.registry import find_element as find_element
    from microscale.spec.registry import find_format as find_format
    from microscale.spec.registry import find_quantizer as find_quantizer
    from microscale.spec.registry import find_recipe as find_recipe
    from microscale.spec.registry import list_elements as list_elements
    from microscale.spec.registry import list_formats as list_formats
    from microscale.spec.registry import list_recipes as list_recipes
    from microscale.spec.registry import register_format as register_format
    from microscale.spec.registry import register_recipe as register_recipe
    from microscale.spec.schema import schema as schema
    from microscale.tensor import BlockScaledTensor as BlockScaledTensor
