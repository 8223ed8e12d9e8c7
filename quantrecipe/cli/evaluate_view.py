"""What an evaluation found, for people."""

from __future__ import annotations

from quantrecipe.cli.tables import table
from quantrecipe.schema.evaluated import Compared, Evaluated, Interval


def evaluation_text(found: Evaluated) -> str:
    """A table of all comparisons, and a line for each that says why."""
    level = f"{found.confidence * 100:.4g} %"
    headers = ("metric", "variant", "prompts", "mean", found.reference, "difference", level)
    rows = [_row(each, found) for each in found.comparisons]
    width = max(len(f"{each.metric}, {each.variant}") for each in found.comparisons)
    why = [
        f"{f'{each.metric}, {each.variant}':{width}}  {each.verdict}: {each.explanation}"
        for each in found.comparisons
    ]
    return "\n".join(
        [
            _head(found),
            "",
            table(rows, (*headers, "p", "verdict"), "llrrrrrrl"),
            "",
            *why,
        ]
    )


def _head(found: Evaluated) -> str:
    many = len(found.comparisons)
    seeds = sorted({each.seeds for each in found.comparisons})
    averaged = "" if seeds == [1] else f", {' or '.join(map(str, seeds))} seeds a prompt averaged"
    adjusted = "" if many == 1 else f"; p values adjusted for {many} comparisons (Holm)"
    return f"paired with {found.reference}, prompt by prompt{averaged}{adjusted}"


def _row(each: Compared, found: Evaluated) -> tuple[object, ...]:
    arrow = "^" if found.metrics[each.metric].higher_is_better else "v"
    test = each.difference_test
    return (
        f"{each.metric} {arrow}",
        each.variant,
        f"{each.prompts:,}",
        f"{each.mean:.4g}",
        f"{each.reference_mean:.4g}",
        f"{each.difference:+.4g}",
        _interval(each.intervals.t),
        "" if test is None else "<0.0001" if test.p_holm < 0.0001 else f"{test.p_holm:.2g}",
        each.verdict,
    )


def _interval(interval: Interval) -> str:
    low, high = interval
    return f"[{low:+.3g}, {high:+.3g}]"
