"""Rules to plan: every module's scheme and every output tensor's place, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.config_fragments import config_refusal
from quantrecipe.schema.layout_reading import PartContents, read_part
from quantrecipe.schema.layout_writing import holds_many_parts
from quantrecipe.schema.location import Location
from quantrecipe.schema.module_metadata import module_metadata
from quantrecipe.schema.placement import parse_size, place
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedOther, placed
from quantrecipe.schema.plan_drafts import Draft, Drafter
from quantrecipe.schema.plan_folds import PlannedFolds, plan_folds
from quantrecipe.schema.plan_metadata import (
    METADATA_KEY,
    carried_over,
    conflicts,
    recipe_metadata,
)
from quantrecipe.schema.plan_readback import misread
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.provenance import rotated_source, with_rotations
from quantrecipe.schema.quantization_config import config_path
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import resolve_layout, resolve_names
from quantrecipe.schema.renaming import renamed
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.selection import module_names, select
from quantrecipe.schema.siblings import Siblings, differing, folded, smoothing_groups, tie
from quantrecipe.schema.tensors import OutputFilePlan, SourceFileInfo, SourcePart

__all__ = ["METADATA_KEY", "check_selection", "make_plan", "recipe_metadata"]


def make_plan(
    recipe: Recipe, parts: Sequence[SourcePart], statistics: Mapping[str, Path] | None = None
) -> Plan:
    """Resolve a recipe against the headers of its source.

    The plan does not depend on the order of parts, or of tensors in a file.

    Args:
        recipe: validated.
        parts: the source's headers, one for each of ``recipe.source.parts``.
        statistics: the statistics files, by the paths that its schemes name them by.

    Raises:
        InvalidInput: with every problem found; pointers are into the recipe.
    """
    return _Planner(recipe, parts, statistics or {}).run()


def check_selection(recipe: Recipe, parts: Sequence[SourcePart]) -> tuple[Problem, ...]:
    """What does not hold when the recipe's rules meet a checkpoint; nothing is resolved further."""
    try:
        make_plan(recipe, parts)
    except InvalidInput as error:
        return error.problems
    return ()


class _Planner:
    def __init__(
        self, recipe: Recipe, parts: Sequence[SourcePart], statistics: Mapping[str, Path]
    ) -> None:
        self.recipe = recipe
        self.parts = tuple(sorted(parts, key=lambda part: part.name))
        self.statistics = statistics
        self.source_layout = resolve_layout(recipe.source.layout)
        self.target_layout = resolve_layout(recipe.target.layout)
        self.names = resolve_names(recipe.target.names)

    def run(self) -> Plan:
        read = {
            part.name: with_rotations(self.source_layout, part, read_part(self.source_layout, part))
            for part in self.parts
        }
        contents = {name: renamed(found, self.names) for name, found in read.items()}
        problems = [problem for found in contents.values() for problem in found.problems]
        for part in self.parts:
            problems += rotated_source(part, read[part.name])
        problems += self._check_modules(contents)
        problems += self._check_owners(contents)
        selection = select(self.recipe, contents)
        problems += selection.problems
        drafter = Drafter(self.recipe, self.target_layout, selection)
        drafts = [
            draft for name, found in contents.items() for draft in drafter.drafts(name, found)
        ]
        problems += drafter.refused
        modules = [draft.module for draft in drafts if draft.module is not None]
        ties = tie(
            self.recipe.siblings or (),
            {name: module_names(found) for name, found in contents.items()},
        )
        problems += ties.problems
        problems += differing(ties.siblings, modules)
        folds = plan_folds(self.recipe, contents, modules)
        problems += folds.problems
        problems += self._check_target()
        problems += self._check_config(modules)
        problems += self._check_names(drafts)
        if not problems:
            problems += misread(self.target_layout, drafts)
        if problems:
            raise InvalidInput(problems)
        warnings = [*drafter.dropped]
        warnings += [conflict for part in self.parts for conflict in conflicts(part)]
        return self._place(drafts, ties.siblings, folds, tuple(warnings))

    def _check_modules(self, contents: Mapping[str, PartContents]) -> Iterator[Problem]:
        for name, found in contents.items():
            if not found.modules and not found.problems:
                yield Problem(
                    "no-modules",
                    f"part {name!r} has no module with a two-dimensional weight in layout "
                    f"{self.source_layout.name!r}",
                    hint="quantrecipe inspect tells what layout a checkpoint is in.",
                    pointer="/source/layout",
                )

    def _check_owners(self, contents: Mapping[str, PartContents]) -> Iterator[Problem]:
        """Every tensor of every file belongs to one part, or it would be lost or written twice."""
        files: dict[Location, SourceFileInfo] = {}
        owners: dict[Location, list[str]] = {}
        for part in self.parts:
            for file in part.files:
                files[file.path] = file
                owners.setdefault(file.path, []).append(part.name)
        for path, file in sorted(files.items()):
            claims = [contents[name].claimed for name in owners[path]]
            lost, shared = [], []
            for tensor in sorted(file.tensors):
                count = sum(tensor in claimed for claimed in claims)
                if not count:
                    lost.append(tensor)
                elif count > 1 and tensor not in self.source_layout.markers:
                    shared.append(tensor)
            yield from self._unowned(path, lost)
            yield from self._shared(path, shared, owners[path])

    def _unowned(self, path: Location, lost: Sequence[str]) -> Iterator[Problem]:
        if lost:
            yield Problem(
                "unowned-tensor",
                f"{len(lost)} tensor(s) belong to no part in layout {self.source_layout.name!r}, "
                f"the first {lost[0]!r}",
                hint="Name every part in source.parts; nothing is left behind silently.",
                file=str(path),
                tensor=lost[0],
                pointer="/source/parts",
            )

    def _shared(
        self, path: Location, shared: Sequence[str], parts: Iterable[str]
    ) -> Iterator[Problem]:
        if shared:
            yield Problem(
                "shared-tensor",
                f"{len(shared)} tensor(s) belong to more than one of the parts {', '.join(parts)} "
                f"in layout {self.source_layout.name!r}, the first {shared[0]!r}",
                hint="Parts share a file only in a layout that tells them apart by name.",
                file=str(path),
                tensor=shared[0],
                pointer="/source/parts",
            )

    def _parts_collide(self) -> bool:
        files = [self.recipe.target.file_of(part.name) for part in self.parts]
        return len(set(files)) < len(files) and not holds_many_parts(self.target_layout)

    def _check_target(self) -> Iterator[Problem]:
        if self._parts_collide():
            yield Problem(
                "parts-share-file",
                f"layout {self.target_layout.name!r} does not say in a tensor's name which part "
                "it belongs to, so parts cannot share a file",
                hint="Give each part a file of its own in target.parts.",
                pointer="/target",
            )
        suffix = f".{self.target_layout.container}"
        for path in sorted({self.recipe.target.file_of(part.name) for part in self.parts}):
            if not path.endswith(suffix):
                yield Problem(
                    "wrong-suffix",
                    f"layout {self.target_layout.name!r} is one of {suffix} files, and the target "
                    f"is called {path!r}",
                    hint=f"End its name in {suffix}.",
                    pointer="/target",
                )
        if self.target_layout.container == "gguf" and self.recipe.target.max_shard_size:
            yield Problem(
                "no-shards",
                "a GGUF file is not cut into shards",
                hint="Take the size out.",
                pointer="/target/max_shard_size",
            )
        configs = {config_path(self.recipe.target.file_of(part.name)) for part in self.parts}
        if self.target_layout.config is not None and len(configs) < len(self.parts):
            yield Problem(
                "parts-share-config",
                f"layout {self.target_layout.name!r} writes a config.json for each part, and some "
                "parts go into the same folder",
                hint="Give each part a folder of its own in target.parts.",
                pointer="/target",
            )

    def _check_config(self, modules: Iterable[PlannedModule]) -> Iterator[Problem]:
        """What is written into the config.json of each part can say how its weights are stored."""
        formats: dict[str, set[str]] = {}
        for module in modules:
            if isinstance(module.weight, ScaledWeight):
                formats.setdefault(module.part, set()).add(module.weight.format)
        for part, found in formats.items():
            refused = config_refusal(self.target_layout, found)
            if refused is not None:
                yield Problem(
                    "config-cannot-say",
                    f"part {part!r} has weights in {' and '.join(sorted(found))}: {refused[0]}",
                    hint=refused[1],
                    pointer="/target/layout",
                )

    def _check_names(self, drafts: Iterable[Draft]) -> Iterator[Problem]:
        """Every tensor of a file has a name of its own."""
        seen: dict[tuple[str, str, str], str] = {}
        # Parts that collide as a whole have been refused for that.
        apart = self._parts_collide()
        for draft in drafts:
            for role, tensor in draft.outputs.items():
                owner = f"{draft.name!r} of part {draft.part!r} ({role.replace('_', ' ')})"
                key = (draft.file, draft.part if apart else "", tensor.name)
                other = seen.setdefault(key, owner)
                if other == owner and tensor.name != "__metadata__":
                    continue
                owners = " and of ".join(dict.fromkeys([other, owner]))
                yield Problem(
                    "name-collision",
                    f"{tensor.name!r} would be the name of {owners}",
                    hint="Choose a target layout whose names tell them apart.",
                    pointer="/target/layout",
                    tensor=tensor.name,
                )

    def _place(
        self,
        drafts: Sequence[Draft],
        siblings: Iterable[Siblings],
        folds: PlannedFolds,
        warnings: tuple[Problem, ...],
    ) -> Plan:
        sha256 = recipe_digest(self.recipe)
        files: list[OutputFilePlan] = []
        extra: dict[str, bytes] = {}
        homes: dict[tuple[str, str], OutputFilePlan] = {}
        by_file: dict[str, list[Draft]] = {}
        for draft in drafts:
            by_file.setdefault(draft.file, []).append(draft)
        for path, mine in sorted(by_file.items()):
            placed_files, index, index_path = self._place_file(path, mine, sha256)
            files += placed_files
            if index is not None and index_path is not None:
                extra[index_path] = index
            for file in placed_files:
                homes.update(((path, name), file) for name in file.tensors)
        _check_paths(files)
        modules: list[PlannedModule] = []
        others: list[PlannedOther] = []
        multiplied, divided = folds.multiplied, folds.divided
        for draft in drafts:
            key = draft.part, draft.name
            outputs = {
                role: placed(tensor, homes[draft.file, tensor.name])
                for role, tensor in draft.outputs.items()
            }
            if draft.module is not None:
                modules.append(
                    replace(
                        draft.module,
                        outputs=outputs,
                        multiplied=key in multiplied,
                        divided=key in divided,
                    )
                )
            elif draft.other is not None:
                others.append(PlannedOther(*key, draft.other, outputs["other"], key in divided))
        return Plan(
            recipe=self.recipe,
            recipe_sha256=sha256,
            source_layout=self.source_layout,
            target_layout=self.target_layout,
            names=self.names,
            parts=self.parts,
            modules=tuple(modules),
            others=tuple(others),
            smoothing_groups=smoothing_groups(modules, [*folded(folds.sites), *siblings]),
            folds=folds.sites,
            files=tuple(files),
            extra_files=extra,
            statistics=self.statistics,
            warnings=warnings,
        )

    def _place_file(
        self, path: str, drafts: Iterable[Draft], sha256: str
    ) -> tuple[tuple[OutputFilePlan, ...], bytes | None, str | None]:
        size = self.recipe.target.max_shard_size
        drafts = tuple(drafts)
        tensors, groups = [], {}
        for draft in drafts:
            for tensor in draft.outputs.values():
                tensors.append(tensor)
                if draft.module is not None:
                    groups[tensor.name] = f"{draft.part}/{draft.name}"
        return place(
            tensors,
            self._metadata(path, sha256, module_metadata(self.target_layout, drafts)),
            path,
            parse_size(size) if size is not None else None,
            groups,
            self.target_layout.container,
        )

    def _metadata(self, path: str, sha256: str, own: Mapping[str, str]) -> dict[str, str]:
        """The source's own entries, the target layout's over them, and the recipe.

        Args:
            path: of the file, before it is cut into shards.
            sha256: digest of the recipe.
            own: what the layout says of the modules in it.
        """
        parts = [part for part in self.parts if self.recipe.target.file_of(part.name) == path]
        return {
            **carried_over(parts, self.source_layout),
            **self.target_layout.metadata,
            **own,
            **recipe_metadata(self.recipe, sha256),
        }


def _check_paths(files: Iterable[OutputFilePlan]) -> None:
    """The shards of one part may be called as the file of another is."""
    seen: set[str] = set()
    for file in files:
        # Names that differ in case alone are one file on some systems.
        if file.path.casefold() in seen:
            raise InvalidInput(
                Problem(
                    "duplicate-file",
                    f"two output files would be called {file.path!r}",
                    hint="Rename one of the files; shards get numbers after the name.",
                    pointer="/target/parts",
                )
            )
        seen.add(file.path.casefold())
