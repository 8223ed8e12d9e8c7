"""Reading a layout: which tensors of a part belong to which module, and in what format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.layout import (
    Holds,
    Layout,
    ModuleTensors,
    ScalesTemplate,
    Shape,
    TensorTemplate,
)
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    AnyWeight,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    GranularityName,
    Int8Channel,
    Int8Group,
    Int8Tensor,
    PlainWeight,
    ScaledFormatName,
)
from quantrecipe.schema.tensors import SourcePart, TensorInfo

SCALED_FORMATS: Final[tuple[ScaledFormatName, ...]] = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A module as a checkpoint holds it.

    Attributes:
        name: its dotted name inside the part.
        out_features, in_features: the shape of its weight.
        weight: how the weight is stored.
        tensors: what it consists of, by role.
    """

    name: str
    out_features: int
    in_features: int
    weight: AnyWeight
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.tensors.values())


@dataclass(frozen=True, slots=True)
class PartContents:
    """A part, read through a layout.

    Attributes:
        modules: by dotted name.
        others: tensors of no module, by their name inside the part.
        claimed: the tensors that this part accounts for, by their name on disk.
        problems: what does not fit the layout.
    """

    modules: Mapping[str, StoredModule]
    others: Mapping[str, TensorInfo]
    claimed: frozenset[str]
    problems: tuple[Problem, ...]


def match_template(template: str, name: str, part: str, field: str) -> str | None:
    """What ``{field}`` stands for when ``template`` reads ``name``, or ``None``."""
    prefix, _, suffix = template.replace("{part}", part).partition("{" + field + "}")
    if len(name) <= len(prefix) + len(suffix):
        return None
    if not name.startswith(prefix) or not name.endswith(suffix):
        return None
    return name[len(prefix) : len(name) - len(suffix)]


def fill_template(template: str, part: str, field: str, value: str) -> str:
    """The name that ``template`` gives ``value``."""
    return template.replace("{part}", part).replace("{" + field + "}", value)


def read_part(layout: Layout, part: SourcePart) -> PartContents:
    """Sort a part's tensors into modules and others, by the templates of ``layout``.

    A module is what has a two-dimensional weight. Quantized numbers without a scale, scales without
    quantized numbers, and scales of an unknown shape or dtype are problems, never a cast.
    """
    return _Reading(layout, part).run()


class _Reading:
    def __init__(self, layout: Layout, part: SourcePart) -> None:
        self.layout = layout
        self.part = part
        self.claimed: set[str] = set()
        self.modules: dict[str, StoredModule] = {}
        self.problems: list[Problem] = []

    def run(self) -> PartContents:
        self.claimed.update(name for name in self.layout.markers if name in self.part.tensors)
        for scaled in SCALED_FORMATS:
            templates = getattr(self.layout.modules, scaled)
            if templates is not None:
                self._read_scaled(scaled, templates)
        self._read_plain(self.layout.modules.plain)
        others = dict(self._read_others())
        return PartContents(
            modules=dict(sorted(self.modules.items())),
            others=others,
            claimed=frozenset(self.claimed),
            problems=tuple(self.problems),
        )

    def _read_scaled(self, scaled: ScaledFormatName, templates: ModuleTensors) -> None:
        for name, info in self._weights(templates):
            if info.dtype != scaled or len(info.shape) != 2:
                continue
            tensors: dict[str, TensorInfo] = {"weight": info}
            self._attach(name, templates, tensors)
            # Claimed even when a scale is missing: one problem a module is enough.
            self.claimed.update(tensor.name for tensor in tensors.values())
            weight = self._scaled_weight(scaled, templates.weight_scale, name, tensors)
            if weight is None:
                continue
            if self._duplicate(name, info):
                continue
            self.modules[name] = StoredModule(
                name, info.shape[0], info.shape[1], weight, tensors
            )

    def _read_plain(self, templates: ModuleTensors) -> None:
        for name, info in self._weights(templates):
            if info.name in self.claimed or not is_plain(info.dtype) or len(info.shape) != 2:
                continue
            tensors: dict[str, TensorInfo] = {"weight": info}
            self._attach(name, templates, tensors)
            self.claimed.update(tensor.name for tensor in tensors.values())
            if self._duplicate(name, info):
                continue
            weight = PlainWeight.model_validate({"format": info.dtype})
            self.modules[name] = StoredModule(
                name, info.shape[0], info.shape[1], weight, tensors
            )

    def _duplicate(self, name: str, info: TensorInfo) -> bool:
        if name not in self.modules:
            return False
        other = self.modules[name].tensors["weight"].name
        self._problem(
            "duplicate-weight", f"{info.name!r} and {other!r} are both the weight of {name!r}", info
        )
        return True

    def _weights(self, templates: ModuleTensors) -> Iterator[tuple[str, TensorInfo]]:
        """Tensors that the weight template reads, with the module's name."""
        for template in (templates.weight.name, *templates.weight.aliases):
            for info in self.part.tensors.values():
                name = match_template(template, info.name, self.part.name, "module")
                if name is not None:
                    yield name, info

    def _attach(
        self, name: str, templates: ModuleTensors, tensors: dict[str, TensorInfo]
    ) -> None:
        out_features, in_features = tensors["weight"].shape
        candidates: tuple[tuple[str, TensorTemplate | None], ...] = (
            ("weight_scale", templates.weight_scale),
            ("smoothing", templates.smoothing),
            ("bias", templates.bias),
            ("input_scale", templates.input_scale),
        )
        expected: dict[str, tuple[int, ...]] = {
            "bias": (out_features,),
            "smoothing": (in_features,),
        }
        for role, template in candidates:
            info = self._find(name, template) if template is not None else None
            if info is None:
                continue
            if role in expected and info.shape != expected[role]:
                self._problem(
                    f"misshaped-{role}",
                    f"the {role} of {name!r} has shape {list(info.shape)}, "
                    f"but its weight {list(tensors['weight'].shape)} asks for "
                    f"{list(expected[role])}",
                    info,
                )
            tensors[role] = info

    def _find(self, name: str, template: TensorTemplate) -> TensorInfo | None:
        found = [
            self.part.tensors[tensor]
            for each in (template.name, *template.aliases)
            if (tensor := fill_template(each, self.part.name, "module", name)) in self.part.tensors
        ]
        if len(found) > 1:
            self._problem(
                "doubly-owned",
                f"{found[0].name!r} and {found[1].name!r} say the same thing of {name!r}",
                found[1],
            )
            self.claimed.update(info.name for info in found)
        return found[0] if found else None

    def _scaled_weight(
        self,
        scaled: ScaledFormatName,
        template: ScalesTemplate | None,
        name: str,
        tensors: Mapping[str, TensorInfo],
    ) -> AnyScaledWeight | None:
        weight, scale = tensors["weight"], tensors.get("weight_scale")
        if template is None or scale is None:
            wanted = fill_template(
                template.name if template else "{module}.weight_scale",
                self.part.name,
                "module",
                name,
            )
            self._problem(
                "missing-scale",
                f"{scaled} weight without its scale {wanted!r}",
                weight,
                "Its numbers mean nothing without a scale; get the whole checkpoint.",
            )
            return None
        if scale.dtype not in template.dtypes:
            self._problem(
                "mistyped-scale",
                f"scale of dtype {scale.dtype}, expected {' or '.join(template.dtypes)}",
                scale,
            )
            return None
        holds = self.layout.holds[scaled]
        for granularity in holds.granularity:
            for shape in template.shapes.get(granularity, ()):
                stored = _stored_weight(scaled, granularity, shape, scale, weight, holds)
                if stored is not None:
                    return stored
        shapes = {
            granularity: [list(shape) for shape in shapes]
            for granularity, shapes in template.shapes.items()
        }
        self._problem(
            "misshaped-scale",
            f"scale of shape {list(scale.shape)} for a weight of shape {list(weight.shape)}; "
            f"layout {self.layout.name!r} reads {shapes}",
            scale,
        )
        return None

    def _read_others(self) -> Iterator[tuple[str, TensorInfo]]:
        for info in self.part.tensors.values():
            if info.name in self.claimed:
                continue
            name = match_template(self.layout.others.name, info.name, self.part.name, "tensor")
            if name is None:
                continue
            self.claimed.add(info.name)
            self._check_other(info)
            yield name, info

    def _check_other(self, info: TensorInfo) -> None:
        if info.dtype.startswith(("float8", "float6", "float4")) or (
            info.dtype == "int8" and len(info.shape) >= 2
        ):
            self._problem(
                "unscaled",
                f"{info.dtype} tensor of shape {list(info.shape)} that layout "
                f"{self.layout.name!r} has no scale for",
                info,
                "Its numbers mean nothing without a scale; name the layout that the source is in "
                "(quantrecipe inspect tells).",
            )
            return
        for scaled in SCALED_FORMATS:
            templates = getattr(self.layout.modules, scaled)
            if templates is None:
                continue
            for role in ("weight_scale", "smoothing", "input_scale"):
                template: TensorTemplate | None = getattr(templates, role)
                if template is not None and self._reads(template, info):
                    self._problem(
                        "orphan-scale",
                        f"{role.replace('_', ' ')} of a module that has no {scaled} weight",
                        info,
                        "Either the weight is missing or it was dequantized and the scale "
                        "left behind; applying or dropping it would be a guess.",
                    )
                    return

    def _reads(self, template: TensorTemplate, info: TensorInfo) -> bool:
        return any(
            match_template(each, info.name, self.part.name, "module") is not None
            for each in (template.name, *template.aliases)
        )

    def _problem(
        self, kind: str, message: str, info: TensorInfo, hint: str | None = None
    ) -> None:
        self.problems.append(
            Problem(kind, message, hint=hint, file=str(info.file), tensor=info.name)
        )


def _stored_weight(
    scaled: ScaledFormatName,
    granularity: GranularityName,
    shape: Shape,
    scale: TensorInfo,
    weight: TensorInfo,
    holds: Holds,
) -> AnyScaledWeight | None:
    """The weight format that a scale of this shape says, if ``shape`` reads it."""
    out_features, in_features = weight.shape
    dims: dict[str, int] = {"out": out_features, "in": in_features}
    fields: dict[str, object] = {"scale_dtype": scale.dtype}
    if granularity == "group":
        groups = scale.shape[-1] if scale.shape else 0
        if groups == 0 or in_features % groups:
            return None
        dims["groups"] = groups
        fields["group_size"] = in_features // groups
    if granularity == "block":
        rows, columns = holds.block_size or (128, 128)
        dims["row_blocks"] = -(-out_features // rows)
        dims["column_blocks"] = -(-in_features // columns)
        fields["block_size"] = (rows, columns)
    if tuple(dims[dim] if isinstance(dim, str) else dim for dim in shape) != scale.shape:
        return None
    model = _MODELS[scaled, granularity]
    return model.model_validate({"format": scaled, "granularity": granularity, **fields})


_MODELS: Final[dict[tuple[ScaledFormatName, GranularityName], type[AnyScaledWeight]]] = {
    ("int8", "tensor"): Int8Tensor,
    ("int8", "channel"): Int8Channel,
    ("int8", "group"): Int8Group,
    ("float8_e4m3fn", "tensor"): Float8Tensor,
    ("float8_e4m3fn", "channel"): Float8Channel,
    ("float8_e4m3fn", "block"): Float8Block,
    ("float8_e5m2", "tensor"): Float8Tensor,
    ("float8_e5m2", "channel"): Float8Channel,
    ("float8_e5m2", "block"): Float8Block,
}
