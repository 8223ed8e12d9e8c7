"""What a target layout calls the modules of a source: other names, and slices of rows.

Safetensors stores rows one after the other, so a slice of them is a tensor at another offset of the
same file: nothing is moved or computed to split a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

_IN_ROWS: Final = frozenset({"weight", "weight_scale", "weight_zero_point", "bias"})
"""Roles of which every piece has rows of its own; it shares the others."""


def renamed(contents: PartContents, layout: Layout) -> PartContents:
    """A part of a source, with its modules and other tensors called as in ``layout``.

    Args:
        contents: the part, read through the layout that it is in.
        layout: the one that it is converted into; without ``names``, nothing changes.

    Returns:
        The part; a module that the layout splits is there as its slices, each with the offsets and
        shapes of its rows. What cannot be split, and names that two would go by, are problems.
    """
    return _Renaming(contents, layout).run() if layout.names else contents


def new_names(name: str, layout: Layout) -> tuple[str, ...]:
    """What a layout calls a module, or its slices of rows; nothing, where no entry fits."""
    segments = name.split(".")
    for mapping in layout.names:
        stars = captured(mapping.source.split("."), segments)
        if stars is not None:
            return tuple(filled(into, stars) for into in mapping.into)
    return ()


class _Renaming:
    def __init__(self, contents: PartContents, layout: Layout) -> None:
        self.contents = contents
        self.layout = layout
        self.renamed: dict[str, tuple[str, ...]] = {}
        self.problems: list[Problem] = list(contents.problems)
        self.broken = {new for name in contents.broken for new in self._names(name)}

    def run(self) -> PartContents:
        modules: dict[str, StoredModule] = {}
        for name, module in self.contents.modules.items():
            for piece in self._pieces(module):
                other = modules.setdefault(piece.name, piece)
                if other is not piece:
                    owners = other.renamed_from or other.name, name
                    self._conflict(piece.name, owners, module.tensors["weight"])
        others: dict[str, TensorInfo] = {}
        for name, info in self.contents.others.items():
            new = self._other(name, info)
            if others.setdefault(new, info) is not info:
                self._conflict(new, (others[new].name, name), info)
        return replace(
            self.contents,
            modules=dict(sorted(modules.items())),
            others=dict(sorted(others.items())),
            problems=tuple(self.problems),
            broken=frozenset(self.broken - modules.keys()),
            renamed=self.renamed,
        )

    def _names(self, name: str) -> tuple[str, ...]:
        """What something of this name is called; itself, where no entry fits."""
        found = new_names(name, self.layout)
        if found:
            self.renamed[name] = found
        return found or (name,)

    def _pieces(self, module: StoredModule) -> Iterator[StoredModule]:
        names = self._names(module.name)
        if names == (module.name,):
            yield module
            return
        reason = _unsplittable(module, len(names))
        if reason is not None:
            self._refuse(module.name, names, reason, module.tensors["weight"])
            self.broken.update(names)
            return
        rows = module.out_features // len(names)
        for index, name in enumerate(names):
            first = index * rows
            yield replace(
                module,
                name=name,
                out_features=rows,
                tensors={
                    role: _slice(module, role, info, first, first + rows)
                    for role, info in module.tensors.items()
                },
                renamed_from=module.name,
            )

    def _other(self, name: str, info: TensorInfo) -> str:
        """The name of a tensor of no module: renamed as a whole, or as the owner it names."""
        owner, _, own = name.rpartition(".")
        for stem, rest in ((name, ""), (owner, f".{own}")):
            names = self._names(stem)
            if len(names) > 1:
                reason = f"{info.name!r} is not a module's"
                self._refuse(stem, names, reason, info)
            elif names != (stem,):
                return names[0] + rest
        return name

    def _refuse(self, name: str, into: Sequence[str], reason: str, info: TensorInfo) -> None:
        self.problems.append(
            Problem(
                "cannot-split",
                f"layout {self.layout.name!r} splits {name!r} into {', '.join(into)}, and {reason}",
                hint="Convert into a layout without these names, or from another source.",
                file=str(info.file),
                tensor=info.name,
                pointer="/target/layout",
            )
        )

    def _conflict(self, name: str, owners: Sequence[str], info: TensorInfo) -> None:
        self.problems.append(
            Problem(
                "name-conflict",
                f"in layout {self.layout.name!r}, {owners[0]!r} and {owners[1]!r} would both be "
                f"called {name!r}",
                hint="The source has it under both names; one of them is left over, or the layout "
                "is not for this model.",
                file=str(info.file),
                tensor=info.name,
                pointer="/target/layout",
            )
        )


def captured(pattern: Sequence[str], segments: Sequence[str]) -> list[str] | None:
    """What each ``*`` stands for, or ``None`` where the name does not fit.

    Args:
        pattern: the segments of a name, in which ``*`` stands for any one segment.
        segments: those of the name.
    """
    if len(pattern) != len(segments):
        return None
    found = []
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted == "*":
            found.append(segment)
        elif wanted != segment:
            return None
    return found


def filled(template: str, stars: Sequence[str]) -> str:
    """A name in which each ``*`` is what was captured for it."""
    values = iter(stars)
    return ".".join(next(values) if each == "*" else each for each in template.split("."))


def _unsplittable(module: StoredModule, pieces: int) -> str | None:
    """Why rows of a module cannot become modules of their own, or ``None``."""
    whole = module.out_features, module.in_features
    rows, rest = divmod(module.out_features, pieces)
    if rest:
        return f"its {whole[0]} rows cannot be cut into {pieces} equal parts"
    weight = module.weight
    if pieces == 1 or not isinstance(weight, ScaledWeight) or weight.granularity == "tensor":
        return None
    height = weight.group_shape(*whole)[0]
    if rows % height:
        return f"parts of {rows} rows begin inside blocks of {height} rows that share a scale"
    if _row_axis(module.tensors["weight_scale"], weight.scale_grid(*whole)[0]) is None:
        return "its scales are not stored row by row"
    packing = module.packings.get("weight_zero_point")
    if packing is not None and rows % packing.codes:
        return f"parts of {rows} rows begin inside numbers that hold {packing.codes} zero points"
    if "weight_shape" in module.tensors:
        return "its shape is stored beside it"
    return None


def _slice(module: StoredModule, role: str, info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """The part of a module's tensor that is of the rows from ``start`` to ``stop``."""
    weight, total = module.weight, module.out_features
    if role not in _IN_ROWS or stop - start == total:
        return info
    if role == "weight_zero_point" and role in module.packings:
        codes = module.packings[role].codes
        start, stop, total = start // codes, -(-stop // codes), -(-total // codes)
    if role == "weight_scale":
        assert isinstance(weight, ScaledWeight)
        if weight.granularity == "tensor":
            return info
        height = weight.group_shape(total, module.in_features)[0]
        start, stop, total = start // height, -(-stop // height), -(-total // height)
    axis = _row_axis(info, total)
    assert axis is not None
    size = info.nbytes // total
    return replace(
        info,
        shape=(*info.shape[:axis], stop - start, *info.shape[axis + 1 :]),
        offset=info.offset + start * size,
        nbytes=(stop - start) * size,
    )


def _row_axis(info: TensorInfo, rows: int) -> int | None:
    """The dimension that counts rows, if rows lie one after the other in the file."""
    for axis, size in enumerate(info.shape):
        if size == rows:
            return axis
        if size != 1:
            break
    return None
