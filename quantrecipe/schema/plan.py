"""The plan: recipe and source headers, resolved down to every output tensor's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from quantrecipe.schema.folds import FoldSite
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.lock import Disposition, Role
from quantrecipe.schema.packings import Packing
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import AnyWeight, DynamicActivation, Hadamard, SmoothQuant
from quantrecipe.schema.tensors import (
    OutputFilePlan,
    OutputTensor,
    SourceFileInfo,
    SourcePart,
    TensorInfo,
)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """An output tensor with its place.

    Attributes:
        name, dtype, shape: as on disk.
        file: below the output folder.
        offset: of its first byte, from the start of the file.
        nbytes: its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """What becomes of one module.

    Attributes:
        part, name: which.
        source: how the source holds it.
        disposition: quantized by a rule, protected, or passed through.
        weight: how its weight is stored.
        activation, smoothing, rotation: as its scheme says.
        scheme: the scheme's name; ``None`` unless quantized.
        reason: why it is protected; ``None`` unless it is.
        pattern: the pattern that took it; ``None`` if passed through.
        pointer: the rule or protected entry that took it, as a JSON pointer.
        outputs: what it is stored as, by role.
        multiplied: whether its columns are multiplied by factors that are folded elsewhere.
        divided: whether rows of it are divided by factors that are folded into it.
        packings: how codes and zero points are packed there, by role.
    """

    part: str
    name: str
    source: StoredModule
    disposition: Disposition
    weight: AnyWeight
    activation: DynamicActivation | None
    smoothing: SmoothQuant | None
    rotation: Hadamard | None
    scheme: str | None
    reason: str | None
    pattern: str | None
    pointer: str | None
    outputs: Mapping[Role, PlannedTensor]
    multiplied: bool = False
    divided: bool = False
    packings: Mapping[str, Packing] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the output."""
        return sum(tensor.nbytes for tensor in self.outputs.values())

    @property
    def rotation_size(self) -> int | None:
        """The columns in a block of its rotation; ``None``: it is not rotated."""
        return None if self.rotation is None else self.rotation.size

    @property
    def copied(self) -> bool:
        """Whether its weight passes through byte for byte."""
        changed = self.disposition == "quantized" or self.multiplied or self.divided
        return self.weight == self.source.weight and not changed


@dataclass(frozen=True, slots=True)
class PlannedOther:
    """A tensor of no module: copied byte for byte, unless factors are folded into it.

    Attributes:
        part, name: which, by its name inside the part.
        source: where it lies.
        output: where it goes.
        divided: whether it is divided by factors that are folded into it; then it is a vector.
    """

    part: str
    name: str
    source: TensorInfo
    output: PlannedTensor
    divided: bool = False


@dataclass(frozen=True, slots=True)
class SmoothingGroup:
    """Modules of one part that share their smoothing factors.

    Attributes:
        part: whose.
        modules: their names, sorted; one, if it has no siblings that are smoothed.
        unsmoothed: siblings that are not smoothed; their weights have no part in the factors.
        smoothing: as the schemes of all of them say.
    """

    part: str
    modules: tuple[str, ...]
    unsmoothed: tuple[str, ...]
    smoothing: SmoothQuant


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a converter has to know; nothing in it depends on time, machine or worker.

    Attributes:
        recipe: what was asked for.
        recipe_sha256: digest of its canonical form.
        source_layout, target_layout: resolved.
        parts: the source, by its headers.
        modules: in order of part and name.
        others: likewise.
        smoothing_groups: every smoothed module in one of them; in order of part and first name.
        folds: where smoothing is folded, in order of part and what it is folded into.
        files: the output files, down to every offset.
        extra_files: further small files with their bytes (a shard index, a loader), by path.
        statistics: the statistics files, by the paths that schemes name them by.
        warnings: what is worth knowing and refuses nothing.
    """

    recipe: Recipe
    recipe_sha256: str
    source_layout: Layout
    target_layout: Layout
    parts: tuple[SourcePart, ...]
    modules: tuple[PlannedModule, ...]
    others: tuple[PlannedOther, ...]
    smoothing_groups: tuple[SmoothingGroup, ...]
    folds: tuple[FoldSite, ...]
    files: tuple[OutputFilePlan, ...]
    extra_files: Mapping[str, bytes]
    statistics: Mapping[str, Path]
    warnings: tuple[Problem, ...]

    @property
    def source_files(self) -> tuple[SourceFileInfo, ...]:
        """Every file that is read, once each."""
        files = {file.path: file for part in self.parts for file in part.files}
        return tuple(files.values())

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        modules = sum(module.source.nbytes for module in self.modules)
        return modules + sum(other.source.nbytes for other in self.others)

    @property
    def output_bytes(self) -> int:
        """Bytes of the files that are written, headers included."""
        return sum(file.size for file in self.files)

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every output tensor."""
        for module in self.modules:
            yield from module.outputs.values()
        for other in self.others:
            yield other.output


def placed(tensor: OutputTensor, file: OutputFilePlan) -> PlannedTensor:
    """``tensor`` with the place that ``file`` gives it."""
    return PlannedTensor(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        file.path,
        file.offsets[tensor.name],
        tensor.nbytes,
    )
