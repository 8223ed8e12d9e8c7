"""Opening a source: which files a part consists of, and what is in them.

Headers only; no tensor is read. A part's location is, below the source's root: a file, a folder
with one file or with an index, an index, or a glob.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

from quantrecipe.checkpoint.containers import read_any_header
from quantrecipe.checkpoint.errors import SourceError, some
from quantrecipe.checkpoint.folder import INDEX_SUFFIX, SUFFIX, Found, look_into, near_miss
from quantrecipe.checkpoint.hub.opening import nearest
from quantrecipe.checkpoint.index import check_index, read_index
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import SourceFileInfo, SourcePart, TensorInfo

_GLOB: Final = re.compile(r"[*?\[]")


def open_parts(root: Location, parts: Mapping[str, str]) -> tuple[SourcePart, ...]:
    """Read the headers of every part of a source.

    Args:
        root: the source's folder, or a single ``.safetensors`` file (a part at ``.`` is that file).
        parts: part name to its location below ``root``, relative, with ``/``; ``.`` is ``root``.

    Returns:
        The parts, in the order given. A file that belongs to two parts is read once.

    Raises:
        InvalidInput: with the problems of all parts.
        SourceError: something is there and cannot be read.
    """
    reader = _Reader()
    opened: list[SourcePart] = []
    problems: list[Problem] = []
    try:
        for name, location in parts.items():
            try:
                opened.append(_open_part(reader, root, name, location))
            except InvalidInput as error:
                problems.extend(error.problems)
    except OSError as error:
        raise SourceError(root, error) from error
    if problems:
        raise InvalidInput(dict.fromkeys(problems))
    return tuple(opened)


class _Reader:
    """Reads each header once, however many parts name its file."""

    def __init__(self) -> None:
        self._known: dict[Location, SourceFileInfo] = {}

    def __call__(self, base: Location, paths: Sequence[Location]) -> list[SourceFileInfo]:
        """The headers of ``paths``, with their paths below ``base``, in the order of those."""
        problems: list[Problem] = []
        files: list[SourceFileInfo] = []
        for path in paths:
            try:
                if path not in self._known:
                    relative = path.relative_to(base).as_posix()
                    self._known[path] = read_any_header(nearest(path), relative)
                files.append(self._known[path])
            except InvalidInput as error:
                problems.extend(error.problems)
        if problems:
            raise InvalidInput(problems)
        return sorted(files, key=lambda file: file.relative)


def _open_part(reader: _Reader, root: Location, name: str, location: str) -> SourcePart:
    if _leaves(location):
        raise _refuse(root, "outside-source", f"part {name!r}: {location!r} leaves the source")
    if root.is_file():
        if location != ".":
            raise _refuse(
                root,
                "not-a-folder",
                f"part {name!r} is at {location!r}, and the source is a single file",
                'Give the folder as the source, or "." as the part\'s location.',
            )
        return _whole(name, root.parent, reader(root.parent, [root]))
    if not root.is_dir():
        raise _refuse(root, "missing-source", "there is no such file or folder", near_miss(root))
    path = root if location == "." else root / location
    if path.is_dir():
        return _open_folder(reader, root, name, path)
    if path.name.endswith(INDEX_SUFFIX) and path.is_file():
        return _open_sharded(reader, root, name, path)
    if path.exists():
        return _whole(name, path.parent, reader(root, [path]))
    if _GLOB.search(location):
        return _open_glob(reader, root, name, location)
    raise _refuse(
        path,
        "missing-part",
        f"part {name!r}: there is no {location!r} in the source",
        near_miss(path),
    )


def _open_folder(reader: _Reader, root: Location, name: str, folder: Location) -> SourcePart:
    found = look_into(folder)
    if len(found.indexes) == 1:
        return _open_sharded(reader, root, name, folder / found.indexes[0])
    if not found.indexes and len(found.files) == 1:
        return _whole(name, folder, reader(root, [folder / found.files[0]]))
    raise InvalidInput(_undecided(found, root, name, folder))


def _undecided(found: Found, root: Location, name: str, folder: Location) -> Problem:
    """Why a folder does not say by itself which files a part consists of."""
    below = folder.relative_to(root).as_posix()
    prefix = "" if below == "." else f"{below}/"
    if found.indexes or found.files:
        candidates = found.indexes or found.files
        what = "indexes" if found.indexes else "files of weights and no index"
        every = "" if found.indexes else f', or "{prefix}*{SUFFIX}" for all of them'
        return Problem(
            kind="ambiguous-part",
            message=f"part {name!r}: the folder holds {len(candidates)} {what}: {some(candidates)}",
            hint=f'Name one in source.parts: {{"{name}": "{prefix}{candidates[0]}"}}{every}.',
            file=str(folder),
        )
    return Problem(
        kind="no-safetensors",
        message=f"part {name!r}: the folder itself holds no safetensors file{found.instead}",
        hint=found.hint(prefix),
        file=str(folder),
    )


def _open_sharded(reader: _Reader, root: Location, name: str, index: Location) -> SourcePart:
    weight_map = read_index(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise _refuse(
            index,
            "missing-shard",
            f"{len(missing)} of the {len(shards)} files it names are not there: {some(missing)}",
            "Fetch them from where the checkpoint came from.",
        )
    files = reader(root, [index.parent / shard for shard in shards])
    problems = check_index(index, weight_map, files)
    if problems:
        raise InvalidInput(problems)
    return _whole(name, index.parent, files)


def _open_glob(reader: _Reader, root: Location, name: str, pattern: str) -> SourcePart:
    try:
        matched = sorted(path for path in root.glob(pattern) if path.is_file())
    except ValueError as error:
        raise _refuse(root, "missing-part", f"part {name!r}: {pattern!r}: {error}") from None
    paths = [path for path in matched if path.name.endswith(SUFFIX)]
    if not paths:
        found = some(path.relative_to(root).as_posix() for path in matched)
        raise _refuse(
            root,
            "missing-part",
            f"part {name!r}: {pattern!r} matches no safetensors file"
            + (f", only {found}" if matched else ""),
            look_into(root).hint(""),
        )
    fixed: list[str] = []
    for segment in PurePosixPath(pattern).parts[:-1]:
        if _GLOB.search(segment):
            break
        fixed.append(segment)
    return _whole(name, root.joinpath(*fixed), reader(root, paths))


def _whole(name: str, root: Location, files: Sequence[SourceFileInfo]) -> SourcePart:
    """All files as one part.

    Raises:
        InvalidInput: tensors that lie in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for file in files:
        twice = [tensor for tensor in file.tensors if tensor in tensors]
        if twice:
            problems.append(
                Problem(
                    kind="duplicate-tensor",
                    message=f"part {name!r}: {len(twice)} tensors lie in other files of the part "
                    f"too: {some(twice)} (also in {tensors[twice[0]].file.name})",
                    hint="Name only one of the files, or give each its own part.",
                    file=str(file.path),
                )
            )
        tensors.update(file.tensors)
    if problems:
        raise InvalidInput(problems)
    return SourcePart(name=name, root=root, files=tuple(files), tensors=tensors)


def _leaves(location: str) -> bool:
    """Whether a location is absolute or steps upwards, under the rules of any system."""
    segments = re.split(r"[/\\]", location)
    drive = re.match(r"[A-Za-z]:", location)
    odd = not location or segments[0] == "" or "\0" in location
    return odd or ".." in segments or drive is not None


def _refuse(path: Location, kind: str, message: str, hint: str | None = None) -> InvalidInput:
    return InvalidInput(Problem(kind=kind, message=message, hint=hint, file=str(path)))
