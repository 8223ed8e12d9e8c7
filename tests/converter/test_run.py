"""The main job as a whole: refusals, what is published and when, and the bytes of the output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantrecipe.checkpoint import OutputExists
from quantrecipe.converter import convert, plan
from quantrecipe.converter.run import carry_out
from quantrecipe.converter.selection import find_converter
from quantrecipe.converter.streaming import StreamingConverter
from quantrecipe.converter.units import Unit
from quantrecipe.converter.working import UnitResult, UnitWorker
from quantrecipe.loaders import load_state_dict
from quantrecipe.schema.problems import InvalidInput, OutputError
from tests.converter.making import (
    Json,
    everything,
    numbers,
    parsed,
    read_lock,
    recipe,
    result_of,
    save,
    save_statistics,
    small,
    tree,
    weight_spec,
)
from tests.converter.waiting import LIMIT, wait_until

BOTH = pytest.mark.parametrize("converter", ["streaming", "reference"])
OUTPUT = ["model.safetensors", "recipe.json", "recipe.lock.json"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    small(tmp_path / "source" / "m.safetensors")
    return tmp_path / "source"


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def only_problem(error: pytest.ExceptionInfo[InvalidInput]) -> Any:
    (problem,) = error.value.problems
    return problem


# Refused numbers


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_a_number_that_is_none_is_named_by_its_place_in_the_tensor(
    tmp_path: Path, converter: str, value: float, dtype: str, granularity: str
) -> None:
    weight = torch.ones(9, 8, dtype=getattr(torch, dtype))
    weight[7, 5] = value
    source = save(tmp_path / "m.safetensors", {"a.weight": torch.ones(4, 4), "b.weight": weight})
    made = parsed(recipe(weight_spec("int8", granularity), target=everything()))
    with pytest.raises(InvalidInput) as error:
        convert(made, source, tmp_path / "out", converter=converter, block_bytes=64)
    problem = only_problem(error)
    assert problem.kind == "non-finite"
    assert (problem.file, problem.tensor) == (str(source), "b.weight")
    assert problem.message.endswith("at index [7, 5]")
    assert "NaN" in problem.message if value != value else "infinity" in problem.message
    assert left_over(tmp_path) == []


@BOTH
def test_a_code_that_is_no_number_is_named(tmp_path: Path, converter: str) -> None:
    codes = torch.full((9, 8), 0x38, dtype=torch.uint8)
    codes[6, 2] = 0xFF
    source = save(
        tmp_path / "m.safetensors",
        {"a.weight": codes.view(torch.float8_e4m3fn), "a.weight_scale": torch.ones(9)},
    )
    with pytest.raises(InvalidInput) as error:
        convert(
            parsed(recipe(source="fp8-scaled")),
            source,
            tmp_path / "out",
            converter=converter,
            block_bytes=64,
        )
    assert only_problem(error).tensor == "a.weight"
    assert "0xff" in only_problem(error).message
    assert "[6, 2]" in only_problem(error).message


@BOTH
@pytest.mark.parametrize(
    ("shape", "place", "index"),
    [((9,), (7,), "[7]"), ((9, 1), (7, 0), "[7, 0]"), ((), (), "[]"), ((3, 2), (2, 1), "[2, 1]")],
    ids=["[out]", "[out,1]", "[]", "block"],
)
def test_a_scale_that_is_no_number_is_named_itself(
    tmp_path: Path, converter: str, shape: tuple[int, ...], place: tuple[int, ...], index: str
) -> None:
    """The codes are fine: whoever looks at the weight would look in vain."""
    scale = torch.ones(shape)
    scale[place] = float("nan")
    codes = torch.ones(9, 8).to(torch.float8_e4m3fn)
    source = save(tmp_path / "m.safetensors", {"a.weight": codes, "a.weight_scale": scale})
    made = parsed(recipe(source=everything(), target=everything()))
    with pytest.raises(InvalidInput) as error:
        convert(made, source, tmp_path / "out", converter=converter, block_bytes=64)
    problem = only_problem(error)
    assert (problem.kind, problem.tensor) == ("non-finite", "a.weight_scale")
    assert problem.message == f"a scale of nan at index {index}"


@BOTH
def test_a_float64_beyond_float32_is_named(tmp_path: Path, converter: str) -> None:
    weight = torch.ones(5, 4, dtype=torch.float64)
    weight[4, 1] = 1e39
    source = save(tmp_path / "m.safetensors", {"a.weight": weight})
    with pytest.raises(InvalidInput, match=r"1e\+39 is too large for float32 at index \[4, 1\]"):
        convert(parsed(recipe()), source, tmp_path / "out", converter=converter, block_bytes=1)


@BOTH
@pytest.mark.parametrize(
    ("spec", "index"),
    [
        (weight_spec("int8", "channel", "float16"), "[7, 0]"),
        (weight_spec("int8", "group", "float16"), "[7, 1]"),
        (weight_spec("int8", "tensor", "float16"), "[0, 0]"),
        (weight_spec("float8_e4m3fn", "block", "float16"), "[2, 1]"),
    ],
    ids=["channel", "group", "tensor", "block"],
)
def test_a_scale_that_overflows_is_named_by_its_place_in_the_grid(
    tmp_path: Path, converter: str, spec: Json, index: str
) -> None:
    weight = torch.ones(9, 8)
    weight[7, 6] = 1e9
    source = save(tmp_path / "m.safetensors", {"a.weight": weight})
    with pytest.raises(InvalidInput) as error:
        convert(
            parsed(recipe(spec, target=everything())),
            source,
            tmp_path / "out",
            converter=converter,
            block_bytes=1,
        )
    assert only_problem(error).kind == "scale-out-of-range"
    assert only_problem(error).message.endswith(f"at index {index}")


def test_protected_in_another_dtype_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    weight = torch.ones(3, 4)
    weight[2, 3] = 70000
    source = save(tmp_path / "m.safetensors", {"a.weight": weight, "b.weight": torch.ones(2, 2)})
    keep = [{"modules": ["a"], "dtype": "float16", "reason": "small"}]
    with pytest.raises(InvalidInput, match=r"70000.0 is too large for float16 at index \[2, 3\]"):
        convert(parsed(recipe(protected=keep)), source, tmp_path / "out", block_bytes=1)
    assert left_over(tmp_path) == []


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_statistics_that_are_no_maxima_are_refused(
    tmp_path: Path, converter: str, value: float
) -> None:
    source = save(tmp_path / "m.safetensors", {"a.weight": torch.ones(3, 4)})
    maxima = torch.ones(2, 4)
    maxima[1, 2] = value
    statistics = save_statistics(tmp_path / "s.safetensors", "model", {"a": maxima})
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "s.safetensors",
    }
    path = tmp_path / "recipe.json"
    scheme = {"weight": weight_spec("int8"), "smoothing": smoothing}
    path.write_text(json.dumps(recipe(schemes={"all": scheme})))
    with pytest.raises(InvalidInput) as error:
        convert(path, source, tmp_path / "out", converter=converter)
    problem = only_problem(error)
    assert (problem.file, problem.tensor) == (str(statistics), "model/a/input_absmax")
    assert problem.message == f"{value} at index [1, 2] cannot have been measured"
    assert left_over(tmp_path) == []


# A source that changes


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "is gone"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, and had"),
        (rewrite, "was written to since"),
    ],
    ids=["vanished", "truncated", "rewritten"],
)
@BOTH
def test_a_source_that_changes_after_planning_is_refused(
    tmp_path: Path, source: Path, converter: str, change: Any, message: str
) -> None:
    planned = plan(parsed(recipe()), source)
    change(source / "m.safetensors")
    with pytest.raises(InvalidInput, match=message) as error:
        carry_out(planned, find_converter(converter), tmp_path / "out")
    assert only_problem(error).kind == "source-changed"
    assert left_over(tmp_path) == []


def test_a_source_truncated_while_it_is_read_is_refused(tmp_path: Path, source: Path) -> None:
    def cut(count: int, name: str) -> None:
        os.truncate(source / "m.safetensors", 8)

    with pytest.raises(InvalidInput, match="became shorter while it was read"):
        convert(parsed(recipe()), source, tmp_path / "out", block_bytes=1, progress=cut)
    assert left_over(tmp_path) == []


# Where the output goes


def test_an_output_appears_with_recipe_and_lock(tmp_path: Path, source: Path) -> None:
    done = convert(parsed(recipe()), source, tmp_path / "out")
    assert sorted(tree(done.out)) == OUTPUT
    assert json.loads((done.out / "recipe.json").read_text()) == recipe()
    lock = read_lock(done.out)
    (output,) = lock["outputs"]
    assert output["sha256"] == tree(done.out)["model.safetensors"]
    assert output["bytes"] == done.output_bytes == (done.out / "model.safetensors").stat().st_size
    assert [module["name"] for module in lock["modules"]] == ["a", "b"]
    assert lock["converter"]["name"] == "streaming"
    assert left_over(tmp_path) == ["out"]


@BOTH
def test_progress_ends_at_the_whole(tmp_path: Path, converter: str) -> None:
    rng = np.random.default_rng(0)
    source = save(
        tmp_path / "m.safetensors",
        {
            "a.weight": numbers(rng, 7, 5).to(torch.float8_e5m2),
            "a.weight_scale": torch.ones(7),
            "a.bias": torch.ones(7),
            "b.weight": numbers(rng, 3, 5).half(),
            "norm.weight": torch.ones(3),
        },
    )
    told: list[int] = []
    done = convert(
        parsed(recipe(source=everything(), target=everything())),
        source,
        tmp_path / "out",
        converter=converter,
        block_bytes=1,
        progress=lambda count, name: told.append(count),
    )
    assert sum(told) == done.source_bytes


def test_existing_files_are_refused_before_any_work(tmp_path: Path, source: Path) -> None:
    convert(parsed(recipe()), source, tmp_path / "out")
    before = tree(tmp_path / "out")

    def never(count: int, name: str) -> None:
        raise AssertionError("work was done")

    with pytest.raises(OutputExists, match="--force"):
        convert(parsed(recipe()), source, tmp_path / "out", progress=never)
    assert tree(tmp_path / "out") == before


def test_force_replaces_and_keeps_what_is_unrelated(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    convert(parsed(recipe()), source, out)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    (out / "other.safetensors").write_text("mine too")
    second = recipe(weight_spec("int8", "tensor"))
    convert(parsed(second), source, out, force=True)
    fresh = convert(parsed(second), source, tmp_path / "fresh").out
    found = tree(out)
    mine = [found.pop("notes/mine.txt"), found.pop("other.safetensors")]
    assert found == tree(fresh)
    assert None not in mine


def test_force_leaves_no_shard_or_index_of_the_last_output(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    sharded = recipe(target_fields={"max_shard_size": "60B"})
    convert(parsed(sharded), source, out)
    assert "model.safetensors.index.json" in tree(out)
    convert(parsed(recipe()), source, out, force=True)
    assert sorted(tree(out)) == OUTPUT
    assert set(load_state_dict(out)) == {"a.weight", "a.bias", "b.weight", "norm.weight"}
    convert(parsed(sharded), source, out, force=True)
    assert "model.safetensors" not in tree(out)
    assert set(load_state_dict(out)) == {"a.weight", "a.bias", "b.weight", "norm.weight"}


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_replaced(tmp_path: Path, source: Path, force: bool) -> None:
    before = tree(source)
    made = parsed(recipe(target_fields={"file": "m.safetensors"}))
    with pytest.raises(OutputError, match="belongs to the source"):
        convert(made, source, source, force=force)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(OutputError, match="belongs to the source"):
        convert(made, source, link, force=force)
    assert tree(source) == before


def test_what_lies_beside_the_source_is_never_replaced(tmp_path: Path, source: Path) -> None:
    (source / "config.json").write_text('{"quantization_config": {}}')
    before = tree(source)
    with pytest.raises(OutputError, match=r"config.json: belongs to the source"):
        convert(parsed(recipe()), source, source, force=True)
    assert tree(source) == before


def test_the_statistics_are_never_replaced(tmp_path: Path, source: Path) -> None:
    statistics = save_statistics(
        tmp_path / "model.safetensors", "model", {"a": torch.ones(1, 12), "b": torch.ones(1, 8)}
    )
    smoothing = {"kind": "smoothquant", "alpha": 0.5, "apply": "online"}
    scheme = {
        "weight": weight_spec("int8"),
        "smoothing": {**smoothing, "statistics": "model.safetensors"},
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipe(schemes={"all": scheme})))
    before = statistics.read_bytes()
    with pytest.raises(OutputError, match="belongs to the source"):
        convert(path, source, tmp_path, force=True)
    assert statistics.read_bytes() == before


def test_a_source_that_an_earlier_conversion_wrote_is_not_swept_away(tmp_path: Path) -> None:
    """The lock of the first lists it as an output; the second has none of that name."""
    small(tmp_path / "m.safetensors")
    out = tmp_path / "out"
    keep = [{"modules": ["**"], "dtype": "float32", "reason": "a first step"}]
    first = recipe(
        schemes={},
        rules=[],
        protected=keep,
        target="plain",
        target_fields={"file": "one.safetensors"},
    )
    convert(parsed(first), tmp_path / "m.safetensors", out)
    before = tree(out)["one.safetensors"]
    second = recipe(target_fields={"file": "two.safetensors"})
    convert(parsed(second), out / "one.safetensors", out, force=True)
    assert tree(out)["one.safetensors"] == before
    assert (out / "two.safetensors").is_file()


def test_the_source_folder_can_take_an_output_of_another_name(source: Path) -> None:
    before = tree(source)["m.safetensors"]
    convert(parsed(recipe()), source, source)
    assert sorted(tree(source)) == ["m.safetensors", *OUTPUT]
    assert tree(source)["m.safetensors"] == before


@pytest.mark.skipif(not Path("/proc/version").is_file(), reason="needs a place nobody can write to")
def test_a_folder_that_cannot_be_written_is_an_output_error(source: Path) -> None:
    with pytest.raises(OutputError, match="/proc"):
        convert(parsed(recipe()), source, "/proc/quantrecipe-out")


def test_a_full_disk_is_told_before_any_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(OutputError, match=r"needs .* bytes, and 9 are free there"):
        convert(parsed(recipe()), source, tmp_path / "out")
    assert left_over(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="the call that fails here")
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    pwrite = os.pwrite

    def fill(descriptor: int, data: bytes, offset: int) -> int:
        written.append(len(data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(OutputError, match="the disk is full"):
        convert(parsed(recipe()), source, tmp_path / "out", block_bytes=1)
    assert left_over(tmp_path) == []


def test_a_disk_that_fills_up_at_the_last_small_file_publishes_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def fill(path: Path, data: bytes) -> int:
        if path.name == "recipe.lock.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(OutputError, match="the disk is full"):
            convert(parsed(recipe()), source, tmp_path / "out")
    assert left_over(tmp_path) == ["out.partial"]
    convert(parsed(recipe()), source, tmp_path / "out")
    assert left_over(tmp_path) == ["out"]


# Bounds and interruption


def test_a_missed_bound_publishes_nothing_and_names_every_module(
    tmp_path: Path, source: Path
) -> None:
    made = recipe(bounds={"min_weight_sqnr_db": 100})
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(made, indent=2))
    with pytest.raises(InvalidInput) as error:
        convert(path, source, tmp_path / "out")
    problems = error.value.problems
    assert {problem.tensor for problem in problems} == {"model: a", "model: b"}
    assert {problem.kind for problem in problems} == {"bound"}
    assert {problem.file for problem in problems} == {str(path)}
    assert all(problem.line is not None for problem in problems)
    figures = [float(problem.message.split("SQNR of ")[1].split(" dB")[0]) for problem in problems]
    assert figures == sorted(figures)
    assert left_over(tmp_path) == []
    within = parsed(recipe(bounds={"min_weight_sqnr_db": min(figures)}))
    assert convert(within, source, tmp_path / "out").out.is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_inside_the_converter_leaves_nothing(
    tmp_path: Path, source: Path, error: type[BaseException]
) -> None:
    def stop(count: int, name: str) -> None:
        raise error

    with pytest.raises(error):
        convert(parsed(recipe()), source, tmp_path / "out", block_bytes=1, progress=stop)
    assert left_over(tmp_path) == []
    assert convert(parsed(recipe()), source, tmp_path / "out").out.is_dir()


def test_a_block_of_no_bytes_is_a_mistake_of_the_caller(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="block_bytes"):
        convert(parsed(recipe()), source, tmp_path / "out", block_bytes=0)


# The file itself


def test_the_file_is_what_save_file_would_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    source = save(
        tmp_path / "m.safetensors",
        {
            "a.weight": numbers(rng, 6, 8).half(),
            "a.bias": torch.ones(6, dtype=torch.float64),
            "é.weight": numbers(rng, 3, 4).float(),
            "steps": torch.arange(5),
            "flag": torch.tensor(True),
            "empty": torch.empty(0, 4),
        },
    )
    out = convert(parsed(recipe(target=everything())), source, tmp_path / "out").out
    ours = (out / "model.safetensors").read_bytes()
    tensors: dict[str, Tensor] = {}
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensors[name] = file.get_tensor(name)
    assert list(metadata) == ["quantrecipe"]
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    assert json.loads(metadata["quantrecipe"])["recipe"] == recipe(target=everything())


def test_with_more_metadata_only_its_order_may_differ(tmp_path: Path, source: Path) -> None:
    out = convert(parsed(recipe()), source, tmp_path / "out").out
    tensors = load_file(out / "model.safetensors")
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "quantrecipe"}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    found = []
    for path in (out / "model.safetensors", tmp_path / "theirs.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        found.append((length, header, list(header), data[8 + length :]))
    assert found[0] == found[1]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists open files")
def test_whole_files_are_closed_while_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems let a process open a thousand or fewer."""
    tensors = {f"m{index}.weight": torch.ones(4, 8) for index in range(9)}
    source = save(tmp_path / "m.safetensors", tensors)
    perform, done = UnitWorker.perform, list[str]()

    def patient(worker: UnitWorker, unit: Unit, **keywords: Any) -> UnitResult:
        result = perform(worker, unit, **keywords)
        done.append(unit.of.name)
        if len(done) == len(tensors):
            last = {Path(part.file).name for part in unit.ranges().values()}
            wait_until(lambda: open_shards() == last)
        return result

    monkeypatch.setattr(UnitWorker, "perform", patient)
    sharded = parsed(recipe(target_fields={"max_shard_size": "60B"}))
    out = convert(sharded, source, tmp_path / "out", jobs=1).out
    assert len(list(out.glob("*.safetensors"))) == len(done) == len(tensors)


def open_shards() -> set[str]:
    """Shards that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found.add(link.readlink().name)
    return {name for name in found if "-of-" in name}


# In a process of its own

SLOW = """
import sys, time
from quantrecipe.converter import convert
def wait(count, name):
    print("working", flush=True)
    time.sleep(600)
convert(sys.argv[1], sys.argv[2], sys.argv[3], block_bytes=1, progress=wait)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_nothing_under_the_final_name(
    tmp_path: Path, source: Path, number: signal.Signals
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path), str(source), str(out)], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        process.send_signal(number)
        assert process.wait(LIMIT) == -number
    assert not out.exists()
    # What it left elsewhere is cleared away by the next.
    assert convert(path, source, out).out.is_dir()
    assert left_over(tmp_path) == ["out"]


MEMORY = """
import json, resource, sys
from quantrecipe.converter import convert
from quantrecipe.converter.streaming import StreamingConverter
import quantrecipe.formats
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], sys.argv[3], block_bytes=int(sys.argv[4]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB")
def test_memory_follows_the_block_and_not_the_tensor(tmp_path: Path) -> None:
    rows, columns = 128, 400_000  # 205 MB of float32; a row is 1.6 MB
    header = {"wide.weight": {"dtype": "F32", "shape": [rows, columns]}}
    header["wide.weight"]["data_offsets"] = [0, rows * columns * 4]
    text = json.dumps(header).encode()
    source = tmp_path / "m.safetensors"
    row = np.random.default_rng(0).standard_normal(columns).astype(np.float32).tobytes()
    with source.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(rows):
            file.write(row)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(source), str(tmp_path / "out"), "1000000"],
        capture_output=True,
        check=True,
        text=True,
    )
    grown = int(done.stdout) * 1024
    assert grown < 60e6, f"{grown / 1e6:.0f} MB for rows of 1.6 MB"
    source.unlink()
    shutil.rmtree(tmp_path / "out")


def test_reused_converters_do_not_remember(tmp_path: Path, source: Path) -> None:
    converter = StreamingConverter()
    small(tmp_path / "other.safetensors", seed=1)
    made = parsed(recipe())
    carry_out(plan(made, tmp_path / "other.safetensors"), converter, tmp_path / "first")
    carry_out(plan(made, source), converter, tmp_path / "second")
    fresh = convert(made, source, tmp_path / "fresh").out
    assert result_of(tmp_path / "second") == result_of(fresh)
