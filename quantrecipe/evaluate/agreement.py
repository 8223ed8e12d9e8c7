"""What a lock says, held to its recipe and to the rest of what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from quantrecipe.evaluate.locked import is_below, locked_sites
from quantrecipe.evaluate.sidecars import shard_indexes, written_configs
from quantrecipe.schema.dtypes import BLOCK_DTYPES, DTYPES, byte_size
from quantrecipe.schema.folds import FOLDED_NAME
from quantrecipe.schema.gguf import DEFAULT_ALIGNMENT, aligned
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.layout_writing import (
    module_tensors,
    other_name,
    refusal,
)
from quantrecipe.schema.lock import LOCK_NAME, RECIPE_NAME, Lock, LockedModule, LockedTensor
from quantrecipe.schema.placement import shard_of
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight
from quantrecipe.schema.selection import Taken, select
from quantrecipe.schema.siblings import Siblings, folded, smoothing_groups, tie
from quantrecipe.schema.tensors import OutputTensor

_SUFFIX: Final = ".safetensors"
_GGUF: Final = ".gguf"
_HINT: Final = "The lock was edited or damaged; fetch or convert the checkpoint again."


def check_lock(lock: Lock) -> Iterator[Problem]:
    """What does not hold within a lock; pointers are into it.

    Source sizes and digests, measured errors and the names of who did it follow from nothing in the
    lock: the first two are held against the source.
    """
    yield from _names(lock)
    yield from _outputs(lock)
    yield from _sidecars(lock)
    yield from _sources(lock)
    yield from _tensors(lock)
    yield from _modules(lock)
    yield from _smoothing_groups(lock)
    yield from _others(lock)


def _wrong(
    pointer: str, message: str, tensor: str | None = None, kind: str = "bad-lock"
) -> Problem:
    """A problem of a lock."""
    return Problem(kind, message, _HINT, pointer=pointer, tensor=tensor)


def _names(lock: Lock) -> Iterator[Problem]:
    """Entries are there where the recipe has names, and those that it has written out."""
    said = lock.recipe.target.names
    if (said is None) != (lock.names is None) or (
        not isinstance(said, str | None) and said != lock.names
    ):
        yield _wrong("/names", "they are not those that the recipe's target.names stands for")


def _outputs(lock: Lock) -> Iterator[Problem]:
    seen: set[str] = set()
    homes = {lock.recipe.target.file_of(part) for part in lock.recipe.source.parts}
    for index, output in enumerate(lock.outputs):
        pointer = f"/outputs/{index}/path"
        if output.path.casefold() in seen:
            yield _wrong(pointer, f"{output.path!r} is listed twice")
        elif output.path not in homes and shard_of(output.path) not in homes:
            yield _wrong(pointer, f"the recipe writes no file {output.path!r}")
        seen.add(output.path.casefold())


def _sidecars(lock: Lock) -> Iterator[Problem]:
    """No two files share a name, and those that are always written are there."""
    seen = {LOCK_NAME, *(output.path.casefold() for output in lock.outputs)}
    for index, file in enumerate(lock.sidecars):
        pointer = f"/sidecars/{index}/path"
        if file.path.casefold() in seen:
            yield _wrong(pointer, f"{file.path!r} is listed twice")
        if not is_below(file.path):
            yield _wrong(pointer, f"{file.path!r} is not below the folder of the lock")
        seen.add(file.path.casefold())
    always = {RECIPE_NAME, *shard_indexes(lock), *written_configs(lock)}
    if locked_sites(lock):
        always.add(FOLDED_NAME)
    for path in always - {file.path for file in lock.sidecars}:
        yield _wrong("/sidecars", f"{path!r} was written, and is not listed")


def _sources(lock: Lock) -> Iterator[Problem]:
    parts = lock.recipe.source.parts
    seen: set[tuple[str, str]] = set()
    for index, file in enumerate(lock.source):
        pointer = f"/source/{index}"
        location = parts.get(file.part)
        if location is None:
            yield _wrong(f"{pointer}/part", f"the recipe has no part {file.part!r}")
        elif _is_one_file(location) and file.path != location:
            yield _wrong(f"{pointer}/path", f"the recipe reads {location!r}, not {file.path!r}")
        if (file.part, file.path) in seen:
            yield _wrong(pointer, f"{file.path!r} is listed twice for part {file.part!r}")
        seen.add((file.part, file.path))
    for part in parts.keys() - {part for part, _ in seen}:
        yield _wrong("/source", f"no file was read for part {part!r}")


def _is_one_file(location: str) -> bool:
    return location.endswith((_SUFFIX, _GGUF)) and re.search(r"[*?\[]", location) is None


def _tensors(lock: Lock) -> Iterator[Problem]:
    """Every byte after a file's header belongs to one tensor, but for what aligns those of GGUF."""
    sizes = {output.path: output.bytes for output in lock.outputs}
    by_file: dict[str, list[tuple[str, LockedTensor]]] = {path: [] for path in sizes}
    seen: set[tuple[str, str]] = set()
    for pointer, tensor in lock.tensors():
        if tensor.file not in sizes:
            yield _wrong(f"{pointer}/file", f"{tensor.file!r} is no file of outputs", tensor.name)
            continue
        if (tensor.file, tensor.name) in seen:
            yield _wrong(pointer, f"{tensor.name!r} is listed twice", tensor.name)
        seen.add((tensor.file, tensor.name))
        by_file[tensor.file].append((pointer, tensor))
        if tensor.dtype not in DTYPES and tensor.dtype not in BLOCK_DTYPES:
            yield _wrong(f"{pointer}/dtype", f"there is no dtype {tensor.dtype!r}", tensor.name)
        elif _size(tensor) != tensor.bytes:
            message = f"{tensor.dtype} {list(tensor.shape)} takes other than {tensor.bytes:,} bytes"
            yield _wrong(f"{pointer}/bytes", message, tensor.name)
    for path, tensors in by_file.items():
        yield from _coverage(path, sizes[path], tensors)


def _size(tensor: LockedTensor) -> int | None:
    try:
        return byte_size(tensor.dtype, tensor.shape)
    except ValueError:
        return None


_CARRIED: Final = ("lossless", "inverted")


def _coverage(path: str, size: int, found: list[tuple[str, LockedTensor]]) -> Iterator[Problem]:
    ordered = sorted(found, key=lambda each: (each[1].offset, each[1].bytes))
    end = None
    for pointer, tensor in ordered:
        if end is not None and tensor.offset != end:
            what = "overlaps what is before it" if tensor.offset < end else "leaves a gap before it"
            yield _wrong(f"{pointer}/offset", f"{what}: byte {end} is next", tensor.name)
        end = tensor.offset + tensor.bytes
        if path.endswith(_GGUF):
            end = aligned(end, DEFAULT_ALIGNMENT)
    if end is not None and end != size:
        yield _wrong("/outputs", f"the tensors of {path!r} end at byte {end:,} of {size:,}")


def _modules(lock: Lock) -> Iterator[Problem]:
    layout = resolve_layout(lock.recipe.target.layout)
    taken = _taken(lock)
    seen: set[tuple[str, str]] = set()
    for index, module in enumerate(lock.modules):
        pointer = f"/modules/{index}"
        if module.part not in lock.recipe.source.parts:
            yield _wrong(f"{pointer}/part", f"the recipe has no part {module.part!r}")
            continue
        key = module.part, module.name
        if key in seen:
            yield _wrong(pointer, f"{module.name!r} of part {module.part!r} is listed twice")
        seen.add(key)
        yield from _decision(lock.recipe, pointer, module, taken.get(key))
        yield from _stored(lock.recipe, layout, pointer, module)
        yield from _measured(lock.recipe, pointer, module)


def _taken(lock: Lock) -> Mapping[tuple[str, str], Taken]:
    contents: dict[str, PartContents] = {}
    for part in lock.recipe.source.parts:
        modules = {
            module.name: StoredModule(module.name, 0, 0, module.weight, {})
            for module in lock.modules
            if module.part == part
        }
        contents[part] = PartContents(modules, {}, frozenset(), ())
    return select(lock.recipe, contents).taken


def _decision(
    recipe: Recipe, pointer: str, module: LockedModule, taken: Taken | None
) -> Iterator[Problem]:
    """What the recipe makes of a module is what the lock says became of it."""
    expected: dict[str, Any] = {
        "disposition": "passthrough",
        "scheme": None,
        "reason": None,
        "activation": None,
        "smoothing": None,
        "rotation": module.rotation if module.transfer in _CARRIED else None,
        "weight": module.weight,
    }
    if taken is not None and taken.protected is not None:
        expected["disposition"], expected["reason"] = "protected", taken.protected.reason
        expected["weight"] = PlainWeight(format=taken.protected.dtype)
    elif taken is not None and taken.rule is not None:
        scheme = recipe.schemes[taken.rule.scheme]
        expected["disposition"], expected["scheme"] = "quantized", taken.rule.scheme
        for field in ("weight", "activation", "smoothing", "rotation"):
            expected[field] = getattr(scheme, field)
    for field, value in expected.items():
        if getattr(module, field) != value:
            message = f"{field} of {module.name!r} is not what the recipe says"
            yield _wrong(f"{pointer}/{field}", message, module.name, "not-the-plan")


def _stored(
    recipe: Recipe, layout: Layout, pointer: str, module: LockedModule
) -> Iterator[Problem]:
    """A module's tensors are those that the target layout gives it."""
    for role, tensor in module.tensors.items():
        if tensor.role != role:
            yield _wrong(f"{pointer}/tensors/{role}/role", f"is not {role!r}", tensor.name)
        yield from _home(recipe, module.part, f"{pointer}/tensors/{role}", tensor)
    weight, bias = module.tensors.get("weight"), module.tensors.get("bias")
    if weight is None:
        yield _wrong(f"{pointer}/tensors", f"{module.name!r} has no weight", module.name)
        return
    factors = module.smoothing is not None and module.smoothing.apply == "online"
    # Those of a source that was smoothed went along with its codes.
    factors = factors or (module.transfer in _CARRIED and "smoothing" in module.tensors)
    refused = refusal(
        layout,
        module.weight,
        smoothed=factors or module.smoothing is not None,
        factors=factors,
        rotation=module.rotation,
    )
    if refused is not None:
        yield _wrong(f"{pointer}/weight", refused[0], module.name, "not-the-plan")
        return
    expected = module_tensors(
        layout,
        module.part,
        module.name,
        module.shape,
        module.weight,
        smoothing=factors,
        rotation=module.rotation,
        decoded="bfloat16",
        bias=OutputTensor(bias.name, bias.dtype, bias.shape) if bias is not None else None,
    )
    for role in expected.keys() | module.tensors.keys():
        there, wanted = module.tensors.get(role), expected.get(role)
        if there is None or wanted is None:
            message = f"{module.name!r} {'lacks' if there is None else 'has no place for'} {role}"
            yield _wrong(f"{pointer}/tensors", message, module.name, "not-the-plan")
        elif (there.name, there.dtype) != (wanted.name, wanted.dtype) or (
            # What a marker says of the source shows nowhere in the lock.
            role != "marker" and there.shape != wanted.shape
        ):
            message = (
                f"layout {layout.name!r} stores it as {wanted.name!r}, {wanted.dtype} "
                f"{list(wanted.shape)}, not {there.name!r}, {there.dtype} {list(there.shape)}"
            )
            yield _wrong(f"{pointer}/tensors/{role}", message, there.name, "not-the-plan")


def _home(recipe: Recipe, part: str, pointer: str, tensor: LockedTensor) -> Iterator[Problem]:
    home = recipe.target.file_of(part)
    if tensor.file != home and shard_of(tensor.file) != home:
        message = f"part {part!r} goes into {home!r}, not {tensor.file!r}"
        yield _wrong(f"{pointer}/file", message, tensor.name, "not-the-plan")


def _measured(recipe: Recipe, pointer: str, module: LockedModule) -> Iterator[Problem]:
    if not isinstance(module.weight, ScaledWeight) or module.transfer in _CARRIED:
        return
    if module.error is None:
        yield _wrong(pointer, f"{module.name!r} has no measured error", module.name)
        return
    least, found = recipe.bounds.min_weight_sqnr_db, module.error.sqnr_db
    if least is not None and found is not None and found < least:
        message = f"{found:.2f} dB, and the recipe asks for {least:g} dB"
        yield _wrong(f"{pointer}/error/sqnr_db", message, module.name, "bound-missed")


def _smoothing_groups(lock: Lock) -> Iterator[Problem]:
    """Every smoothed module in one group, as the recipe ties them, and one set of factors in each.

    Where the recipe ties none itself, the groups come from the statistics file, which is no part
    of the output; what they are is taken from the lock.
    """
    groups = lock.smoothing_groups or ()
    smoothing = {(m.part, m.name): m.smoothing for m in lock.modules if m.smoothing is not None}
    names: dict[str, list[str]] = {part: [] for part in lock.recipe.source.parts}
    for module in lock.modules:
        names.setdefault(module.part, []).append(module.name)
    ties = tuple(Siblings(group.part, group.modules) for group in groups)
    if lock.recipe.siblings is not None:
        ties = (*folded(locked_sites(lock)), *tie(lock.recipe.siblings, names).siblings)
    expected = [(group.part, group.modules) for group in smoothing_groups(lock.modules, ties)]
    if [(group.part, group.modules) for group in groups] != expected:
        message = "the groups are not those that the recipe makes of the smoothed modules"
        yield _wrong("/smoothing_groups", message, kind="not-the-plan")
        return
    stored = {
        (module.part, module.name): module.tensors["smoothing"].xxh3_128
        for module in lock.modules
        if "smoothing" in module.tensors
    }
    for index, group in enumerate(groups):
        if group.alpha not in smoothing[group.part, group.modules[0]].candidates:
            message = f"alpha is {group.alpha}, and the recipe does not say so"
            yield _wrong(f"/smoothing_groups/{index}/alpha", message, kind="not-the-plan")
        if len({stored.get((group.part, name)) for name in group.modules}) > 1:
            message = f"{', '.join(group.modules)} of part {group.part!r} store different factors"
            yield _wrong(f"/smoothing_groups/{index}", message)


def _others(lock: Lock) -> Iterator[Problem]:
    layout = resolve_layout(lock.recipe.target.layout)
    for index, other in enumerate(lock.others):
        pointer, tensor = f"/others/{index}", other.tensor
        if other.part not in lock.recipe.source.parts:
            yield _wrong(f"{pointer}/part", f"the recipe has no part {other.part!r}")
            continue
        yield from _home(lock.recipe, other.part, f"{pointer}/tensor", tensor)
        if tensor.role != "other":
            yield _wrong(f"{pointer}/tensor/role", "is not 'other'", tensor.name)
        wanted = other_name(layout, other.part, other.name)
        if tensor.name != wanted:
            message = f"layout {layout.name!r} calls it {wanted!r}"
            yield _wrong(f"{pointer}/name", message, tensor.name, "not-the-plan")
