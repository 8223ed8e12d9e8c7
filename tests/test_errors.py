"""Errors that travel between processes arrive as they were."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest

import quantrecipe
from quantrecipe.checkpoint.errors import OutputExists, SourceError
from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.converter.clusters import ExecutorError
from quantrecipe.converter.working import BrokenConverter
from quantrecipe.formats import NonFinite, ScaleOutOfRange, Unrepresentable
from quantrecipe.formats.folding import FoldOutOfRange
from quantrecipe.formats.proof import TargetNonFinite
from quantrecipe.formats.refusals import OutOfRange
from quantrecipe.schema.migrations import MigrationError
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem, QuantrecipeError

PROBLEMS = (Problem("a", "one", "do it", "f", 1, 2, "/p", "t"), Problem("b", "two"))
ERRORS = [
    QuantrecipeError("no"),
    InvalidInput(PROBLEMS),
    OutputError("full"),
    OutputExists(Path("out"), ["a", "b"]),
    SourceError(Path("a"), OSError(5, "failing"), "t"),
    HubError("gated", "hf://o/n", "no", "ask"),
    MigrationError("stuck"),
    ExecutorError("away"),
    BrokenConverter("theirs", "too short"),
    Unrepresentable("a hole", (1, 2)),
    NonFinite("a NaN", (3,)),
    TargetNonFinite("a NaN", (3,)),
    OutOfRange("1e9", ()),
    ScaleOutOfRange("1e9", (0, 0)),
    FoldOutOfRange("1e9", (0, 0)),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_errors_survive_pickling(error: QuantrecipeError, way: object) -> None:
    assert callable(way)
    error.add_note("seen")
    back = way(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert back.__dict__ == error.__dict__


def test_every_error_is_tried() -> None:
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in Path(quantrecipe.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    own, found = set[str](), {"QuantrecipeError"}
    while found:
        own |= found
        found = {name for name in bases if bases[name] & own} - own
    assert own == {type(error).__name__ for error in ERRORS}
