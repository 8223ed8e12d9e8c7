"""Fragile linears that were planted in a model are found, and protecting them is what helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantrecipe.converter.ranking import Ladder, Order, ladder, rank, trade_off
from tests.converter.making import parsed
from tests.converter.ranking.planted import FRAGILE, LAYERS, damage, recipe, write_planted

PLANTED = {("model", f"layers.{index}") for index in FRAGILE}


@pytest.mark.parametrize("keep", [0, 32], ids=["from moments", "from tokens"])
def test_the_planted_modules_come_first_and_the_knee_is_theirs(tmp_path: Path, keep: int) -> None:
    write_planted(tmp_path, keep)
    found = rank(
        parsed(recipe()), tmp_path / "m.safetensors", statistics=tmp_path / "s.safetensors"
    )
    assert {module.key for module in found.modules[:3]} == PLANTED
    for module in found.modules:
        assert module.basis == ("tokens" if keep else "moments")
        assert module.spikiness is not None
        assert (module.spikiness.max_to_median > 20) == (module.key in PLANTED)
    curve = trade_off(found.groups)
    assert {key for group in curve.chosen(curve.knee()) for key in group.modules} == PLANTED


def test_weights_alone_do_not_show_them(tmp_path: Path) -> None:
    write_planted(tmp_path)
    found = rank(parsed(recipe()), tmp_path / "m.safetensors")
    assert all(module.blind and module.basis == "weight" for module in found.modules)
    assert found.modules[0].noise < 2 * found.modules[-1].noise


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    folder = tmp_path_factory.mktemp("ladder")
    write_planted(folder)
    source, document = folder / "m.safetensors", parsed(recipe())
    ranking = rank(document, source, statistics=folder / "s.safetensors")
    against: list[Order] = ["random", "reverse"]
    return ladder(document, source, ranking, damage, (0, 1, 3, 6, 12), against=against, jobs=1)


def test_the_ladder_has_its_knee_at_three(climbed: Ladder) -> None:
    assert climbed.knee == len(FRAGILE)
    assert [rung.protected for rung in climbed.of("ranked")] == [0, 1, 3, 6, 12]
    first, *_, last = climbed.of("ranked")
    assert (first.extra_bytes, last.modules) == (0, LAYERS)
    assert last.value < first.value / 100


def test_the_ranked_set_beats_the_others_of_its_size(climbed: Ladder) -> None:
    ranked, shuffled, backwards = (
        next(rung for rung in climbed.of(order) if rung.protected == len(FRAGILE))
        for order in ("ranked", "random", "reverse")
    )
    assert ranked.extra_bytes == shuffled.extra_bytes == backwards.extra_bytes
    assert ranked.value < shuffled.value / 3
    assert ranked.value < backwards.value / 3


def test_ends_of_the_ladder_do_not_depend_on_the_order(climbed: Ladder) -> None:
    for end in (0, -1):
        assert len({climbed.of(order)[end].value for order in ("ranked", "random", "reverse")}) == 1
