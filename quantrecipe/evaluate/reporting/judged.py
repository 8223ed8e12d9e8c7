"""What ``quantrecipe evaluate`` found, read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from quantrecipe.evaluate.reporting.fields import Fields, Source, read_fields

Verdict = Literal["better", "worse", "equivalent within margin", "not shown"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)

_WHAT: Final = "an evaluation"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant and the reference by one metric.

    Attributes:
        metric: its name.
        higher_is_better: of the metric.
        margin: the smallest difference that was declared to matter.
        variant: its name.
        prompts: how many there were.
        mean, reference_mean: of both.
        difference: the first less the second.
        interval: of the difference.
        verdict: what was shown.
        explanation: why.
    """

    metric: str
    higher_is_better: bool
    margin: float | None
    variant: str
    prompts: int
    mean: float
    reference_mean: float
    difference: float
    interval: tuple[float, float]
    verdict: Verdict
    explanation: str


@dataclass(frozen=True, slots=True)
class Judged:
    """An evaluation.

    Attributes:
        source: the file.
        recipe: name and digest of what declared it, if anything did.
        reference: what all variants are compared with.
        confidence: of the intervals.
        comparisons: in the order of the file.
        inputs: name and digest of every file of scores.
        software: name and version of what computed it.
        warnings: what to know before believing it.
    """

    source: Source
    recipe: tuple[str, str] | None
    reference: str
    confidence: float
    comparisons: tuple[Comparison, ...]
    inputs: tuple[tuple[str, str], ...]
    software: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def read_judged(path: Path) -> Judged:
    """Read an evaluation.

    Raises:
        InvalidInput: it is none, or claims what it has not tested.
        SourceError: the system could not read it.
    """
    found, source = read_fields(path, _WHAT)
    if found["kind"].text() != "evaluation":
        raise found["kind"].refused(f"its kind is {found['kind'].text()!r}")
    if found["version"].whole() != 1:
        raise found["version"].refused("its version is not 1")
    metrics = found["metrics"]
    recipe = found.get("recipe")
    software, warnings = found["software"], found.get("warnings")
    return Judged(
        source=source,
        recipe=None if recipe is None else (recipe["name"].text(), recipe["sha256"].text()),
        reference=found["reference"].text(),
        confidence=found["confidence"].number(),
        comparisons=tuple(_comparison(each, metrics) for each in found["comparisons"].items()),
        inputs=tuple(
            (each["name"].text(), each["sha256"].text()) for each in found["inputs"].items()
        ),
        software=tuple((name, software[name].text()) for name in software.object()),
        warnings=() if warnings is None else tuple(each.text() for each in warnings.items()),
    )


def _comparison(found: Fields, metrics: Fields) -> Comparison:
    name = found["metric"].text()
    metric = metrics[name]
    declared = metric.get("margin")
    margin = None if declared is None else declared.number()
    verdict = _verdict(found["verdict"])
    tested = margin is not None and found.get("equivalence_test") is not None
    if verdict == "equivalent within margin" and not tested:
        # Nothing but a test against a declared margin shows that; no interval does.
        raise found["verdict"].refused("equivalence is claimed, and no margin was tested")
    difference, higher = found["difference"], metric["higher_is_better"]
    good = difference.number() > 0 if higher.truth() else difference.number() < 0
    if verdict in ("better", "worse") and good != (verdict == "better"):
        raise found["verdict"].refused("the difference is the other way round")
    interval = found["intervals"]["t"]
    ends = interval.numbers()
    if len(ends) != 2 or not ends[0] <= ends[1]:
        raise interval.refused("these are not the two ends of an interval")
    return Comparison(
        metric=name,
        higher_is_better=higher.truth(),
        margin=margin,
        variant=found["variant"].text(),
        prompts=found["prompts"].whole(),
        mean=found["mean"].number(),
        reference_mean=found["reference_mean"].number(),
        difference=difference.number(),
        interval=(ends[0], ends[1]),
        verdict=verdict,
        explanation=found["explanation"].text(),
    )


def _verdict(found: Fields) -> Verdict:
    said = found.text()
    for verdict in VERDICTS:
        if said == verdict:
            return verdict
    raise found.refused(f"{said!r} is none of {', '.join(map(repr, VERDICTS))}")
