"""Writing a layout: the tensors that a module becomes, and what the layout cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quantrecipe.schema.layout import Layout, ModuleTensors, Shape
from quantrecipe.schema.layout_reading import fill_template, roles
from quantrecipe.schema.lock import Role
from quantrecipe.schema.schemes import (
    AnyWeight,
    Float8Block,
    Hadamard,
    Int8Group,
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
    if isinstance(weight, Float8Block) and weight.block_size != holds.block_size:
        fixed = list(holds.block_size) if holds.block_size else "no block size"
        return (
            f"layout {layout.name!r} cannot say block_size {list(weight.block_size)}",
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
    found: dict[Role, OutputTensor] = {
        "weight": OutputTensor(named(templates.weight.name), weight.format, shape)
    }
    if isinstance(weight, ScaledWeight):
        template = templates.weight_scale
        assert template is not None
        stored = template.shapes[weight.granularity][0]
        found["weight_scale"] = OutputTensor(
            named(template.name), weight.scale_dtype, _fill_shape(stored, shape, weight)
        )
    if smoothing:
        assert templates.smoothing is not None
        found["smoothing"] = OutputTensor(
            named(templates.smoothing.name), templates.smoothing.dtype, (shape[1],)
        )
    if bias is not None and templates.bias is not None:
        found["bias"] = OutputTensor(named(templates.bias.name), bias.dtype, bias.shape)
    return found


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
    written = {"weight_scale"} | ({"smoothing"} if smoothing else set())
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
    if isinstance(weight, Int8Group):
        dims["groups"] = columns
    if isinstance(weight, Float8Block):
        dims |= {"row_blocks": rows, "column_blocks": columns}
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in shape)
