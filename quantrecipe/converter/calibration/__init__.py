"""Calibration: what modules were handed while a model ran, and the files that say so."""

from quantrecipe.converter.calibration.files import (
    StatisticsFile,
    open_statistics,
    write_statistics,
)
from quantrecipe.converter.calibration.module import ModuleStatistics

__all__ = [
    "ModuleStatistics",
    "StatisticsFile",
    "open_statistics",
    "write_statistics",
]
