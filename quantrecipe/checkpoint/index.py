"""The index of a sharded checkpoint: which tensor lies in which file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from quantrecipe.checkpoint.errors import SourceError, some
from quantrecipe.checkpoint.scan import no_constant, unique_pairs
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import SourceFileInfo

MAX_INDEX_BYTES: Final = 100_000_000


def read_index(path: Location) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name to the name of a file beside the index.

    Raises:
        InvalidInput: it is malformed, or names files elsewhere.
        SourceError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise _bad(path, f"has {size:,} bytes; no index needs more than {MAX_INDEX_BYTES:,}")
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(path, error) from error
    try:
        index: Any = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique_pairs, parse_constant=no_constant
        )
    except RecursionError:
        raise _bad(path, "is too deeply nested") from None
    except ValueError as error:
        raise _bad(path, f"is not an index: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(path, "has no weight_map of tensors to files")
    values = [value for value in weight_map.values() if not _is_plain_name(value)]
    if values:
        raise _bad(
            path,
            f"{len(values)} values of weight_map are not names of .safetensors files beside it: "
            f"{some(repr(value)[:80] for value in values)}",
        )
    return cast(dict[str, str], weight_map)


def check_index(
    path: Location, weight_map: Mapping[str, str], files: Sequence[SourceFileInfo]
) -> list[Problem]:
    """Whether an index and the headers of the shards beside it say the same."""
    problems: list[Problem] = []
    for file in files:
        shard = file.path.name
        mapped = {tensor for tensor, where in weight_map.items() if where == shard}
        for kind, tensors, message in (
            ("index-mismatch", sorted(mapped - file.tensors.keys()), "it should hold and does not"),
            (
                "unindexed-tensor",
                sorted(file.tensors.keys() - mapped),
                "it holds and the index does not list",
            ),
        ):
            if tensors:
                problems.append(
                    Problem(
                        kind=kind,
                        message=f"{shard}: {len(tensors)} tensors that {message}: {some(tensors)}",
                        hint="Index and shards are of different versions: fetch both again.",
                        file=str(path),
                    )
                )
    return problems


def _is_plain_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and value.endswith(".safetensors")
        and not any(character in value for character in "/\\:\0")
    )


def _bad(path: Location, message: str) -> InvalidInput:
    return InvalidInput(Problem(kind="bad-index", message=message, file=str(path)))
