"""Writing a layout: the tensors that a module becomes, and what the layout cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from quantrecipe.schema.dtypes import byte_size, is_plain
from quantrecipe.schema.layout import (
    ConstantTemplate,
    Layout,
    MarkerTemplate,
    ModuleTensors,
    ScalesTemplate,
)
from quantrecipe.schema.layout_reading import (
    codes_dtype,
    fill_template,
    roles,
    storages,
    zero_point_dtype,
    zero_point_shape,
)
from quantrecipe.schema.lock import Role
from quantrecipe.schema.markers import marker_bytes, written_marker
from quantrecipe.schema.schemes import (
    AnyWeight,
    Hadamard,
    PlainWeight,
    ScaledWeight,
)
from quantrecipe.schema.storage import PACKINGS, Storage
from quantrecipe.schema.stored_weights import (
    fill_shape,
    scale_dims,
    shape_of_constant,
    shapes_of_second,
)
from quantrecipe.schema.tensors import OutputTensor, TensorInfo

_UNSMOOTHED: Final = (
    "smoothing factors go with quantized weights, and the weights of this scheme are plain",
    "Take the smoothing out of the scheme, or give it a quantized weight format.",
)


_UNROTATED: Final = (
    "rotation goes with quantized weights, and the weights of this scheme are plain",
    "Take the rotation out of the scheme, or give it a quantized weight format.",
)


def refusal(
    layout: Layout,
    weight: AnyWeight,
    *,
    smoothed: bool = False,
    factors: bool = False,
    rotation: Hadamard | None = None,
) -> tuple[str, str] | None:
    """Why ``layout`` cannot hold such a module, and what would work; ``None`` if it can.

    Args:
        layout: the layout.
        weight: how the weight is stored.
        smoothed: whether its columns are multiplied by smoothing factors.
        factors: whether the factors are stored with it.
        rotation: what its columns are rotated by.
    """
    if isinstance(weight, PlainWeight):
        if smoothed:
            return _UNSMOOTHED
        return None if rotation is None else _UNROTATED
    name, granularity = weight.format, weight.granularity
    holds = layout.holds.get(name)
    if holds is None:
        held = ", ".join(layout.holds) or "plain dtypes only"
        return f"layout {layout.name!r} has no place for {name}", f"It holds: {held}."
    if granularity not in holds.granularity:
        return (
            f"layout {layout.name!r} has no place for {name} scales of granularity {granularity!r}",
            f"It holds: {', '.join(holds.granularity)}.",
        )
    by_block = granularity == "block" and weight.has_scales
    block = weight.group_shape(0, 0) if by_block else None
    if block is not None and block != holds.block_size:
        fixed = list(holds.block_size) if holds.block_size else "no block size"
        return (
            f"layout {layout.name!r} cannot say block_size {list(block)}",
            f"A block there is {fixed}.",
        )
    templates: ModuleTensors | None = getattr(layout.modules, name)
    if templates is None or (weight.has_scales and templates.weight_scale is None):
        return f"layout {layout.name!r} has no templates for {name}", "Mend the layout."
    scales = templates.weight_scale
    if scales is not None and not set(weight.stored_scale_dtypes) & set(scales.dtypes):
        return (
            f"layout {layout.name!r} has no place for {name} scales in {_scale_word(weight)}",
            f"It holds: {', '.join(scales.dtypes)}.",
        )
    if weight.has_two_levels and templates.second_scale is None:
        return (
            f"layout {layout.name!r} has no place for a second level of scales",
            'Set "double_quantized": false, or choose another layout.',
        )
    if weight.has_zero_points and templates.weight_zero_point is None:
        return (
            f"layout {layout.name!r} has no place for zero points of {name}",
            'Set "symmetric": true, or choose another layout.',
        )
    if factors and "online" not in holds.smoothing:
        return (
            f"layout {layout.name!r} has no place for smoothing applied 'online'",
            'Fold it ("apply": "fold" needs no place), take it out, or choose another layout.',
        )
    if rotation is not None and rotation not in holds.rotation:
        sizes = ", ".join(f"{held.kind} of {held.size}" for held in holds.rotation)
        wanted = f"rotated by {rotation.kind} of {rotation.size}"
        return (
            f"layout {layout.name!r} cannot tell a reader that {name} weights are {wanted}",
            f"It holds: {sizes}."
            if sizes
            else "Take the rotation out, or choose a layout that says it, as 'quantrecipe' does.",
        )
    return None


def module_tensors(
    layout: Layout,
    part: str,
    module: str,
    shape: tuple[int, int],
    weight: AnyWeight,
    *,
    smoothing: bool,
    bias: OutputTensor | None,
    rotation: Hadamard | None = None,
    decoded: str = "bfloat16",
) -> Mapping[Role, OutputTensor]:
    """The tensors that a module is stored as.

    Args:
        layout: one for which ``refusal`` gave ``None``.
        part: its name.
        module: its name inside the part.
        shape: out and in features.
        weight: how the weight is stored.
        smoothing: whether factors are stored with it.
        bias: the source's bias, for its dtype and shape; ``None`` if it has none.
        rotation: what its columns are rotated by.
        decoded: the plain dtype that readers decode it to, where a marker says that.

    Returns:
        Role to tensor, named, typed and shaped as on disk.
    """

    def named(template: str) -> str:
        return fill_template(template, part, "module", module)

    templates = _templates(layout, weight)
    found: dict[Role, OutputTensor] = {"weight": _codes(named, templates, weight, shape)}
    if isinstance(weight, ScaledWeight) and weight.has_scales:
        template = templates.weight_scale
        assert template is not None
        stored = template.shapes[weight.granularity][0]
        found["weight_scale"] = OutputTensor(
            named(template.name),
            _scale_dtype(weight, template),
            fill_shape(stored, scale_dims(weight, shape)),
        )
        zeros = templates.weight_zero_point
        if weight.has_zero_points and zeros is not None:
            found["weight_zero_point"] = OutputTensor(
                named(zeros.name), zero_point_dtype(zeros), zero_point_shape(zeros, weight, shape)
            )
        found |= dict(_second_level(named, templates, weight, shape))
    if templates.marker is not None:
        marker = templates.marker
        said = marker_bytes(
            marker_of(marker, weight, shape, rotation=rotation, decoded=decoded), marker.length
        )
        found["marker"] = OutputTensor(named(marker.name), "uint8", (len(said),))
    for role, constant in _constants(templates):
        if role != "scale_map" or (isinstance(weight, ScaledWeight) and weight.has_two_levels):
            found[role] = OutputTensor(
                named(constant.name), constant.dtype, shape_of_constant(constant, shape)
            )
    if templates.weight_shape is not None:
        found["weight_shape"] = OutputTensor(
            named(templates.weight_shape.name), templates.weight_shape.dtype, (2,)
        )
    if smoothing:
        assert templates.smoothing is not None
        found["smoothing"] = OutputTensor(
            named(templates.smoothing.name), templates.smoothing.dtype, (shape[1],)
        )
    if bias is not None and templates.bias is not None:
        found["bias"] = OutputTensor(named(templates.bias.name), bias.dtype, bias.shape)
    return found


def marker_of(
    template: MarkerTemplate,
    weight: AnyWeight,
    shape: tuple[int, int],
    *,
    rotation: Hadamard | None,
    decoded: str,
) -> dict[str, Any]:
    """What a marker says of a module; the arguments are those of ``module_tensors``."""
    two_levels = isinstance(weight, ScaledWeight) and weight.has_two_levels
    return written_marker(template, shape, rotation=rotation, two_levels=two_levels, dtype=decoded)


def marker_template(layout: Layout, weight: AnyWeight) -> MarkerTemplate | None:
    """What ``layout`` says of such a module in JSON, if it does."""
    return _templates(layout, weight).marker


def vector_dtype(layout: Layout, info: TensorInfo) -> str:
    """What a tensor that is no weight is stored in: numbers of one dimension, in one plain dtype.

    Only those that it holds exactly; others are copied.
    """
    wide = layout.vectors
    if wide is None or len(info.shape) != 1 or not is_plain(info.dtype):
        return info.dtype
    return wide if byte_size(wide, (1,)) > byte_size(info.dtype, (1,)) else info.dtype


def storage_of(layout: Layout, weight: AnyWeight) -> Mapping[str, Storage]:
    """How the tensors of such a module lie in ``layout``, by role."""
    found = dict(storages(_templates(layout, weight)))
    if not isinstance(weight, ScaledWeight) or not weight.has_zero_points:
        found.pop("weight_zero_point", None)
    if not isinstance(weight, ScaledWeight) or not weight.has_two_levels:
        found.pop("second_scale", None)
    return found


def unfit(layout: Layout, weight: AnyWeight, shape: tuple[int, int]) -> str | None:
    """Why ``layout`` cannot hold such a weight in this shape, or ``None``."""
    held = layout.holds.get(weight.format) if isinstance(weight, ScaledWeight) else None
    multiples = None if held is None else held.multiples
    if multiples is not None and any(size % n for size, n in zip(shape, multiples, strict=True)):
        return (
            f"layout {layout.name!r} holds shapes of multiples of {list(multiples)} only, because "
            "its readers fill up others and nothing in a file says how much of it is the weight"
        )
    if (
        isinstance(weight, ScaledWeight)
        and weight.granularity == "group"
        and _templates(layout, weight).weight.grouped
        and weight.scale_grid(*shape)[1] == 1
    ):
        return (
            f"its {shape[1]} input features are one group, and readers of layout {layout.name!r} "
            "take that for granularity 'channel'"
        )
    return _unpackable(layout, weight, shape[1])


def _unpackable(layout: Layout, weight: AnyWeight, in_features: int) -> str | None:
    """Why rows of this many codes cannot be packed as ``layout`` does, or ``None``."""
    name = _templates(layout, weight).weight.packing
    packing = None if name is None else PACKINGS[name]
    if packing is None or in_features % packing.codes == 0:
        return None
    return (
        f"its {in_features} input features do not fill {packing.dtype} numbers of "
        f"{packing.codes} codes each, as layout {layout.name!r} packs them"
    )


def has_place_for_bias(layout: Layout, weight: AnyWeight) -> bool:
    """Whether a module stored so may have a bias in ``layout``."""
    return _templates(layout, weight).bias is not None


def missing_role(
    layout: Layout, weight: AnyWeight, *, smoothing: bool, bias: bool
) -> tuple[str, str] | None:
    """What ``layout`` asks of such a module and the module does not have, and what would help.

    Args:
        layout: one for which ``refusal`` gave ``None``.
        weight: how the weight is stored.
        smoothing: whether factors are stored with it.
        bias: whether it has a bias.
    """
    written = {"weight_scale", "weight_shape", "marker", "code_map", "scale_map", "zeros"}
    if isinstance(weight, ScaledWeight):
        written |= {"weight_zero_point"} if weight.has_zero_points else set()
        written |= {"second_scale", "scale_offset"} if weight.has_two_levels else set()
    written |= ({"smoothing"} if smoothing else set()) | ({"bias"} if bias else set())
    for role, template in roles(_templates(layout, weight)):
        if role not in written and not template.optional:
            return (
                f"layout {layout.name!r} asks every {weight.format} module for its "
                + role.replace("_", " "),
                "Choose another layout, or make the tensor optional in it.",
            )
    return None


def other_name(layout: Layout, part: str, tensor: str) -> str:
    """The name on disk of a tensor that belongs to no module."""
    return fill_template(layout.others.name, part, "tensor", tensor)


def holds_many_parts(layout: Layout) -> bool:
    """Whether parts may share a file: every name says which part it belongs to."""
    return "{part}" in layout.others.name and "{part}" in layout.modules.plain.weight.name


def _templates(layout: Layout, weight: AnyWeight) -> ModuleTensors:
    if isinstance(weight, PlainWeight):
        return layout.modules.plain
    templates: ModuleTensors | None = getattr(layout.modules, weight.format)
    assert templates is not None
    return templates


def _codes(
    named: Callable[[str], str], templates: ModuleTensors, weight: AnyWeight, shape: tuple[int, int]
) -> OutputTensor:
    template, name = templates.weight, named(templates.weight.name)
    if isinstance(weight, PlainWeight):
        return OutputTensor(name, weight.format, shape)
    packing = None if template.packing is None else PACKINGS[template.packing]
    rows, width = shape[0], shape[1] if packing is None else packing.stored(shape[1])
    stored: tuple[int, ...] = (rows, width) if template.shape == "rows" else (rows * width, 1)
    if template.grouped and weight.granularity == "group":
        groups = weight.scale_grid(*shape)[1]
        stored = (rows, groups, width // groups)
    return OutputTensor(name, codes_dtype(weight.format, template), stored)


def _second_level(
    named: Callable[[str], str],
    templates: ModuleTensors,
    weight: ScaledWeight,
    shape: tuple[int, int],
) -> Iterator[tuple[Role, OutputTensor]]:
    if not weight.has_two_levels:
        return
    second, offset = templates.second_scale, templates.scale_offset
    assert second is not None
    second_shape = shapes_of_second(second, weight, shape)[0]
    yield "second_scale", OutputTensor(named(second.name), second.dtype, second_shape)
    if offset is not None:
        yield "scale_offset", OutputTensor(named(offset.name), offset.dtype, (1,))


def _constants(templates: ModuleTensors) -> Iterator[tuple[Role, ConstantTemplate]]:
    constants: tuple[tuple[Role, ConstantTemplate | None], ...] = (
        ("code_map", templates.code_map),
        ("scale_map", templates.scale_map),
        ("zeros", templates.zeros),
    )
    for role, constant in constants:
        if constant is not None:
            yield role, constant


def _scale_dtype(weight: ScaledWeight, template: ScalesTemplate) -> str:
    """What scales are stored in: the first dtype of the layout that has their bits."""
    return next(dtype for dtype in template.dtypes if dtype in weight.stored_scale_dtypes)


def _scale_word(weight: ScaledWeight) -> str:
    return weight.stored_scale_dtypes[0]
