"""From a source's modules to what they are stored as, or to why they cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.layout_writing import (
    has_place_for_bias,
    missing_role,
    module_tensors,
    other_name,
    packings_of,
    refusal,
    unpackable,
)
from quantrecipe.schema.lock import Disposition, Role
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.problems import Problem, Reasons
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, ScaledWeight, SmoothQuant
from quantrecipe.schema.selection import Selection, Taken
from quantrecipe.schema.tensors import OutputTensor, TensorInfo


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
            output = OutputTensor(other_name(self.target, part, name), info.dtype, info.shape)
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
        outputs = module_tensors(
            self.target,
            part,
            name,
            (module.out_features, module.in_features),
            planned.weight,
            smoothing=_stores_factors(planned),
            bias=OutputTensor(bias.name, bias.dtype, bias.shape) if bias is not None else None,
        )
        planned = replace(planned, packings=packings_of(self.target, planned.weight))
        return Draft(part, name, file, planned, None, outputs)

    def _decide(
        self, part: str, name: str, module: StoredModule, taken: Taken | None
    ) -> PlannedModule:
        """What becomes of a module, whether or not that is possible."""
        disposition: Disposition = "passthrough"
        weight = self._passed_through(module)
        scheme = scheme_name = reason = None
        if taken is not None and taken.protected is not None:
            disposition, reason = "protected", taken.protected.reason
            weight = PlainWeight(format=taken.protected.dtype)
        elif taken is not None and taken.rule is not None:
            disposition, scheme_name = "quantized", taken.rule.scheme
            scheme = self.recipe.schemes[scheme_name]
            weight = scheme.weight
        return PlannedModule(
            part=part,
            name=name,
            source=module,
            disposition=disposition,
            weight=weight,
            activation=scheme.activation if scheme is not None else None,
            smoothing=scheme.smoothing if scheme is not None else None,
            rotation=scheme.rotation if scheme is not None else None,
            scheme=scheme_name,
            reason=reason,
            pattern=taken.pattern if taken is not None else None,
            pointer=taken.pointer if taken is not None else None,
            outputs={},
        )

    def _passed_through(self, module: StoredModule) -> AnyWeight:
        dtype = self.recipe.target.passthrough_dtype
        if isinstance(module.weight, PlainWeight) or dtype == "keep":
            return module.weight
        return PlainWeight(format=dtype)

    def _refusal(self, module: PlannedModule) -> Problem | None:
        return (
            _smoothed_source(module)
            or _shape(module)
            or _rotated(module)
            or self._format(module)
            or self._packing(module)
            or self._roles(module)
        )

    def _format(self, module: PlannedModule) -> Problem | None:
        refused = refusal(self.target, module.weight, None)
        pointer = "/target/passthrough_dtype"
        if module.disposition == "protected":
            pointer = f"{module.pointer}/dtype"
        if module.scheme is not None:
            pointer = f"/schemes/{module.scheme}/weight"
        if refused is None and module.smoothing is not None:
            refused = refusal(self.target, module.weight, module.smoothing)
            pointer = f"/schemes/{module.scheme}/smoothing"
        if refused is None and module.rotation is not None:
            refused = refusal(self.target, module.weight, None, module.rotation)
            pointer = f"/schemes/{module.scheme}/rotation"
        if refused is None:
            return None
        return Problem("target-cannot-hold", refused[0], hint=refused[1], pointer=pointer)

    def _packing(self, module: PlannedModule) -> Problem | None:
        source = module.source
        reason = unpackable(self.target, module.weight, source.in_features)
        if reason is not None:
            return _shape_refused(module, reason)
        if not module.copied or module.source.packings == packings_of(self.target, module.weight):
            return None
        return Problem(
            "target-cannot-hold",
            f"layout {self.target.name!r} packs codes of {module.weight.format} in another way "
            "than the source, and they pass through as they are",
            hint="Set target.passthrough_dtype to a plain dtype.",
            pointer="/target/passthrough_dtype",
        )

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
    return isinstance(module.smoothing, SmoothQuant) and module.smoothing.apply == "online"


def _smoothed_source(module: PlannedModule) -> Problem | None:
    if "smoothing" not in module.source.tensors:
        return None
    # Its stored numbers mean something only together with factors that activations meet.
    return Problem(
        "smoothed-source",
        f"part {module.part!r} of the source is stored with smoothing factors",
        hint="Convert from the checkpoint that it was made from.",
        pointer="/source",
    )


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


def _input_scale(part: str) -> Problem:
    return Problem(
        "input-scale-dropped",
        f"static activation scales of part {part!r} are not carried over",
        hint="They belong to the source's activation format.",
    )
