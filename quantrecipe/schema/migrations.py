"""Documents of older versions, brought up to date one version at a time.

A step is a pure function from one JSON object to the next; it is registered under the version that
it starts from, and what it gets and gives is checked. Inputs are never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.schema.problems import InvalidInput, Problem, QuantrecipeError
from quantrecipe.schema.structure import VERSIONS, structure_problems, tag_problem

Step = Callable[[dict[str, Any]], dict[str, Any]]
Check = Callable[[Any], tuple[Problem, ...]]


class MigrationError(QuantrecipeError):
    """A step did not do what it is for. That is a fault of this program, not of the document."""


@dataclass(frozen=True)
class Chain:
    """The way from every older version of a kind of document to the current one.

    Attributes:
        kind: of the document.
        current: the version it ends at.
        steps: the step from each older version to the next; no version is left out.
        checks: the structure of each version, the current one included.
    """

    kind: str
    current: int
    steps: Mapping[int, Step]
    checks: Mapping[int, Check]

    def __post_init__(self) -> None:
        """Refuse a chain with a gap.

        Raises:
            ValueError: a version has no step or no check.
        """
        first = min(self.steps, default=self.current)
        if sorted(self.steps) != list(range(first, self.current)):
            raise ValueError(f"the migrations of {self.kind} leave out a version")
        if sorted(self.checks) != list(range(first, self.current + 1)):
            raise ValueError(f"the migrations of {self.kind} leave a version unchecked")


CHAINS: Final[Mapping[str, Chain]] = MappingProxyType(
    {
        kind: Chain(kind, version, {}, {version: partial(structure_problems, kind=kind)})
        for kind, version in VERSIONS.items()
    }
)
"""The migrations of each kind of document. Version 1 is the first of all of them."""


def migrate(value: Any, chains: Mapping[str, Chain] = CHAINS) -> dict[str, Any]:
    """The document in the current version of its kind; a copy if it already is.

    Args:
        value: a JSON value with ``kind`` and ``version``; it is not changed.
        chains: the migrations of each kind.

    Raises:
        InvalidInput: it is of no known kind or version, or does not hold to the version it names.
        MigrationError: a step left the version as it was, or made something that does not hold.
    """
    chain = _chain_of(value, chains)
    document: dict[str, Any] = copy.deepcopy(value)
    problems = chain.checks[document["version"]](document)
    if problems:
        raise InvalidInput(problems)
    while document["version"] != chain.current:
        document = _advance(document, chain)
    return document


def _chain_of(value: Any, chains: Mapping[str, Chain]) -> Chain:
    kind = value.get("kind") if isinstance(value, dict) else None
    version = value.get("version") if isinstance(value, dict) else None
    chain = chains.get(kind) if isinstance(kind, str) else None
    if chain is not None and type(version) is int and version in chain.checks:
        return chain
    problem = tag_problem(value)
    if problem is None:
        hint = "Write the version of the document as a whole number."
        problem = Problem("missing-field", "the version is missing", hint, pointer="/version")
    raise InvalidInput(problem)


def _advance(document: dict[str, Any], chain: Chain) -> dict[str, Any]:
    before = document["version"]
    after = chain.steps[before](copy.deepcopy(document))
    if after.get("version") != before + 1 or type(after["version"]) is not int:
        raise MigrationError(
            f"the migration of {chain.kind} from version {before} ended at version "
            f"{after.get('version')!r} instead of {before + 1}"
        )
    problems = chain.checks[before + 1](after)
    if problems:
        listed = "\n".join(str(problem) for problem in problems)
        raise MigrationError(
            f"the migration of {chain.kind} from version {before} made what version {before + 1} "
            f"refuses:\n{listed}"
        )
    return after
