"""Rules to plan: every module's scheme and every output tensor's place, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantrecipe.schema.canonical import canonical_bytes, digest
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule, read_part
from quantrecipe.schema.layout_writing import (
    has_place_for_bias,
    holds_many_parts,
    module_tensors,
    other_name,
    refusal,
)
from quantrecipe.schema.lock import Disposition, Role
from quantrecipe.schema.placement import parse_size, place
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedOther, placed
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, ScaledWeight
from quantrecipe.schema.selection import Selection, select
from quantrecipe.schema.tensors import OutputFilePlan, OutputTensor, SourcePart, TensorInfo

METADATA_KEY = "quantrecipe"
"""The one key of the safetensors metadata under which a file explains itself."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A module or other tensor whose outputs have no place yet."""

    file: str
    module: PlannedModule | None
    other: tuple[str, str, TensorInfo] | None
    outputs: Mapping[Role, OutputTensor]


def make_plan(recipe: Recipe, parts: Sequence[SourcePart], statistics: Path | None = None) -> Plan:
    """Resolve a recipe against the headers of its source.

    Args:
        recipe: validated.
        parts: the source's headers, one for each of ``recipe.source.parts``.
        statistics: the statistics file that its schemes name, already checked to exist.

    Raises:
        InvalidInput: with every problem found; pointers are into the recipe.
    """
    return _Planner(recipe, parts, statistics).run()


def recipe_metadata(recipe: Recipe, recipe_sha256: str) -> dict[str, str]:
    """The metadata entry that says what a file is, without its sidecars."""
    document = {"recipe": recipe.to_json_value(), "recipe_sha256": recipe_sha256, "version": 1}
    return {METADATA_KEY: canonical_bytes(document).decode()}


def check_selection(recipe: Recipe, parts: Sequence[SourcePart]) -> tuple[Problem, ...]:
    """What does not hold when the recipe's rules meet a checkpoint; nothing is resolved further."""
    try:
        make_plan(recipe, parts)
    except InvalidInput as error:
        return error.problems
    return ()


class _Planner:
    def __init__(
        self, recipe: Recipe, parts: Sequence[SourcePart], statistics: Path | None
    ) -> None:
        self.recipe = recipe
        self.parts = tuple(parts)
        self.statistics = statistics
        self.source_layout = resolve_layout(recipe.source.layout)
        self.target_layout = resolve_layout(recipe.target.layout)
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def run(self) -> Plan:
        contents = {part.name: self._read(part) for part in self.parts}
        self._check_unowned(contents)
        selection = select(self.recipe, contents)
        self.problems += selection.problems
        drafts = [
            draft
            for part in self.parts
            for draft in self._draft_part(part, contents[part.name], selection)
        ]
        self._check_target(contents)
        self._check_names(drafts)
        if self.problems:
            raise InvalidInput(self.problems)
        return self._place(drafts)

    def _read(self, part: SourcePart) -> PartContents:
        contents = read_part(self.source_layout, part)
        self.problems += contents.problems
        if not contents.modules and not contents.problems:
            self.problems.append(
                Problem(
                    "no-modules",
                    f"part {part.name!r} has no module with a two-dimensional weight in layout "
                    f"{self.source_layout.name!r}",
                    hint="quantrecipe inspect tells what layout a checkpoint is in.",
                    pointer="/source/layout",
                )
            )
        return contents

    def _check_unowned(self, contents: Mapping[str, PartContents]) -> None:
        """Every tensor of every file belongs to a part; what nobody claims would be lost."""
        claimed: dict[Path, set[str]] = {}
        for part in self.parts:
            for file in part.files:
                claimed.setdefault(file.path, set()).update(contents[part.name].claimed)
        seen: set[Path] = set()
        for part in self.parts:
            for file in part.files:
                if file.path in seen:
                    continue
                seen.add(file.path)
                lost = [name for name in file.tensors if name not in claimed[file.path]]
                if lost:
                    self.problems.append(
                        Problem(
                            "unowned-tensor",
                            f"{len(lost)} tensor(s) belong to no part in layout "
                            f"{self.source_layout.name!r}, the first {lost[0]!r}",
                            hint="Name every part in source.parts; nothing is left behind silently.",
                            file=str(file.path),
                            tensor=lost[0],
                            pointer="/source/parts",
                        )
                    )

    def _draft_part(
        self, part: SourcePart, contents: PartContents, selection: Selection
    ) -> Iterable[_Draft]:
        file = self._file_of(part.name)
        for name, module in contents.modules.items():
            draft = self._draft_module(part.name, name, module, selection)
            if draft is not None:
                yield replace(draft, file=file)
        for name, info in contents.others.items():
            output = OutputTensor(
                other_name(self.target_layout, part.name, name), info.dtype, info.shape
            )
            yield _Draft(file, None, (part.name, name, info), {"other": output})

    def _file_of(self, part: str) -> str:
        target = self.recipe.target
        return target.parts[part] if target.parts is not None else target.file

    def _draft_module(
        self, part: str, name: str, module: StoredModule, selection: Selection
    ) -> _Draft | None:
        taken = selection.taken.get((part, name))
        disposition: Disposition = "passthrough"
        weight: AnyWeight = self._passthrough(module)
        scheme = scheme_name = reason = None
        if taken is not None and taken.protected is not None:
            disposition, reason = "protected", taken.protected.reason
            weight = PlainWeight(format=taken.protected.dtype)
        elif taken is not None and taken.rule is not None:
            disposition, scheme_name = "quantized", taken.rule.scheme
            scheme = self.recipe.schemes[scheme_name]
            weight = scheme.weight
        smoothing = scheme.smoothing if scheme is not None else None
        pointer = taken.pointer if taken is not None else "/target/passthrough_dtype"
        bias = module.tensors.get("bias")
        if not self._fits(part, name, module, weight, pointer) or (
            smoothing is not None and not self._smoothable(part, name, module, smoothing.apply)
        ):
            return None
        refused = refusal(self.target_layout, weight, smoothing)
        if refused is not None:
            self._refuse("target-cannot-hold", refused[0], refused[1], pointer, name)
            return None
        if bias is not None and not has_place_for_bias(self.target_layout, weight):
            self._refuse(
                "target-cannot-hold",
                f"layout {self.target_layout.name!r} has no place for the bias of {name!r}",
                "Choose another layout.",
                pointer,
                name,
            )
            return None
        self._note_dropped(name, module)
        outputs = module_tensors(
            self.target_layout,
            part,
            name,
            (module.out_features, module.in_features),
            weight,
            smoothing=smoothing is not None and smoothing.apply == "online",
            bias=OutputTensor(bias.name, bias.dtype, bias.shape) if bias is not None else None,
        )
        planned = PlannedModule(
            part=part,
            name=name,
            source=module,
            disposition=disposition,
            weight=weight,
            activation=scheme.activation if scheme is not None else None,
            smoothing=smoothing,
            scheme=scheme_name,
            reason=reason,
            pattern=taken.pattern if taken is not None else None,
            pointer=taken.pointer if taken is not None else None,
            outputs={},
        )
        return _Draft("", planned, None, outputs)

    def _passthrough(self, module: StoredModule) -> AnyWeight:
        if isinstance(module.weight, PlainWeight):
            return module.weight
        dtype = self.recipe.target.passthrough_dtype
        return module.weight if dtype == "keep" else PlainWeight(format=dtype)

    def _fits(
        self, part: str, name: str, module: StoredModule, weight: AnyWeight, pointer: str
    ) -> bool:
        if isinstance(module.weight, ScaledWeight) and "smoothing" in module.tensors:
            # Its stored numbers mean something only together with factors that activations meet.
            self._refuse(
                "smoothed-source",
                f"{name!r} of part {part!r} is stored with smoothing factors",
                "Convert from the checkpoint that it was made from.",
                "/source",
                name,
            )
            return False
        reason = weight.refuses(module.out_features, module.in_features)
        if reason is None and 0 in (module.out_features, module.in_features):
            reason = None if isinstance(weight, PlainWeight) else "it is empty"
        if reason is not None:
            self._refuse(
                "shape-refused",
                f"{name!r} [{module.out_features}, {module.in_features}] cannot be stored as "
                f"{weight.format}: {reason}",
                "Protect it, or give it a scheme that takes its shape.",
                pointer,
                name,
            )
            return False
        return True

    def _smoothable(self, part: str, name: str, module: StoredModule, apply: str) -> bool:
        if apply == "fold":
            self._refuse(
                "fold-unsupported",
                f"folding the smoothing of {name!r} needs a fold graph, which a recipe of version 1 "
                "cannot declare",
                'Use "apply": "online" with a layout that stores the factors.',
                "/schemes",
                name,
            )
            return False
        return True

    def _note_dropped(self, name: str, module: StoredModule) -> None:
        if "input_scale" in module.tensors:
            self.warnings.append(
                Problem(
                    "input-scale-dropped",
                    f"the static activation scale of {name!r} is not carried over",
                    hint="It belongs to the source's activation format.",
                    tensor=module.tensors["input_scale"].name,
                )
            )

    def _check_target(self, contents: Mapping[str, PartContents]) -> None:
        files = [self._file_of(part) for part in contents]
        shared = len(set(files)) < len(files)
        if shared and not holds_many_parts(self.target_layout):
            self.problems.append(
                Problem(
                    "parts-share-file",
                    f"layout {self.target_layout.name!r} does not say in a tensor's name which part "
                    "it belongs to, so parts cannot share a file",
                    hint="Give each part a file of its own in target.parts.",
                    pointer="/target",
                )
            )

    def _check_names(self, drafts: Sequence[_Draft]) -> None:
        seen: dict[tuple[str, str], str] = {}
        for draft in drafts:
            owner = draft.module.name if draft.module else draft.other[1] if draft.other else ""
            for tensor in draft.outputs.values():
                other = seen.setdefault((draft.file, tensor.name), owner)
                if other != owner:
                    self.problems.append(
                        Problem(
                            "name-collision",
                            f"{owner!r} and {other!r} would both be written as {tensor.name!r}",
                            hint="Choose a target layout whose names tell them apart.",
                            pointer="/target/layout",
                            tensor=tensor.name,
                        )
                    )

    def _refuse(self, kind: str, message: str, hint: str, pointer: str, tensor: str) -> None:
        self.problems.append(Problem(kind, message, hint=hint, pointer=pointer, tensor=tensor))

    def _place(self, drafts: Sequence[_Draft]) -> Plan:
        recipe_sha256 = digest(self.recipe.to_json_value())
        files: list[OutputFilePlan] = []
        extra: dict[str, bytes] = {}
        homes: dict[tuple[str, str], OutputFilePlan] = {}
        size = self.recipe.target.max_shard_size
        for path in sorted({draft.file for draft in drafts}):
            mine = [draft for draft in drafts if draft.file == path]
            tensors = [tensor for draft in mine for tensor in draft.outputs.values()]
            groups = {
                tensor.name: f"{draft.module.part}/{draft.module.name}"
                for draft in mine
                if draft.module is not None
                for tensor in draft.outputs.values()
            }
            placed_files, index, index_path = place(
                tensors,
                self._metadata(path, recipe_sha256),
                path,
                parse_size(size) if size is not None else None,
                groups,
            )
            files += placed_files
            if index is not None and index_path is not None:
                extra[index_path] = index
            for file in placed_files:
                homes.update(((path, name), file) for name in file.tensors)
        modules: list[PlannedModule] = []
        others: list[PlannedOther] = []
        for draft in drafts:
            outputs = {
                role: placed(tensor, homes[draft.file, tensor.name])
                for role, tensor in draft.outputs.items()
            }
            if draft.module is not None:
                modules.append(replace(draft.module, outputs=outputs))
            elif draft.other is not None:
                others.append(PlannedOther(*draft.other, outputs["other"]))
        return Plan(
            recipe=self.recipe,
            recipe_sha256=recipe_sha256,
            source_layout=self.source_layout,
            target_layout=self.target_layout,
            parts=self.parts,
            modules=tuple(modules),
            others=tuple(others),
            files=tuple(files),
            extra_files=extra,
            statistics=self.statistics,
            warnings=tuple(self.warnings),
        )

    def _metadata(self, path: str, recipe_sha256: str) -> dict[str, str]:
        """The source's own entries, the target layout's over them, and the recipe."""
        metadata: dict[str, str] = {}
        parts = [part for part in self.parts if self._file_of(part.name) == path]
        for part in parts:
            for file in part.files:
                for key, value in file.metadata.items():
                    if metadata.setdefault(key, value) != value:
                        metadata[f"{part.name}.{key}"] = value
        metadata.pop(METADATA_KEY, None)
        return metadata | self.target_layout.metadata | recipe_metadata(self.recipe, recipe_sha256)
