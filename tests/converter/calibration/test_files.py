"""Statistics files: what was written is read back, and what does not agree is refused."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.checkpoint import OutputExists
from quantrecipe.converter.calibration import (
    ModuleStatistics,
    open_statistics,
    write_statistics,
)
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.statistics import (
    KEPT_TOKENS,
    STATISTICS_KEY,
    Statistics,
    token_absmax_edges,
)
from quantrecipe.schema.validation import load_statistics_header
from quantrecipe.testing.conformance.files import write_tensors

HEADER: dict[str, Any] = {
    "kind": "statistics",
    "version": 1,
    "model": "owner/model@v1",
    "samples": 3,
    "timesteps": [
        {"start": 0, "stop": 1, "samples": 2},
        {"start": 1, "stop": 2, "samples": 1},
    ],
    "modules": {"model": ["a", "b/c"]},
    "reservoir": 4,
}


def header(**changes: Any) -> Statistics:
    return load_statistics_header(json.dumps(HEADER | changes))


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    """All that a module with 3 channels may have in 2 bins, of 2 and 1 tokens."""
    histogram = torch.zeros(2, 256, dtype=torch.int64)
    histogram[0, 96], histogram[1, 100] = 2, 1
    return {
        "input_absmax": torch.tensor([[1.0, 0, 2], [4, 0, 0.5]]),
        "input_second_moment": torch.tensor([[1.0, 0, 4], [16, 0, 0.25]], dtype=torch.float64),
        "input_moments": torch.ones(2, 4, dtype=torch.float64),
        "tokens": torch.tensor([2, 1]),
        "token_absmax_histogram": histogram,
        "token_absmax_second_moment": torch.tensor([4.0, 16], dtype=torch.float64),
        "weight_absmax": torch.tensor([1.0, 2, 3]),
        "input_tokens": torch.ones(2, 3, dtype=torch.bfloat16),
        "input_token_bins": torch.tensor([0, 1]),
        "input_token_keys": torch.tensor([-5, 7]),
    } | changes


def module(**changes: Tensor) -> ModuleStatistics:
    return ModuleStatistics.from_tensors(tensors(**changes))


def hand_made(path: Path, head: dict[str, Any], **of_a: Tensor) -> Path:
    named = {f"model/{name}/{what}": tensor for name in "a" for what, tensor in of_a.items()}
    write_tensors(path, named, {STATISTICS_KEY: json.dumps(head)})
    return path


ONLY_A = HEADER | {"modules": {"model": ["a"]}}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "statistics.safetensors"
    other = module(input_tokens=torch.full((2, 3), 1e-9))
    write_statistics(path, header(), {("model", "a"): module(), ("model", "b/c"): other})
    with open_statistics(path) as statistics:
        assert statistics.header == header()
        assert list(statistics) == [("model", "a"), ("model", "b/c")]
        assert ("model", "a") in statistics
        assert ("other", "a") not in statistics
        for name, expected in (("a", module()), ("b/c", other)):
            found = statistics.module("model", name).tensors()
            assert found.keys() == expected.tensors().keys()
            for what, tensor in expected.tensors().items():
                torch.testing.assert_close(found[what], tensor, rtol=0, atol=0)
        fewer = statistics.module("model", "a", tokens=False).tensors()
        assert fewer.keys() == module().tensors().keys() - set(KEPT_TOKENS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(b"mine")
    modules = {("model", "a"): module(), ("model", "b/c"): module()}
    with pytest.raises(OutputExists):
        write_statistics(path, header(), modules)
    assert path.read_bytes() == b"mine"
    for samples in (2, 3):
        changed = header().model_copy(update={"samples": samples})
        write_statistics(path, changed, modules, force=True)
        with open_statistics(path) as statistics:
            assert statistics.header == changed


def test_maxima_alone_are_enough(tmp_path: Path) -> None:
    head = {key: value for key, value in ONLY_A.items() if key != "reservoir"}
    path = hand_made(tmp_path / "s.safetensors", head, input_absmax=tensors()["input_absmax"])
    with open_statistics(path) as statistics:
        found = statistics.module("model", "a")
    assert found.absmax().tolist() == [4, 0, 2]
    assert found.max_to_median() == 2
    assert found.second_moment() is None
    assert found.kurtosis() is None
    assert found.tokens_kept() is None
    assert found.token_absmax_second_moment() is None


def test_bins_count_by_their_tokens() -> None:
    found = module(input_moments=torch.tensor([[0.0, 1, 0, 1], [0, 4, 0, 48]]).double())
    assert found.absmax().tolist() == [4, 0, 2]
    second = found.second_moment()
    assert second is not None
    torch.testing.assert_close(second, torch.tensor([6, 0, 8.25 / 3], dtype=torch.float64))
    assert found.token_absmax_second_moment() == pytest.approx(8)
    assert found.kurtosis() == pytest.approx((50 / 3) / 4)
    kept = found.tokens_kept()
    assert kept is not None
    assert kept.dtype == torch.float32


@pytest.mark.parametrize(
    ("absmax", "expected"),
    [([0.0, 0, 0], 1), ([0.0, 0, 5], math.inf), ([1.0, 1, 3], 3)],
)
def test_max_to_median(absmax: list[float], expected: float) -> None:
    assert ModuleStatistics(torch.tensor([absmax])).max_to_median() == expected


def test_no_token_at_all() -> None:
    zeros = module(
        tokens=torch.zeros(2, dtype=torch.int64), input_moments=torch.zeros(2, 4).double()
    )
    assert zeros.kurtosis() == 0
    assert zeros.token_absmax_second_moment() == 0


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=50))
def test_kurtosis_is_that_of_the_numbers(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    moments = torch.stack([x.pow(power).mean() for power in range(1, 5)])
    found = ModuleStatistics(torch.ones(1, 1), input_moments=moments[None]).kurtosis()
    centred = x - x.mean()
    variance = centred.square().mean()
    assert found is not None
    assert found >= 0
    if variance > 1e-3 * x.square().mean():
        assert found == pytest.approx(float(centred.pow(4).mean() / variance**2), rel=1e-6)


EDGES = token_absmax_edges()


def test_edges_ascend_and_are_exact() -> None:
    assert len(EDGES) == 255
    assert EDGES[95] == 1
    assert list(EDGES) == sorted(set(EDGES)) == torch.tensor(EDGES).tolist()


WRONG: dict[str, tuple[dict[str, Any], dict[str, Tensor], str, str]] = {
    "a dtype": ({}, {"input_absmax": torch.zeros(2, 3).double()}, "input_absmax", "float64"),
    "a number of bins": ({}, {"input_absmax": torch.zeros(1, 3)}, "input_absmax", "[2, 3]"),
    "a number of axes": ({}, {"tokens": torch.zeros(2, 1).long()}, "tokens", "[2]"),
    "channels that differ": ({}, {"weight_absmax": torch.zeros(4)}, "weight_absmax", "[3]"),
    "no channels": (
        {"reservoir": 0, "holds": ["input_absmax"]},
        {"input_absmax": torch.zeros(2, 0)},
        "input_absmax",
        "no channels",
    ),
    "tokens that differ": (
        {},
        {"input_token_keys": torch.tensor([1])},
        "input_token_keys",
        "[2]",
    ),
    "more than is kept": ({"reservoir": 1}, {}, "input_tokens", "1 at most"),
    "tokens that no header says": ({"reservoir": 0}, {}, "input_tokens", "does not say"),
    "what no header says": ({"holds": ["input_absmax"]}, {}, "tokens", "does not say"),
    "a measure of no name": ({}, {"input_median": torch.zeros(3)}, "input_median", "nothing"),
    "a module too few": ({"modules": {"model": ["a", "b"]}}, {}, "input_absmax", "missing"),
    "a module too many": ({"modules": {"model": ["b"]}}, {}, "input_absmax", "not among"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_header_and_tensors_agree(
    tmp_path: Path, case: tuple[dict[str, Any], dict[str, Tensor], str, str]
) -> None:
    head, changes, what, said = case
    path = hand_made(tmp_path / "s.safetensors", ONLY_A | head, **tensors(**changes))
    with pytest.raises(InvalidInput) as caught:
        open_statistics(path)
    assert {problem.kind for problem in caught.value.problems} == {"bad-statistics"}
    about = [p for p in caught.value.problems if (p.tensor or "").endswith(f"/{what}")]
    assert any(said in problem.message for problem in about), caught.value


def test_what_is_held_and_missing(tmp_path: Path) -> None:
    have = tensors()
    del have["tokens"], have["weight_absmax"]
    head = ONLY_A | {"holds": ["input_absmax", "tokens", "weight_absmax"], "reservoir": 0}
    only = {"input_absmax": have["input_absmax"]}
    with pytest.raises(InvalidInput) as caught:
        open_statistics(hand_made(tmp_path / "s.safetensors", head, **only))
    (problem,) = caught.value.problems
    assert problem.tensor == "model/a/tokens"  # a weight of codes has no maxima


IMPOSSIBLE: dict[str, tuple[str, Tensor, str]] = {
    "a NaN": ("input_absmax", torch.tensor([[1.0, 2, 3], [1, math.nan, 3]]), "nan at index [1, 1]"),
    "a negative maximum": ("input_absmax", -torch.ones(2, 3), "-1.0 at index [0, 0]"),
    "an infinite mean": ("input_moments", torch.full((2, 4), math.inf).double(), "inf"),
    "a negative count": ("tokens", torch.tensor([2, -1]), "-1 at index [1]"),
    "counts that differ": ("tokens", torch.tensor([2, 2]), "add up"),
    "keys in disorder": ("input_token_keys", torch.tensor([7, 7]), "ascend"),
    "a bin that is none": ("input_token_bins", torch.tensor([0, 2]), "2 bins"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_numbers_that_cannot_be(tmp_path: Path, case: tuple[str, Tensor, str]) -> None:
    what, values, said = case
    path = hand_made(tmp_path / "s.safetensors", ONLY_A, **tensors(**{what: values}))
    with open_statistics(path) as statistics, pytest.raises(InvalidInput) as caught:
        statistics.module("model", "a")
    assert {problem.kind for problem in caught.value.problems} == {"bad-statistics"}
    assert any(said in problem.message for problem in caught.value.problems), caught.value


def test_modules_that_were_not_measured(tmp_path: Path) -> None:
    path = hand_made(tmp_path / "s.safetensors", ONLY_A, **tensors())
    with open_statistics(path) as statistics:
        for part, name in (("model", "b"), ("models", "a")):
            with pytest.raises(InvalidInput) as caught:
                statistics.module(part, name)
            assert caught.value.problems[0].kind == "not-measured"


def test_no_statistics_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(InvalidInput):
        open_statistics(path)
    write_tensors(path, {"a": torch.ones(1)})
    with pytest.raises(InvalidInput) as caught:
        open_statistics(path)
    assert caught.value.problems[0].kind == "not-statistics"
    write_tensors(path, {"a": torch.ones(1)}, {STATISTICS_KEY: '{"kind": "recipe"}'})
    with pytest.raises(InvalidInput) as caught:
        open_statistics(path)
    assert str(path) in str(caught.value)


def _whole() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "s.safetensors")
        write_statistics(path, header(), {("model", "a"): module(), ("model", "b/c"): module()})
        return path.read_bytes()


WHOLE = _whole()


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(0, len(WHOLE)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_harmless(tmp_path: Path, place: int, byte: int, end: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[place] = byte
    path = tmp_path / "s.safetensors"
    for content in (damaged, WHOLE[:end]):
        path.write_bytes(content)
        with suppress(InvalidInput), open_statistics(path) as statistics:
            for part, name in statistics:
                found = statistics.module(part, name)
                assert found.input_absmax.shape == (2, 3)
                assert bool(found.absmax().isfinite().all())
