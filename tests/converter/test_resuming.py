"""Interrupted conversions: what was done is gone on from, and the bytes are those of one run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from quantrecipe.checkpoint import Journal, OutputFiles, read_journal
from quantrecipe.converter import convert, resuming, units
from quantrecipe.converter.digesting import SourceDigests
from quantrecipe.converter.working import UnitWorker
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, OutputError
from quantrecipe.schema.tensors import SourceFileInfo
from tests.converter.making import Json, parsed, read_lock, recipe, save, tree, weight_spec
from tests.converter.waiting import LIMIT, wait_until

MODULES = 12


class Interrupted(Exception):  # noqa: N818 - what a test raises
    """Something that nobody foresaw."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"m{index:02}.weight": torch.randn(16, 32, generator=generator).bfloat16()
        for index in range(MODULES)
    }
    tensors["norm.weight"] = torch.ones(8)
    return save(tmp_path / "source" / "m.safetensors", tensors).parent


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> dict[str, str]:
    return tree(convert(parsed(recipe()), source, tmp_path / "undisturbed").out)


class Counting:
    """Counts the units that are converted, and fails after a number of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units: list[str] = []
        self.fails_after: int | None = None
        self.error: BaseException = Interrupted()
        real = UnitWorker.perform

        def perform(worker: UnitWorker, unit: units.Unit, **keywords: Any) -> Any:
            if self.fails_after is not None and len(self.units) >= self.fails_after:
                raise self.error
            self.units.append(unit.of.name)
            return real(worker, unit, **keywords)

        monkeypatch.setattr(UnitWorker, "perform", perform)

    def fail_after(self, count: int, error: BaseException | None = None) -> None:
        self.units.clear()
        self.fails_after, self.error = count, error or Interrupted()

    def go_on(self) -> None:
        self.units.clear()
        self.fails_after = None


@pytest.fixture
def counting(expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def interrupt(
    counting: Counting, source: Path, out: Path, after: int = 5, **options: Any
) -> list[str]:
    """Convert until the error; returns what was told."""
    told: list[str] = []
    counting.fail_after(after)
    with pytest.raises(Interrupted):
        convert(parsed(recipe()), source, out, jobs=1, notice=told.append, **options)
    counting.go_on()
    assert not out.exists()
    return told


def test_it_goes_on_from_what_was_done(
    tmp_path: Path, source: Path, expected: dict[str, str], counting: Counting
) -> None:
    out = tmp_path / "out"
    told = interrupt(counting, source, out)
    assert told == [f"what was done is kept in {out}.partial; the same command goes on from there"]
    told.clear()
    progress: list[int] = []
    done = convert(
        parsed(recipe()),
        source,
        out,
        notice=told.append,
        progress=lambda count, name: progress.append(count),
    )
    assert told == [f"going on: 5 of {MODULES + 1} units were done"]
    assert len(counting.units) == MODULES + 1 - 5
    assert sum(progress) == done.source_bytes
    assert tree(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_again_and_again(
    tmp_path: Path, source: Path, expected: dict[str, str], counting: Counting
) -> None:
    for _ in range(4):
        interrupt(counting, source, tmp_path / "out", after=2)
    convert(parsed(recipe()), source, tmp_path / "out")
    assert len(counting.units) == MODULES + 1 - 8
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("resumed", [False, True])
def test_without_resuming_nothing_is_kept_nor_used(
    tmp_path: Path, source: Path, expected: dict[str, str], counting: Counting, resumed: bool
) -> None:
    out = tmp_path / "out"
    assert interrupt(counting, source, out, resume=resumed) == [
        f"what was done is kept in {out}.partial; the same command goes on from there"
    ] * int(resumed)
    assert (tmp_path / "out.partial").exists() == resumed
    convert(parsed(recipe()), source, out, resume=False)
    assert len(counting.units) == MODULES + 1
    assert tree(out) == expected


def other_recipe(source: Path) -> Json:
    return recipe(weight_spec("int8", "tensor"))


def other_source(source: Path) -> Json:
    os.utime(source / "m.safetensors", ns=(1, 1))
    return recipe()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_recipe, "the recipe has changed"),
        (other_source, "the source has changed"),
    ],
)
def test_something_else_starts_over_and_says_why(
    tmp_path: Path,
    source: Path,
    counting: Counting,
    change: Callable[[Path], Json],
    reason: str,
) -> None:
    interrupt(counting, source, tmp_path / "out")
    made, told = parsed(change(source)), list[str]()
    convert(made, source, tmp_path / "out", notice=told.append)
    assert told == [f"starting over: {reason}"]
    assert len(counting.units) == MODULES + 1
    fresh = convert(made, source, tmp_path / "fresh").out
    assert tree(tmp_path / "out") == tree(fresh)


def test_another_version_starts_over(
    tmp_path: Path, source: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(counting, source, tmp_path / "out")
    monkeypatch.setattr(resuming, "__version__", "9.9")
    told: list[str] = []
    convert(parsed(recipe()), source, tmp_path / "out", notice=told.append)
    assert told == ["starting over: another version of quantrecipe began it"]


def test_another_converter_starts_over(tmp_path: Path, source: Path, counting: Counting) -> None:
    interrupt(counting, source, tmp_path / "out")
    told: list[str] = []
    convert(parsed(recipe()), source, tmp_path / "out", converter="reference", notice=told.append)
    assert told == ["starting over: another converter began it"]


@pytest.mark.parametrize("what", ["plan.json", "journal", "output-*/model.safetensors"])
def test_any_damaged_bit_is_noticed(
    tmp_path: Path, source: Path, expected: dict[str, str], counting: Counting, what: str
) -> None:
    """Of what lies there: a damaged unit is done again, a damaged plan starts over."""
    chosen = random.Random(what)
    for _ in range(25):
        interrupt(counting, source, tmp_path / "out")
        (path,) = (tmp_path / "out.partial").glob(what)
        content = bytearray(path.read_bytes())
        bit = chosen.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        out = convert(parsed(recipe()), source, tmp_path / "out").out
        assert tree(out) == expected, bit
        shutil.rmtree(out)


@pytest.mark.parametrize("what", ["plan.json", "journal", "output-*/*", "output-*"])
def test_what_is_gone_is_done_again(
    tmp_path: Path, source: Path, expected: dict[str, str], counting: Counting, what: str
) -> None:
    interrupt(counting, source, tmp_path / "out")
    (path,) = (tmp_path / "out.partial").glob(what)
    if path.is_dir():
        (path / "model.safetensors").unlink()
        path.rmdir()
    else:
        path.unlink()
    convert(parsed(recipe()), source, tmp_path / "out")
    assert len(counting.units) == MODULES + 1
    assert tree(tmp_path / "out") == expected


def test_numbers_that_are_refused_leave_nothing(tmp_path: Path) -> None:
    """The same command could never go on."""
    good, bad = torch.ones(4, 4), torch.full((4, 4), float("nan"))
    source = save(tmp_path / "m.safetensors", {"a.weight": good, "b.weight": bad})
    with pytest.raises(InvalidInput):
        convert(parsed(recipe()), source, tmp_path / "out", jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_source_that_vanishes_can_come_back(
    tmp_path: Path, source: Path, expected: dict[str, str], counting: Counting
) -> None:
    """A network drive, say; it is the same source if size, time and header are the same."""
    away, out = source.with_name("away"), tmp_path / "out"
    interrupt(counting, source, out, after=3)
    source.rename(away)
    with pytest.raises(InvalidInput, match="there is no such file or folder"):
        convert(parsed(recipe()), source, out)
    assert (tmp_path / "out.partial").is_dir()
    away.rename(source)
    convert(parsed(recipe()), source, out)
    assert len(counting.units) == MODULES + 1 - 3
    assert tree(out) == expected


def test_a_disk_that_fills_up_can_be_given_room(
    tmp_path: Path,
    source: Path,
    expected: dict[str, str],
    counting: Counting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, written = OutputFiles.write, list[int]()

    def full(files: OutputFiles, path: str, position: int, buffer: Any) -> None:
        written.append(position)
        if len(written) > 10:
            raise OutputError("the disk is full")
        write(files, path, position, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFiles, "write", full)
        with pytest.raises(OutputError, match="full"):
            convert(parsed(recipe()), source, tmp_path / "out", jobs=1)
    counting.go_on()
    convert(parsed(recipe()), source, tmp_path / "out")
    assert 0 < len(counting.units) < MODULES
    assert tree(tmp_path / "out") == expected


def test_a_disk_that_fails_to_keep_a_journal_stops_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(journal: Journal, records: Any) -> None:
        raise OutputError("no journal today")

    monkeypatch.setattr(Journal, "append", fail)
    with pytest.raises(OutputError, match="no journal today"):
        convert(parsed(recipe()), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_that_change_after_they_were_written_are_not_published(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer, failing memory, a network drive that loses a block."""
    real = OutputFiles.write

    def write(files: OutputFiles, path: str, position: int, buffer: Any) -> None:
        spoiled = bytearray(buffer)
        if len(spoiled) == 512:
            spoiled[7] ^= 1
        real(files, path, position, spoiled)

    monkeypatch.setattr(OutputFiles, "write", write)
    with pytest.raises(OutputError, match="what is there is not what was written"):
        convert(parsed(recipe()), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_one_is_refused_while_the_first_works(tmp_path: Path, source: Path) -> None:
    refused: list[str] = []

    def second(count: int, name: str) -> None:
        if not refused:
            with pytest.raises(OutputError) as error:
                convert(parsed(recipe()), source, tmp_path / "out")
            refused.append(str(error.value))

    convert(parsed(recipe()), source, tmp_path / "out", progress=second, jobs=1)
    assert f"is running: process {os.getpid()}" in refused[0]
    assert "Wait for it to end" in refused[0]


def test_the_source_is_hashed_once_in_all_attempts(
    tmp_path: Path,
    source: Path,
    expected: dict[str, str],
    counting: Counting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed, real, counted = Event(), SourceDigests._hash, UnitWorker.perform

    def _hash(digests: SourceDigests, file: SourceFileInfo) -> tuple[Location, str | None]:
        found = real(digests, file)
        hashed.set()
        return found

    def perform(worker: UnitWorker, unit: units.Unit, **keywords: Any) -> Any:
        assert hashed.wait(LIMIT)  # hashing stands back for all else
        return counted(worker, unit, **keywords)

    monkeypatch.setattr(SourceDigests, "_hash", _hash)
    monkeypatch.setattr(UnitWorker, "perform", perform)
    interrupt(counting, source, tmp_path / "out", after=MODULES)
    journal = read_journal(tmp_path / "out.partial" / "journal")
    (noted,) = [record for record in journal if "source" in record]
    lock = read_lock(convert(parsed(recipe()), source, tmp_path / "out").out)
    assert lock["source"][0]["sha256"] == noted["sha256"] == tree(source)["m.safetensors"]


def test_a_source_that_is_not_what_was_published_is_refused(tmp_path: Path, source: Path) -> None:
    note = source / ".cache" / "huggingface" / "download" / "m.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"rev\n{'0' * 64}\n0.0\n")
    with pytest.raises(InvalidInput) as error:
        convert(parsed(recipe()), source, tmp_path / "out")
    (problem,) = error.value.problems
    assert problem.kind == "source-digest"
    assert problem.file == str(source / "m.safetensors")
    assert f"{note} says {'0' * 64}" in problem.message
    assert not (tmp_path / "out").exists()
    note.write_text(f"rev\n{tree(source)['m.safetensors']}\n0.0\n")
    convert(parsed(recipe()), source, tmp_path / "out")


# In a process of its own

COMMAND = "from quantrecipe.cli.convert import main; main()"

# After five units, every other is waited for as if it took for ever. What a shell runs in the
# background ignores SIGINT, and so do its children unless they are told otherwise.
HELD = f"""
import signal, time
from quantrecipe.converter.working import UnitWorker
signal.signal(signal.SIGINT, signal.default_int_handler)
real = UnitWorker.perform
def perform(worker, unit, progress, following):
    while unit.index >= 5:
        progress(0, unit.of.name)
        time.sleep(0.01)
    return real(worker, unit, progress, following)
UnitWorker.perform = perform
{COMMAND}
"""


def command(program: str, source: Path, out: Path) -> list[str]:
    path = source.with_name("recipe.json")
    path.write_text(json.dumps(recipe()))
    places = ["--recipe", str(path), str(source), "--out", str(out)]
    return [sys.executable, "-c", program, *places]


def a_unit_is_in(journal: Path) -> bool:
    return any("unit" in record for record in read_journal(journal))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_command_goes_on(
    tmp_path: Path, source: Path, expected: dict[str, str], number: signal.Signals
) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal"
    process = subprocess.Popen(command(HELD, source, out), stderr=subprocess.PIPE)
    try:
        wait_until(lambda: process.poll() is not None or a_unit_is_in(journal))
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert not out.exists()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert b"the same command goes on from there" in errors
        assert errors.endswith(b"interrupted\n")
    again = subprocess.run(
        command(COMMAND, source, out), check=True, capture_output=True, text=True
    )
    assert "going on: " in again.stderr
    assert tree(out) == expected
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_gives_the_same_bytes(tmp_path: Path) -> None:
    """A short run of ``benchmarks/kills.py``."""
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", "--work", str(tmp_path), "--count", "12"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout
