"""Calibration: what modules are handed while a model runs, and the files that say so."""

from quantrecipe.converter.calibration.files import (
    StatisticsFile,
    open_statistics,
    write_statistics,
)
from quantrecipe.converter.calibration.folding import check_folds
from quantrecipe.converter.calibration.measurements import (
    Measurements,
    load_measurements,
    merge_statistics,
)
from quantrecipe.converter.calibration.module import ModuleStatistics
from quantrecipe.converter.calibration.observing import observe
from quantrecipe.converter.calibration.running import Calibration

__all__ = [
    "Calibration",
    "Measurements",
    "ModuleStatistics",
    "StatisticsFile",
    "check_folds",
    "load_measurements",
    "merge_statistics",
    "observe",
    "open_statistics",
    "write_statistics",
]
