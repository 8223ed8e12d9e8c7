"""Who may know whom, and what never to find in the tree."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "quantrecipe"

FLOORS = {
    "schema": 0,
    "formats": 1,
    "checkpoint": 1,
    "converter": 2,
    "loaders": 2,
    "evaluate": 2,
    "testing": 2,
    "publishing": 3,
    "cli": 4,
}
DATA_ROOMS = {"recipes", "layouts"}
# The conformance suite runs converters and loaders, so it has to know both protocols; what is
# evaluated is read by loaders.
SAME_FLOOR = {("testing", "converter"), ("testing", "loaders"), ("evaluate", "loaders")}
WITHOUT_TORCH = {"schema", "checkpoint"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str | None:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; from-imports give both levels."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in imported(path):
        top, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if top == "quantrecipe" and room in FLOORS.keys() | DATA_ROOMS:
            rooms.add(room)
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room is None:
        assert not rooms_imported(path), "the package itself imports no room"
        return
    assert room in FLOORS.keys() | DATA_ROOMS, f"{room} is no room of the house"
    for other in rooms_imported(path) - {room}:
        allowed = (room, other) in SAME_FLOOR or FLOORS.get(other, -1) < FLOORS.get(room, -1)
        assert allowed, f"{room} must not import {other}"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if room_of(path) in WITHOUT_TORCH],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_torch_stays_out_of_the_ground_floor(path: Path) -> None:
    assert "torch" not in {name.partition(".")[0] for name in imported(path)}


def test_data_rooms_hold_data_only() -> None:
    for room in DATA_ROOMS:
        files = [path for path in (PACKAGE / room).rglob("*") if path.is_file()]
        code = {path for path in files if path.suffix == ".py" and path.name != "__init__.py"}
        assert not code
        assert any(path.suffix == ".json" for path in files), f"{room} is empty"


RECIPE = str(ROOT / "examples" / "minilm" / "recipe.json")
WATCH = """
import sys
sys.argv = ["quantrecipe", *{arguments!r}]
code = 0
try:
    from quantrecipe.cli import main
    main()
except SystemExit as ended:
    code = ended.code
assert code in (0, None), code
for heavy in ("torch", "scipy"):
    assert heavy not in sys.modules, f"{{heavy}} was imported"
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["rank", "--help"],
        ["diff", "--help"],
        ["report", "--help"],
        ["tune", "--help"],
        ["calibrate", "--help"],
        ["evaluate", "--help"],
        ["evaluate", "compare", "--help"],
        ["evaluate", "metrics"],
        ["validate", RECIPE],
        ["schema"],
        ["recipes"],
        ["layouts"],
        ["formats"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(RECIPE, "FILE"),
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    run_python(WATCH.format(arguments=arguments))


def test_schema_never_imports_torch() -> None:
    run_python(
        "import sys, quantrecipe.schema, quantrecipe.checkpoint\nassert 'torch' not in sys.modules"
    )


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# Put together from pieces, so that this file does not hold what it looks for.
FORBIDDEN = ("pypi" + ".org", "files.python" + "hosted", "/wo" + "rk/", "/tm" + "p/venv")
SKIPPED = {".git", ".hypothesis", ".venv", "build", "dist", "demo-output", "out", "__pycache__"}


def tree() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED and not name.endswith(("_cache", ".partial", ".egg-info"))
        ]
        yield from (Path(folder, name) for name in files)


def test_the_tree_names_no_registry_and_no_machine() -> None:
    found = []
    for path in tree():
        content = path.read_bytes()
        found += [(path, word) for word in FORBIDDEN if word.encode() in content]
    assert not found
