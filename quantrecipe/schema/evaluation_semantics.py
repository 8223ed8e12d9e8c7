"""What is wrong with a declared or finished evaluation beyond its structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantrecipe.schema.evaluation import KNOWN_METRICS
from quantrecipe.schema.evaluation_claims import claim_problems
from quantrecipe.schema.parsed import child
from quantrecipe.schema.problems import Problem, did_you_mean


def metric_problems(evaluation: Mapping[str, Any], pointer: str) -> Iterator[Problem]:
    """Metrics that are declared the wrong way round, or with a margin that holds everything.

    Args:
        evaluation: what has ``metrics``, as a JSON value.
        pointer: where it stands.
    """
    metrics = evaluation.get("metrics")
    for name, metric in metrics.items() if isinstance(metrics, dict) else ():
        known = KNOWN_METRICS.get(name)
        if known is None or not isinstance(metric, dict):
            continue
        where = child(f"{pointer}/metrics", name)
        said, margin = metric.get("higher_is_better"), metric.get("margin")
        if isinstance(said, bool) and said != known.higher_is_better:
            better = "higher" if known.higher_is_better else "lower"
            yield Problem(
                "wrong-direction",
                f"of {name}, {better} is better",
                "Give a metric of your own another name.",
                pointer=f"{where}/higher_is_better",
            )
        if (
            isinstance(margin, int | float)
            and not isinstance(margin, bool)
            and known.width is not None
            and margin >= known.width
        ):
            yield Problem(
                "margin-too-wide",
                f"no two scores of {name} differ by more than {known.width:g}",
                "Declare the smallest difference that would matter.",
                pointer=f"{where}/margin",
            )


def evaluated_problems(evaluated: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with an evaluation file.

    Metrics, comparisons of none or of twice one, and verdicts that no test of the file bears out.
    """
    yield from metric_problems(evaluated, "")
    metrics = evaluated.get("metrics")
    known = list(metrics) if isinstance(metrics, dict) else []
    comparisons = evaluated.get("comparisons")
    seen: set[tuple[str, str]] = set()
    for index, entry in enumerate(comparisons if isinstance(comparisons, list) else []):
        metric = entry.get("metric") if isinstance(entry, dict) else None
        variant = entry.get("variant") if isinstance(entry, dict) else None
        if not isinstance(metric, str) or not isinstance(variant, str):
            continue
        where = f"/comparisons/{index}"
        if metric not in known:
            message = f"no metric of the evaluation is called {metric!r}"
            yield Problem(
                "unknown-metric", message, did_you_mean(metric, known), pointer=f"{where}/metric"
            )
        if variant == evaluated.get("reference"):
            message = "the reference is compared with itself"
            yield Problem("compared-with-itself", message, pointer=f"{where}/variant")
        if (metric, variant) in seen:
            message = f"{variant!r} is compared twice by {metric!r}"
            yield Problem("duplicate-name", message, pointer=where)
        seen.add((metric, variant))
        if metric in known:
            yield from claim_problems(entry, evaluated, where)
