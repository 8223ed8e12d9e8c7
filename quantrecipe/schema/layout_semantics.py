"""What a layout says that no schema can check: whether its pieces fit one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, get_args

from quantrecipe.schema.layout import DimName
from quantrecipe.schema.packings import PACKINGS, Packing
from quantrecipe.schema.parsed import child
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import PACKED_FORMATS, ScaledFormatName

Object = Mapping[str, Any]

SCALED: Final[tuple[str, ...]] = get_args(ScaledFormatName)
_DIM_NAMES: Final = frozenset(get_args(DimName))
_WITH_ZEROS: Final = ("int4",)
_PACKINGS: Final[Mapping[str, Packing]] = {str(name): each for name, each in PACKINGS.items()}

# The named dimensions that the scales of a granularity need: no more, or their number would not
# follow from the shape of the weight; no fewer, or they would not fit in.
_DIMS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "tensor": frozenset(),
        "channel": frozenset({"out"}),
        "group": frozenset({"out", "groups"}),
        "block": frozenset({"row_blocks", "column_blocks"}),
    }
)

# What ``quantization_config`` leaves unsaid, because it is always so.
_CONFIG_NAMES: Final = ("weight", "weight_scale", "weight_zero_point", "smoothing", "bias")
_CONFIG_SHAPES: Final[Mapping[str, list[str | int]]] = MappingProxyType(
    {
        "tensor": [],
        "channel": ["out", 1],
        "group": ["out", "groups"],
        "block": ["row_blocks", "column_blocks"],
    }
)


def layout_problems(layout: Object, pointer: str = "") -> Iterator[Problem]:
    """What is wrong with a layout beyond its structure.

    Args:
        layout: the layout as a JSON value; what is not of the expected shape is looked past.
        pointer: where the layout is in its document.
    """
    modules, holds = _table(layout, "modules"), _table(layout, "holds")
    for name in SCALED:
        tensors, held = modules.get(name), holds.get(name)
        here = child(f"{pointer}/modules", name)
        if isinstance(held, dict) and tensors is None:
            yield Problem(
                "format-without-tensors",
                f"the layout holds {name}, but does not say what its tensors are called",
                f"Add {name!r} to 'modules'.",
                pointer=child(f"{pointer}/holds", name),
            )
        if isinstance(tensors, dict) and held is None:
            yield Problem(
                "format-not-held",
                f"{name} has tensors, but 'holds' does not say what the layout can hold of it",
                f"Add {name!r} to 'holds'.",
                pointer=here,
            )
        if isinstance(tensors, dict):
            yield from _scales(tensors, name, here)
            yield from _packing(tensors, name, here)
        if isinstance(tensors, dict) and isinstance(held, dict):
            yield from _granularity(tensors, held, here)
            yield from _smoothing(tensors, held, child(f"{pointer}/holds", name), here)
    yield from _alike(modules, f"{pointer}/modules")
    if _table(_table(modules, "plain"), "weight_scale"):
        yield Problem(
            "scales-of-plain",
            "a plain module has no scales",
            "Describe them under the format that has them.",
            pointer=f"{pointer}/modules/plain/weight_scale",
        )
    for name, held in holds.items():
        if isinstance(held, dict):
            yield from _block_size(held, child(f"{pointer}/holds", name))
            yield from _rotation(layout, held, child(f"{pointer}/holds", name))
    for name, tensors in modules.items():
        if isinstance(tensors, dict):
            yield from _names(tensors, child(f"{pointer}/modules", name))
    if _table(layout, "config").get("quantization_config") == "quantrecipe":
        yield from _config(layout, pointer)
    yield from _mappings(layout.get("names"), f"{pointer}/names")


def _scales(tensors: Object, name: str, pointer: str) -> Iterator[Problem]:
    scales = tensors.get("weight_scale")
    if scales is None:
        yield Problem(
            "missing-scales",
            f"a weight in {name} means nothing without its scales",
            "Add 'weight_scale'.",
            pointer=pointer,
        )
        return
    if not isinstance(scales, dict):
        return
    if scales.get("optional") is True:
        yield Problem(
            "optional-scales",
            f"a weight in {name} means nothing without its scales, so they are not optional",
            "Remove 'optional'.",
            pointer=f"{pointer}/weight_scale/optional",
        )
    for granularity, shapes in _table(scales, "shapes").items():
        if not isinstance(shapes, list) or granularity not in _DIMS:
            continue
        for index, shape in enumerate(shapes):
            if isinstance(shape, list):
                where = f"{child(f'{pointer}/weight_scale/shapes', granularity)}/{index}"
                yield from _shape(shape, granularity, where)


def _packing(tensors: Object, name: str, pointer: str) -> Iterator[Problem]:
    """Codes of 4 bits are packed, others are not; zero points are those of int4."""
    packed = _table(tensors, "weight").get("packing") is not None
    if packed != (name in PACKED_FORMATS):
        yield Problem(
            "packing-mismatch",
            f"codes of {name} " + ("fill a byte each" if packed else "have 4 bits"),
            "Take 'packing' out." if packed else "Say with 'packing' how they share numbers.",
            pointer=f"{pointer}/weight" + ("/packing" if packed else ""),
        )
    for role, formats in (("weight_zero_point", _WITH_ZEROS), ("weight_shape", PACKED_FORMATS)):
        if tensors.get(role) is not None and name not in formats:
            yield Problem(
                "role-without-use",
                f"a weight in {name} has no {role.replace('weight_', '').replace('_', ' ')} "
                "beside its codes",
                "Take it out.",
                pointer=f"{pointer}/{role}",
            )


def _alike(modules: Object, pointer: str) -> Iterator[Problem]:
    """Two formats whose weights nothing but their numbers would tell apart."""
    seen: dict[tuple[str, str], str] = {}
    for name in PACKED_FORMATS:
        weight = _table(_table(modules, name), "weight")
        called, packing = weight.get("name"), weight.get("packing")
        if not isinstance(called, str) or not isinstance(packing, str):
            continue
        if packing not in _PACKINGS:
            continue
        first = seen.setdefault((called, _PACKINGS[packing].dtype), name)
        if first != name:
            yield Problem(
                "formats-alike",
                f"weights in {first} and in {name} have the same names and the same dtype, so "
                "nobody could tell which is which",
                "Give one of them another name or another packing.",
                pointer=f"{child(pointer, name)}/weight",
            )


def _shape(shape: list[Any], granularity: str, pointer: str) -> Iterator[Problem]:
    named = [dim for dim in shape if isinstance(dim, str)]
    fixed = [dim for dim in shape if type(dim) is int]
    if not _DIM_NAMES.issuperset(named) or min(fixed, default=1) < 1:
        return
    needed = _DIMS[granularity]
    if sorted(named) != sorted(needed) or max(fixed, default=1) > 1:
        wanted = " and ".join(sorted(needed)) or "no named dimension"
        yield Problem(
            "bad-shape",
            f"the scales of granularity {granularity!r} do not have the shape {shape}",
            f"It has {wanted}, each once, and else only ones.",
            pointer=pointer,
        )


def _granularity(tensors: Object, held: Object, pointer: str) -> Iterator[Problem]:
    shapes = _table(tensors, "weight_scale").get("shapes")
    said = held.get("granularity")
    if not isinstance(shapes, dict) or not isinstance(said, list):
        return
    known = [entry for entry in said if isinstance(entry, str)]
    if _DIMS.keys() >= set(shapes) != set(known):
        yield Problem(
            "granularity-mismatch",
            f"scales have shapes for {_listed(shapes)}, but the layout holds {_listed(known)}",
            "Name the same granularities in 'shapes' and in 'holds'.",
            pointer=f"{pointer}/weight_scale/shapes",
        )


def _smoothing(tensors: Object, held: Object, holds: str, pointer: str) -> Iterator[Problem]:
    places = held.get("smoothing", [])
    online = isinstance(places, list) and "online" in places
    has_place = tensors.get("smoothing") is not None
    if online and not has_place:
        yield Problem(
            "smoothing-mismatch",
            "the layout holds smoothing online, but has no tensor for its factors",
            "Add 'smoothing' to the tensors of the format.",
            pointer=f"{holds}/smoothing",
        )
    if has_place and not online:
        yield Problem(
            "smoothing-mismatch",
            "there is a tensor for smoothing factors, but the layout does not hold any online",
            "Add 'online' to 'smoothing' in 'holds'.",
            pointer=f"{pointer}/smoothing",
        )


def _block_size(held: Object, pointer: str) -> Iterator[Problem]:
    said = held.get("granularity")
    if held.get("block_size") is not None and isinstance(said, list) and "block" not in said:
        yield Problem(
            "block-size-without-block",
            "a block size says nothing without the granularity 'block'",
            "Remove it, or add 'block' to 'granularity'.",
            pointer=f"{pointer}/block_size",
        )


def _rotation(layout: Object, held: Object, pointer: str) -> Iterator[Problem]:
    said = _table(layout, "config").get("quantization_config")
    if held.get("rotation") and said != "quantrecipe":
        yield Problem(
            "rotation-unsaid",
            "nothing in the layout tells a reader which modules are rotated",
            'Add "config": {"quantization_config": "quantrecipe"}, or take the rotation out of '
            "'holds'.",
            pointer=f"{pointer}/rotation",
        )


def _names(tensors: Object, pointer: str) -> Iterator[Problem]:
    """A name that two tensors of one module, or one tensor twice, would go by."""
    seen: dict[str, str] = {}
    for role, template in tensors.items():
        if not isinstance(template, dict):
            continue
        here = child(pointer, role)
        names = [("name", template.get("name"))]
        aliases = template.get("aliases")
        if isinstance(aliases, list):
            names += [(f"aliases/{index}", alias) for index, alias in enumerate(aliases)]
        for where, name in names:
            if not isinstance(name, str):
                continue
            first = seen.setdefault(name, role)
            if first != role or (where != "name" and name == template.get("name")):
                yield Problem(
                    "duplicate-name",
                    f"{name!r} is already the name of {first!r}",
                    "Every tensor of a module goes by names of its own.",
                    pointer=f"{here}/{where}",
                )


def _config(layout: Object, pointer: str) -> Iterator[Problem]:
    """Where a loader that knows the ``quantization_config`` alone would expect something else."""
    hint = "Name it so, or take 'config' out: its readers look for nothing else."
    for name, tensors in _table(layout, "modules").items():
        here = child(f"{pointer}/modules", name)
        for role in _CONFIG_NAMES:
            template = _table(tensors, role)
            wanted = f"{{module}}.{role}"
            if template.get("name", wanted) != wanted:
                yield Problem(
                    "not-as-configured",
                    f"with 'config', it is called {wanted!r}",
                    hint,
                    pointer=f"{here}/{role}/name",
                )
        shapes = _table(_table(tensors, "weight_scale"), "shapes")
        for granularity, written in _CONFIG_SHAPES.items():
            listed = shapes.get(granularity)
            if isinstance(listed, list) and listed and listed[0] != written:
                yield Problem(
                    "not-as-configured",
                    f"with 'config', scales of granularity {granularity!r} are written as "
                    f"{written}",
                    "Put that shape first.",
                    pointer=f"{child(f'{here}/weight_scale/shapes', granularity)}/0",
                )
    if _table(layout, "others").get("name", "{tensor}") != "{tensor}":
        yield Problem(
            "not-as-configured",
            "with 'config', it is '{tensor}'",
            hint,
            pointer=f"{pointer}/others/name",
        )


def _mappings(names: Any, pointer: str) -> Iterator[Problem]:
    """Names that cannot be made, or that two entries would make."""
    taken: dict[str, str] = {}
    made: dict[str, str] = {}
    for index, entry in enumerate(names if isinstance(names, list) else ()):
        source, into = (entry.get("from"), entry.get("into")) if isinstance(entry, dict) else (0, 0)
        if not isinstance(source, str) or not isinstance(into, list):
            continue
        here = f"{pointer}/{index}"
        if source in taken:
            yield Problem(
                "duplicate-name",
                f"{source!r} is what {taken[source]} is for already",
                "The first entry that fits counts; take one of them out.",
                pointer=f"{here}/from",
            )
        taken.setdefault(source, here)
        wildcards = source.split(".").count("*")
        for place, name in enumerate(into):
            if not isinstance(name, str):
                continue
            where = f"{here}/into/{place}"
            if name.split(".").count("*") != wildcards:
                yield Problem(
                    "wildcards-differ",
                    f"{name!r} has not as many '*' as {source!r}",
                    "What each '*' stands for is carried over to the one in the same place.",
                    pointer=where,
                )
            if name in made:
                yield Problem(
                    "duplicate-name",
                    f"{name!r} is already the name that {made[name]} makes",
                    "Every module goes by a name of its own.",
                    pointer=where,
                )
            made.setdefault(name, where)


def _table(value: Any, key: str) -> Object:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
