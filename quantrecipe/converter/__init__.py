"""Carrying plans out: the main job, and the protocol for other people's converters."""

from quantrecipe.converter.devices import check_devices
from quantrecipe.converter.engine import Means
from quantrecipe.converter.planning import OpenRecipe, open_recipe, plan, statistics_files
from quantrecipe.converter.protocol import (
    DEFAULT_BLOCK_BYTES,
    Converter,
    ErrorSums,
    Job,
    Progress,
)
from quantrecipe.converter.run import Conversion, carry_out, convert
from quantrecipe.converter.selection import converter_names, find_converter
from quantrecipe.converter.units import Range, Unit
from quantrecipe.schema.capabilities import Capabilities, Need

__all__ = [
    "DEFAULT_BLOCK_BYTES",
    "Capabilities",
    "Conversion",
    "Converter",
    "ErrorSums",
    "Job",
    "Means",
    "Need",
    "OpenRecipe",
    "Progress",
    "Range",
    "Unit",
    "carry_out",
    "check_devices",
    "convert",
    "converter_names",
    "find_converter",
    "open_recipe",
    "plan",
    "statistics_files",
]
