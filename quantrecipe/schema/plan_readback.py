"""Reading a plan's output back, before it is written: names that would mean something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule, read_part
from quantrecipe.schema.markers import marker_bytes
from quantrecipe.schema.plan import PlannedModule, as_stored
from quantrecipe.schema.plan_drafts import Draft
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import AnyWeight, ScaledWeight
from quantrecipe.schema.tensors import SourcePart, TensorInfo

_HINT = "Choose a target layout whose names tell them apart."


def misread(target: Layout, drafts: Iterable[Draft]) -> Iterator[Problem]:
    """What ``target`` would read out of these outputs that is not what went in.

    A tensor of no module may by its name look like the scale of one; then nothing could read the
    checkpoint, so it is refused before it exists.
    """
    files: dict[str, dict[str, TensorInfo]] = {}
    modules: dict[tuple[str, str], list[tuple[PlannedModule, Draft]]] = {}
    for draft in drafts:
        tensors = files.setdefault(draft.file, {})
        for role, output in draft.outputs.items():
            tensors[output.name] = TensorInfo(
                output.name,
                output.dtype,
                output.shape,
                Path(draft.file),
                0,
                output.nbytes,
                _said(draft.module) if role == "marker" else None,
            )
        mine = modules.setdefault((draft.file, draft.part), [])
        if draft.module is not None:
            mine.append((draft.module, draft))
    for (file, part), expected in modules.items():
        contents = read_part(target, SourcePart(part, Path(), (), files[file]))
        for problem in contents.problems:
            yield Problem(
                "misread",
                f"layout {target.name!r} would not read its own output of part {part!r} back: "
                f"{problem.message}",
                hint=_HINT,
                pointer="/target/layout",
                tensor=problem.tensor,
            )
        if contents.problems:
            continue
        for module, draft in expected:
            if not _same(module, draft, contents.modules.get(module.name)):
                yield Problem(
                    "misread",
                    f"layout {target.name!r} would read {module.name!r} of part {part!r} back as "
                    "something else",
                    hint=_HINT,
                    pointer="/target/layout",
                    tensor=draft.outputs["weight"].name,
                )


def _said(module: PlannedModule | None) -> bytes | None:
    """What will be in a marker, but for numbers that only the end tells."""
    if module is None or module.marker is None:
        return None
    return marker_bytes(module.marker, module.marker_length, 0.0)


def _same(planned: PlannedModule, draft: Draft, read: StoredModule | None) -> bool:
    if read is None or not same_numbers(
        planned.weight, read.weight, (read.out_features, read.in_features)
    ):
        return False
    if "smoothing" in read.tensors and "smoothing" not in draft.outputs:
        return False
    names = {role: info.name for role, info in read.tensors.items()}
    return all(names.get(role) == output.name for role, output in draft.outputs.items())


def same_numbers(one: AnyWeight, other: AnyWeight, shape: tuple[int, int]) -> bool:
    """Whether two weight formats store a weight of this shape in the same way.

    With a single row, a channel is the whole tensor: files cannot tell such formats apart, and
    nobody has to.
    """
    if isinstance(one, ScaledWeight) and isinstance(other, ScaledWeight):
        alike = (one.format, one.scale_dtype) == (other.format, other.scale_dtype)
        alike = alike and one.has_zero_points == other.has_zero_points
        alike = alike and one.has_two_levels == other.has_two_levels
        return alike and one.scale_grid(*shape) == other.scale_grid(*shape)
    return one == other


def same_codes(one: AnyWeight, other: AnyWeight, shape: tuple[int, int]) -> bool:
    """``same_numbers``, but that scales may be in a wider dtype in ``other``."""
    if isinstance(one, ScaledWeight) and isinstance(other, ScaledWeight):
        widened = as_stored(one, other)
        return same_numbers(widened, other, shape)  # type: ignore[arg-type]
    return same_numbers(one, other, shape)
