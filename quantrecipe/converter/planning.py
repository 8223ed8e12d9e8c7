"""From a recipe and a place on disk to a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

from quantrecipe.checkpoint import open_parts
from quantrecipe.checkpoint.hub.opening import in_cache_only, open_address
from quantrecipe.converter.calibration import StatisticsFile, open_statistics
from quantrecipe.converter.loader_contents import Contents
from quantrecipe.converter.measured import kept_tokens, measured_as
from quantrecipe.converter.selection import check_capabilities, find_converter
from quantrecipe.converter.standalone import LOADER_NAME, loader_source
from quantrecipe.schema.address import HubAddress, is_address, parse_address
from quantrecipe.schema.document import STDIN, Document, parse_text, read_parsed
from quantrecipe.schema.folds import fold_digest
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import SourceRepository
from quantrecipe.schema.plan import Plan, PlannedModule
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import recipe_text
from quantrecipe.schema.schemes import second_moments
from quantrecipe.schema.siblings import Siblings, differing, folded, smoothing_groups
from quantrecipe.schema.statistics import ProvenFold, Statistics
from quantrecipe.schema.validation import examine_text, located


@dataclass(frozen=True, slots=True)
class OpenRecipe:
    """A recipe, and where it stands.

    Attributes:
        recipe: validated.
        folder: what relative paths in it start from.
        document: its text, so that problems found later can say where.
    """

    recipe: Recipe
    folder: Path
    document: Document | None = None

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Within it, problems that point into the recipe get its file, line and column."""
        try:
            yield
        except InvalidInput as error:
            if self.document is None:
                raise
            raise located(error, self.document) from error


_SUFFIXES: Final = (".json", ".yaml", ".yml")
RecipeLike = Recipe | OpenRecipe | Path | str


def open_recipe(recipe: RecipeLike) -> OpenRecipe:
    """Read a recipe: a file, ``-`` for standard input, or the name of a built-in one.

    Raises:
        InvalidInput: it cannot be read, or does not hold to the schema.
    """
    if isinstance(recipe, OpenRecipe):
        return recipe
    if isinstance(recipe, Recipe):
        return OpenRecipe(recipe, Path.cwd())
    path, folder = Path(recipe), Path.cwd()
    if str(recipe) == STDIN:
        parsed = read_parsed(STDIN)
    elif path.suffix in _SUFFIXES or (path.exists() and not path.is_dir()):
        # A folder may well be called as the recipe it was made by.
        parsed, folder = read_parsed(path), path.parent
    else:
        parsed = parse_text(recipe_text(str(recipe)), f"recipe {recipe}")
    examined = examine_text(parsed, kind="recipe")
    if not isinstance(examined.model, Recipe):
        raise InvalidInput(examined.problems)
    return OpenRecipe(examined.model, folder, examined.document)


def plan(
    recipe: RecipeLike,
    source: Path | str | None = None,
    *,
    converter: str = "streaming",
    offline: bool = False,
) -> Plan:
    """Resolve a recipe against the headers of its source; not one weight is read.

    Args:
        recipe: a ``Recipe``, or the path or built-in name of one.
        source: the root of the source, or one safetensors file, here or in a repository
            (``hf://owner/name@revision``); ``None``: where the recipe says.
        converter: who shall carry it out; what it cannot do is refused here.
        offline: whether a repository is read from the Hub's cache only.

    Raises:
        InvalidInput: with every problem found.
        HubError: the repository cannot be read.
    """
    loaded = open_recipe(recipe)
    with loaded.locating():
        check_capabilities(loaded.recipe, find_converter(converter))
        root, repository = source_root(loaded, source, offline=offline)
        with in_cache_only(repository, root):
            parts = open_parts(root, loaded.recipe.source.parts)
        planned = _with_statistics(make_plan(loaded.recipe, parts, statistics_files(loaded)))
        planned = replace(planned, repository=repository)
        if loaded.recipe.target.emit_loader:
            emitted = {LOADER_NAME: loader_source(Contents.of_plan(planned))}
            return replace(planned, extra_files={**planned.extra_files, **emitted})
        return planned


def source_root(
    loaded: OpenRecipe, source: Path | str | None, *, offline: bool = False
) -> tuple[Location, SourceRepository | None]:
    """Where the source of a recipe is, and the repository that this is in, if it is in one.

    Raises:
        InvalidInput: nobody says where; or there is no such repository or revision.
        HubError: the repository cannot be read.
    """
    address = source_address(loaded, source)
    if address is not None:
        with _pointing() if source is None else nullcontext():
            opened = open_address(address, offline=offline)
        return opened.root, opened.repository
    if source is not None:
        return Path(source), None
    if loaded.recipe.source.path is not None:
        return loaded.folder / loaded.recipe.source.path, None
    raise InvalidInput(
        Problem(
            "no-source",
            "the recipe names no local source",
            hint="Give the folder (or safetensors file) of the source on the command line.",
            pointer="/source",
        )
    )


@contextmanager
def _pointing() -> Iterator[None]:
    """Within it, what is wrong with a repository or a revision is wrong in the recipe."""
    places = {"no-repository": "/source/repo", "no-revision": "/source/revision"}
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(
            replace(
                problem,
                message=f"{problem.file}: {problem.message}",
                file=None,
                pointer=places.get(problem.kind),
            )
            for problem in error.problems
        ) from error


def source_address(loaded: OpenRecipe, source: Path | str | None) -> HubAddress | None:
    """The repository that the source is in; ``None`` if it is on this machine.

    Raises:
        InvalidInput: ``source`` is meant as an address, and is none.
    """
    if source is not None:
        text = str(source)
        return parse_address(text) if is_address(text) else None
    wanted = loaded.recipe.source
    if wanted.path is not None or wanted.repo is None:
        return None
    return HubAddress(wanted.repo, wanted.revision)


def statistics_files(loaded: OpenRecipe) -> dict[str, Path]:
    """The statistics files that the schemes of a recipe name, and where each lies."""
    return {name: loaded.folder / name for name in loaded.recipe.statistics()}


def _with_statistics(planned: Plan) -> Plan:
    """The plan, with the siblings that calibration found where the recipe names none.

    Every statistics file holds what is asked of it: what modules need was measured, in as many
    channels as they have; tokens were kept where they are needed.

    Raises:
        InvalidInput: with every problem of the statistics files.
    """
    problems: list[Problem] = []
    siblings: list[Siblings] = []
    proven: list[ProvenFold] = []
    files: dict[str, StatisticsFile] = {}
    for name, path in planned.statistics.items():
        if not path.exists():
            problems += _missing(planned, name, path)
            continue
        try:
            with open_statistics(path) as file:
                files[name] = file
                problems += _unmeasured(planned, name, file)
        except InvalidInput as error:
            problems += error.problems
            continue
        siblings += _found_siblings(planned, name, file.header)
        proven += file.header.folds
    if siblings and planned.recipe.siblings is None:
        found = tuple(dict.fromkeys(siblings))
        problems += differing(found, planned.modules)
        ties = [*folded(planned.folds), *found]
        planned = replace(planned, smoothing_groups=smoothing_groups(planned.modules, ties))
    problems += _no_tokens(planned, files)
    if len(files) == len(planned.statistics):
        problems += _not_proven(planned, proven)
    if problems:
        raise InvalidInput(problems)
    return planned


def _missing(planned: Plan, name: str, path: Path) -> Iterator[Problem]:
    for scheme, found in planned.recipe.schemes.items():
        for pointer, file in found.statistics().items():
            if file == name:
                yield Problem(
                    "no-statistics",
                    f"the statistics file does not exist: {path}",
                    hint="Write it with 'quantrecipe calibrate', or take what needs it out of the "
                    "scheme.",
                    pointer=f"/schemes/{scheme}{pointer}",
                )


def _unmeasured(planned: Plan, name: str, file: StatisticsFile) -> Iterator[Problem]:
    for module in planned.modules:
        needed = []
        if module.smoothing is not None and module.smoothing.statistics == name:
            needed.append("input_absmax")
        if second_moments(module.weight) == name:
            needed.append("input_second_moment")
        names = measured_as(module, file)
        if "input_second_moment" in needed and len(names) > 1:
            yield from _differing(module, file, names)
        for measured, what in product(names, needed):
            found, channels = file.tensors(*measured), module.source.in_features
            message = None
            if what not in found:
                message = f"{what} of {module.name!r} of part {module.part!r} was not measured"
            elif found[what].shape[1] != channels:
                message = (
                    f"shape {list(found[what].shape)}, but {module.name!r} of part "
                    f"{module.part!r} has {channels} input channels: expected [bins, {channels}]"
                )
            if message is not None:
                tensor = "/".join((*measured, what))
                yield Problem("statistics-mismatch", message, file=str(file.path), tensor=tensor)


def _differing(
    module: PlannedModule, file: StatisticsFile, names: Sequence[tuple[str, str]]
) -> Iterator[Problem]:
    """Pieces of a module that did not have the same input: a mean over neither would be right."""
    said = [file.module(*name, tokens=False).input_second_moment for name in names]
    for (_, name), other in zip(names[1:], said[1:], strict=True):
        if said[0] is not None and other is not None and not other.equal(said[0]):
            yield Problem(
                "statistics-mismatch",
                f"{names[0][1]!r} and {name!r} of part {module.part!r} become rows of "
                f"{module.name!r}, and their second moments differ",
                hint="Rows of one module have one input. Measure them in one run, or take one of "
                "them out of the file.",
                file=str(file.path),
                tensor="/".join((module.part, name, "input_second_moment")),
            )


def _found_siblings(planned: Plan, file: str, said: Statistics) -> Iterator[Siblings]:
    """The siblings of a statistics file that some are smoothed by, by the names of the plan."""
    smoothed = {
        (module.part, module.name)
        for module in planned.modules
        if module.smoothing is not None and module.smoothing.statistics == file
    }
    for group in found_siblings(planned, said):
        if any((group.part, name) in smoothed for name in group.modules):
            yield group


def found_siblings(planned: Plan, said: Statistics) -> Iterator[Siblings]:
    """The siblings that a statistics file says were found, by the names of the plan."""
    names: dict[tuple[str, str], list[str]] = {}
    for module in planned.modules:
        for name in {module.name, *module.source.renamed_from}:
            names.setdefault((module.part, name), []).append(module.name)
    for part, groups in said.siblings.items():
        for group in groups:
            found = sorted({new for name in group for new in names.get((part, name), ())})
            if len(found) > 1:
                yield Siblings(part, tuple(found))


def _not_proven(planned: Plan, proven: Iterable[ProvenFold]) -> Iterator[Problem]:
    """Edges that are used, and that no statistics file says to be proven where they are."""
    known: dict[tuple[str, str], int] = {}
    for one in proven:
        key = one.part, one.fold_sha256
        known[key] = max(known.get(key, 0), one.sites)
    places = Counter((site.edge, site.part) for site in planned.folds)
    for (edge, part), count in sorted(places.items()):
        there = known.get((part, fold_digest(planned.recipe.folds[edge])), 0)
        if there >= count:
            continue
        message = f"no statistics file says that it was proven on part {part!r}"
        if there:
            message = f"proven in {there} places of part {part!r}, and used in {count}"
        yield Problem(
            "fold-unproven",
            message,
            hint="Run quantrecipe calibrate with this recipe: it proves what can be proven, and "
            "says what to do about the rest.",
            pointer=f"/folds/{edge}",
        )


def _no_tokens(planned: Plan, files: Mapping[str, StatisticsFile]) -> Iterator[Problem]:
    """Groups whose alpha is to be chosen, and of which no tokens to do so by were kept."""
    modules = {(module.part, module.name): module for module in planned.modules}
    for group in planned.smoothing_groups:
        file = files.get(group.smoothing.statistics)
        if len(group.smoothing.candidates) == 1 or file is None:
            continue
        members = [modules[group.part, name] for name in group.modules]
        if not any(kept_tokens(module, file) for module in members):
            yield Problem(
                "no-tokens",
                f"no tokens were kept of {members[0].name!r} of part {group.part!r}, and alpha is "
                "chosen by them",
                hint="Calibrate again with --tokens 256, or give alpha as a number.",
                pointer=f"/schemes/{members[0].scheme}/smoothing/alpha/search",
                file=str(file.path),
            )
