"""``quantrecipe report`` of what the other commands really write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantrecipe.cli import main
from quantrecipe.cli.report import report
from quantrecipe.converter import convert
from quantrecipe.converter.calibration import open_statistics
from quantrecipe.evaluate.reporting import gather
from tests.converter.ranking.planted import recipe, write_planted


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source, statistics, a recipe and what it converts to."""
    monkeypatch.chdir(tmp_path)
    write_planted(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe()))
    convert("recipe.json", "m.safetensors", tmp_path / "out")
    return tmp_path


def test_rankings_are_read_as_they_are_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "judging", _Judging())
    arguments = ["--recipe", "recipe.json", "m.safetensors", "--statistics", "s.safetensors"]
    arguments += ["--ladder", "judging:size", "--rungs", "0,1,2", "--against", "random", "--json"]
    monkeypatch.setattr(sys, "argv", ["quantrecipe", "rank", *arguments])
    with pytest.raises(SystemExit):
        main()
    printed = json.loads(capsys.readouterr().out)
    (folder / "rank.json").write_text(json.dumps(printed))
    found = gather(folder / "out", rank=folder / "rank.json").ranked
    assert found is not None
    assert [module.key for module in found.modules] == [
        (module["part"], module["name"]) for module in printed["modules"]
    ]
    assert found.modules[0].sqnr_db == printed["modules"][0]["sqnr_db"]
    assert found.nbytes == tuple(printed["curve"]["bytes"])
    assert found.chosen
    assert len(found.rungs) == 6


class _Judging:
    """A module with a function for the ladder."""

    @staticmethod
    def size(folder: Path) -> float:
        return float(sum(path.stat().st_size for path in folder.iterdir()))


def test_statistics_are_read_as_they_are_written(folder: Path) -> None:
    path = folder / "s.safetensors"
    (found,) = gather(folder / "out", statistics=[path]).measured
    with open_statistics(path) as expected:
        assert {(each.part, each.name) for each in found.modules} == set(expected)
        for each in found.modules:
            module = expected.module(each.part, each.name)
            assert each.max_to_median == pytest.approx(module.max_to_median(), rel=1e-12)
            assert each.largest == tuple(module.input_absmax.amax(1).tolist())


def test_the_page_of_a_real_conversion(folder: Path) -> None:
    page = folder / "report.html"
    arguments = [str(folder / "out"), "--statistics", "s.safetensors", "--out", str(page)]
    result = CliRunner().invoke(report, arguments)
    assert result.exit_code == 0, result.output
    lock = json.loads((folder / "out" / "recipe.lock.json").read_bytes())
    html = page.read_text("utf-8")
    for module in lock["modules"]:
        assert f"weight SQNR {module['error']['sqnr_db']:.1f} dB" in html
    assert lock["sha256"] in html
    assert lock["source"][0]["sha256"] in html
