"""From a source's modules to what they are stored as, or to why they cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from quantrecipe.schema.dtypes import BLOCK_DTYPES
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.layout_writing import (
    has_place_for_bias,
    marker_of,
    marker_template,
    missing_role,
    module_tensors,
    other_name,
    refusal,
    storage_of,
    unfit,
    vector_dtype,
)
from quantrecipe.schema.lock import Disposition, Role
from quantrecipe.schema.merging import row_by_row
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.problems import Problem, Reasons
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    AnyWeight,
    PlainWeight,
    ScaledWeight,
    SmoothQuant,
)
from quantrecipe.schema.selection import Selection, Taken
from quantrecipe.schema.tensors import OutputTensor, TensorInfo

_NARROW: Final = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Draft:
    """A module or other tensor whose outputs have no place yet.

    Attributes:
        part, name: which.
        file: the output file, before it is cut into shards.
        module: the module; its ``outputs`` are empty still.
        other: the tensor of no module, as the source has it.
        outputs: what it is stored as, by role.
    """

    part: str
    name: str
    file: str
    module: PlannedModule | None
    other: TensorInfo | None
    outputs: Mapping[Role, OutputTensor]


@dataclass(frozen=True, slots=True)
class Drafter:
    """Makes drafts, and keeps what is wrong with those that it cannot make."""

    recipe: Recipe
    target: Layout
    selection: Selection
    refused: Reasons = field(default_factory=Reasons)
    dropped: Reasons = field(default_factory=Reasons)

    def drafts(self, part: str, contents: PartContents) -> Iterator[Draft]:
        """One draft for each module of a part that can be stored, and one for each other tensor."""
        file = self.recipe.target.file_of(part)
        for name, module in contents.modules.items():
            draft = self._module(part, name, module, file)
            if draft is not None:
                yield draft
        for name, info in contents.others.items():
            if info.dtype in BLOCK_DTYPES and self.target.container != "gguf":
                self.refused.add(_records(info.dtype), info.name)
                continue
            dtype = vector_dtype(self.target, info)
            output = OutputTensor(other_name(self.target, part, name), dtype, info.shape)
            yield Draft(part, name, file, None, info, {"other": output})

    def _module(self, part: str, name: str, module: StoredModule, file: str) -> Draft | None:
        planned = self._decide(part, name, module, self.selection.taken.get((part, name)))
        bias = module.tensors.get("bias")
        problem = self._refusal(planned)
        if problem is not None:
            self.refused.add(problem, name)
            return None
        if "input_scale" in module.tensors:
            self.dropped.add(_input_scale(part), module.tensors["input_scale"].name)
        shape, decoded = (module.out_features, module.in_features), decoded_dtype(module)
        dtype = None if bias is None else vector_dtype(self.target, bias)
        outputs = module_tensors(
            self.target,
            part,
            name,
            shape,
            planned.weight,
            smoothing=_stores_factors(planned),
            rotation=planned.rotation,
            decoded=decoded,
            bias=OutputTensor(bias.name, dtype, bias.shape) if bias is not None and dtype else None,
        )
        planned = replace(planned, storage=storage_of(self.target, planned.weight))
        marker = marker_template(self.target, planned.weight)
        if marker is not None:
            said = marker_of(
                marker, planned.weight, shape, rotation=planned.rotation, decoded=decoded
            )
            planned = replace(planned, marker=said, marker_length=marker.length)
        return Draft(part, name, file, planned, None, outputs)

    def _decide(
        self, part: str, name: str, module: StoredModule, taken: Taken | None
    ) -> PlannedModule:
        """What becomes of a module, whether or not that is possible."""
        disposition: Disposition = "passthrough"
        weight = self._passed_through(module)
        scheme = scheme_name = reason = None
        rotation = module.rotation if isinstance(weight, ScaledWeight) else None
        if taken is not None and taken.protected is not None:
            disposition, reason = "protected", taken.protected.reason
            weight, rotation = PlainWeight(format=taken.protected.dtype), None
        elif taken is not None and taken.rule is not None:
            disposition, scheme_name = "quantized", taken.rule.scheme
            scheme = self.recipe.schemes[scheme_name]
            weight, rotation = scheme.weight, scheme.rotation
            module = row_by_row(module, weight)
        return PlannedModule(
            part=part,
            name=name,
            source=module,
            disposition=disposition,
            weight=weight,
            activation=scheme.activation if scheme is not None else None,
            smoothing=scheme.smoothing if scheme is not None else None,
            rotation=rotation,
            scheme=scheme_name,
            reason=reason,
            pattern=taken.pattern if taken is not None else None,
            pointer=taken.pointer if taken is not None else None,
            outputs={},
            anew=disposition == "quantized" and self._loses_factors(module, weight),
        )

    def _loses_factors(self, module: StoredModule, weight: AnyWeight) -> bool:
        """Whether a module comes with smoothing factors that the target has no place for."""
        if "smoothing" not in module.tensors or isinstance(weight, PlainWeight):
            return False
        return refusal(self.target, weight) is None and (
            refusal(self.target, weight, smoothed=True, factors=True) is not None
        )

    def _passed_through(self, module: StoredModule) -> AnyWeight:
        dtype = self.recipe.target.passthrough_dtype
        if isinstance(module.weight, PlainWeight):
            return module.weight
        if dtype != "keep":
            return PlainWeight(format=dtype)
        return self._widened(module.weight)

    def _widened(self, weight: AnyScaledWeight) -> AnyScaledWeight:
        """The same weight with its scales in float32, if the target takes them in nothing else."""
        if refusal(self.target, weight) is None or weight.scale_dtype not in _NARROW:
            return weight
        wide = weight.model_copy(update={"scale_dtype": "float32"})
        return wide if refusal(self.target, wide) is None else weight

    def _refusal(self, module: PlannedModule) -> Problem | None:
        return (
            _shape(module)
            or _rotated(module)
            or self._unsaid(module)
            or self._format(module)
            or self._packing(module)
            or self._roles(module)
        )

    def _unsaid(self, module: PlannedModule) -> Problem | None:
        """Rotated codes that pass through to where nothing but a scheme says that they are."""
        if module.rotation is None or module.disposition == "quantized":
            return None
        marker = marker_template(self.target, module.weight)
        if marker is not None and marker.rotated is not None:
            return None
        return Problem(
            "rotation-unsaid",
            f"it is stored rotated, and files of layout {self.target.name!r} do not say so of what "
            "passes through",
            hint="Give it to a rule whose scheme has the same weight format and the same rotation: "
            "then its codes are carried over, and the recipe in the file says the rest.",
            pointer="/target/passthrough_dtype",
        )

    def _format(self, module: PlannedModule) -> Problem | None:
        refused = refusal(self.target, module.weight)
        pointer = "/target/passthrough_dtype"
        if module.disposition == "protected":
            pointer = f"{module.pointer}/dtype"
        if module.scheme is not None:
            pointer = f"/schemes/{module.scheme}/weight"
        if refused is None and (module.smoothing is not None or _stores_factors(module)):
            refused = refusal(
                self.target, module.weight, smoothed=True, factors=_stores_factors(module)
            )
            if module.scheme is not None and module.smoothing is not None:
                pointer = f"/schemes/{module.scheme}/smoothing"
        if refused is None and module.rotation is not None:
            refused = refusal(self.target, module.weight, rotation=module.rotation)
            if module.scheme is not None:
                pointer = f"/schemes/{module.scheme}/rotation"
        if refused is None:
            return None
        return Problem("target-cannot-hold", refused[0], hint=refused[1], pointer=pointer)

    def _packing(self, module: PlannedModule) -> Problem | None:
        source = module.source
        shape = source.out_features, source.in_features
        reason = unfit(self.target, module.weight, shape)
        return None if reason is None else _shape_refused(module, reason)

    def _roles(self, module: PlannedModule) -> Problem | None:
        bias = "bias" in module.source.tensors
        if bias and not has_place_for_bias(self.target, module.weight):
            return Problem(
                "target-cannot-hold",
                f"layout {self.target.name!r} has no place for the bias of a module in "
                f"{module.weight.format}",
                hint="Choose another layout.",
                pointer="/target/layout",
            )
        lacking = missing_role(
            self.target, module.weight, smoothing=_stores_factors(module), bias=bias
        )
        if lacking is None:
            return None
        return Problem(
            "target-asks-for-more", lacking[0], hint=lacking[1], pointer="/target/layout"
        )


def _stores_factors(module: PlannedModule) -> bool:
    if isinstance(module.smoothing, SmoothQuant):
        return module.smoothing.apply == "online"
    # Codes of a source that is smoothed mean something only together with its factors.
    return "smoothing" in module.source.tensors and module.carried


def decoded_dtype(module: StoredModule) -> str:
    """What readers shall decode a weight to: the source's own dtype, if it is a common one."""
    plain = isinstance(module.weight, PlainWeight) and module.weight.format != "float64"
    return module.weight.format if plain else "bfloat16"


def _shape(module: PlannedModule) -> Problem | None:
    source = module.source
    reason = module.weight.refuses(source.out_features, source.in_features)
    empty = 0 in (source.out_features, source.in_features)
    if reason is None and empty and isinstance(module.weight, ScaledWeight):
        reason = "it is empty"
    return None if reason is None else _shape_refused(module, reason)


def _shape_refused(module: PlannedModule, reason: str) -> Problem:
    source = module.source
    return Problem(
        "shape-refused",
        f"a weight of shape [{source.out_features}, {source.in_features}] cannot be stored as "
        f"{module.weight.format}: {reason}",
        hint="Protect it, or give it a scheme that takes its shape.",
        pointer=module.pointer or "/target/passthrough_dtype",
    )


def _rotated(module: PlannedModule) -> Problem | None:
    reason = None if module.rotation is None else module.rotation.refuses(module.source.in_features)
    if reason is None:
        return None
    source = module.source
    return Problem(
        "shape-refused",
        f"a weight of shape [{source.out_features}, {source.in_features}] cannot be rotated: "
        f"{reason}",
        hint="Choose a size that divides them, protect the module, or give it another scheme.",
        pointer=f"/schemes/{module.scheme}/rotation/size",
    )


def _records(dtype: str) -> Problem:
    return Problem(
        "target-cannot-hold",
        f"{dtype} of a tensor that is no module goes into GGUF files only",
        hint="Read the source in a layout that has it as the weight of a module, as 'gguf' does.",
        pointer="/target/layout",
    )


def _input_scale(part: str) -> Problem:
    return Problem(
        "input-scale-dropped",
        f"static activation scales of part {part!r} are not carried over",
        hint="They belong to the source's activation format.",
    )
