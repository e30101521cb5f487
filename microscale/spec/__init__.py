"""The declarative half of microscale: pydantic records and the YAML registry. Nothing here imports torch."""

from microscale.spec.element import ElementSpec
from microscale.spec.format import FormatSpec, OuterScaleSpec, ScaleRuleSpec
from microscale.spec.quantizer import QuantizerSpec
from microscale.spec.recipe import GemmSpec, RecipeSpec, Rule
from microscale.spec.registry import (
    find_element,
    find_format,
    find_quantizer,
    find_recipe,
    list_elements,
    list_formats,
    list_recipes,
    register_format,
    register_recipe,
)

__all__ = [
    "ElementSpec",
    "FormatSpec",
    "GemmSpec",
    "OuterScaleSpec",
    "QuantizerSpec",
    "RecipeSpec",
    "Rule",
    "ScaleRuleSpec",
    "find_element",
    "find_format",
    "find_quantizer",
    "find_recipe",
    "list_elements",
    "list_formats",
    "list_recipes",
    "register_format",
    "register_recipe",
]
