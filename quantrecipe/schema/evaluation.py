"""What a recipe says of how its result is judged: before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from quantrecipe.schema.base import LABEL, Model, NonEmpty

DEFAULT_CONFIDENCE: Final = 0.95

Label = Annotated[str, StringConstraints(pattern=LABEL, max_length=128)]
"""What a metric or a variant is called."""

Confidence = Annotated[float, Field(gt=0.5, lt=1.0)]


class Metric(Model):
    """One metric, and which difference of it matters."""

    higher_is_better: bool
    """Whether more of it is better."""

    margin: Annotated[float, Field(gt=0.0)] | None = None
    """The smallest difference that would matter, in the metric's own unit. A variant is equivalent
    to the reference where the difference is shown to lie between the margin below 0 and the margin
    above. Absent: equivalence is not tested."""


class Evaluation(Model):
    """How variants are compared with the reference, declared before they are."""

    reference: Label
    """The variant that all others are compared with."""

    metrics: Annotated[dict[Label, Metric], NonEmpty]
    """Every metric that is looked at; all of them share the risk of a false finding."""

    confidence: Confidence = DEFAULT_CONFIDENCE
    """Of the intervals; 1 less this is the risk of a false finding over all metrics and
    variants."""


@dataclass(frozen=True, slots=True)
class KnownMetric:
    """What is known of a metric by its name.

    Attributes:
        higher_is_better: whether more of it is better.
        width: the largest difference that two scores can have; ``None``: no limit.
    """

    higher_is_better: bool
    width: float | None = None


KNOWN_METRICS: Final[Mapping[str, KnownMetric]] = MappingProxyType(
    {
        "psnr": KnownMetric(True),
        "ssim": KnownMetric(True, 2.0),
        "exact-match": KnownMetric(True, 1.0),
        "normalized-edit-distance": KnownMetric(False, 1.0),
        "sqnr": KnownMetric(True),
        "cosine": KnownMetric(True, 2.0),
        "clip-score": KnownMetric(True, 100.0),
        "pickscore": KnownMetric(True),
        "hpsv2": KnownMetric(True),
        "lpips": KnownMetric(False),
        "ocr-edit-distance": KnownMetric(False, 1.0),
    }
)
"""The metrics that come with the package."""
