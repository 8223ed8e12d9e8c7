"""Sums and kept tokens: the same however tokens come, and what exact arithmetic says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.converter.calibration import ModuleStatistics
from quantrecipe.converter.calibration import sums as sums_module
from quantrecipe.converter.calibration.reservoir import token_keys
from quantrecipe.converter.calibration.sums import ModuleSums
from quantrecipe.schema.statistics import token_absmax_edges

BINS, CHANNELS, KEPT = 3, 2, 4
CPU = torch.device("cpu")

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-24, 3.0e38, -7.5]), st.floats(-100, 100, width=32)
)
tokens = st.tuples(st.integers(0, BINS - 1), st.lists(numbers, min_size=2, max_size=2))
runs = st.lists(tokens, max_size=24)
Token = tuple[int, list[float]]


def summed(batches: Sequence[Sequence[Token]]) -> ModuleSums:
    """Batch after batch, bin after bin."""
    found = ModuleSums.zeros(BINS, CHANNELS, KEPT, CPU)
    for batch in batches:
        for at in range(BINS):
            rows = [row for where, row in batch if where == at]
            if rows:
                found.add(ModuleSums.of(torch.tensor(rows), at, KEPT), at)
    return found


def merged(pieces: Sequence[ModuleSums]) -> ModuleSums:
    found = ModuleSums.zeros(BINS, CHANNELS, KEPT, CPU)
    for piece in pieces:
        found.add(piece)
    return found


EXACT = {
    "input_absmax",
    "tokens",
    "token_absmax_histogram",
    "input_tokens",
    "input_token_bins",
    "input_token_keys",
}


def assert_same(found: ModuleSums, expected: ModuleSums) -> None:
    assert found.called == expected.called
    assert_alike(found.statistics(None), expected.statistics(None))


def assert_alike(found: ModuleStatistics, expected: ModuleStatistics) -> None:
    mine, its = found.tensors(), expected.tensors()
    assert mine.keys() == its.keys()
    for what, tensor in its.items():
        if what in EXACT:
            assert mine[what].equal(tensor), what
        else:
            # Positive and negative powers may cancel, so errors are of the size of the largest.
            largest = 1e-12 * float(tensor.abs().max()) if tensor.numel() else 0.0
            torch.testing.assert_close(mine[what], tensor, rtol=1e-12, atol=largest)


@given(runs, st.randoms(use_true_random=False), st.lists(st.integers(0, 24), max_size=5))
def test_order_and_batches_do_not_matter(run: list[Token], random: Random, cuts: list[int]) -> None:
    shuffled = list(run)
    random.shuffle(shuffled)
    places = sorted({0, *cuts, len(run)})
    batches = [shuffled[a:b] for a, b in pairwise(places)]
    assert_same(summed(batches), summed([run]))


@given(runs, runs, runs)
@settings(max_examples=25)
def test_merging_is_associative_and_commutative(
    a: list[Token], b: list[Token], c: list[Token]
) -> None:
    whole = summed([a + b + c])
    one, two, three = summed([a]), summed([b]), summed([c])
    assert_same(merged([one, two, three]), whole)
    assert_same(merged([three, merged([two, one])]), whole)


@given(runs)
@settings(max_examples=30)
def test_reading_back_is_the_same(run: list[Token]) -> None:
    found = summed([run])
    again = ModuleSums.from_statistics(found.statistics(None), KEPT)
    assert_same(merged([again, found]), merged([found, found]))


@given(runs)
@settings(max_examples=30)
def test_statistics_are_those_of_the_numbers(run: list[Token]) -> None:
    found = summed([run]).statistics(None)
    edges = np.array(token_absmax_edges())
    for at in range(BINS):
        x = np.array([row for where, row in run if where == at], np.float32).reshape(-1, CHANNELS)
        x = x.astype(np.float64)
        largest = np.abs(x).max(1) if len(x) else np.zeros(0)
        assert found.tokens is not None
        assert found.tokens[at] == len(x)
        assert found.input_absmax[at].tolist() == np.abs(x).max(0, initial=0).tolist()
        histogram = np.bincount(np.searchsorted(edges, largest, "right"), minlength=256)
        assert found.token_absmax_histogram is not None
        assert found.token_absmax_histogram[at].tolist() == histogram.tolist()
        n = max(1, len(x))
        for tensor, expected in (
            (found.input_second_moment, (x**2).sum(0) / n),
            (found.token_absmax_second_moments, (largest**2).sum() / n),
            (found.input_moments, [(x**k).sum() / (n * CHANNELS) for k in (1, 2, 3, 4)]),
        ):
            assert tensor is not None
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(tensor[at].numpy(), expected, 1e-12, 1e-12 * scale)


def plain_key(row: Sequence[float], at: int) -> int:
    """The key in whole numbers of any size."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    total = (at + 1) * golden
    for channel, value in enumerate(np.array(row, np.float32) + np.float32(0)):
        bits = int(value.view(np.int32))
        total += (bits ^ (bits >> 16)) * (mix((channel + 1) * golden & mask) | 1)
    key = mix(total & mask)
    return key - (1 << 64) if key >> 63 else key


@given(st.lists(tokens, min_size=1))
@settings(max_examples=30)
def test_keys_are_the_same_everywhere(run: list[Token]) -> None:
    for at, row in run:
        assert token_keys(torch.tensor([row]), at).tolist() == [plain_key(row, at)]


@given(runs)
@settings(max_examples=30)
def test_the_smallest_keys_are_kept_and_each_token_once(run: list[Token]) -> None:
    kept = summed([run]).kept
    assert kept is not None
    different = {plain_key(row, at): (at, [x + 0.0 for x in row]) for at, row in run}
    smallest = sorted(different)[:KEPT]
    assert kept.keys.tolist() == smallest
    exact = [(at, torch.tensor(row).tolist()) for at, row in (different[key] for key in smallest)]
    assert list(zip(kept.bins.tolist(), kept.tokens.tolist(), strict=True)) == exact


def test_keys_do_not_prefer_any_token() -> None:
    """Of 4000 tokens in two halves, those kept are of both."""
    torch.manual_seed(0)
    x = torch.randn(4000, 8, dtype=torch.bfloat16)
    x[2000:] *= 100
    kept = ModuleSums.of(x, 0, 400).kept
    assert kept is not None
    assert 150 < int((kept.tokens.float().abs().amax(1) > 10).sum()) < 250


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_are_kept_as_they_are(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 3.140625], [0.5, -2.0]], dtype=dtype)
    kept = ModuleSums.of(x, 1, 8).kept
    assert kept is not None
    assert kept.tokens.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert sorted(kept.tokens.tolist()) == sorted(x.tolist())


def test_precision_is_that_of_the_finest() -> None:
    coarse = ModuleSums.of(torch.ones(1, 2, dtype=torch.bfloat16), 0, 4)
    fine = ModuleSums.of(torch.full((1, 2), 1.001), 0, 4)
    for first, second in ((coarse, fine), (fine, coarse)):
        total = ModuleSums.zeros(1, 2, 4, CPU)
        total.add(first)
        total.add(second)
        assert total.kept is not None
        assert total.kept.tokens.dtype == torch.float32
        assert sorted(total.kept.tokens.tolist()) == torch.tensor([[1, 1], [1.001, 1.001]]).tolist()


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 7)
    whole = ModuleSums.of(x, 0, 6)
    monkeypatch.setattr(sums_module, "_CPU_ELEMENTS", 21)
    assert_same(ModuleSums.of(x, 0, 6), whole)


def test_large_numbers_stay_finite() -> None:
    x = torch.full((1000, 4), torch.finfo(torch.float32).max)
    found = ModuleSums.of(x, 0, 0).statistics(None)
    for tensor in found.tensors().values():
        assert bool(tensor.isfinite().all())
    assert found.kurtosis() == 0


def test_the_hash_is_pinned() -> None:
    """What files hold was chosen by it."""
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4) - 5.5
    keys = token_keys(x, 2).numpy().tobytes()
    assert hashlib.sha256(keys).hexdigest()[:16] == "0d3d95c28e9cdb2b"


def test_statistics_stay_what_they_were() -> None:
    found = ModuleSums.of(torch.ones(2, CHANNELS), 0, KEPT)
    before = found.statistics(None)
    copies = {what: tensor.clone() for what, tensor in before.tensors().items()}
    found.add(ModuleSums.of(torch.full((1, CHANNELS), 9.0), 0, KEPT))
    assert all(tensor.equal(copies[what]) for what, tensor in before.tensors().items())


def no_tokens() -> Tensor:
    return torch.zeros(0, CHANNELS)


def test_a_call_without_tokens_is_a_call() -> None:
    found = ModuleSums.of(no_tokens(), 0, KEPT)
    assert found.called
    assert found.sums.tokens.tolist() == [0]
    assert found.sums.absmax.tolist() == [[0, 0]]
