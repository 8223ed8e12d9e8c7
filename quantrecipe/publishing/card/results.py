"""The sections on results: what was compared, what is shown, and how to compute it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantrecipe.evaluate.reporting.speeds import label, numbers_of
from quantrecipe.evaluate.reporting.wording import figure, signed
from quantrecipe.publishing.card.markdown import (
    Markdown,
    code,
    fenced,
    folded,
    joined,
    listed,
    shell,
    table,
    text,
)
from quantrecipe.publishing.card.words import long_table
from quantrecipe.publishing.facts import Facts, Result
from quantrecipe.schema.evaluated import Compared, Evaluated
from quantrecipe.schema.evaluation import KNOWN_METRICS
from quantrecipe.schema.lock import RECIPE_NAME, Lock

AGAIN = "evaluation-again.json"


def results(facts: Facts) -> list[Markdown]:
    """Every evaluation: its numbers, its verdicts, what declared them, and what it was made of."""
    if not facts.results:
        return []
    blocks = [
        Markdown(
            "Differences from a reference, paired by prompt: the same prompt, the same seed. "
            "Verdicts go by p values that are adjusted by Holm for all comparisons of a file; "
            "intervals are Student's and not adjusted. An interval that holds zero is no "
            "equivalence: only a test against a margin that was declared beforehand shows that."
        )
    ]
    for result in facts.results:
        blocks += _result(result, facts.lock)
    return blocks


def _result(result: Result, lock: Lock) -> list[Markdown]:
    found = result.evaluated
    said = f"### {code(result.variant)} against {code(found.reference)}"
    mine = [each for each in found.comparisons if each.variant == result.variant]
    rivals = [each for each in found.comparisons if each.variant != result.variant]
    if rivals:
        what = f"This checkpoint is {code(result.variant)}; the others were compared likewise."
    else:
        what = f"This checkpoint is {code(result.variant)}."
    whys = [(each.metric, each.variant, each.explanation) for each in (*mine, *rivals)]
    blocks = [
        Markdown(said),
        Markdown(what),
        _comparisons(found, [*mine, *rivals]),
        folded("Why these verdicts", table(("metric", "variant", "because"), whys)),
        _declared(found, lock),
    ]
    if found.warnings:
        blocks += [
            Markdown("Warnings of the evaluation:"),
            listed(found.warnings),
        ]
    return [*blocks, *_again(result, lock)]


def _comparisons(found: Evaluated, ordered: Sequence[Compared]) -> Markdown:
    rows = [
        (
            joined([code(each.metric), _better(found, each.metric)], ", "),
            code(each.variant),
            figure(each.mean),
            figure(each.reference_mean),
            signed(each.difference),
            "{} to {}".format(*map(signed, each.intervals.t)),
            "-" if each.difference_test is None else _p(each.difference_test.p_holm),
            "-" if each.equivalence_test is None else _p(each.equivalence_test.p_holm),
            Markdown(f"**{each.verdict}**"),
            *(f"{each.prompts:,}", f"{each.seeds:,}"),
        )
        for each in ordered
    ]
    headers = (
        *(
            "metric",
            "variant",
            "mean",
            joined(["mean of", code(found.reference)], " "),
            "difference",
        ),
        *(f"{found.confidence * 100:.4g} % interval", "p of a difference (Holm)"),
        *("p of equivalence (Holm)", "verdict", "prompts", "seeds"),
    )
    return table(headers, rows, "llrrrrrrlrr")


def _better(found: Evaluated, metric: str) -> str:
    return "higher is better" if found.metrics[metric].higher_is_better else "lower is better"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def _declared(found: Evaluated, lock: Lock) -> Markdown:
    """Margins, and what declared them."""
    margins = [
        f"{code(name)} ±{metric.margin:g}"
        for name, metric in found.metrics.items()
        if metric.margin is not None
    ]
    without = [code(name) for name, metric in found.metrics.items() if metric.margin is None]
    said = f"Margins of equivalence: {', '.join(margins)}. " if margins else ""
    if without:
        said += f"Without a margin, so without a test of equivalence: {', '.join(without)}. "
    if found.recipe is None:
        return Markdown(f"{said}No recipe declared what is compared.")
    if found.recipe.sha256 == lock.recipe_sha256:
        return Markdown(f"{said}Metrics and margins are declared in {code(RECIPE_NAME)}.")
    return Markdown(
        f"{said}Metrics and margins are declared in the recipe {code(found.recipe.name)}, which is "
        f"not that of this checkpoint: SHA-256 {code(found.recipe.sha256)}."
    )


def _again(result: Result, lock: Lock) -> list[Markdown]:
    """The files of scores, and the command that compares them once more, if that can be done."""
    found = result.evaluated
    pairs = list(zip(found.inputs, result.scores, strict=True))
    rows = [
        (
            code(file.name),
            f"{file.scores:,}",
            "not published" if path is None else code(path),
            code(file.sha256),
        )
        for file, path in pairs
    ]
    headers = ("scores", "number", "here", "SHA-256")
    blocks = [long_table("files of scores", headers, rows, "lrll")]
    of_file = f"{code(result.path)} (SHA-256 {code(result.sha256)})"
    paths = [path for _, path in pairs if path is not None]
    repeatable = len(paths) == len(pairs)
    repeatable &= found.recipe is None or found.recipe.sha256 == lock.recipe_sha256
    if not repeatable:
        return [*blocks, Markdown(f"All of it is in {of_file}.")]
    versions = found.software
    said = (
        f"All of it is in {of_file}. In this folder, this computes it again, with "
        f"quantrecipe {text(versions.quantrecipe)}, NumPy {text(versions.numpy)} and SciPy "
        f"{text(versions.scipy)} to the same numbers:"
    )
    return [*blocks, Markdown(said), fenced([" ".join(_command(found, paths))], "shell")]


def _command(found: Evaluated, paths: Sequence[str]) -> Iterator[str]:
    yield "quantrecipe evaluate compare"
    yield from (shell(path if not path.startswith("-") else f"./{path}") for path in paths)
    if found.recipe is not None:
        yield f"--recipe {RECIPE_NAME}"
    else:
        yield f"--reference {shell(found.reference)} --confidence {found.confidence!r}"
        for name, metric in found.metrics.items():
            if name not in KNOWN_METRICS:
                yield f"--{'higher' if metric.higher_is_better else 'lower'} {shell(name)}"
    yield f"--seed {found.seed} --resamples {found.resamples} --out {AGAIN}"


def speed(facts: Facts) -> list[Markdown]:
    """The numbers of a benchmark, under its own names."""
    timed = facts.timed
    if timed is None:
        return []
    names = numbers_of(timed)
    rows = []
    for row in timed.rows:
        numbers = dict(row.numbers)
        rows.append(
            (label(row), *(figure(numbers[name]) if name in numbers else "" for name in names))
        )
    source = f"As {code(timed.source.name)} has them (SHA-256 {code(timed.source.sha256)}):"
    shown = long_table("measurements", ("", *names), rows, "l" + "r" * len(names))
    return [Markdown(source), shown]
