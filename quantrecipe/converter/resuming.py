"""Going on where an earlier attempt ended: whose work it was, and what of it still holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import xxhash

from quantrecipe import __version__
from quantrecipe.checkpoint import Staging, locate, read_journal
from quantrecipe.checkpoint.durable import output_error, sync_file, sync_folder
from quantrecipe.converter.protocol import Converter
from quantrecipe.converter.units import UNIT_BYTES, Range, Unit
from quantrecipe.converter.working import UnitResult
from quantrecipe.schema.canonical import digest, document_bytes
from quantrecipe.schema.plan import Plan

PLAN_NAME: Final = "plan.json"
JOURNAL_NAME: Final = "journal"
_BLOCK: Final = 1 << 20

Notice = Callable[[str], None]
"""Called with something that the user may want to know."""


@dataclass(slots=True)
class Earlier:
    """What an earlier attempt got done.

    Attributes:
        units: results, by index.
        sources: SHA-256 of source files, by path.
    """

    units: dict[int, UnitResult] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def take_up(
    staging: Staging, record: Mapping[str, Any], *, resume: bool, notice: Notice
) -> Earlier:
    """What the journal of an earlier attempt says, if that was an attempt at the same thing.

    If it was not, or is not wanted, everything of it is removed, and the new plan written down.

    Raises:
        OutputError: the system could not.
    """
    path = staging.root / PLAN_NAME
    old = _read(path)
    if old is not None and resume:
        reason = why_another(old, record)
        if reason is None:
            return _read_earlier(staging.root / JOURNAL_NAME)
        notice(f"starting over: {reason}")
    staging.clear()
    try:
        path.write_bytes(document_bytes(record))
        sync_file(path)
        sync_folder(staging.root)
    except OSError as error:
        raise output_error(path, error) from error
    return Earlier()


def plan_record(plan: Plan, converter: Converter) -> dict[str, Any]:
    """Whatever the bytes of the output depend on; the same record, the same bytes."""
    return {
        "kind": "plan",
        "recipe": plan.recipe_sha256,
        "tool": __version__,
        "converter": {"name": converter.name, "version": converter.version},
        "unit_bytes": UNIT_BYTES,
        "source": [
            {
                "path": str(file.path),
                "bytes": file.size,
                "mtime_ns": file.mtime_ns,
                "header_sha256": file.header_sha256,
            }
            for file in plan.source_files
        ],
        "statistics": {name: _identity(path) for name, path in sorted(plan.statistics.items())},
        "output": [
            {"path": file.path, "bytes": file.size, "header": digest(file.header.hex())}
            for file in plan.files
        ],
    }


def plan_key(record: Mapping[str, Any]) -> str:
    """A short name for a plan: another one for other bytes."""
    return hashlib.sha256(document_bytes(record)).hexdigest()[:16]


def why_another(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What makes ``old`` the plan of something else than ``new``; ``None`` if nothing does."""
    if old == new:
        return None
    for key, what in (
        ("tool", "another version of quantrecipe began it"),
        ("recipe", "the recipe has changed"),
        ("source", "the source has changed"),
        ("statistics", "the statistics have changed"),
        ("converter", "another converter began it"),
    ):
        if old.get(key) != new[key]:
            return what
    return "what is left of the last attempt is damaged or was made for other files"


def still_there(
    folder: Path, units: tuple[Unit, ...], earlier: Earlier, threads: int
) -> Iterator[UnitResult]:
    """Those results whose bytes are on the disk as they were written."""

    def check(result: UnitResult) -> UnitResult | None:
        ranges = units[result.index].ranges()
        whole = result.digests.keys() == ranges.keys()
        return result if whole and holds(folder, ranges, result) else None

    known = [result for index, result in earlier.units.items() if 0 <= index < len(units)]
    with ThreadPoolExecutor(threads) as pool:
        yield from (result for result in pool.map(check, known) if result is not None)


def holds(folder: Path, ranges: Mapping[Any, Range], result: UnitResult) -> bool:
    """Whether the bytes of a unit are on the disk as they were written."""
    return all(range_digest(folder, part) == result.digests[role] for role, part in ranges.items())


def range_digest(folder: Path, part: Range) -> str | None:
    """The digest of consecutive bytes of a file; ``None`` if they cannot be read."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_BLOCK, part.nbytes)))
    left = part.nbytes
    try:
        with locate(folder, part.file).open("rb", buffering=0) as file:
            file.seek(part.position)
            while left:
                got = file.readinto(buffer[: min(len(buffer), left)])
                if not got:
                    return None
                found.update(buffer[:got])
                left -= got
    except OSError:
        return None
    return found.hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_earlier(path: Path) -> Earlier:
    earlier = Earlier()
    for record in read_journal(path):
        if "unit" in record:
            result = UnitResult.of_record(record)
            earlier.units[result.index] = result
        else:
            earlier.sources[record["source"]] = record["sha256"]
    return earlier
