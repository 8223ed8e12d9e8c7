"""``quantrecipe report``: exit codes, what goes where, and what is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quantrecipe.cli.report import report
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.problems import InvalidInput, OutputError
from tests.evaluate.reporting_materials import (
    evaluation,
    lock_with,
    ranking,
    write_json,
    write_lock,
)

NAMES = ["layers.0.q", "layers.1.q", "proj"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write_lock(tmp_path / "out", lock_with(NAMES))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(report, [str(argument) for argument in arguments])


def test_the_page_is_written_and_named(tmp_path: Path, made: Path) -> None:
    page = tmp_path / "new" / "report.html"
    result = invoke(made, "--out", page)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{page}\n"
    assert result.stderr == ""
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_json_says_what_is_in_it(tmp_path: Path, made: Path) -> None:
    page = tmp_path / "report.html"
    rank = write_json(tmp_path / "rank.json", ranking(lock_with(NAMES)))
    judged = write_json(tmp_path / "evaluation.json", evaluation())
    result = invoke(made, "--rank", rank, "--evaluation", judged, "--out", page, "--json")
    found = json.loads(result.stdout)
    assert found["out"] == str(page)
    assert found["bytes"] == page.stat().st_size
    expected = ["network", "depth", "ranking", "evaluation", "sizes", "provenance"]
    assert found["sections"] == expected
    assert found["figures"] == []


def test_a_page_that_is_there_is_kept(tmp_path: Path, made: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    result = invoke(made, "--out", page)
    assert isinstance(result.exception, OutputError)
    assert result.exception.exit_code == 3
    assert page.read_text() == "mine"
    assert invoke(made, "--out", page, "--force").exit_code == 0
    assert page.read_text("utf-8") != "mine"


def test_figures_are_written_beside_it(tmp_path: Path, made: Path) -> None:
    pytest.importorskip("matplotlib")
    page, folder = tmp_path / "report.html", tmp_path / "png"
    result = invoke(made, "--out", page, "--png", folder)
    names = ["network.png", "depth.png", "sizes.png"]
    assert result.stdout.splitlines() == [str(page), *(str(folder / name) for name in names)]
    page.unlink()
    again = invoke(made, "--out", page, "--png", folder)
    assert isinstance(again.exception, OutputError)
    assert not page.exists()


def test_a_folder_without_a_lock_is_refused(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--out", tmp_path / "report.html")
    assert isinstance(result.exception, InvalidInput)
    assert result.exception.exit_code == 1
    assert "there is no lock" in str(result.exception)
    assert not (tmp_path / "report.html").exists()
    as_json = invoke(tmp_path, "--out", tmp_path / "report.html", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problems"][0]["kind"] == "no-lock"


def test_a_damaged_lock_is_refused(tmp_path: Path, made: Path) -> None:
    path = made / LOCK_NAME
    path.write_bytes(path.read_bytes().replace(b'"sqnr_db": 4', b'"sqnr_db": 9', 1))
    result = invoke(made, "--out", tmp_path / "report.html")
    assert isinstance(result.exception, InvalidInput)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("option", ["--rank", "--evaluation", "--statistics", "--benchmarks"])
def test_missing_and_foreign_files_are_refused(tmp_path: Path, made: Path, option: str) -> None:
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"a": "b"}')
    for path in (tmp_path / "missing.json", foreign):
        result = invoke(made, option, path, "--out", tmp_path / "report.html")
        assert isinstance(result.exception, InvalidInput), result.output
        assert result.exception.problems[0].file == str(path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--out", "report.pdf"],
        ["--out", "r.html", "--images", "a"],
        ["--out", "r.html", "--images", "=a"],
        ["--out", "r.html", "--images", "a=b", "--images", "a=c"],
        ["--out", "r.html", "--image-bytes", "much"],
        ["--out", "r.html", "--image-count", "0"],
    ],
)
def test_usage_errors_exit_with_2(made: Path, arguments: list[str]) -> None:
    assert invoke(made, *arguments).exit_code == 2


def test_images_are_put_in(tmp_path: Path, made: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for variant in ("a", "b"):
        (tmp_path / variant).mkdir()
        image.new("RGB", (9, 9)).save(tmp_path / variant / "x.png")
    page = tmp_path / "report.html"
    given = [f"{variant}={tmp_path / variant}" for variant in ("a", "b")]
    result = invoke(made, "--images", given[0], "--images", given[1], "--out", page)
    assert result.exit_code == 0, result.output
    assert page.read_text("utf-8").count("data:image/png;base64,") == 2


def test_no_torch_and_no_matplotlib_are_needed(tmp_path: Path, made: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['matplotlib'] = sys.modules['PIL'] = None\n"
        "from quantrecipe.cli import main\n"
        "main()\n"
    )
    page = str(tmp_path / "report.html")
    arguments = [sys.executable, "-c", code, "report", str(made), "--out", page]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    for option, missing in (("--png", "matplotlib"), ("--images", "Pillow")):
        value = str(tmp_path) if option == "--png" else f"a={tmp_path}"
        done = subprocess.run(
            [*arguments, "--force", option, value],
            capture_output=True,
            text=True,
            cwd=root,
            check=False,
        )
        assert done.returncode == 3
        assert f"need {missing}" in done.stderr or f"needs {missing}" in done.stderr
