"""What a layout says that no schema can check: whether its pieces fit one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, get_args

from quantrecipe.schema.layout import DimName
from quantrecipe.schema.markers import OFFSET, VARIABLES, variables
from quantrecipe.schema.parsed import child
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import (
    CODE_DTYPES,
    PACKED_FORMATS,
    RecordFormatName,
    ScaledFormatName,
)
from quantrecipe.schema.storage import PACKINGS, Packing

Object = Mapping[str, Any]

SCALED: Final[tuple[str, ...]] = get_args(ScaledFormatName)
_RECORDS: Final[tuple[str, ...]] = get_args(RecordFormatName)
_TWO_LEVELS: Final = ("nf4", "nvfp4")
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
_TILES: Final = ("padded_groups", "padded_out"), ("tile_columns", "tile_rows")
_FLAT: Final = frozenset({"scales"})

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
        yield from _format(modules.get(name), holds.get(name), name, pointer)
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
            yield from _rotation(layout, name, held, child(f"{pointer}/holds", name))
    for name, tensors in modules.items():
        if isinstance(tensors, dict):
            yield from _names(tensors, child(f"{pointer}/modules", name))
    if _table(layout, "config").get("quantization_config") == "quantrecipe":
        yield from _config(layout, pointer)


def _format(tensors: Any, held: Any, name: str, pointer: str) -> Iterator[Problem]:
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
        if name in _RECORDS:
            yield from _records(tensors, name, here)
        else:
            yield from _scales(tensors, name, here)
        yield from _packing(tensors, name, here)
        yield from _levels(tensors, name, here)
        yield from _marker(tensors, here)
    if isinstance(tensors, dict) and isinstance(held, dict) and name not in _RECORDS:
        yield from _granularity(tensors, held, here)
        yield from _smoothing(tensors, held, child(f"{pointer}/holds", name), here)


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
                tiles = scales.get("arrangement", "rows") != "rows"
                yield from _shape(shape, granularity, where, tiles=tiles)


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
    """Two formats whose tensors nothing but their numbers would tell apart."""
    seen: dict[tuple[str, str], list[str]] = {}
    for name in SCALED:
        tensors = _table(modules, name)
        weight = _table(tensors, "weight")
        called, packing = weight.get("name"), weight.get("packing")
        if not isinstance(called, str) or not (packing is None or packing in _PACKINGS):
            continue
        dtype = _PACKINGS[packing].dtype if packing else CODE_DTYPES.get(name, name)
        others = seen.setdefault((called, dtype), [])
        for first in others:
            if not _told_apart(_table(modules, first), tensors):
                yield Problem(
                    "formats-alike",
                    f"weights in {first} and in {name} have the same names, dtypes and scales, so "
                    "nobody could tell which is which",
                    "Give one of them another name, another packing or a marker.",
                    pointer=f"{child(pointer, name)}/weight",
                )
        others.append(name)


def _told_apart(one: Object, other: Object) -> bool:
    """Whether scales, what stands beside them or a marker show which of two formats it is."""
    scales = [_table(each, "weight_scale") for each in (one, other)]
    if scales[0].get("name") != scales[1].get("name"):
        return True
    dtypes = [set(each.get("dtypes") or ()) for each in scales]
    if dtypes[0].isdisjoint(dtypes[1]):
        return True
    seconds = [_table(each, "second_scale") for each in (one, other)]
    asked = [bool(each) and each.get("optional") is not True for each in seconds]
    if asked[0] != asked[1] and not all(seconds):
        return True
    said = [_table(_table(each, "marker"), "json") for each in (one, other)]
    return any(
        said[0][key] != said[1][key] and not {said[0][key], said[1][key]} & VARIABLES
        for key in said[0].keys() & said[1].keys()
        if isinstance(said[0][key], str) and isinstance(said[1][key], str)
    )


def _records(tensors: Object, name: str, pointer: str) -> Iterator[Problem]:
    if tensors.get("weight_scale") is not None:
        yield Problem(
            "role-without-use",
            f"a weight in {name} has its scales in its records",
            "Take it out.",
            pointer=f"{pointer}/weight_scale",
        )


def _levels(tensors: Object, name: str, pointer: str) -> Iterator[Problem]:
    """A second level of scales belongs to formats that have one."""
    if name not in _TWO_LEVELS:
        for role in ("second_scale", "scale_offset", "scale_map"):
            if tensors.get(role) is not None:
                yield Problem(
                    "role-without-use",
                    f"scales of {name} have one level",
                    "Take it out.",
                    pointer=f"{pointer}/{role}",
                )
    elif name == "nvfp4" and _table(tensors, "second_scale") == {}:
        yield Problem(
            "missing-scales",
            f"scales of {name} mean nothing without their second level",
            "Add 'second_scale'.",
            pointer=pointer,
        )


def _marker(tensors: Object, pointer: str) -> Iterator[Problem]:
    """What a marker may say, and what has to be said by one."""
    marker = _table(tensors, "marker")
    said = set(variables([marker.get(key) for key in ("json", "rotated", "two_levels")]))
    for name in sorted(said - VARIABLES):
        yield Problem(
            "unknown-variable",
            f"nothing is called {name!r}",
            f"Known are {', '.join(sorted(VARIABLES))}.",
            pointer=f"{pointer}/marker",
        )
    if _table(tensors, "weight").get("shape") == "column" and not {"$out", "$in"} <= said:
        yield Problem(
            "shape-unsaid",
            "codes in a column do not show how many out and in features there are",
            "Add a marker that says '$out' and '$in'.",
            pointer=f"{pointer}/weight/shape",
        )
    if OFFSET in said and marker.get("length") is None:
        yield Problem(
            "length-unsaid",
            "how long the number will be is known only at the end",
            "Add a 'length' with room for it.",
            pointer=f"{pointer}/marker",
        )


def _shape(shape: list[Any], granularity: str, pointer: str, *, tiles: bool) -> Iterator[Problem]:
    named = [dim for dim in shape if isinstance(dim, str)]
    fixed = [dim for dim in shape if type(dim) is int]
    if not _DIM_NAMES.issuperset(named) or min(fixed, default=1) < 1:
        return
    needed = _TILES if tiles else (tuple(sorted(_DIMS[granularity])),)
    flat = not tiles and frozenset(named) == _FLAT and granularity in ("group", "block")
    if (tuple(sorted(named)) not in needed and not flat) or max(fixed, default=1) > 1:
        wanted = " or ".join(" and ".join(dims) for dims in needed) or "no named dimension"
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


def _rotation(layout: Object, name: str, held: Object, pointer: str) -> Iterator[Problem]:
    said = _table(layout, "config").get("quantization_config")
    marker = _table(_table(_table(layout, "modules"), name), "marker")
    if held.get("rotation") and said != "quantrecipe" and not marker.get("rotated"):
        yield Problem(
            "rotation-unsaid",
            "nothing in the layout tells a reader which modules are rotated",
            'Add "config": {"quantization_config": "quantrecipe"} or a marker that says it, or '
            "take the rotation out of 'holds'.",
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


def _table(value: Any, key: str) -> Object:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
