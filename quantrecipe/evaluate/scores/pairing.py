"""Which score of a variant goes with which of the reference: same metric, prompt and seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantrecipe.evaluate.scores.bootstrap import Values
from quantrecipe.evaluate.scores.reading import Score
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean

_NAMED = 3

BySeed = dict[int, Score]
ByPrompt = dict[str, BySeed]


@dataclass(frozen=True, slots=True)
class Paired:
    """One metric of all variants, prompt by prompt.

    Attributes:
        metric: its name.
        prompts: what they are called, ascending.
        seeds: of each prompt; averaged, because prompts are what was drawn independently.
        means: by variant, the mean over seeds of each prompt, ``[prompts]``.
    """

    metric: str
    prompts: tuple[str, ...]
    seeds: int
    means: Mapping[str, Values]


def pair(
    scores: Iterable[Score], reference: str, metrics: Collection[str], *, leave_out: Collection[str]
) -> list[Paired]:
    """Pair every variant's scores with the reference's.

    Args:
        scores: of all variants.
        reference: the variant that the others are compared with.
        metrics: what is compared, in this order.
        leave_out: metrics that may be among the scores and are not compared.

    Raises:
        InvalidInput: anything has no partner; every problem is in it.
    """
    found: dict[str, dict[str, ByPrompt]] = {}
    for score in scores:
        if score.metric not in leave_out:
            variants = found.setdefault(score.metric, {})
            variants.setdefault(score.variant, {}).setdefault(score.prompt, {})[score.seed] = score
    problems = [_declared(metric) for metric in metrics if metric in leave_out]
    if not problems:
        problems += _problems(found, reference, metrics)
    if problems:
        raise InvalidInput(problems)
    return [_paired(metric, found[metric], reference) for metric in metrics]


def _declared(metric: str) -> Problem:
    message = f"{metric!r} is declared, so it cannot be left out once it was measured"
    return Problem("declared-metric", message, "Leave out what no recipe declares.")


def _paired(metric: str, variants: Mapping[str, ByPrompt], reference: str) -> Paired:
    prompts = tuple(sorted(variants[reference]))
    return Paired(
        metric=metric,
        prompts=prompts,
        seeds=len(variants[reference][prompts[0]]),
        means={
            variant: np.array([_mean(by_prompt[prompt]) for prompt in prompts])
            for variant, by_prompt in sorted(variants.items())
        },
    )


def _mean(by_seed: BySeed) -> float:
    # An exact sum: the order of lines shows nowhere.
    return math.fsum(score.value for score in by_seed.values()) / len(by_seed)


def _problems(
    found: Mapping[str, Mapping[str, ByPrompt]], reference: str, metrics: Collection[str]
) -> Iterator[Problem]:
    known = sorted({variant for variants in found.values() for variant in variants})
    if reference not in known:
        message = f"no scores are of the reference, {reference!r}"
        yield Problem("unknown-variant", message, did_you_mean(reference, known))
        return
    if len(known) == 1:
        yield Problem("no-rival", f"all scores are of {reference!r}: nothing to compare it with")
    for metric, variants in found.items():
        if metric not in metrics:
            first = next(_all(next(iter(variants.values()))))
            yield _at(
                first,
                "undeclared-metric",
                f"{metric!r} is not among the metrics of the evaluation",
                "Declare it there, or leave it out with --without.",
            )
    for metric in metrics:
        yield from _of_metric(metric, found.get(metric, {}), reference, known)


def _of_metric(
    metric: str, variants: Mapping[str, ByPrompt], reference: str, known: Sequence[str]
) -> Iterator[Problem]:
    lacking = [variant for variant in known if variant not in variants]
    for variant in lacking:
        yield Problem(
            "missing-metric",
            f"there is no {metric} of {variant!r}",
            "Every variant needs every metric of the evaluation.",
        )
    if reference in lacking:
        return
    wanted = variants[reference]
    if len(wanted) < 2:
        message = f"one prompt has a {metric}; a spread takes two"
        yield _at(next(_all(wanted)), "too-few-prompts", message)
    yield from _uneven(metric, wanted)
    for variant, by_prompt in variants.items():
        if variant != reference:
            yield from _unpaired(metric, reference, wanted, variant, by_prompt)
            yield from _unpaired(metric, variant, by_prompt, reference, wanted)
            yield from _other_seeds(metric, reference, wanted, variant, by_prompt)


def _unpaired(
    metric: str, one: str, there: ByPrompt, other: str, lacking: ByPrompt
) -> Iterator[Problem]:
    """Prompts of one variant that the other has not."""
    prompts = [prompt for prompt in there if prompt not in lacking]
    if prompts:
        yield _at(
            next(_all({prompts[0]: there[prompts[0]]})),
            "missing-prompt",
            f"{one!r} has the {metric} of {_some(prompts)}, and {other!r} has not",
            "Score the same prompts with every variant.",
        )


def _other_seeds(
    metric: str, reference: str, wanted: ByPrompt, variant: str, by_prompt: ByPrompt
) -> Iterator[Problem]:
    prompts = [p for p in by_prompt if p in wanted and by_prompt[p].keys() != wanted[p].keys()]
    if prompts:
        first = prompts[0]
        yield _at(
            next(_all({first: by_prompt[first]})),
            "other-seeds",
            f"{variant!r} has the {metric} of {_some(prompts)} with other seeds than {reference!r}:"
            f" {_seeds(by_prompt[first])}, not {_seeds(wanted[first])}",
            "A pair has the same prompt and the same seed.",
        )


def _uneven(metric: str, by_prompt: ByPrompt) -> Iterator[Problem]:
    """Prompts with more or fewer seeds than most have."""
    counts = Counter(len(by_seed) for by_seed in by_prompt.values())
    usual = counts.most_common(1)[0][0]
    prompts = [prompt for prompt, by_seed in by_prompt.items() if len(by_seed) != usual]
    if prompts:
        many = len(by_prompt[prompts[0]])
        yield _at(
            next(_all({prompts[0]: by_prompt[prompts[0]]})),
            "mixed-seeds",
            f"{_some(prompts)} has {many} seed{'' if many == 1 else 's'} for {metric}, and other "
            f"prompts have {usual}",
            "Score every prompt with as many seeds.",
        )


def _all(by_prompt: ByPrompt) -> Iterator[Score]:
    for by_seed in by_prompt.values():
        yield from by_seed.values()


def _at(score: Score, kind: str, message: str, hint: str | None = None) -> Problem:
    return Problem(kind, message, hint, score.file, score.line)


def _some(prompts: Sequence[str]) -> str:
    named = ", ".join(repr(prompt) for prompt in prompts[:_NAMED])
    more = f" and {len(prompts) - _NAMED:,} more" if len(prompts) > _NAMED else ""
    return f"prompt{'' if len(prompts) == 1 else 's'} {named}{more}"


def _seeds(by_seed: BySeed) -> str:
    seeds = sorted(by_seed)
    more = ", ..." if len(seeds) > _NAMED else ""
    return ", ".join(map(str, seeds[:_NAMED])) + more
