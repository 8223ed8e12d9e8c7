"""What a run found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "passed", "failed", "skipped", "excluded", "failed as expected", "passed unexpectedly"
]


@dataclass(frozen=True, slots=True)
class Result:
    """One case.

    Attributes:
        case: its id.
        title: of the case.
        outcome: what came of it. ``skipped``: the candidate does not claim to do it.
        detail: what differs, or why it was not run.
    """

    case: str
    title: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All cases of a run. ``str`` gives a table.

    Attributes:
        candidate: who was run.
        results: in the order of the cases.
    """

    candidate: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether no case failed, and none passed that was expected to fail."""
        return not {"failed", "passed unexpectedly"} & {result.outcome for result in self.results}

    def of(self, outcome: Outcome) -> tuple[Result, ...]:
        """The results with an outcome."""
        return tuple(result for result in self.results if result.outcome == outcome)

    def __str__(self) -> str:
        width = max((len(result.case) for result in self.results), default=0)
        lines = []
        for result in self.results:
            lines.append(f"{result.outcome:<19}  {result.case:<{width}}  {result.title}".rstrip())
            lines += [f"{'':<19}    {line}" for line in result.detail.splitlines()]
        counts = Counter(result.outcome for result in self.results)
        total = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return "\n".join([*lines, f"{self.candidate}: {total or 'no cases'}"])
