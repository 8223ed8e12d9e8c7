"""Metrics by name: those that come with the package, and those that entry points add."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.evaluate.metrics.protocol import Scorer
from quantrecipe.schema.base import LABEL
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.registry import entry_points_by_name, load_named

GROUP: Final = "quantrecipe.metrics"
_HERE: Final = "quantrecipe.evaluate.metrics"

BUILT_IN: Final[Mapping[str, str]] = MappingProxyType(
    {
        "psnr": f"{_HERE}.images:Psnr",
        "ssim": f"{_HERE}.images:Ssim",
        "exact-match": f"{_HERE}.texts:ExactMatch",
        "normalized-edit-distance": f"{_HERE}.texts:NormalizedEditDistance",
        "sqnr": f"{_HERE}.tensors:Sqnr",
        "cosine": f"{_HERE}.tensors:Cosine",
        "clip-score": f"{_HERE}.learned:ClipScore",
        "pickscore": f"{_HERE}.learned:PickScore",
        "hpsv2": f"{_HERE}.learned:HpsV2",
        "lpips": f"{_HERE}.learned:Lpips",
        "ocr-edit-distance": f"{_HERE}.learned:OcrEditDistance",
    }
)


def scorer_names() -> list[str]:
    """Every metric that is installed.

    Raises:
        InvalidInput: an entry point takes the name of one that is built in.
    """
    added = entry_points_by_name(GROUP)
    for name in added.keys() & BUILT_IN.keys():
        raise InvalidInput(
            Problem(
                "duplicate-entry-point",
                f"{added[name].value} registers {name!r} in {GROUP}, which is built in",
                hint="Ask its author for another name.",
            )
        )
    return [*BUILT_IN, *added]


def find_scorer(name: str) -> Scorer:
    """A metric by name, made anew.

    Raises:
        InvalidInput: none is called that, or what is registered is no metric of that name.
    """
    if name not in (known := scorer_names()):
        message = f"no metric is called {name!r}"
        raise InvalidInput(Problem("unknown-metric", message, did_you_mean(name, known)))
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        made: Any = getattr(importlib.import_module(module), attribute)()
    else:
        made = load_named(GROUP, name, "metric")()
    if not isinstance(made, Scorer) or made.name != name or not re.fullmatch(LABEL, name):
        raise InvalidInput(
            Problem(
                "not-a-metric",
                f"what is registered as metric {name!r} lacks that name, or part of a metric",
                hint=f"{_HERE}.protocol.Scorer says what one needs.",
            )
        )
    return made
