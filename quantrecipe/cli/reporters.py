"""How `validate` says what it found: for people, for programs, and for two kinds of CI."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote

from quantrecipe.schema.problems import Problem

SARIF_VERSION: Final = "2.1.0"


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file and what is wrong with it.

    Attributes:
        file: as it was given on the command line.
        kind: what the document says it is, where that could be read.
        problems: none if it is valid.
    """

    file: str
    kind: str | None
    problems: tuple[Problem, ...]


Reporter = Callable[[Sequence[FileResult]], str]
"""Renders all results as one text that ends with a line break, or as nothing."""


def report_text(results: Sequence[FileResult]) -> str:
    """``file:line:column: message (pointer)``, a hint below it, and a summary at the end."""
    lines = []
    for result in results:
        for problem in result.problems:
            pointer = f" ({problem.pointer})" if problem.pointer else ""
            tensor = f" [{problem.tensor}]" if problem.tensor else ""
            lines.append(f"{_place(problem, result)}: {problem.message}{pointer}{tensor}")
            if problem.hint:
                lines.append(f"  {problem.hint}")
        if not result.problems:
            lines.append(f"{result.file}: valid {result.kind or 'document'}")
    lines.append(_summary(results))
    return "\n".join(lines) + "\n"


def report_json(results: Sequence[FileResult]) -> str:
    """One object with every file and every problem."""
    value = {
        "valid": not any(result.problems for result in results),
        "files": [
            {
                "file": result.file,
                "kind": result.kind,
                "valid": not result.problems,
                "problems": [problem.as_dict() for problem in result.problems],
            }
            for result in results
        ],
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def report_github(results: Sequence[FileResult]) -> str:
    """Workflow commands that GitHub Actions shows beside the lines they are about."""
    lines = []
    for result in results:
        for problem in result.problems:
            place = {
                "file": problem.file or result.file,
                "line": problem.line,
                "col": problem.column,
                "title": problem.kind,
            }
            properties = ",".join(
                f"{name}={_escape_property(str(value))}"
                for name, value in place.items()
                if value is not None
            )
            lines.append(f"::error {properties}::{_escape_data(_full_message(problem))}")
    lines.append(_summary(results))
    return "\n".join(lines) + "\n"


def report_sarif(results: Sequence[FileResult]) -> str:
    """A SARIF 2.1.0 log, as code scanning reads it."""
    from quantrecipe import __version__

    kinds = sorted({problem.kind for result in results for problem in result.problems})
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "quantrecipe",
                "semanticVersion": __version__,
                "rules": [{"id": kind} for kind in kinds],
            }
        },
        "columnKind": "unicodeCodePoints",
        "artifacts": [{"location": {"uri": _uri(result.file)}} for result in results],
        "results": [
            _sarif_result(problem, result, kinds)
            for result in results
            for problem in result.problems
        ],
    }
    schema = f"https://docs.oasis-open.org/sarif/sarif/v{SARIF_VERSION}/errata01/os/schemas/"
    log = {
        "$schema": f"{schema}sarif-schema-{SARIF_VERSION}.json",
        "version": SARIF_VERSION,
        "runs": [run],
    }
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


REPORTERS: Final[Mapping[str, Reporter]] = MappingProxyType(
    {
        "text": report_text,
        "json": report_json,
        "github": report_github,
        "sarif": report_sarif,
    }
)


def _sarif_result(problem: Problem, result: FileResult, kinds: Sequence[str]) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(problem.file or result.file)}}
    if problem.line is not None:
        physical["region"] = {"startLine": problem.line}
        if problem.column is not None:
            physical["region"]["startColumn"] = problem.column
    location: dict[str, Any] = {"physicalLocation": physical}
    if problem.pointer or problem.tensor:
        named = problem.pointer or problem.tensor
        location["logicalLocations"] = [{"fullyQualifiedName": named}]
    return {
        "ruleId": problem.kind,
        "ruleIndex": kinds.index(problem.kind),
        "level": "error",
        "message": {"text": _full_message(problem)},
        "locations": [location],
    }


def _full_message(problem: Problem) -> str:
    pointer = f" ({problem.pointer})" if problem.pointer else ""
    tensor = f" [{problem.tensor}]" if problem.tensor else ""
    hint = f"\n{problem.hint}" if problem.hint else ""
    return f"{problem.message}{pointer}{tensor}{hint}"


def _place(problem: Problem, result: FileResult) -> str:
    place = problem.file or result.file
    for number in (problem.line, problem.column):
        if number is None:
            break
        place += f":{number}"
    return place


def _summary(results: Sequence[FileResult]) -> str:
    files = len(results)
    problems = sum(len(result.problems) for result in results)
    invalid = sum(bool(result.problems) for result in results)
    counted = f"{files} file{'' if files == 1 else 's'}"
    if not problems:
        return f"{counted}, all valid"
    return f"{counted}, {invalid} invalid, {problems} problem{'' if problems == 1 else 's'}"


def _uri(file: str) -> str:
    """A path as a URI reference: relative stays relative, as a repository's files have to be."""
    path = PurePath(file)
    if path.is_absolute():
        return path.as_uri()
    return quote(file.replace(os.sep, "/"), safe="/")


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")
