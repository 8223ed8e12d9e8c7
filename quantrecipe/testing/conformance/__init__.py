"""The conformance suite: any converter, loader or model loader over the same cases.

Each case is data (``quantrecipe/testing/cases/``): a recipe, a tiny source, the tensors that must
be written, the numbers that must be loaded, and what modules must compute. The expected numbers
come from exact arithmetic, not from this package's converters.
"""

from quantrecipe.testing.conformance.cases import Case, CaseTensor, Load, Output, cases
from quantrecipe.testing.conformance.comparing import Deviation
from quantrecipe.testing.conformance.modules import LoadModel
from quantrecipe.testing.conformance.report import Report, Result
from quantrecipe.testing.conformance.running import pytest_cases, run

__all__ = [
    "Case",
    "CaseTensor",
    "Deviation",
    "Load",
    "LoadModel",
    "Output",
    "Report",
    "Result",
    "cases",
    "pytest_cases",
    "run",
]
