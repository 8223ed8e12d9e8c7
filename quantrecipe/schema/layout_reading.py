"""Reading a layout: which tensors of a part belong to which module, and in what format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, get_args

from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.layout import (
    Layout,
    ModuleTensors,
    ScalesTemplate,
    ShapeTemplate,
    SmoothingTemplate,
    TensorTemplate,
    ZeroPointsTemplate,
)
from quantrecipe.schema.packings import PACKINGS, Packing
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    AnyWeight,
    Hadamard,
    PlainWeight,
    ScaledFormatName,
    ScaledWeight,
)
from quantrecipe.schema.stored_weights import stored_weight
from quantrecipe.schema.tensors import SourcePart, TensorInfo

SCALED_FORMATS: Final[tuple[ScaledFormatName, ...]] = get_args(ScaledFormatName)


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A module as a checkpoint holds it.

    Attributes:
        name: its dotted name inside the part.
        out_features, in_features: the shape of its weight.
        weight: how the weight is stored.
        tensors: what it consists of, by role.
        renamed_from: what the checkpoint calls it, where a target layout's names were applied.
        packings: how codes and zero points are packed, by role; those that are not are left out.
        rotation: what its columns are rotated by. Names and shapes do not show it: a lock, a recipe
            or a ``config.json`` says it.
    """

    name: str
    out_features: int
    in_features: int
    weight: AnyWeight
    tensors: Mapping[str, TensorInfo]
    renamed_from: str | None = None
    packings: Mapping[str, Packing] = field(default_factory=lambda: MappingProxyType({}))
    rotation: Hadamard | None = None

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
        broken: modules whose weight was found, but not what it means; each has a problem.
        renamed: names that the checkpoint gives, and what a target layout made of them.
    """

    modules: Mapping[str, StoredModule]
    others: Mapping[str, TensorInfo]
    claimed: frozenset[str]
    problems: tuple[Problem, ...]
    broken: frozenset[str] = frozenset()
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
    quantized numbers, and tensors of an unknown shape or dtype are problems, never a cast. The
    order of tensors in their files does not matter.
    """
    return _Reading(layout, part).run()


class _Reading:
    def __init__(self, layout: Layout, part: SourcePart) -> None:
        self.layout = layout
        self.part = part
        self.infos = [part.tensors[name] for name in sorted(part.tensors)]
        self.claimed: set[str] = set()
        self.modules: dict[str, StoredModule] = {}
        self.broken: set[str] = set()
        self.problems: list[Problem] = []

    def run(self) -> PartContents:
        self.claimed.update(name for name in self.layout.markers if name in self.part.tensors)
        for scaled in SCALED_FORMATS:
            templates: ModuleTensors | None = getattr(self.layout.modules, scaled)
            if templates is not None:
                self._read_scaled(scaled, templates)
        self._read_plain(self.layout.modules.plain)
        others = dict(self._read_others())
        return PartContents(
            modules=dict(sorted(self.modules.items())),
            others=dict(sorted(others.items())),
            claimed=frozenset(self.claimed),
            problems=tuple(self.problems),
            broken=frozenset(self.broken - self.modules.keys()),
        )

    def _read_scaled(self, scaled: ScaledFormatName, templates: ModuleTensors) -> None:
        packed = packings(templates)
        packing = packed.get("weight")
        for name, info in self._weights(templates):
            if info.dtype != (packing.dtype if packing else scaled) or len(info.shape) != 2:
                continue
            rows, columns = info.shape
            shape = (rows, columns * packing.codes) if packing else (rows, columns)
            # Claimed even when a scale is missing: one problem a module is enough.
            tensors = self._tensors_of(name, info, templates, shape)
            weight = self._scaled_weight(scaled, templates.weight_scale, name, tensors, shape)
            self._add(name, weight, tensors, shape, packed)

    def _read_plain(self, templates: ModuleTensors) -> None:
        for name, info in self._weights(templates):
            if info.name in self.claimed or not is_plain(info.dtype) or len(info.shape) != 2:
                continue
            if self._is_transposed(name, info, templates):
                continue
            weight = PlainWeight.model_validate({"format": info.dtype})
            rows, columns = info.shape
            tensors = self._tensors_of(name, info, templates, (rows, columns))
            self._add(name, weight, tensors, (rows, columns), {})

    def _is_transposed(self, name: str, weight: TensorInfo, templates: ModuleTensors) -> bool:
        """Whether the bias says ``[in, out]``, as in GPT-2: no module, so it passes through."""
        bias = self._find(name, templates.bias) if templates.bias is not None else None
        rows, columns = weight.shape
        return bias is not None and bias.shape == (columns,) != (rows,)

    def _add(
        self,
        name: str,
        weight: AnyWeight | None,
        tensors: Mapping[str, TensorInfo],
        shape: tuple[int, int],
        packed: Mapping[str, Packing],
    ) -> None:
        info = tensors["weight"]
        if weight is None:
            self.broken.add(name)
        elif name in self.modules:
            other = self.modules[name].tensors["weight"].name
            self._problem(
                "duplicate-weight",
                f"{info.name!r} and {other!r} are both the weight of {name!r}",
                info,
                "One of them is left over from another build; applying either would be a guess.",
            )
        else:
            mine = {role: each for role, each in packed.items() if role in tensors}
            self.modules[name] = StoredModule(name, *shape, weight, tensors, packings=mine)

    def _weights(self, templates: ModuleTensors) -> Iterator[tuple[str, TensorInfo]]:
        """Tensors that the weight template reads, with the module's name."""
        for template in (templates.weight.name, *templates.weight.aliases):
            for info in self.infos:
                name = match_template(template, info.name, self.part.name, "module")
                if name is not None:
                    yield name, info

    def _tensors_of(
        self, name: str, weight: TensorInfo, templates: ModuleTensors, shape: tuple[int, int]
    ) -> Mapping[str, TensorInfo]:
        """What belongs to the module with this weight ``shape``, by role; all of it claimed."""
        tensors = {"weight": weight}
        for role, template in roles(templates):
            info = self._find(name, template)
            if info is not None:
                tensors[role] = info
                self._check_role(role, template, name, shape, info)
            elif not template.optional and role != "weight_scale":
                self._problem(
                    f"missing-{role.replace('_', '-')}",
                    f"{name!r} is without {self._named(template, name)!r}, which layout "
                    f"{self.layout.name!r} asks for",
                    weight,
                    "Get the whole checkpoint.",
                )
        self.claimed.update(info.name for info in tensors.values())
        return tensors

    def _check_role(
        self,
        role: str,
        template: TensorTemplate,
        name: str,
        shape: tuple[int, int],
        info: TensorInfo,
    ) -> None:
        out_features, in_features = shape
        expected = {
            "bias": (out_features,),
            "smoothing": (in_features,),
            "weight_shape": (2,),
        }.get(role)
        kind, words = role.replace("_", "-"), role.replace("_", " ")
        if expected is not None and info.shape != expected:
            self._problem(
                f"misshaped-{kind}",
                f"the {words} of {name!r} has shape {list(info.shape)}, "
                f"but its weight {list(shape)} asks for {list(expected)}",
                info,
            )
        wanted = "a plain dtype"
        if isinstance(template, SmoothingTemplate | ShapeTemplate):
            wanted = template.dtype
        elif isinstance(template, ZeroPointsTemplate):
            wanted = zero_point_dtype(template)
        if (
            role in ("smoothing", "weight_shape", "weight_zero_point") and info.dtype != wanted
        ) or (role == "bias" and not is_plain(info.dtype)):
            self._problem(
                f"mistyped-{kind}",
                f"the {words} of {name!r} is {info.dtype}, expected {wanted}",
                info,
            )

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
                "They may differ; take one of them out.",
            )
            self.claimed.update(info.name for info in found)
        return found[0] if found else None

    def _scaled_weight(
        self,
        scaled: ScaledFormatName,
        template: ScalesTemplate | None,
        name: str,
        tensors: Mapping[str, TensorInfo],
        weight_shape: tuple[int, int],
    ) -> AnyScaledWeight | None:
        weight, scale, holds = (
            tensors["weight"],
            tensors.get("weight_scale"),
            self.layout.holds.get(scaled),
        )
        zero_point = tensors.get("weight_zero_point")
        if template is None or scale is None or holds is None:
            wanted = f" {self._named(template, name)!r}" if template is not None else ""
            self._problem(
                "missing-scale",
                f"{scaled} weight without its scale{wanted}",
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
        found = stored_weight(
            scaled, template, holds, scale, weight_shape, zero_points=zero_point is not None
        )
        if found is None:
            shapes = " or ".join(
                f"[{', '.join(map(str, shape))}] ({granularity})"
                for granularity in holds.granularity
                for shape in template.shapes.get(granularity, ())
            )
            self._problem(
                "misshaped-scale",
                f"scale of shape {list(scale.shape)} for a weight of shape {list(weight_shape)}; "
                f"layout {self.layout.name!r} reads {shapes}",
                scale,
            )
            return None
        if zero_point is not None:
            templates: ModuleTensors = getattr(self.layout.modules, scaled)
            assert templates.weight_zero_point is not None
            expected = zero_point_shape(templates.weight_zero_point, found, weight_shape)
            if zero_point.shape != expected:
                self._problem(
                    "misshaped-weight-zero-point",
                    f"the weight zero point of {name!r} has shape {list(zero_point.shape)}, but "
                    f"its weight {list(weight_shape)} asks for {list(expected)}",
                    zero_point,
                )
                return None
        return found

    def _read_others(self) -> Iterator[tuple[str, TensorInfo]]:
        for info in self.infos:
            if info.name in self.claimed:
                continue
            name = match_template(self.layout.others.name, info.name, self.part.name, "tensor")
            if name is None:
                continue
            self.claimed.add(info.name)
            self._check_other(info)
            yield name, info

    def _check_other(self, info: TensorInfo) -> None:
        if info.dtype.startswith(("float8_", "float6_", "float4_")) or (
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
            templates: ModuleTensors | None = getattr(self.layout.modules, scaled)
            for role, template in roles(templates) if templates is not None else ():
                if role != "bias" and self._reads(template, info):
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

    def _named(self, template: TensorTemplate, module: str) -> str:
        return fill_template(template.name, self.part.name, "module", module)

    def _problem(self, kind: str, message: str, info: TensorInfo, hint: str | None = None) -> None:
        self.problems.append(
            Problem(kind, message, hint=hint, file=str(info.file), tensor=info.name)
        )


def packings(templates: ModuleTensors) -> Mapping[str, Packing]:
    """How the tensors of a module are packed, by role; those that are not are left out."""
    named = {"weight": templates.weight.packing}
    if templates.weight_zero_point is not None:
        named["weight_zero_point"] = templates.weight_zero_point.packing
    return {role: PACKINGS[name] for role, name in named.items() if name is not None}


def zero_point_dtype(template: ZeroPointsTemplate) -> str:
    """What zero points are stored in."""
    return "uint8" if template.packing is None else PACKINGS[template.packing].dtype


def zero_point_shape(
    template: ZeroPointsTemplate, weight: ScaledWeight, shape: tuple[int, int]
) -> tuple[int, int]:
    """What shape the zero points of a weight ``shape`` are stored in."""
    rows, columns = weight.scale_grid(*shape)
    packing = None if template.packing is None else PACKINGS[template.packing]
    return (rows if packing is None else packing.stored(rows)), columns


def roles(templates: ModuleTensors) -> Iterator[tuple[str, TensorTemplate]]:
    """The tensors that a module may have beside its weight, by role."""
    candidates: tuple[tuple[str, TensorTemplate | None], ...] = (
        ("weight_scale", templates.weight_scale),
        ("weight_zero_point", templates.weight_zero_point),
        ("weight_shape", templates.weight_shape),
        ("smoothing", templates.smoothing),
        ("bias", templates.bias),
        ("input_scale", templates.input_scale),
    )
    for role, template in candidates:
        if template is not None:
            yield role, template
