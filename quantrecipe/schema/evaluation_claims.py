"""Whether what an evaluation file claims of a comparison is what its own numbers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from quantrecipe.schema.problems import Problem

_AGAIN: Final = "Compare again; a verdict is computed, not written."


def claim_problems(
    comparison: Mapping[str, Any], evaluated: Mapping[str, Any], pointer: str
) -> Iterator[Problem]:
    """Verdicts without a test, against it, or against the sign; ends of an interval swapped.

    Args:
        comparison: as a JSON value; its metric is one of the evaluation's.
        evaluated: the evaluation, as a JSON value.
        pointer: where the comparison stands.
    """
    metric = _object(evaluated["metrics"][comparison["metric"]])
    confidence = _number(evaluated.get("confidence"))
    risk = None if confidence is None else 1 - confidence
    yield from _interval_problems(comparison, pointer)
    yield from _equivalence_problems(comparison, metric, risk, pointer)
    yield from _difference_problems(comparison, metric, risk, pointer)


def _interval_problems(comparison: Mapping[str, Any], pointer: str) -> Iterator[Problem]:
    for name, ends in _object(comparison.get("intervals")).items():
        if not isinstance(ends, list) or len(ends) != 2:
            continue
        low, high = map(_number, ends)
        if low is not None and high is not None and low > high:
            message = "these are not the two ends of an interval: the first is above the second"
            yield Problem("bad-interval", message, pointer=f"{pointer}/intervals/{name}")


def _equivalence_problems(
    comparison: Mapping[str, Any], metric: Mapping[str, Any], risk: float | None, pointer: str
) -> Iterator[Problem]:
    test, margin = _object(comparison.get("equivalence_test")), _number(metric.get("margin"))
    if comparison.get("verdict") == "equivalent within margin":
        # Nothing but a test against a declared margin shows that; no interval does.
        message = "equivalence is claimed, and "
        if margin is None or not test:
            message += "no margin was tested"
            yield Problem("untested-verdict", message, _AGAIN, pointer=f"{pointer}/verdict")
        elif not _shows(test, risk):
            message += "its test does not show it"
            yield Problem("untested-verdict", message, _AGAIN, pointer=f"{pointer}/verdict")
    tested = _number(test.get("margin"))
    if tested is not None and tested != margin:
        declared = "none was declared" if margin is None else f"{margin:g} was declared"
        message = f"a margin of {tested:g} was tested, and {declared}"
        yield Problem("other-margin", message, _AGAIN, pointer=f"{pointer}/equivalence_test/margin")


def _difference_problems(
    comparison: Mapping[str, Any], metric: Mapping[str, Any], risk: float | None, pointer: str
) -> Iterator[Problem]:
    verdict = comparison.get("verdict")
    if verdict not in ("better", "worse"):
        return
    difference, higher = _number(comparison.get("difference")), metric.get("higher_is_better")
    if not _shows(_object(comparison.get("difference_test")), risk):
        message = f"{verdict!r} is claimed, and no test shows a difference"
        yield Problem("untested-verdict", message, _AGAIN, pointer=f"{pointer}/verdict")
    elif difference is not None and isinstance(higher, bool):
        good = difference > 0 if higher else difference < 0
        if good != (verdict == "better"):
            message = f"{verdict!r} is claimed, and the difference is the other way round"
            yield Problem("contrary-verdict", message, _AGAIN, pointer=f"{pointer}/verdict")


def _shows(test: Mapping[str, Any], risk: float | None) -> bool:
    """Whether a test shows what it is of; one that is not there shows nothing."""
    p = _number(test.get("p_holm"))
    return bool(test) and (p is None or risk is None or p < risk)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
