"""Writing a layout: the tensors that a module becomes, and what the layout cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quantrecipe.schema.layout import Layout, ModuleTensors, Shape
from quantrecipe.schema.layout_reading import (
    fill_template,
    packings,
    roles,
    zero_point_dtype,
    zero_point_shape,
)
from quantrecipe.schema.lock import Role
from quantrecipe.schema.packings import Packing
from quantrecipe.schema.schemes import (
    AnyWeight,
    Hadamard,
    PlainWeight,
    ScaledWeight,
    SmoothQuant,
)
from quantrecipe.schema.tensors import OutputTensor

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
    smoothing: SmoothQuant | None,
    rotation: Hadamard | None = None,
) -> tuple[str, str] | None:
    """Why ``layout`` cannot hold such a module, and what would work; ``None`` if it can."""
    if isinstance(weight, PlainWeight):
        if smoothing is not None:
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
    block = weight.group_shape(0, 0) if granularity == "block" else None
    if block is not None and block != holds.block_size:
        fixed = list(holds.block_size) if holds.block_size else "no block size"
        return (
            f"layout {layout.name!r} cannot say block_size {list(block)}",
            f"A block there is {fixed}.",
        )
    templates: ModuleTensors | None = getattr(layout.modules, name)
    if templates is None or templates.weight_scale is None:
        return f"layout {layout.name!r} has no templates for {name}", "Mend the layout."
    if weight.scale_dtype not in templates.weight_scale.dtypes:
        return (
            f"layout {layout.name!r} has no place for {name} scales in {weight.scale_dtype}",
            f"It holds: {', '.join(templates.weight_scale.dtypes)}.",
        )
    if weight.has_zero_points and templates.weight_zero_point is None:
        return (
            f"layout {layout.name!r} has no place for zero points of {name}",
            'Set "symmetric": true, or choose another layout.',
        )
    if smoothing is not None and smoothing.apply == "online" and "online" not in holds.smoothing:
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

    Returns:
        Role to tensor, named, typed and shaped as on disk.
    """

    def named(template: str) -> str:
        return fill_template(template, part, "module", module)

    templates = _templates(layout, weight)
    packing = packings(templates).get("weight")
    found: dict[Role, OutputTensor] = {}
    if packing is None:
        found["weight"] = OutputTensor(named(templates.weight.name), weight.format, shape)
    else:
        packed = shape[0], packing.stored(shape[1])
        found["weight"] = OutputTensor(named(templates.weight.name), packing.dtype, packed)
    if isinstance(weight, ScaledWeight):
        template = templates.weight_scale
        assert template is not None
        stored = template.shapes[weight.granularity][0]
        found["weight_scale"] = OutputTensor(
            named(template.name), weight.scale_dtype, _fill_shape(stored, shape, weight)
        )
        zeros = templates.weight_zero_point
        if weight.has_zero_points and zeros is not None:
            found["weight_zero_point"] = OutputTensor(
                named(zeros.name), zero_point_dtype(zeros), zero_point_shape(zeros, weight, shape)
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


def packings_of(layout: Layout, weight: AnyWeight) -> Mapping[str, Packing]:
    """How ``layout`` packs the tensors of such a module, by role."""
    found = dict(packings(_templates(layout, weight)))
    if not isinstance(weight, ScaledWeight) or not weight.has_zero_points:
        found.pop("weight_zero_point", None)
    return found


def shape_of_codes(layout: Layout, weight: AnyWeight, stored: tuple[int, int]) -> tuple[int, int]:
    """Out and in features of a weight whose numbers, or packed codes, have the shape ``stored``."""
    packing = packings(_templates(layout, weight)).get("weight")
    return stored[0], stored[1] * (1 if packing is None else packing.codes)


def unpackable(layout: Layout, weight: AnyWeight, in_features: int) -> str | None:
    """Why rows of this many codes cannot be packed as ``layout`` does, or ``None``."""
    packing = packings(_templates(layout, weight)).get("weight")
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
    written = {"weight_scale", "weight_shape"} | ({"smoothing"} if smoothing else set())
    if isinstance(weight, ScaledWeight) and weight.has_zero_points:
        written.add("weight_zero_point")
    written |= {"bias"} if bias else set()
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


def _fill_shape(
    shape: Shape, weight_shape: tuple[int, int], weight: ScaledWeight
) -> tuple[int, ...]:
    out_features, in_features = weight_shape
    rows, columns = weight.scale_grid(out_features, in_features)
    dims: dict[str, int] = {"out": out_features, "in": in_features}
    if weight.granularity == "group":
        dims["groups"] = columns
    if weight.granularity == "block":
        dims |= {"row_blocks": rows, "column_blocks": columns}
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in shape)
