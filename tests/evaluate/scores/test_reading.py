"""Files of scores are read as they are, or refused with the line."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.evaluate.scores import reading
from quantrecipe.evaluate.scores.reading import Score, read_scores
from quantrecipe.schema.problems import InvalidInput

GOOD = {"prompt": "p", "seed": 0, "metric": "clip", "value": 1.5}
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable()),
            "seed": st.integers(0, 2**53 - 1),
            "metric": st.sampled_from(["clip", "a.b-c", "NED"]),
            "value": st.floats(allow_nan=False, allow_infinity=False),
            "variant": st.sampled_from(["int8", "NF4"]),
        }
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda row: (row["prompt"], row["seed"], row["metric"], row["variant"]),
)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def problems(path: Path) -> list[tuple[str, int | None]]:
    with pytest.raises(InvalidInput) as caught:
        read_scores([path])
    assert all(problem.file in (str(path), None) for problem in caught.value.problems)
    return [(problem.kind, problem.line) for problem in caught.value.problems]


@given(ROWS)
@settings(max_examples=30)
def test_both_formats_say_the_same(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("scores")
    (folder / "s.jsonl").write_text(lines(*rows), "utf-8")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "s.csv").write_text(buffer.getvalue(), "utf-8", newline="")
    found = []
    for name in ("s.jsonl", "s.csv"):
        scores, (file,) = read_scores([folder / name])
        assert file.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert file.scores == len(rows)
        found.append([{name: getattr(score, name) for name in rows[0]} for score in scores])
    assert found == [rows, rows]


def test_a_file_without_variants_is_of_the_one_it_is_called_after(tmp_path: Path) -> None:
    path = tmp_path / "int8.jsonl"
    path.write_text("\n" + lines(GOOD, GOOD | {"prompt": 7}), "utf-8")
    first, second = read_scores([path])[0]
    assert first.variant == "int8"
    assert (second.prompt, second.line) == ("7", 3)


BAD: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "syntax"),
    "a list": ([1], "wrong-type"),
    "no value": ({k: v for k, v in GOOD.items() if k != "value"}, "missing-field"),
    "a typo": (GOOD | {"promt": "p"}, "unknown-field"),
    "NaN": ('{"prompt": "p", "seed": 0, "metric": "m", "value": NaN}', "not-finite"),
    "infinite": ('{"prompt": "p", "seed": 0, "metric": "m", "value": 1e999}', "not-finite"),
    "too large": (GOOD | {"value": 10**400}, "not-finite"),
    "too long to be a number": (f'{{"prompt": {"1" * 5000}}}', "syntax"),
    "true": (GOOD | {"value": True}, "wrong-type"),
    "null": (GOOD | {"value": None}, "wrong-type"),
    "a number in quotes": (GOOD | {"value": "1.5"}, "wrong-type"),
    "a seed with a point": (GOOD | {"seed": 1.5}, "wrong-type"),
    "a negative seed": (GOOD | {"seed": -1}, "wrong-type"),
    "a metric with a space": (GOOD | {"metric": "clip score"}, "wrong-type"),
    "an empty prompt": (GOOD | {"prompt": ""}, "wrong-type"),
    "a key twice": ('{"seed": 0, "seed": 0}', "duplicate-key"),
    "a score twice": (GOOD | {"prompt": "first"}, "duplicate-score"),
    "a variant in some lines": (GOOD | {"variant": "v"}, "mixed-variants"),
    "nested too deep": ("[" * 10_000, "syntax"),
    "a long line": (GOOD | {"prompt": "p" * 70_000}, "too-large"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    bad, kind = BAD[case]
    path = tmp_path / "v.jsonl"
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_text(lines(GOOD | {"prompt": "first"}) + text + "\n", "utf-8")
    assert problems(path) == [(kind, 2)]


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("prompt,seed,metric\np,0,clip\n", "missing-field", 1),
        ("prompt,seed,metric,value,note\n", "unknown-field", 1),
        ("prompt,seed,metric,value,value\n", "duplicate-key", 1),
        ("prompt,seed,metric,value\np,0,clip\n", "syntax", 2),
        ("prompt,seed,metric,value\np,0,clip,nan\n", "not-finite", 2),
        ("prompt,seed,metric,value\np,0,clip,-Infinity\n", "not-finite", 2),
        ("prompt,seed,metric,value\np,0,clip,1e999\n", "not-finite", 2),
        ('prompt,seed,metric,value\n"p,0,clip,1\n', "syntax", 2),
        ("prompt,seed,metric,value\np,0,clip,1\np,x,clip,1\n", "wrong-type", 3),
        ("prompt,seed,metric,value\np,0,clip,0x1\n", "wrong-type", 2),
        ("prompt,seed,metric,value\np,0,clip,\n", "wrong-type", 2),
        ("\ufeffprompt,seed,metric,value\n", "byte-order-mark", 1),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, kind: str, line: int) -> None:
    path = tmp_path / "v.csv"
    path.write_text(text, "utf-8")
    assert problems(path)[0] == (kind, line)


@given(st.lists(st.one_of(st.binary(max_size=20), ROWS.map(lambda rows: lines(*rows).encode()))))
@settings(max_examples=40)
def test_whatever_the_bytes_are_nothing_else_is_raised(
    tmp_path_factory: Any, pieces: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("v.jsonl", "v.csv"):
        path = folder / name
        path.write_bytes(b"".join(pieces))
        scores: list[Score] = []
        with contextlib.suppress(InvalidInput):
            scores, _ = read_scores([path])
        assert all(np.isfinite(score.value) for score in scores)


def test_every_fault_is_told(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_bytes(b"{\n\xff\n" + lines(GOOD, GOOD).encode())
    assert problems(path) == [("syntax", 1), ("not-utf-8", 2), ("duplicate-score", 4)]


def test_a_score_of_another_file_counts(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(lines(GOOD | {"variant": "v"}), "utf-8")
    with pytest.raises(InvalidInput, match=r"already: .*a\.jsonl:1"):
        read_scores([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_what_is_no_file_of_scores(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("", "utf-8")
    assert problems(path) == [("not-scores", None)]
    empty = tmp_path / "v.jsonl"
    empty.write_text("\n", "utf-8")
    assert problems(empty) == [("no-scores", None)]


def test_reading_ends_where_there_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text("{\n" * 1000, "utf-8")
    assert len(problems(path)) == 201
    monkeypatch.setattr(reading, "MAX_SCORES", 2)
    path.write_text(lines(*(GOOD | {"prompt": n} for n in range(3))), "utf-8")
    assert problems(path) == [("too-large", 3)]
