"""The plan: recipe and source headers, resolved down to every output tensor's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from quantrecipe.schema.folds import FoldSite
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.lock import Disposition, Role, SourceRepository, Transfer
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import (
    Absmax,
    AnyWeight,
    DynamicActivation,
    Hadamard,
    PlainWeight,
    ScaledWeight,
    SmoothQuant,
)
from quantrecipe.schema.storage import AS_IT_IS, WRITTEN_ANEW, Storage
from quantrecipe.schema.tensors import (
    OutputFilePlan,
    OutputTensor,
    SourceFileInfo,
    SourcePart,
    TensorInfo,
)

_WIDENED: Final = {"bfloat16": 1, "float16": 1, "float32": 2}


def carries(
    source: StoredModule,
    weight: AnyWeight,
    disposition: Disposition,
    *,
    smoothed: bool,
    rotation: Hadamard | None,
) -> bool:
    """Whether a module is to be stored in the format that the source has it in.

    Args:
        source: how the source holds it.
        weight: how it shall be stored.
        disposition: what decided that.
        smoothed: whether its columns are multiplied by factors.
        rotation: what its columns shall be rotated by.
    """
    if smoothed or rotation != source.rotation:
        return False
    if isinstance(weight, PlainWeight) or isinstance(source.weight, PlainWeight):
        return weight == source.weight and disposition != "quantized"
    if not isinstance(weight.quantizer, Absmax):
        return False
    return as_stored(source.weight, weight) == weight


def as_stored(source: ScaledWeight, weight: ScaledWeight) -> ScaledWeight:
    """``source`` with the quantizer of ``weight``, and scales in a wider dtype if it asks so."""
    one, other = _WIDENED.get(source.scale_dtype, 0), _WIDENED.get(weight.scale_dtype, 0)
    same: dict[str, object] = {"quantizer": weight.quantizer}
    if 0 < one < other:
        same["scale_dtype"] = weight.scale_dtype
    return source.model_copy(update=same)


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
        anew: whether its codes are computed anew although the source has them in this format, since
            the target has no place for the factors that those are stored with.
        multiplied: whether its columns are multiplied by factors that are folded elsewhere.
        divided: whether rows of it are divided by factors that are folded into it.
        storage: how tensors lie there that are not as they are in memory, by role.
        marker: what a marker says of it, ``$offset`` left open; ``None`` where there is none.
        marker_length: to how many bytes the marker is filled up, if it is.
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
    anew: bool = False
    multiplied: bool = False
    divided: bool = False
    storage: Mapping[str, Storage] = field(default_factory=dict)
    marker: Mapping[str, Any] | None = None
    marker_length: int | None = None

    def stored(self, role: str) -> Storage:
        """How its tensor of this role will lie on disk."""
        return self.storage.get(role, AS_IT_IS)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the output."""
        return sum(tensor.nbytes for tensor in self.outputs.values())

    @property
    def rotation_size(self) -> int | None:
        """The columns in a block of its rotation; ``None``: it is not rotated."""
        return None if self.rotation is None else self.rotation.size

    @property
    def carried(self) -> bool:
        """Whether its numbers, or codes and scales, go over as they are, wherever they lie."""
        return not (self.anew or self.multiplied or self.divided) and carries(
            self.source,
            self.weight,
            self.disposition,
            smoothed=self.smoothing is not None,
            rotation=self.rotation,
        )

    @property
    def transfer(self) -> Transfer:
        """What becomes of the numbers that the source holds."""
        if self.carried:
            inverted = self.source.stored("second_scale") != self.stored("second_scale")
            if inverted and isinstance(self.weight, ScaledWeight) and self.weight.has_two_levels:
                return "inverted"
            return "lossless"
        if isinstance(self.source.weight, PlainWeight):
            return "cast" if isinstance(self.weight, PlainWeight) else "quantized"
        return "dequantized" if isinstance(self.weight, PlainWeight) else "requantized"

    def same_bytes(self, role: Role) -> bool:
        """Whether a tensor of a module that is carried over has the bytes that it has now."""
        info, output = self.source.tensors.get(role), self.outputs[role]
        if info is None or role in WRITTEN_ANEW or info.nbytes != output.nbytes:
            return False
        same = info.dtype == output.dtype or {info.dtype, output.dtype} == {
            "uint8",
            "float8_e8m0fnu",
        }
        return same and self.source.stored(role) == self.stored(role)


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
        source_layout, target_layout, names: resolved.
        parts: the source, by its headers.
        modules: in order of part and name.
        others: likewise.
        smoothing_groups: every smoothed module in one of them; in order of part and first name.
        folds: where smoothing is folded, in order of part and what it is folded into.
        files: the output files, down to every offset.
        extra_files: further small files with their bytes (a shard index, a loader), by path.
        statistics: the statistics files, by the paths that schemes name them by.
        warnings: what is worth knowing and refuses nothing.
        repository: where the source is, unless it is on this machine.
    """

    recipe: Recipe
    recipe_sha256: str
    source_layout: Layout
    target_layout: Layout
    names: tuple[NameMapping, ...]
    parts: tuple[SourcePart, ...]
    modules: tuple[PlannedModule, ...]
    others: tuple[PlannedOther, ...]
    smoothing_groups: tuple[SmoothingGroup, ...]
    folds: tuple[FoldSite, ...]
    files: tuple[OutputFilePlan, ...]
    extra_files: Mapping[str, bytes]
    statistics: Mapping[str, Path]
    warnings: tuple[Problem, ...]
    repository: SourceRepository | None = None

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
