"""Evaluations that are published with a checkpoint, and the scores that they were made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.checkpoint import file_sha256
from quantrecipe.evaluate.evaluations import read_evaluation
from quantrecipe.publishing.facts import Result
from quantrecipe.schema.evaluated import Evaluated
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is published of it.

    Attributes:
        results: the evaluations.
        files: the files that go along, by their names in the repository.
    """

    results: tuple[Result, ...]
    files: Mapping[str, Path]


def read_evidence(
    lock: Lock, evaluations: Sequence[Path], scores: Sequence[Path], variant: str | None
) -> Evidence:
    """Read evaluations, and match score files with what they say they were made of.

    Args:
        lock: of the checkpoint that is published.
        evaluations: files that ``evaluate compare`` wrote.
        scores: files of scores, to be published as well.
        variant: what the checkpoint is called in the evaluations; ``None``: the only variant.

    Raises:
        InvalidInput: with everything that does not fit.
        SourceError: the system could not read a file.
    """
    problems: list[Problem] = []
    digests = {path: file_sha256(path) for path in scores}
    names = {sha256: path.name for path, sha256 in digests.items()}
    results: list[Result] = []
    wanted: set[str] = set()
    for path in evaluations:
        evaluated, sha256 = read_evaluation(path)
        problems += _foreign(path, evaluated, lock)
        chosen = _variant(path, evaluated, variant, problems)
        inputs = [each.sha256 for each in evaluated.inputs]
        wanted.update(inputs)
        found = tuple(names.get(each) for each in inputs)
        results.append(Result(evaluated, chosen, path.name, sha256, found))
    problems += [
        Problem(
            "unused-scores",
            "none of the evaluations was made of these scores",
            "Give the files that evaluate compare read, unchanged.",
            file=str(path),
        )
        for path, sha256 in digests.items()
        if sha256 not in wanted
    ]
    files, twice = _by_name([*evaluations, *scores])
    problems += twice
    if problems:
        raise InvalidInput(problems)
    return Evidence(tuple(results), files)


def _foreign(path: Path, evaluated: Evaluated, lock: Lock) -> Iterator[Problem]:
    """Margins count where they were declared before anything was measured: in the recipe."""
    declared = evaluated.recipe
    if declared is not None and declared.sha256 != lock.recipe_sha256:
        yield Problem(
            "another-recipe",
            f"was declared by the recipe {declared.name!r}, and the checkpoint was converted by "
            f"{lock.recipe.name!r} (digests {declared.sha256[:12]}... and "
            f"{lock.recipe_sha256[:12]}...)",
            "Declare metrics and margins in the recipe that converts; or compare with --reference.",
            file=str(path),
        )


def _variant(path: Path, evaluated: Evaluated, variant: str | None, problems: list[Problem]) -> str:
    there = list(dict.fromkeys(each.variant for each in evaluated.comparisons))
    if variant is None and len(there) == 1:
        return there[0]
    if variant is None:
        message = f"compares {', '.join(there)}, and nothing says which of them this checkpoint is"
        problems.append(Problem("no-variant", message, "Give --variant.", file=str(path)))
    elif variant not in there:
        message = f"has no variant {variant!r}"
        problems.append(
            Problem("unknown-variant", message, did_you_mean(variant, there), file=str(path))
        )
    return variant or there[0]


def _by_name(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Problem]]:
    found: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        if found.setdefault(path.name, path) != path:
            message = f"is called like {found[path.name]}, and both would lie in one folder"
            problems.append(Problem("name-conflict", message, "Rename one.", file=str(path)))
    return found, problems
