"""Carrying plans out: the main job, and the protocol for other people's converters."""

from quantrecipe.converter.planning import OpenRecipe, open_recipe, plan
from quantrecipe.converter.protocol import (
    DEFAULT_BLOCK_BYTES,
    Converter,
    Job,
    ModuleResult,
    Progress,
)
from quantrecipe.converter.run import Conversion, carry_out, convert
from quantrecipe.converter.selection import converter_names, find_converter
from quantrecipe.schema.capabilities import Capabilities, Need

__all__ = [
    "DEFAULT_BLOCK_BYTES",
    "Capabilities",
    "Conversion",
    "Converter",
    "Job",
    "ModuleResult",
    "Need",
    "OpenRecipe",
    "Progress",
    "carry_out",
    "convert",
    "converter_names",
    "find_converter",
    "open_recipe",
    "plan",
]
