"""What a document says that no schema can check, but the document alone can.

Each check reads the plain JSON value and looks past whatever does not have the shape it expects, so
that these problems are reported together with those of structure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Final, TypeGuard

from quantrecipe.schema.canonical import digest, lock_digest
from quantrecipe.schema.evaluation_semantics import metric_problems
from quantrecipe.schema.layout_semantics import layout_problems
from quantrecipe.schema.names_semantics import names_problems
from quantrecipe.schema.parsed import child
from quantrecipe.schema.patterns import check_pattern
from quantrecipe.schema.problems import Problem, did_you_mean

Object = Mapping[str, Any]

LOCK_DAMAGED: Final = "lock-damaged"
"""The kind of problem of a lock that its own digest is not of."""


def recipe_problems(
    recipe: Object, layouts: Collection[str], names: Collection[str]
) -> Iterator[Problem]:
    """What is wrong with a recipe beyond its structure.

    Args:
        recipe: the recipe as a JSON value.
        layouts: the layouts that are known by name.
        names: the names of modules that are known by a name.
    """
    yield from _schemes(recipe)
    yield from _alphas(recipe)
    yield from _siblings(recipe)
    yield from _parts(recipe)
    yield from _patterns(recipe)
    yield from _counts(recipe)
    yield from _folds((f"/folds/{index}", edge) for index, edge in _entries(recipe, "folds"))
    yield from metric_problems(_table(recipe, "evaluation"), "/evaluation")
    yield from _extensions(recipe)
    yield from _source(_table(recipe, "source"))
    yield from _target(_table(recipe, "target"))
    for where in ("source", "target"):
        layout = _table(recipe, where).get("layout")
        pointer = f"/{where}/layout"
        if isinstance(layout, dict):
            yield from layout_problems(layout, pointer)
        elif isinstance(layout, str) and layout not in layouts:
            yield Problem(
                "unknown-layout",
                f"no layout is called {layout!r}",
                did_you_mean(layout, sorted(layouts)),
                pointer=pointer,
            )
    called = _table(recipe, "target").get("names")
    if isinstance(called, str) and called not in names:
        yield Problem(
            "unknown-names",
            f"no names are called {called!r}",
            did_you_mean(called, sorted(names)),
            pointer="/target/names",
        )
    yield from names_problems(called, "/target/names")


def lock_problems(
    lock: Object, layouts: Collection[str], names: Collection[str]
) -> Iterator[Problem]:
    """What is wrong with a lock beyond its structure: its recipe, and both digests."""
    recipe = lock.get("recipe")
    if isinstance(recipe, dict):
        for problem in recipe_problems(recipe, layouts, names):
            yield _below("/recipe", problem)
        if isinstance(lock.get("recipe_sha256"), str) and lock["recipe_sha256"] != digest(recipe):
            yield Problem(
                "digest-mismatch",
                f"the recipe's digest is {digest(recipe)}, not this",
                "The recipe was changed after the conversion; convert again.",
                pointer="/recipe_sha256",
            )
    yield from names_problems(lock.get("names"), "/names")
    if isinstance(lock.get("sha256"), str) and lock["sha256"] != (found := lock_digest(lock)):
        yield Problem(
            LOCK_DAMAGED,
            f"the lock is not the one that was written: its digest is {found}, not this",
            "It was damaged or edited; fetch it again, or convert again.",
            pointer="/sha256",
        )


def statistics_problems(statistics: Object) -> Iterator[Problem]:
    """What is wrong with the header of a statistics file beyond its structure."""
    yield from _bins(statistics)
    modules = _table(statistics, "modules")
    for part, names in modules.items():
        yield from _listed_twice(names, child("/modules", part))
    for part, groups in _table(statistics, "siblings").items():
        yield from _sibling_groups(groups, modules.get(part), child("/siblings", part))
    yield from _proven_folds(statistics)
    holds = statistics.get("holds")
    yield from _listed_twice(holds, "/holds")
    if isinstance(holds, list) and holds and "input_absmax" not in holds:
        yield Problem("no-absmax", "every file holds 'input_absmax'", pointer="/holds")


def _proven_folds(statistics: Object) -> Iterator[Problem]:
    yield from _folds(
        (f"/folds/{index}/fold", _table(entry, "fold"))
        for index, entry in _entries(statistics, "folds")
    )
    for index, entry in _entries(statistics, "folds"):
        edge = entry.get("fold")
        if not isinstance(edge, dict) or not isinstance(entry.get("fold_sha256"), str):
            continue
        if entry["fold_sha256"] != (found := digest(edge)):
            yield Problem(
                "digest-mismatch",
                f"the edge's digest is {found}, not this",
                "The edge was changed after it was proven; prove it again.",
                pointer=f"/folds/{index}/fold_sha256",
            )


def _bins(statistics: Object) -> Iterator[Problem]:
    before = None
    for index, entry in _entries(statistics, "timesteps"):
        start, stop = entry.get("start"), entry.get("stop")
        if not (_is_number(start) and _is_number(stop)):
            continue
        pointer = f"/timesteps/{index}"
        if start >= stop:
            message = f"the bin from {start} to {stop} is empty"
            yield Problem("empty-range", message, "A bin holds start <= t < stop.", pointer=pointer)
        elif before is not None and start < before:
            message = f"the bin starts at {start}, before the end of an earlier one at {before}"
            yield Problem("disordered-bins", message, "Bins ascend, apart.", pointer=pointer)
        before = stop if before is None else max(before, stop)


def _listed_twice(names: Any, pointer: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, name in enumerate(names if isinstance(names, list) else []):
        if not isinstance(name, str):
            continue
        if name in seen:
            message = f"{name!r} is listed twice"
            yield Problem("duplicate-name", message, pointer=child(pointer, index))
        seen.add(name)


def _sibling_groups(groups: Any, modules: Any, pointer: str) -> Iterator[Problem]:
    known = {name for name in modules if isinstance(name, str)} if isinstance(modules, list) else ()
    seen: set[str] = set()
    for index, group in enumerate(groups if isinstance(groups, list) else []):
        for place, name in enumerate(group if isinstance(group, list) else []):
            if not isinstance(name, str):
                continue
            where = child(child(pointer, index), place)
            if name not in known:
                message = f"{name!r} is not among the modules of the part"
                yield Problem("unknown-module", message, pointer=where)
            elif name in seen:
                message = f"{name!r} is a sibling twice"
                yield Problem("duplicate-name", message, pointer=where)
            seen.add(name)


def _schemes(recipe: Object) -> Iterator[Problem]:
    schemes = recipe.get("schemes")
    if not isinstance(schemes, dict):
        return
    used = set()
    for index, rule in _entries(recipe, "rules"):
        scheme = rule.get("scheme")
        if not isinstance(scheme, str):
            continue
        used.add(scheme)
        if scheme not in schemes:
            yield Problem(
                "unknown-scheme",
                f"no scheme is called {scheme!r}",
                did_you_mean(scheme, _some(schemes)),
                pointer=f"/rules/{index}/scheme",
            )
    if isinstance(recipe.get("rules"), list):
        for name in schemes:
            if name not in used:
                yield Problem(
                    "unused-scheme",
                    f"no rule uses the scheme {name!r}",
                    "Remove it, or give it to a rule.",
                    pointer=child("/schemes", name),
                )
    for name in schemes:
        weight = _table(_table(schemes, name), "weight")
        yield from _quantizer(weight, f"{child('/schemes', name)}/weight/quantizer")


def _quantizer(weight: Object, pointer: str) -> Iterator[Problem]:
    kind = _table(weight, "quantizer").get("kind")
    if kind == "clip-search" and weight.get("granularity") == "tensor":
        yield Problem(
            "quantizer-unsupported",
            "clip-search chooses the scales of a block of rows from that block, and a tensor's one "
            "scale needs all of it",
            "Choose a finer granularity, or the quantizer absmax.",
            pointer=pointer,
        )


def _alphas(recipe: Object) -> Iterator[Problem]:
    for name, scheme in _table(recipe, "schemes").items():
        alpha = _table(_table(scheme, "smoothing"), "alpha") if isinstance(scheme, dict) else {}
        candidates = alpha.get("search")
        seen: set[float] = set()
        for place, value in enumerate(candidates if isinstance(candidates, list) else []):
            if _is_number(value) and value in seen:
                pointer = f"{child('/schemes', name)}/smoothing/alpha/search/{place}"
                yield Problem("duplicate-value", f"{value} is listed twice", pointer=pointer)
            if _is_number(value):
                seen.add(value)


def _siblings(recipe: Object) -> Iterator[Problem]:
    lists = recipe.get("siblings")
    if not isinstance(lists, list) or not lists:
        return
    schemes = _table(recipe, "schemes").values()
    if not any(isinstance(scheme, dict) and scheme.get("smoothing") for scheme in schemes):
        yield Problem(
            "unused-siblings",
            "no scheme smooths, and siblings share nothing but smoothing factors",
            "Remove them, or give a scheme its smoothing.",
            pointer="/siblings",
        )
    for index, names in enumerate(lists):
        seen: dict[str, int] = {}
        for place, name in enumerate(names if isinstance(names, list) else []):
            if not isinstance(name, str):
                continue
            pointer = f"/siblings/{index}/{place}"
            stars = name.split(".").count("*")
            if name in seen:
                yield Problem("duplicate-name", f"{name!r} is listed twice", pointer=pointer)
            elif seen and stars != next(iter(seen.values())):
                yield Problem(
                    "uneven-stars",
                    f"{name!r} has {stars} '*', and {next(iter(seen))!r} has another number",
                    "Modules are siblings where the '*' of their names stand for the same.",
                    pointer=pointer,
                )
            seen.setdefault(name, stars)


def _parts(recipe: Object) -> Iterator[Problem]:
    source = recipe.get("source")
    if not isinstance(source, dict):
        return
    parts = source.get("parts", {"model": "."})
    if not isinstance(parts, dict):
        return
    for section in ("rules", "protected"):
        for index, entry in _entries(recipe, section):
            for position, part in _texts(entry, "parts"):
                if part not in parts:
                    yield _unknown_part(part, parts, f"/{section}/{index}/parts/{position}")
    written = _table(recipe, "target").get("parts")
    if not isinstance(written, dict):
        return
    for part in written:
        if part not in parts:
            yield _unknown_part(part, parts, child("/target/parts", part))
    for part in parts:
        if part not in written:
            yield Problem(
                "missing-part",
                f"the part {part!r} of the source has no file here",
                "Name a file for every part of the source, or one 'file' for all.",
                pointer="/target/parts",
            )


def _unknown_part(part: str, parts: Object, pointer: str) -> Problem:
    message = f"the source has no part called {part!r}"
    return Problem("unknown-part", message, did_you_mean(part, _some(parts)), pointer=pointer)


def _patterns(recipe: Object) -> Iterator[Problem]:
    for section in ("rules", "protected"):
        for index, entry in _entries(recipe, section):
            for position, text in _texts(entry, "modules"):
                wrong = check_pattern(text)
                if wrong is not None:
                    yield Problem(
                        "bad-module-pattern",
                        f"{text!r} is no module pattern: {wrong}",
                        "A pattern is a dotted name with *, **, {a,b} or {0..9} in it, or re: and "
                        "a regular expression.",
                        pointer=f"/{section}/{index}/modules/{position}",
                    )


def _counts(recipe: Object) -> Iterator[Problem]:
    for section in ("rules", "protected"):
        for index, entry in _entries(recipe, section):
            count = _table(entry, "count")
            fewest, most = count.get("min", 1), count.get("max")
            if _is_number(fewest) and _is_number(most) and fewest > most:
                yield Problem(
                    "empty-range",
                    f"no count is at least {fewest} and at most {most}",
                    "min is 1 where it is left out." if "min" not in count else "Swap them?",
                    pointer=f"/{section}/{index}/count",
                )


def _folds(edges: Iterable[tuple[str, Object]]) -> Iterator[Problem]:
    """What is wrong with edges of folds, each with its pointer."""
    for pointer, fold in edges:
        rows = fold.get("rows")
        if isinstance(rows, list) and len(rows) == 2 and all(map(_is_number, rows)):
            start, stop = rows
            if start >= stop:
                yield Problem(
                    "empty-range",
                    f"there are no rows from {start} up to {stop}",
                    "The first is taken along, the second is not.",
                    pointer=f"{pointer}/rows",
                )
        into = fold.get("into")
        if not isinstance(into, str):
            continue
        for position, text in _texts(fold, "modules"):
            if text.split(".").count("*") != into.split(".").count("*"):
                yield Problem(
                    "wildcards-differ",
                    f"{text!r} has not as many '*' as {into!r}",
                    "What each '*' stands for is carried over to the one in the same place.",
                    pointer=f"{pointer}/modules/{position}",
                )


def _extensions(recipe: Object) -> Iterator[Problem]:
    for key, extension in _table(recipe, "extensions").items():
        if isinstance(extension, dict) and extension.get("must_understand") is True:
            yield Problem(
                "not-understood",
                f"the recipe has to be refused by who does not know {key!r}, and nothing here does",
                "Use the tool that it is made for, or set must_understand to false.",
                pointer=child(child("/extensions", key), "must_understand"),
            )


def _source(source: Object) -> Iterator[Problem]:
    if source.get("path") is not None and source.get("repo") is not None:
        yield Problem(
            "conflicting-fields",
            "a source is a local path or a repository, not both",
            "Remove 'path' or 'repo'.",
            pointer="/source/path",
        )
    if source.get("revision") is not None and source.get("repo") is None:
        yield Problem(
            "revision-without-repo",
            "a revision says nothing without a repository",
            "Add 'repo', or remove 'revision'.",
            pointer="/source/revision",
        )


def _target(target: Object) -> Iterator[Problem]:
    parts = target.get("parts")
    if not isinstance(parts, dict):
        return
    if "file" in target:
        yield Problem(
            "conflicting-fields",
            "all parts go into one file, or each into its own, not both",
            "Remove 'file' or 'parts'.",
            pointer="/target/file",
        )
    seen: dict[str, str] = {}
    for part, file in parts.items():
        if not isinstance(file, str):
            continue
        # Two names that differ in case alone are one file on some systems.
        first = seen.setdefault(file.casefold(), part)
        if first != part:
            yield Problem(
                "duplicate-file",
                f"the parts {first!r} and {part!r} would both be written to {file!r}",
                "Give each its own file, or use 'file' for all parts in one.",
                pointer=child("/target/parts", part),
            )


def _some(names: Object) -> list[str]:
    """Names to suggest; looking for near misses among very many takes very long."""
    return sorted(islice(names, 500))


def _below(pointer: str, problem: Problem) -> Problem:
    return replace(problem, pointer=pointer + (problem.pointer or ""))


def _table(value: Object, key: str) -> Object:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _entries(value: Object, key: str) -> list[tuple[int, Object]]:
    """The objects in a list, with their places in it."""
    found = value.get(key)
    if not isinstance(found, list):
        return []
    return [(index, entry) for index, entry in enumerate(found) if isinstance(entry, dict)]


def _texts(value: Object, key: str) -> list[tuple[int, str]]:
    """The strings in a list, with their places in it."""
    found = value.get(key)
    if not isinstance(found, list):
        return []
    return [(index, entry) for index, entry in enumerate(found) if isinstance(entry, str)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
