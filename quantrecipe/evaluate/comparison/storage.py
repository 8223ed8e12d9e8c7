"""How the same numbers are stored otherwise: under other names, in other shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.plan_readback import same_numbers
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo


def moved_tensors(
    a: Mapping[str, TensorInfo], b: Mapping[str, TensorInfo], *, files: bool
) -> Iterator[str]:
    """What differs of where tensors are, in a word each.

    Args:
        a: tensors of one checkpoint, by role.
        b: those of the other.
        files: whether the names of files are the checkpoints' own. Where in a file a tensor lies
            is nothing that a reader sees.
    """
    both = [(a[role], b[role]) for role in a if role in b]
    for side, only in (("A", a.keys() - b.keys()), ("B", b.keys() - a.keys())):
        for role in sorted(only):
            yield f"{role.replace('_', ' ')} only in {side}"
    if any(one.name != other.name for one, other in both):
        yield "names"
    if files and any(one.file.name != other.file.name for one, other in both):
        yield "files"


def moved_module(a: StoredModule, b: StoredModule, *, files: bool) -> Iterator[str]:
    """What differs of how a module of the same numbers is stored, in a few words each."""
    yield from moved_tensors(a.tensors, b.tensors, files=files)
    if a.storage != b.storage:
        yield "packing"
    one, other = a.weight, b.weight
    if not isinstance(one, ScaledWeight) or not isinstance(other, ScaledWeight):
        return
    if one.scale_dtype != other.scale_dtype:
        yield f"scales {one.scale_dtype} -> {other.scale_dtype}"
    elif not same_numbers(one, other, (a.out_features, a.in_features)):
        yield f"scales by {one.granularity} -> {other.granularity}"
    elif any(
        a.tensors[role].shape != b.tensors[role].shape
        for role in a.tensors.keys() & b.tensors.keys() & {"weight_scale"}
    ):
        yield "scale shape"
