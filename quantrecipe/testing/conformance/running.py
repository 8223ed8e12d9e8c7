"""Who is run, over which cases: as a program, and as entries for pytest."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from quantrecipe.converter import Converter, find_converter
from quantrecipe.loaders import Loader, find_loader
from quantrecipe.schema.capabilities import Capabilities, missing, needs
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.validation import parse_recipe
from quantrecipe.testing.conformance.cases import Case, cases
from quantrecipe.testing.conformance.comparing import Deviation
from quantrecipe.testing.conformance.converters import check_converter
from quantrecipe.testing.conformance.loaders import check_loader
from quantrecipe.testing.conformance.modules import LoadModel, check_model_loader
from quantrecipe.testing.conformance.report import Outcome, Report, Result

_NONE: Final[Mapping[str, str]] = {}


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Who is run.

    Attributes:
        name: in the report.
        check: carries out a case in an empty folder; raises if it deviates.
        takes: whether a case says anything of such a candidate.
        capabilities: what it claims; ``None``: everything.
        reads_source: whether the layout of the source is its business too.
    """

    name: str
    check: Callable[[Case, Path], None]
    takes: Callable[[Case], bool]
    capabilities: Capabilities | None
    reads_source: bool

    def lacks(self, case: Case) -> str | None:
        """What a case needs and the candidate does not claim."""
        if self.capabilities is None:
            return None
        try:
            recipe = parse_recipe(json.dumps(case.recipe), case.id)
        except InvalidInput:
            return None
        layouts = [(resolve_layout(recipe.target.layout).name, "/target/layout")]
        if self.reads_source:
            layouts.append((resolve_layout(recipe.source.layout).name, "/source/layout"))
        lacking = missing(self.capabilities, needs(recipe, layouts))
        return ", ".join(f"no {need}" for need in lacking) or None


@dataclass(frozen=True, slots=True)
class _Check:
    """One case for one candidate; calling it raises if the candidate deviates."""

    candidate: _Candidate
    case: Case

    def __call__(self) -> None:
        with TemporaryDirectory(prefix="conformance-") as folder:
            self.candidate.check(self.case, Path(folder))


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A case, and what is said of it beforehand."""

    check: _Check
    excluded: str | None
    lacking: str | None
    expected: str | None


def run(
    *,
    converter: str | Converter | None = None,
    loader: str | Loader | None = None,
    load_model: LoadModel | None = None,
    capabilities: Capabilities | None = None,
    include: Iterable[str] | None = None,
    exclude: Mapping[str, str] = _NONE,
    expected_failures: Mapping[str, str] = _NONE,
) -> Report:
    """Run one candidate over the cases.

    Args:
        converter: a converter, or the name of an installed one.
        loader: a loader, or the name of an installed one.
        load_model: what fills a model with the numbers of a checkpoint.
        capabilities: what ``load_model`` claims to read; ``None``: everything. Converters and
            loaders declare theirs.
        include: ids of cases, or patterns with ``*``; ``None``: all that concern the candidate.
        exclude: ids or patterns of cases that are not run, each with the reason.
        expected_failures: ids or patterns of cases that are known to fail, each with the reason.
            One that passes is reported as such.

    Raises:
        InvalidInput: an id or pattern is that of no case; no converter or loader is called so.
        TypeError: not exactly one candidate.
    """
    candidate = _candidate(converter, loader, load_model, capabilities)
    chosen = _choose(candidate, include, exclude, expected_failures)
    return Report(candidate.name, tuple(_result(each) for each in chosen))


def pytest_cases(
    *,
    converter: str | Converter | None = None,
    loader: str | Loader | None = None,
    load_model: LoadModel | None = None,
    capabilities: Capabilities | None = None,
    include: Iterable[str] | None = None,
    exclude: Mapping[str, str] = _NONE,
    expected_failures: Mapping[str, str] = _NONE,
) -> list[Any]:
    """The same cases as entries for ``pytest.mark.parametrize``; each is called without arguments.

    Cases that are excluded or not claimed are marked to be skipped, expected failures as strict
    ``xfail``, each with its reason. Arguments and errors are those of ``run``.

    Example:
        ``@pytest.mark.parametrize("check", conformance.pytest_cases(converter="streaming"))``
    """
    import pytest  # not needed by who calls ``run``

    candidate = _candidate(converter, loader, load_model, capabilities)
    entries = []
    for each in _choose(candidate, include, exclude, expected_failures):
        marks = []
        if each.excluded is not None or each.lacking is not None:
            marks.append(pytest.mark.skip(reason=each.excluded or each.lacking or ""))
        elif each.expected is not None:
            marks.append(pytest.mark.xfail(reason=each.expected, strict=True))
        entries.append(pytest.param(each.check, id=each.check.case.id, marks=marks))
    return entries


def _candidate(
    converter: str | Converter | None,
    loader: str | Loader | None,
    load_model: LoadModel | None,
    capabilities: Capabilities | None,
) -> _Candidate:
    given = [each for each in (converter, loader, load_model) if each is not None]
    if len(given) != 1:
        raise TypeError("name one candidate: converter=, loader= or load_model=")
    if capabilities is not None and load_model is None:
        raise TypeError("a converter or a loader declares its own capabilities")
    if converter is not None:
        made = find_converter(converter) if isinstance(converter, str) else converter
        return _Candidate(
            f"converter {made.name}",
            lambda case, folder: check_converter(made, case, folder),
            lambda case: not case.edited,
            made.capabilities,
            reads_source=True,
        )
    if loader is not None:
        reader = find_loader(loader) if isinstance(loader, str) else loader
        return _Candidate(
            f"loader {reader.name}",
            lambda case, folder: check_loader(reader, case, folder),
            lambda case: bool(case.target),
            reader.capabilities,
            reads_source=False,
        )
    assert load_model is not None
    load = load_model
    return _Candidate(
        getattr(load, "__qualname__", type(load).__name__),
        lambda case, folder: check_model_loader(load, case, folder),
        lambda case: bool(case.outputs or case.edited),
        capabilities,
        reads_source=False,
    )


def _choose(
    candidate: _Candidate,
    include: Iterable[str] | None,
    exclude: Mapping[str, str],
    expected_failures: Mapping[str, str],
) -> list[_Chosen]:
    concerned = [case for case in cases() if candidate.takes(case)]
    wanted = ["*"] if include is None else list(include)
    _check_patterns([*wanted, *exclude, *expected_failures], [case.id for case in concerned])
    return [
        _Chosen(
            _Check(candidate, case),
            _reason(case.id, exclude),
            candidate.lacks(case),
            _reason(case.id, expected_failures),
        )
        for case in concerned
        if any(fnmatchcase(case.id, pattern) for pattern in wanted)
    ]


def _check_patterns(patterns: Iterable[str], known: Sequence[str]) -> None:
    unknown = [
        pattern
        for pattern in dict.fromkeys(patterns)
        if not any(fnmatchcase(name, pattern) for name in known)
    ]
    if unknown:
        raise InvalidInput(
            Problem(
                "unknown-case",
                f"no case for this candidate is called {pattern!r}",
                hint=did_you_mean(pattern, known),
            )
            for pattern in unknown
        )


def _reason(case: str, reasons: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if fnmatchcase(case, pattern)), None)


def _result(chosen: _Chosen) -> Result:
    case = chosen.check.case

    def result(outcome: Outcome, detail: str = "") -> Result:
        return Result(case.id, case.title, outcome, detail)

    if chosen.excluded is not None:
        return result("excluded", chosen.excluded)
    if chosen.lacking is not None:
        return result("skipped", chosen.lacking)
    try:
        chosen.check()
    except Deviation as deviation:
        found = str(deviation)
    except Exception:  # noqa: BLE001 - a candidate that breaks has failed, and the others go on
        found = traceback.format_exc().rstrip()
    else:
        if chosen.expected is not None:
            return result("passed unexpectedly", f"expected to fail: {chosen.expected}")
        return result("passed")
    if chosen.expected is not None:
        return result("failed as expected", chosen.expected)
    return result("failed", found)
