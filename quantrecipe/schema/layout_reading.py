"""Reading a layout: which tensors of a part belong to which module, and in what format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, get_args

from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.layout import (
    CodesTemplate,
    ConstantTemplate,
    Layout,
    ModuleTensors,
    ScaleOffsetTemplate,
    ScalesTemplate,
    SecondScaleTemplate,
    ShapeTemplate,
    SmoothingTemplate,
    TensorTemplate,
    ZeroPointsTemplate,
)
from quantrecipe.schema.markers import Marked, file_markers, read_marker, weight_class
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import (
    CODE_DTYPES,
    AnyScaledWeight,
    AnyWeight,
    Hadamard,
    Nf4,
    PlainWeight,
    RecordFormatName,
    ScaledFormatName,
    ScaledWeight,
)
from quantrecipe.schema.storage import AS_IT_IS, PACKINGS, Storage, padded
from quantrecipe.schema.stored_weights import (
    records,
    shape_of_constant,
    shapes_of_second,
    stored_weight,
)
from quantrecipe.schema.tensors import SourcePart, TensorInfo

SCALED_FORMATS: Final[tuple[ScaledFormatName, ...]] = get_args(ScaledFormatName)
RECORD_FORMATS: Final[tuple[str, ...]] = get_args(RecordFormatName)
_TORCHAO: Final[Mapping[str, str]] = {
    "int8": "Int8Tensor",
    "float8_e4m3fn": "Float8Tensor",
    "nvfp4": "NVFP4Tensor",
}
"""Its class of a weight in each format; tensors of other classes have the same names."""
_NOT_ITS_OWN: Final = (
    "A reader that takes it anyway scales other numbers than were meant: get the whole checkpoint "
    "again, or name the layout that it is in."
)
_FLAT: Final = (
    "Readers multiply the weight by it as it is: scales of one dimension meet columns, which is an "
    "error, or on a square weight goes wrong without one. They have to be stored as [out, 1]."
)
NOT_READ: Final = frozenset({"blocks-over-rows", "transposed-weight", "unread-tensor"})
"""Kinds of problems that are none of the checkpoint's: its own program reads what is not read here.
"""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A module as a checkpoint holds it.

    Attributes:
        name: its dotted name inside the part.
        out_features, in_features: the shape of its weight.
        weight: how the weight is stored.
        tensors: what it consists of, by role.
        renamed_from: what the checkpoint calls it, or the modules that it is made of, where names
            of a target were applied.
        storage: how tensors lie that are not as they are in memory, by role.
        rotation: what its columns are rotated by. Names and shapes do not show it: a marker, a
            lock, a recipe or a ``config.json`` says it.
        scale_offset: what is added to scales of two levels, where a marker says it.
    """

    name: str
    out_features: int
    in_features: int
    weight: AnyWeight
    tensors: Mapping[str, TensorInfo]
    renamed_from: tuple[str, ...] = ()
    storage: Mapping[str, Storage] = field(default_factory=dict)
    rotation: Hadamard | None = None
    scale_offset: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def stored(self, role: str) -> Storage:
        """How its tensor of this role lies on disk."""
        return self.storage.get(role, AS_IT_IS)


@dataclass(frozen=True, slots=True)
class PartContents:
    """A part, read through a layout.

    Attributes:
        modules: by dotted name.
        others: tensors of no module, by their name inside the part.
        claimed: the tensors that this part accounts for, by their name on disk.
        problems: what does not fit the layout.
        broken: modules whose weight was found, but not what it means; each has a problem.
        renamed: names that the checkpoint gives, and what names of a target made of them.
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


@dataclass(slots=True)
class _Option:
    """A way to read one weight."""

    name: str
    shape: tuple[int, int]
    tensors: dict[str, TensorInfo]
    weight: AnyWeight | None = None
    storage: Mapping[str, Storage] = field(default_factory=dict)
    marked: Marked | None = None
    problems: list[Problem] = field(default_factory=list)


class _Reading:
    def __init__(self, layout: Layout, part: SourcePart) -> None:
        self.layout = layout
        self.part = part
        self.infos = [part.tensors[name] for name in sorted(part.tensors)]
        self.claimed: set[str] = set()
        self.modules: dict[str, StoredModule] = {}
        self.broken: set[str] = set()
        self.problems: list[Problem] = []
        self.said: Mapping[str, Mapping[str, object]] = {}

    def run(self) -> PartContents:
        self.claimed.update(name for name in self.layout.markers if name in self.part.tensors)
        if self.layout.module_metadata is not None:
            self.said, problems = file_markers(self.layout.module_metadata, self.part)
            self.problems += problems
        for options in self._options().values():
            # Formats may share names and dtype; what stands beside the weight tells them apart.
            best = min(options, key=lambda option: (option.weight is None, len(option.problems)))
            self.problems += best.problems
            # Claimed even when a scale is missing: one problem a module is enough.
            self.claimed.update(info.name for info in best.tensors.values())
            self._add(best)
        self._read_plain(self.layout.modules.plain)
        self._unmarked()
        others = dict(self._read_others())
        return PartContents(
            modules=dict(sorted(self.modules.items())),
            others=dict(sorted(others.items())),
            claimed=frozenset(self.claimed),
            problems=tuple(self.problems),
            broken=frozenset(self.broken - self.modules.keys()),
        )

    def _options(self) -> Mapping[tuple[str, str], list[_Option]]:
        """Every way to read every weight that is not plain, by module and tensor."""
        found: dict[tuple[str, str], list[_Option]] = {}
        for scaled in SCALED_FORMATS:
            templates: ModuleTensors | None = getattr(self.layout.modules, scaled)
            if templates is None:
                continue
            dtype = codes_dtype(scaled, templates.weight)
            for name, info in self._weights(templates):
                dims = (2, 3) if templates.weight.grouped else (2,)
                if info.dtype == dtype and len(info.shape) in dims:
                    option = self._option(scaled, templates, name, info)
                    found.setdefault((name, info.name), []).append(option)
        return found

    def _option(
        self, scaled: ScaledFormatName, templates: ModuleTensors, name: str, info: TensorInfo
    ) -> _Option:
        before, self.problems = self.problems, []
        tensors = self._found(name, info, templates)
        marked = self._marked(templates, name, tensors)
        shape = self._shape(templates.weight, info, marked)
        holds = self.layout.holds.get(scaled)
        if shape is not None and holds is not None and holds.multiples is not None:
            shape = _without_filling(shape, holds.multiples[0], tensors)
        option = _Option(name, shape or (0, 0), tensors, marked=marked)
        if shape is not None and not self._is_refused(scaled, name, templates, tensors, shape):
            self._check_roles(name, templates, tensors, shape)
            weight = self._scaled_weight(scaled, templates, name, tensors, shape)
            if weight is not None and not self._offset_known(weight, tensors, marked):
                weight = None
            option.weight = None if marked is not None and marked.problem else weight
        mine = storages(templates)
        option.storage = {role: each for role, each in mine.items() if role in tensors}
        option.problems, self.problems = self.problems, before
        return option

    def _is_refused(
        self,
        scaled: ScaledFormatName,
        name: str,
        templates: ModuleTensors,
        tensors: Mapping[str, TensorInfo],
        shape: tuple[int, int],
    ) -> bool:
        """Whether its numbers stand for something that is not read, with a problem if so."""
        count = len(self.problems)
        for template in templates.refused:
            changing = self.part.tensors.get(
                fill_template(template, self.part.name, "module", name)
            )
            if changing is not None:
                self._problem(
                    "unread-tensor",
                    f"it changes what the weight of {name!r} stands for, and is not applied here",
                    changing,
                    "Save the checkpoint again in the program that wrote it, without what this "
                    "tensor is for.",
                )
        said = None
        if self.layout.module_metadata == "torchao":
            said = weight_class(self.part, f"{name}.weight")
        if said is not None and said != _TORCHAO.get(scaled):
            self._problem(
                "unread-tensor",
                f"the metadata of the file say that the weight of {name!r} is of class {said}, and "
                f"{scaled} weights are read of class {_TORCHAO.get(scaled)}",
                tensors["weight"],
                "Quantize with another config of torchao, or convert from the plain weights.",
            )
        scale, (rows, columns) = tensors.get("weight_scale"), shape
        config = self.layout.config
        if (
            config is not None
            and config.quantization_config == "sdnq"
            and scale is not None
            and scale.shape == (1, columns) != (rows, 1)
        ):
            self._problem(
                "transposed-weight",
                f"the scale of {name!r} is [1, {columns}]: its codes are stored as [in, out], for "
                "kernels that ask for that",
                tensors["weight"],
                "SDNQ stores them so with use_quantized_matmul: save it there again with "
                "apply_sdnq_options_to_model(model, use_quantized_matmul=False).",
            )
        holds = self.layout.holds.get("nf4")
        block = holds.block_size if holds is not None else None
        if templates.weight.shape == "column" and block is not None and columns % block[1]:
            self._problem(
                "blocks-over-rows",
                f"the {columns} input features of {name!r} are no multiple of {block[1]}, so that "
                "blocks of its codes go on from row to row, and those are not read",
                tensors["weight"],
                "Have that module left as it is by the program that quantizes "
                "(llm_int8_skip_modules).",
            )
        return len(self.problems) > count

    def _marked(
        self, templates: ModuleTensors, name: str, tensors: Mapping[str, TensorInfo]
    ) -> Marked | None:
        """What a marker, or the metadata of the file in its place, say of a module."""
        template = templates.marker
        if template is None:
            return None
        info, said = tensors.get("marker"), self.said.get(name)
        if info is None and said is None:
            if not template.optional:
                self._problem(
                    "missing-marker",
                    f"nothing says how {name!r} is stored: it is without "
                    f"{self._named(template, name)!r}",
                    tensors["weight"],
                    "A reader of this layout takes it for plain and drops its scales. If only the "
                    "marker was lost, read it in a layout without markers.",
                )
            return None
        marked = read_marker(template, info, said)
        if marked.problem is not None:
            self._problem(
                "wrong-marker",
                marked.problem,
                info or tensors["weight"],
                "A reader of this layout refuses it, or takes the weight for something else. Write "
                "the marker again.",
            )
        return marked

    def _shape(
        self, template: CodesTemplate, info: TensorInfo, marked: Marked | None
    ) -> tuple[int, int] | None:
        """Out and in features, or ``None``, with a problem, where nothing says them."""
        codes = PACKINGS[template.packing].codes if template.packing else 1
        if template.shape == "rows":
            return info.shape[0], math.prod(info.shape[1:]) * codes
        shape = None if marked is None else marked.shape
        if shape is None or shape[0] * shape[1] != info.shape[0] * codes or info.shape[1] != 1:
            said = "nothing says its shape" if shape is None else f"its shape is {list(shape)}"
            self._problem(
                "misshaped-weight",
                f"{info.shape[0] * codes} codes in a tensor {list(info.shape)}, and {said}",
                info,
                "Get the whole checkpoint.",
            )
            return None
        return shape

    def _unmarked(self) -> None:
        """What the metadata of the file say of modules that are not there, or that are plain."""
        for name in sorted(self.said.keys() - self.broken):
            module = self.modules.get(name)
            if module is not None and isinstance(module.weight, ScaledWeight):
                continue
            what = "is stored as plain numbers" if module is not None else "is not there"
            self.problems.append(
                Problem(
                    "metadata-differs",
                    f"the metadata say how {name!r} is quantized, and it {what}",
                    hint="Either the module was left out or its metadata were left over.",
                    file=str(self.infos[0].file) if self.infos else None,
                    tensor=name,
                )
            )

    def _read_plain(self, templates: ModuleTensors) -> None:
        for name, info in self._weights(templates):
            if info.name in self.claimed or not is_plain(info.dtype) or len(info.shape) != 2:
                continue
            if self._is_transposed(name, info, templates):
                continue
            rows, columns = info.shape
            option = _Option(name, (rows, columns), self._found(name, info, templates))
            option.weight = PlainWeight.model_validate({"format": info.dtype})
            self._check_roles(name, templates, option.tensors, option.shape)
            self.claimed.update(each.name for each in option.tensors.values())
            self._add(option)

    def _is_transposed(self, name: str, weight: TensorInfo, templates: ModuleTensors) -> bool:
        """Whether the bias says ``[in, out]``, as in GPT-2: no module, so it passes through."""
        bias = self._find(name, templates.bias) if templates.bias is not None else None
        rows, columns = weight.shape
        return bias is not None and bias.shape == (columns,) != (rows,)

    def _add(self, option: _Option) -> None:
        name, info, marked = option.name, option.tensors["weight"], option.marked
        if option.weight is None:
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
            self.modules[name] = StoredModule(
                name,
                *option.shape,
                option.weight,
                option.tensors,
                storage=option.storage,
                rotation=None if marked is None else marked.rotation,
                scale_offset=None if marked is None else marked.offset,
            )

    def _weights(self, templates: ModuleTensors) -> Iterator[tuple[str, TensorInfo]]:
        """Tensors that the weight template reads, with the module's name."""
        for template in (templates.weight.name, *templates.weight.aliases):
            for info in self.infos:
                name = match_template(template, info.name, self.part.name, "module")
                if name is not None:
                    yield name, info

    def _found(
        self, name: str, weight: TensorInfo, templates: ModuleTensors
    ) -> dict[str, TensorInfo]:
        """What belongs to the module with this weight, by role."""
        tensors = {"weight": weight}
        for role, template in roles(templates):
            info = self._find(name, template)
            if info is not None:
                tensors[role] = info
        return tensors

    def _check_roles(
        self,
        name: str,
        templates: ModuleTensors,
        tensors: Mapping[str, TensorInfo],
        shape: tuple[int, int],
    ) -> None:
        for role, template in roles(templates):
            info = tensors.get(role)
            if info is not None:
                self._check_role(role, template, name, shape, info)
            elif not template.optional and role not in ("weight_scale", "marker"):
                self._problem(
                    f"missing-{role.replace('_', '-')}",
                    f"{name!r} is without {self._named(template, name)!r}, which layout "
                    f"{self.layout.name!r} asks for",
                    tensors["weight"],
                    "Get the whole checkpoint.",
                )

    def _check_role(
        self,
        role: str,
        template: TensorTemplate,
        name: str,
        shape: tuple[int, int],
        info: TensorInfo,
    ) -> None:
        out_features, in_features = shape
        expected: tuple[int, ...] | None = {
            "bias": (out_features,),
            "smoothing": (in_features,),
            "weight_shape": (2,),
            "scale_offset": (1,),
        }.get(role)
        if isinstance(template, ConstantTemplate):
            expected = shape_of_constant(template, shape)
        kind, words = role.replace("_", "-"), role.replace("_", " ")
        if expected is not None and info.shape != expected:
            self._problem(
                f"misshaped-{kind}",
                f"the {words} of {name!r} has shape {list(info.shape)}, "
                f"but its weight {list(shape)} asks for {list(expected)}",
                info,
            )
        wanted = "a plain dtype"
        typed = SmoothingTemplate, ShapeTemplate, SecondScaleTemplate, ScaleOffsetTemplate
        if isinstance(template, (*typed, ConstantTemplate)):
            wanted = template.dtype
        elif isinstance(template, ZeroPointsTemplate):
            wanted = zero_point_dtype(template)
        if (wanted != "a plain dtype" and role != "marker" and info.dtype != wanted) or (
            role == "bias" and not is_plain(info.dtype)
        ):
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
        templates: ModuleTensors,
        name: str,
        tensors: Mapping[str, TensorInfo],
        weight_shape: tuple[int, int],
    ) -> AnyScaledWeight | None:
        weight, scale, holds = (
            tensors["weight"],
            tensors.get("weight_scale"),
            self.layout.holds.get(scaled),
        )
        if holds is not None and scaled in RECORD_FORMATS:
            return self._records(scaled, name, weight, weight_shape)
        template, zero_point = templates.weight_scale, tensors.get("weight_zero_point")
        second = tensors.get("second_scale")
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
                _NOT_ITS_OWN,
            )
            return None
        found = stored_weight(
            scaled,
            template,
            holds,
            scale,
            weight_shape,
            zero_points=zero_point is not None,
            two_levels=second is not None,
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
                _FLAT if scale.shape == weight_shape[:1] else _NOT_ITS_OWN,
            )
            return None
        if second is not None and not self._second_fits(templates, found, second, weight_shape):
            return None
        if zero_point is not None:
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

    def _records(
        self, scaled: ScaledFormatName, name: str, weight: TensorInfo, shape: tuple[int, int]
    ) -> AnyScaledWeight | None:
        found = records(scaled)
        reason = found.refuses(*shape)
        if reason is not None:
            self._problem("misshaped-weight", f"{name!r} cannot be {scaled}: {reason}", weight)
            return None
        return found

    def _offset_known(
        self, weight: AnyWeight, tensors: Mapping[str, TensorInfo], marked: Marked | None
    ) -> bool:
        """Whether scales that are stored less their mean can be read."""
        if not isinstance(weight, Nf4) or not weight.double_quantized:
            return True
        if "scale_offset" in tensors or (marked is not None and marked.offset is not None):
            return True
        self._problem(
            "missing-scale-offset",
            "scales in two levels, and nothing says the mean that was taken off them",
            tensors["weight_scale"],
            "Get the whole checkpoint.",
        )
        return False

    def _second_fits(
        self,
        templates: ModuleTensors,
        weight: ScaledWeight,
        info: TensorInfo,
        shape: tuple[int, int],
    ) -> bool:
        assert templates.second_scale is not None
        shapes = shapes_of_second(templates.second_scale, weight, shape)
        if info.shape not in shapes:
            self._problem(
                "misshaped-second-scale",
                f"second level of scales of shape {list(info.shape)}, expected "
                + " or ".join(str(list(each)) for each in shapes),
                info,
            )
            return False
        return True

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
                if role == "bias" or not could_be(template, info):
                    continue
                name = self._reads(template, info)
                if role == "marker" and name is not None:
                    self._idle_marker(name, info)
                    return
                if name is not None:
                    self._problem(
                        "orphan-scale",
                        f"{role.replace('_', ' ')} of a module that has no {scaled} weight",
                        info,
                        "Either the weight is missing or it was dequantized and the scale "
                        "left behind; applying or dropping it would be a guess.",
                    )
                    return

    def _idle_marker(self, name: str, info: TensorInfo) -> None:
        plain = name in self.modules
        what = "is stored as plain numbers" if plain else "has no weight here"
        self._problem(
            "idle-marker",
            f"it says how {name!r} is quantized, and that {what}",
            info,
            "Either the module was left out or dequantized, and the marker left behind: a reader "
            "that believes it takes plain numbers for codes. Take it out, or get the weight.",
        )

    def _reads(self, template: TensorTemplate, info: TensorInfo) -> str | None:
        """The module that a tensor belongs to if it is what ``template`` speaks of."""
        names = (
            match_template(each, info.name, self.part.name, "module")
            for each in (template.name, *template.aliases)
        )
        return next((name for name in names if name is not None), None)

    def _named(self, template: TensorTemplate, module: str) -> str:
        return fill_template(template.name, self.part.name, "module", module)

    def _problem(self, kind: str, message: str, info: TensorInfo, hint: str | None = None) -> None:
        self.problems.append(
            Problem(kind, message, hint=hint, file=str(info.file), tensor=info.name)
        )


def _without_filling(
    shape: tuple[int, int], multiple: int, tensors: dict[str, TensorInfo]
) -> tuple[int, int]:
    """The shape of a weight less the rows that it was filled up with, where a bias shows them.

    Rows lie one after the other, so the tensor of the weight becomes the first of them. Without a
    bias they stay, and columns always do: zeros, and nothing in a file tells them from others.
    """
    bias, weight = tensors.get("bias"), tensors["weight"]
    if bias is None or len(bias.shape) != 1:
        return shape
    rows, out_features = weight.shape[0], bias.shape[0]
    if not 0 < out_features < rows or padded(out_features, multiple) != rows:
        return shape
    tensors["weight"] = replace(
        weight,
        shape=(out_features, *weight.shape[1:]),
        nbytes=weight.nbytes // rows * out_features,
    )
    return out_features, shape[1]


def could_be(template: TensorTemplate, info: TensorInfo) -> bool:
    """Whether a tensor has as many dimensions as ``template`` speaks of; names alone are common."""
    if isinstance(template, ScalesTemplate):
        shapes = [shape for each in template.shapes.values() for shape in each]
    elif isinstance(template, SecondScaleTemplate):
        shapes = list(template.shapes)
    elif isinstance(template, ConstantTemplate):
        shapes = [template.shape]
    else:
        return True
    return len(info.shape) in {len(shape) for shape in shapes}


def codes_dtype(scaled: ScaledFormatName, template: CodesTemplate) -> str:
    """What a header says of the codes of a format."""
    if template.packing is not None:
        return PACKINGS[template.packing].dtype
    return CODE_DTYPES.get(scaled, scaled)


def storages(templates: ModuleTensors) -> Mapping[str, Storage]:
    """How tensors of a module lie, by role; those that lie as they are in memory are left out."""
    found: dict[str, Storage] = {}
    for role, packing in (
        ("weight", templates.weight.packing),
        (
            "weight_zero_point",
            None if templates.weight_zero_point is None else templates.weight_zero_point.packing,
        ),
    ):
        if packing is not None:
            found[role] = Storage(packing=PACKINGS[packing])
    scales, second = templates.weight_scale, templates.second_scale
    if scales is not None and scales.arrangement != "rows":
        found["weight_scale"] = Storage(arrangement=scales.arrangement)
    if second is not None and second.meaning == "divide":
        found["second_scale"] = Storage(reciprocal=True)
    return found


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
        ("second_scale", templates.second_scale),
        ("scale_offset", templates.scale_offset),
        ("marker", templates.marker),
        ("code_map", templates.code_map),
        ("scale_map", templates.scale_map),
        ("zeros", templates.zeros),
        ("smoothing", templates.smoothing),
        ("bias", templates.bias),
        ("input_scale", templates.input_scale),
    )
    for role, template in candidates:
        if template is not None:
            yield role, template
