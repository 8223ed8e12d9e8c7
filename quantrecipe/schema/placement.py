"""Where output tensors go: their order in a file, the header that says so, and shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from quantrecipe.schema.dtypes import DTYPES, RANK
from quantrecipe.schema.gguf import plan_gguf_file
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import OutputFilePlan, OutputTensor

MAX_HEADER_BYTES: Final = 100_000_000
_ALIGNMENT: Final = 8
_SUFFIX: Final = ".safetensors"
_SHARD: Final = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors", re.ASCII | re.DOTALL)
_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE: Final = re.compile(r"([1-9][0-9]{0,11})(B|KB|MB|GB|TB)", re.ASCII)


def parse_size(text: str) -> int:
    """A size such as ``5GB`` in bytes; units are decimal: B, KB, MB, GB, TB.

    Raises:
        ValueError: it is not one.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"not a size: {text!r} (a whole number and B, KB, MB, GB or TB: 5GB)")
    return int(match[1]) * _UNITS[match[2]]


def file_order(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """The order in which tensors lie in a file: dtype rank descending, then name.

    It is the order of the safetensors library; wide types first keeps every tensor aligned to its
    element size.
    """
    return sorted(tensors, key=lambda tensor: (-RANK[tensor.dtype], tensor.name))


def shard_of(path: str) -> str | None:
    """The file that ``path`` is a shard of, by its name; ``None`` if it is called otherwise."""
    match = _SHARD.fullmatch(path)
    return f"{match[1]}{_SUFFIX}" if match is not None else None


def encode_header(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file: the length field and the padded JSON header.

    The bytes are those that ``safetensors.serialize`` writes for the same tensors and at most one
    metadata key (with more it has no fixed order; here keys are sorted). Empty metadata is left
    out.

    Raises:
        ValueError: a name twice, ``__metadata__`` as a name, a sub-byte dtype whose elements do not
            fill whole bytes, or a string that is no Unicode text.
        InvalidInput: the header is larger than the format allows.
    """
    return _encode(file_order(tensors), metadata)


def place(
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    path: str,
    max_shard_size: int | None = None,
    groups: Mapping[str, str] | None = None,
    container: str = "safetensors",
) -> tuple[tuple[OutputFilePlan, ...], bytes | None, str | None]:
    """Lay tensors out in one file, or in numbered shards with an index.

    Shards are filled greedily in the order of names, so the same tensors always land in the same
    files. Tensors with the same key in ``groups`` stay together, at the place of the first of their
    names, and are split only if they are larger than a shard. A tensor larger than a shard gets
    one of its own.

    Args:
        tensors: what is to be written, in any order.
        metadata: goes into every file's header.
        path: of the single file, below the output folder; ``D/N.safetensors`` gives shards
            ``D/N-00001-of-00003.safetensors`` and the index ``D/N.safetensors.index.json``.
        max_shard_size: the most bytes of tensors in a file, the header not counted; ``None``: no
            limit.
        groups: a key for each tensor name that shall stay with others.
        container: what kind of file it is; a GGUF file is never cut into shards.

    Returns:
        The files; the index and its path, both ``None`` where one file is enough.

    Raises:
        ValueError: as ``encode_header``, or a path or size that is none.
        InvalidInput: as ``encode_header``.
    """
    if container == "gguf":
        return (plan_gguf_file(path, tensors, metadata),), None, None
    if not path.endswith(_SUFFIX):
        raise ValueError(f"not a {_SUFFIX} path: {path!r}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ValueError(f"a shard holds at least one byte, not {max_shard_size}")
    _check_names(tensors)
    total = sum(tensor.nbytes for tensor in tensors)
    shards: list[list[OutputTensor]] = [list(tensors)]
    if max_shard_size is not None and total > max_shard_size:
        shards = _fill(tensors, max_shard_size, groups or {})
    if len(shards) == 1:
        return (_plan_file(path, shards[0], metadata),), None, None
    stem = path.removesuffix(_SUFFIX)
    plans = tuple(
        _plan_file(f"{stem}-{number:05d}-of-{len(shards):05d}{_SUFFIX}", shard, metadata)
        for number, shard in enumerate(shards, start=1)
    )
    return plans, _index(plans, total), f"{path}.index.json"


def _plan_file(
    path: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> OutputFilePlan:
    ordered = file_order(tensors)
    header = _encode(ordered, metadata, path)
    offsets: dict[str, int] = {}
    position = len(header)
    for tensor in ordered:
        offsets[tensor.name] = position
        position += tensor.nbytes
    return OutputFilePlan(
        path=path,
        header=header,
        size=position,
        tensors={tensor.name: tensor for tensor in ordered},
        offsets=offsets,
    )


def _encode(
    ordered: Sequence[OutputTensor], metadata: Mapping[str, str], path: str | None = None
) -> bytes:
    _check_names(ordered)
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype].code,
            "shape": tensor.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidInput(
            Problem(
                kind="header-too-large",
                message=f"{len(ordered):,} tensors need a header of {len(text):,} bytes; the "
                f"format allows {MAX_HEADER_BYTES:,}",
                hint="Set target.max_shard_size so that they go into several files.",
                file=path,
            )
        )
    return len(text).to_bytes(8, "little") + text


def _check_names(tensors: Iterable[OutputTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors are called {tensor.name!r}")
        if tensor.name == "__metadata__":
            raise ValueError("__metadata__ is not a name for a tensor")
        seen.add(tensor.name)


def _fill(
    tensors: Sequence[OutputTensor], limit: int, groups: Mapping[str, str]
) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    room = limit
    for unit in _units(tensors, groups):
        whole = sum(tensor.nbytes for tensor in unit) <= limit
        for piece in [unit] if whole else [[tensor] for tensor in unit]:
            size = sum(tensor.nbytes for tensor in piece)
            if size > room and shards[-1]:
                shards.append([])
                room = limit
            shards[-1] += piece
            room -= size
    return shards


def _units(
    tensors: Sequence[OutputTensor], groups: Mapping[str, str]
) -> Iterable[list[OutputTensor]]:
    units: dict[tuple[bool, str], list[OutputTensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        grouped = tensor.name in groups
        key = (grouped, groups[tensor.name] if grouped else tensor.name)
        units.setdefault(key, []).append(tensor)
    return units.values()


def _index(plans: Sequence[OutputFilePlan], total: int) -> bytes:
    weight_map = {name: plan.path.rpartition("/")[2] for plan in plans for name in plan.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")
