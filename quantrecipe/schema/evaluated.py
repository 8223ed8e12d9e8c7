"""The evaluation file, version 1: variants compared with a reference, prompt by prompt.

Beside the weights it is called ``evaluation.json``. It has no date and no path in it: the same
scores, plan and seed make the same file. Numbers have 12 significant digits, so that two machines
whose last bits differ write the same. A *difference* is the variant less the reference, averaged
over the seeds of a prompt first and over prompts then.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field

from quantrecipe.schema.base import Model, Name, NonEmpty, Sha256, VersionOne
from quantrecipe.schema.evaluation import Confidence, Label, Metric

EVALUATION_VERSION: Final = 1
EVALUATION_NAME: Final = "evaluation.json"
POWER: Final = 0.8
"""The power that a detectable difference is stated for."""

FEW: Final = 20
"""With fewer prompts that differ, no equivalence is tested; with fewer prompts, a warning is given.
Of a few, a t interval holds the truth less often than it says if what differs is skewed."""

Verdict = Literal["better", "worse", "equivalent within margin", "not shown"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Interval = tuple[float, float]


class JudgedRecipe(Model):
    """The recipe that declared the evaluation."""

    name: Name
    """What it is called."""

    sha256: Sha256
    """Digest of its canonical form (RFC 8785)."""


class ScoreFile(Model):
    """A file that scores were read from."""

    name: Annotated[str, NonEmpty]
    """Its name, without its folder."""

    sha256: Sha256
    """Digest of its bytes."""

    scores: Annotated[int, Field(ge=0)]
    """How many scores it holds."""


class Software(Model):
    """What computed the numbers."""

    quantrecipe: str
    """Version of this package."""

    numpy: str
    """Version of NumPy, which draws the resamples."""

    scipy: str
    """Version of SciPy, which has the t distributions."""


class Intervals(Model):
    """Intervals of the mean difference, each at the confidence of the evaluation."""

    t: Interval
    """Student's, of the paired differences: the one that the verdict goes by."""

    bca: Interval | None
    """Bootstrap, bias-corrected and accelerated; null where no two differences differ."""

    percentile: Interval
    """Percentile bootstrap."""


class DifferenceTest(Model):
    """Paired t test of no difference, two-sided."""

    p: Probability
    """Its p value."""

    p_holm: Probability
    """The same, adjusted by Holm for every comparison of the file."""


class EquivalenceTest(Model):
    """Two one-sided t tests (TOST) of a difference at least as large as the margin."""

    margin: Annotated[float, Field(gt=0.0)]
    """The margin that was declared."""

    p_below: Probability
    """Of a difference at or below minus the margin."""

    p_above: Probability
    """Of a difference at or above the margin."""

    p: Probability
    """The larger of the two."""

    p_holm: Probability
    """The same, adjusted by Holm for every equivalence test of the file."""

    power: Probability
    """How likely so many prompts with this spread show equivalence if there is no difference, at
    the level that Holm holds the smallest p value to."""


class Sensitivity(Model):
    """What so many prompts with this spread can show.

    At the level that Holm holds the smallest p value to: the risk over the number of comparisons.
    """

    detectable: Annotated[float, Field(ge=0.0)]
    """The true difference that is shown with a probability of 0.8."""

    power_at_margin: Probability | None = None
    """How likely a true difference as large as the margin is shown; absent: no margin."""


class Compared(Model):
    """A variant and the reference, by one metric."""

    metric: Label
    """The metric."""

    variant: Label
    """The variant."""

    prompts: Annotated[int, Field(ge=2)]
    """The number of prompts, which are the independent units."""

    differing: Annotated[int, Field(ge=0)]
    """Prompts in which the two have not the same score."""

    seeds: Annotated[int, Field(ge=1)]
    """The seeds of each prompt, averaged before anything else."""

    mean: float
    """Of the variant, over prompts."""

    reference_mean: float
    """Of the reference, over prompts."""

    difference: float
    """The first less the second."""

    standard_deviation: Annotated[float, Field(ge=0.0)]
    """Of the differences over prompts, with ``prompts - 1`` below."""

    intervals: Intervals
    """Of the mean difference."""

    difference_test: DifferenceTest | None
    """Whether there is a difference; null where no two differences differ."""

    equivalence_test: EquivalenceTest | None
    """Whether it is smaller than the margin; null without a margin, and where fewer than 20 prompts
    differ: a t test says too much of the rest then."""

    sensitivity: Sensitivity | None
    """What could have been shown; null where no two differences differ."""

    verdict: Verdict
    """What is shown."""

    explanation: str
    """Why, in one line."""


class Evaluated(Model):
    """Everything that was compared, with what and how."""

    kind: Literal["evaluation"]
    version: VersionOne
    recipe: JudgedRecipe | None = None
    """What declared metrics and margins; absent: nothing did."""

    reference: Label
    """The variant that all others are compared with."""

    metrics: Annotated[dict[Label, Metric], NonEmpty]
    """What was looked at."""

    confidence: Confidence
    """Of the intervals; 1 less this is the risk of a false finding, for differences over all
    comparisons together, and for equivalences likewise."""

    resamples: Annotated[int, Field(ge=1)]
    """Of the bootstraps."""

    seed: Annotated[int, Field(ge=0)]
    """Of the bootstraps: PCG64 of NumPy."""

    software: Software
    """What computed this."""

    inputs: Annotated[tuple[ScoreFile, ...], NonEmpty]
    """The files of scores, in the order of their names."""

    comparisons: Annotated[tuple[Compared, ...], NonEmpty]
    """By metric, then by variant."""

    warnings: tuple[str, ...] = ()
    """What to know before believing it."""
