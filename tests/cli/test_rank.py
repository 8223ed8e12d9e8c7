"""``quantrecipe rank`` as a user meets it, on a small real checkpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantrecipe.cli import main
from quantrecipe.converter import convert
from quantrecipe.converter.ranking import plotting
from quantrecipe.schema.problems import QuantrecipeError
from quantrecipe.schema.validation import load_recipe
from tests.converter.making import Json, read_lock, weight_spec
from tests.converter.ranking.planted import FRAGILE, TOKEN, recipe, write_planted

ARGUMENTS = ("--recipe", "recipe.json", "m.safetensors", "--statistics", "s.safetensors")
PLANTED = [f"layers.{index}" for index in FRAGILE]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: object
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["quantrecipe", "rank", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        captured = capsys.readouterr()
        return Ended(leaving.value.code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source, statistics and a recipe, which is also where the command runs."""
    monkeypatch.chdir(tmp_path)
    write_planted(tmp_path)
    write("recipe.json", recipe())
    return tmp_path


def write(name: str, document: Json) -> None:
    Path(name).write_text(json.dumps(document, indent=2))


def smoothed() -> Json:
    """A recipe that smooths, and says what shares its factors."""
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "s.safetensors",
    }
    scheme = {"weight": weight_spec("int8"), "activation": TOKEN, "smoothing": smoothing}
    siblings = [["layers.0", "layers.1"]]
    return recipe(schemes={"w8a8": scheme}, siblings=siblings, target={"layout": "transformerlab"})


def protected(path: str) -> list[str]:
    return [name for entry in load_recipe(path).protected for name in entry.modules]


def test_the_recipe_that_it_writes_protects_what_is_fragile(run: Run) -> None:
    ended = run(*ARGUMENTS, "--out", "better.json")
    assert (ended.code, ended.stderr) == (0, "")
    first, headers, *rows = ended.stdout.splitlines()
    assert first == "planted: 12 quantized modules, noise 12 predicted from input moments"
    assert headers.split()[:4] == ["#", "part", "module", "SQNR"]
    assert sorted(row.split()[2] for row in rows[:3]) == PLANTED
    assert ["protect" in row for row in rows[:12]] == [True] * 3 + [False] * 9
    assert ended.stdout.splitlines()[-2].startswith("protect 3 modules in bfloat16: ")
    assert ended.stdout.splitlines()[-1] == "better.json"

    assert sorted(protected("better.json")) == PLANTED
    for entry in load_recipe("better.json").protected:
        assert (entry.parts, entry.dtype, entry.count) == (("model",), "bfloat16", 1)
        assert "fragile under w8a8, " in entry.reason
        assert "of 12 by noise: SQNR " in entry.reason
        assert "kurtosis" in entry.reason
    assert load_recipe("better.json").rules[0].count == 9

    convert("better.json", "m.safetensors", "out")
    modules = read_lock(Path("out"))["modules"]
    kept = sorted(each["name"] for each in modules if each["disposition"] == "protected")
    assert kept == PLANTED


def test_json_says_all_of_it(run: Run) -> None:
    ended = run(*ARGUMENTS, "--top", "2", "--json")
    assert (ended.code, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert len(found["modules"]) == len(found["groups"]) == 12
    assert [module["noise"] for module in found["modules"]] == sorted(
        (module["noise"] for module in found["modules"]), reverse=True
    )
    assert found["noise"] == pytest.approx(sum(module["noise"] for module in found["modules"]))
    curve = found["curve"]
    assert (curve["exact"], curve["noise"][0]) == (True, pytest.approx(found["noise"]))
    assert curve["protected"][curve["knee"]] == 3
    chosen = found["chosen"]
    assert len(chosen["groups"]) == 2
    taken = sum(group["noise"] for group in chosen["groups"])
    assert chosen["noise"] == pytest.approx(found["noise"] - taken)
    assert chosen["sqnr_db"] == pytest.approx(-10 * math.log10(chosen["noise"]))
    assert (found["ladder"], found["out"], found["warnings"]) == (None, None, [])


@pytest.mark.parametrize(
    ("goal", "count"),
    [
        (("--top", "5"), 5),
        (("--top", "0"), 0),
        (("--budget", "10KB"), 4),
        (("--budget", "1GB"), 12),
        (("--quality", "-100"), 0),
        (("--quality", "200"), 12),
        (("--top", "2", "--per-part"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_goals(run: Run, goal: tuple[str, ...], count: int) -> None:
    found = json.loads(run(*ARGUMENTS, *goal, "--json").stdout)
    assert len(found["chosen"]["groups"]) == count


def test_a_quality_is_reached(run: Run) -> None:
    found = json.loads(run(*ARGUMENTS, "--quality", "20", "--json").stdout)
    assert found["chosen"]["sqnr_db"] >= 20
    assert 0 < len(found["chosen"]["groups"]) < 12


LADDER = """
import json
from pathlib import Path

def kept(folder: Path) -> int:
    lock = json.loads((folder / "recipe.lock.json").read_text("utf-8"))
    return sum(module["disposition"] == "quantized" for module in lock["modules"]) ** 3

def nothing(folder: Path) -> None:
    return None
"""


def test_the_ladder_converts_and_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("")
    Path("judging.py").write_text(LADDER)
    arguments = (*ARGUMENTS, "--ladder", "judging:kept", "--rungs", "0, 1,4,99")
    ended = run(*arguments, "--against", "random")
    assert ended.code == 0
    assert "ranked, 4 of 12 protected" in ended.stderr
    lines = ended.stdout.splitlines()
    table = lines[lines.index("converted and measured:") + 2 :]
    rows = [line.split() for line in table[: table.index("")]]
    assert [(row[0], int(row[1]), float(row[5])) for row in rows] == [
        (order, count, (12 - count) ** 3)
        for order in ("ranked", "random")
        for count in (0, 1, 4, 12)
    ]
    ladder = json.loads(run(*arguments, "--json").stdout)["ladder"]
    assert ladder["knee"] == 4
    ended = run(*ARGUMENTS, "--ladder", "judging:nothing", "--rungs", "0")
    assert ended.code == 3
    assert "returned None" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing option '--recipe'"),
        ((*ARGUMENTS, "--top", "1", "--budget", "1MB"), "one of --top, --budget and --quality"),
        ((*ARGUMENTS, "--budget", "much"), "not a size: 'much'"),
        ((*ARGUMENTS, "--per-part", "--tie-parts"), "--tie-parts"),
        ((*ARGUMENTS, "--rungs", "1"), "are of --ladder"),
        ((*ARGUMENTS, "--ladder", "x:y", "--rungs", "1,b"), "give whole numbers"),
        ((*ARGUMENTS, "--ladder", "x:y", "--against", "best"), "give random or reverse"),
        ((*ARGUMENTS, "--ladder", "json"), "give MODULE:FUNCTION"),
        ((*ARGUMENTS, "--ladder", "no_such_module:f"), "No module named"),
        ((*ARGUMENTS, "--ladder", "json:no_such"), "no_such"),
        ((*ARGUMENTS, "--ladder", "sys:path"), "is no function"),
        ((*ARGUMENTS, "--plot", "picture.gif"), ".png or .svg"),
        ((*ARGUMENTS, "--out", "better.yaml"), "end it in .json"),
    ],
)
def test_usage_exits_with_2(run: Run, arguments: tuple[str, ...], says: str) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.stdout) == (2, "")
    assert says in ended.stderr


def test_a_recipe_is_replaced_only_with_force(run: Run) -> None:
    before = Path("recipe.json").read_bytes()
    ended = run(*ARGUMENTS, "--out", "recipe.json")
    assert (ended.code, ended.stdout) == (3, "")
    assert "--force" in ended.stderr
    assert Path("recipe.json").read_bytes() == before
    assert run(*ARGUMENTS, "--out", "recipe.json", "--force", "--top", "1").code == 0
    assert len(protected("recipe.json")) == 1
    # What was protected stays so, and one more is now.
    assert run(*ARGUMENTS, "--out", "recipe.json", "--force", "--top", "1").code == 0
    assert len(protected("recipe.json")) == 2


def test_a_recipe_that_names_files_stays_in_its_folder(run: Run) -> None:
    write("recipe.json", recipe(source={"layout": "plain", "path": "m.safetensors"}))
    arguments = ("--recipe", "recipe.json", "--statistics", "s.safetensors")
    ended = run(*arguments, "--out", "elsewhere/better.json")
    assert (ended.code, ended.stdout) == (3, "")
    assert "names m.safetensors by where it lies" in ended.stderr
    assert not Path("elsewhere").exists()
    assert run(*arguments, "--out", "better.json").code == 0
    smoothing = {"kind": "smoothquant", "alpha": 0.5, "apply": "online"}
    scheme = {
        "weight": weight_spec("int8"),
        "smoothing": smoothing | {"statistics": "s.safetensors"},
    }
    write("recipe.json", recipe(schemes={"w8a8": scheme}))
    ended = run(*ARGUMENTS, "--out", "elsewhere/better.json")
    assert ended.code == 3
    assert "names s.safetensors by where it lies" in ended.stderr


@pytest.mark.parametrize("count", [1, 3, 11])
def test_a_recipe_that_smooths_stays_one_that_holds(run: Run, count: int) -> None:
    write("recipe.json", smoothed())
    arguments = ("--recipe", "recipe.json", "m.safetensors", "--top", str(count))
    ended = run(*arguments, "--out", "better.json")
    assert (ended.code, ended.stderr) == (0, "")
    better = load_recipe("better.json")
    # Two of the twelve are one group.
    assert len(protected("better.json")) in (count, count + 1)
    assert (better.siblings is None) == (count == 11)
    assert convert("better.json", "m.safetensors", "out").lock.recipe == better


def test_blind_spots_are_said(run: Run) -> None:
    ended = run("--recipe", "recipe.json", "m.safetensors")
    assert ended.code == 0
    first = [f"model: {line.split()[2]}" for line in ended.stdout.splitlines()[2:5]]
    assert ended.stderr == (
        "warning: activations are quantized, and what that costs is not known of 12 modules: "
        f"{', '.join(first)} and 9 more\n"
    )
    scheme = {"only": {"weight": weight_spec("int8")}}
    rules = [{"modules": ["layers.*"], "scheme": "only"}]
    write("recipe.json", recipe(schemes=scheme, rules=rules))
    assert run("--recipe", "recipe.json", "m.safetensors").stderr == ""


def test_statistics_that_are_none_exit_with_1(run: Run) -> None:
    ended = run("--recipe", "recipe.json", "m.safetensors", "--statistics", "m.safetensors")
    assert (ended.code, ended.stdout) == (1, "")
    assert "not a statistics file" in ended.stderr


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn(run: Run, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    ended = run(*ARGUMENTS, "--plot", f"picture{suffix}")
    assert (ended.code, ended.stderr) == (0, "")
    first = Path(f"picture{suffix}").read_bytes()
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[suffix])
    run(*ARGUMENTS, "--plot", f"again{suffix}")
    assert Path(f"again{suffix}").read_bytes() == first


def test_without_matplotlib_it_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = run(*ARGUMENTS, "--plot", "picture.png")
    assert (ended.code, ended.stdout) == (3, "")
    assert "quantrecipe[plot]" in ended.stderr
    with pytest.raises(QuantrecipeError, match="matplotlib"):
        plotting.check_plotting()
