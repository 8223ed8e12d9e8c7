"""Module patterns, against a matcher that expands and backtracks."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantrecipe.schema.globs import MAX_DEPTH
from quantrecipe.schema.patterns import MAX_LENGTH, Patterns, check_pattern, is_exact
from quantrecipe.schema.problems import InvalidInput

# -- globs, each with the set of globs without braces that it stands for --------------------------

LETTERS = "ab1"


@dataclass(frozen=True)
class Glob:
    """Text for the code under test; for the naive matcher, the globs without braces it says."""

    text: str
    count: int
    expand: Callable[[], list[str]] = field(repr=False)


def plain(text: str) -> Glob:
    return Glob(text, 1, lambda: [text])


def concat(parts: list[Glob], between: str = "") -> Glob:
    def expand() -> list[str]:
        return [between.join(p) for p in itertools.product(*(part.expand() for part in parts))]

    count = math.prod(part.count for part in parts)
    return Glob(between.join(part.text for part in parts), count, expand)


def braces(items: list[Glob]) -> Glob:
    def expand() -> list[str]:
        return [text for item in items for text in item.expand()]

    text = "{" + ",".join(item.text for item in items) + "}"
    return Glob(text, sum(item.count for item in items), expand)


def number_range(bounds: tuple[int, int]) -> Glob:
    low, high = sorted(bounds)
    numbers = range(low, high + 1)
    return Glob(f"{{{low}..{high}}}", len(numbers), lambda: [str(number) for number in numbers])


def segments(piece: st.SearchStrategy[Glob]) -> st.SearchStrategy[Glob]:
    """Segments that hold no two stars side by side."""
    return (
        st.lists(piece, min_size=1, max_size=3)
        .map(concat)
        .filter(lambda glob: "**" not in glob.text)
    )


literals = st.sampled_from(LETTERS).map(plain)
stars = st.just(plain("*"))
ranges = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(number_range)
flat = segments(literals | stars)
inner = st.lists(flat | ranges, min_size=2, max_size=3).map(braces) | ranges
nested = st.lists(
    segments(literals | inner)
    | st.lists(flat, min_size=2, max_size=2).map(lambda p: concat(p, ".")),
    min_size=2,
    max_size=3,
).map(braces)
deep = st.just(plain("**"))


def stars_meet(text: str) -> bool:
    """Whether a star may stand beside another across a brace: two of one segment, no ``**``."""
    begins, ends = "{*" in text or ",*" in text, "*}" in text or "*," in text
    return (
        ("*{" in text and begins) or ("}*" in text and ends) or ("}{" in text and begins and ends)
    )


globs = (
    st.lists(segments(literals | stars | inner | nested) | deep, min_size=1, max_size=4)
    .map(lambda parts: concat(parts, "."))
    .filter(lambda glob: glob.count <= 500 and not stars_meet(glob.text))
)
names = st.lists(st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=5).map(".".join)


def naive_segment(pattern: str, segment: str) -> bool:
    if not pattern:
        return not segment
    if pattern[0] == "*":
        return any(naive_segment(pattern[1:], segment[i:]) for i in range(len(segment) + 1))
    return segment[:1] == pattern[0] and naive_segment(pattern[1:], segment[1:])


def naive(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(naive(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and naive_segment(pattern[0], name[0]) and naive(pattern[1:], name[1:])


def naive_glob(glob: Glob, name: str) -> bool:
    return any(naive(one.split("."), name.split(".")) for one in glob.expand())


def matches(pattern: str, name: str) -> bool:
    return Patterns.compile([pattern]).matches(name) == 0


# -- properties -----------------------------------------------------------------------------------


@given(globs, st.lists(names, min_size=1, max_size=8))
def test_a_glob_matches_what_the_naive_matcher_says(glob: Glob, candidates: list[str]) -> None:
    assert check_pattern(glob.text) is None
    compiled = Patterns.compile([glob.text])
    for name in candidates:
        assert (compiled.matches(name) == 0) == naive_glob(glob, name), name


@pytest.mark.parametrize(("name", "taken"), [("1", False), ("1.2", True), ("1.2.3", False)])
def test_stars_that_meet_across_a_brace_are_each_of_one_segment(name: str, taken: bool) -> None:
    assert matches("*{a,*.*}", name) == taken


@given(globs, st.data())
def test_a_glob_matches_the_names_that_are_written_from_it(glob: Glob, data: st.DataObject) -> None:
    one = data.draw(st.sampled_from(glob.expand()))

    def fill(segment: str) -> Iterator[str]:
        if segment == "**":
            yield from data.draw(st.lists(st.text(LETTERS, min_size=1, max_size=2), max_size=2))
        else:
            yield "".join(
                data.draw(st.text(LETTERS, max_size=2)) if c == "*" else c for c in segment
            )

    filled = [part for segment in one.split(".") for part in fill(segment)]
    if filled:
        assert matches(glob.text, ".".join(filled))


@given(st.lists(globs, min_size=1, max_size=6), names)
def test_the_first_pattern_that_matches_is_named(several: list[Glob], name: str) -> None:
    expected = next((i for i, glob in enumerate(several) if naive_glob(glob, name)), None)
    assert Patterns.compile([glob.text for glob in several]).matches(name) == expected


@given(st.integers(0, 12_000), st.integers(0, 9_999), st.integers(0, 30_000))
def test_a_range_holds_its_numbers_and_no_others(low: int, length: int, number: int) -> None:
    compiled = Patterns.compile([f"x.{{{low}..{low + length}}}"])
    edges = (low - 1, low, low + length, low + length + 1)
    for candidate in (number, *(edge for edge in edges if edge >= 0)):
        assert (compiled.matches(f"x.{candidate}") == 0) == (low <= candidate <= low + length)
        assert compiled.matches(f"x.0{candidate}") is None


@given(st.text(max_size=30))
@example("re:\ud800")
@example("{" * 600)
@example("{0.." + "9" * 900 + "}")
def test_any_text_is_taken_or_refused_with_a_reason(text: str) -> None:
    why = check_pattern(text)
    if why is None:
        Patterns.compile([text]).matches("layers.0.attention")
    else:
        with pytest.raises(InvalidInput) as caught:
            Patterns.compile([text])
        assert caught.value.problems[0].kind == "invalid-pattern"
        assert why in str(caught.value)


@given(st.text("ab.*{},01?[(|)\\", max_size=12), st.text("ab.01", max_size=6))
def test_an_exact_pattern_matches_its_own_text_only(text: str, other: str) -> None:
    if check_pattern(text) is None and is_exact(text):
        assert matches(text, text)
        assert matches(text, other) == (text == other)


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a*", "a", True),
        ("**", "a", True),
        ("**", "a.b.c", True),
        ("a.**", "a", True),
        ("a.**", "a.b.c", True),
        ("a.**", "ab", False),
        ("**.b", "b", True),
        ("**.b", "a.a.b", True),
        ("**.b", "ab", False),
        ("a.**.b", "a.b", True),
        ("a.**.b", "a.x.y.b", True),
        ("a.**.b", "a.xb", False),
        ("**.**", "a", True),
        ("**.a.**.**.b.**", "a.b", True),
        ("l.{0..33}", "l.33", True),
        ("l.{0..33}", "l.34", False),
        ("l.{0..33}", "l.03", False),
        ("l.{0..33}", "l.", False),
        ("l.{7..7}", "l.7", True),
        ("l.{0..3,7,9..11}.x", "l.7.x", True),
        ("l.{0..3,7,9..11}.x", "l.10.x", True),
        ("l.{0..3,7,9..11}.x", "l.8.x", False),
        ("{a.b,c}.d", "a.b.d", True),
        ("{a.b,c}.d", "c.d", True),
        ("{a.b,c}.d", "a.d", False),
        ("{a,{b,c}d}", "cd", True),
        ("{a,{b,c}d}", "c", False),
        ("{a*,b}*", "axx", True),
        ("{b,*}", "*", True),
        ("schräg.*", "schräg.ß", True),
        ("*", "日本", True),
        ("*", "\ud800", True),
        ("\ud800.b", "a.b", False),
        (r"re:.*\.\d+", "a.b.12", True),
        (r"re:a|b\d", "a", True),
        (r"re:a|b\d", "a1", False),
        (r"re:^a$", "a", True),
        (r"re:(?i)ATTN", "attn", True),
    ],
)
def test_what_matches_what(pattern: str, name: str, expected: bool) -> None:
    if check_pattern(pattern) is not None:
        assert not expected, check_pattern(pattern)
        return
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("pattern", "fragment", "character"),
    [
        ("", "a dotted segment is empty", 1),
        (".a", "a dotted segment is empty", 1),
        ("a.", "a dotted segment is empty", 3),
        ("a..b", "a range is two whole numbers in braces", 2),
        ("a**", "only dots may be beside it", 2),
        ("**a", "only dots may be beside it", 1),
        ("a.***", "only dots may be beside it", 3),
        ("**{a,b}", "only dots may be beside it", 1),
        ("{a,b}**", "only dots may be beside it", 6),
        ("{**,a}", "'**' cannot stand in braces", 2),
        ("{a}", "braces hold alternatives", 1),
        ("{a,b", "never closed", 1),
        ("{0..3", "never closed", 1),
        ("a}", "never opened", 2),
        ("a,b", "alternatives go into braces", 2),
        ("{a,}", "an alternative is empty", 4),
        ("{,a}", "an alternative is empty", 2),
        ("{.a,b}", "begins with a dot", 2),
        ("{a.,b}", "a dotted segment is empty", 4),
        ("{a..c}", "a range is two whole numbers in braces", 3),
        ("{10..3}", "write '{3..10}'", 2),
        ("{00..3}", "leading zero", 2),
        ("{0..03}", "leading zero", 5),
        ("{-1..3}", "a range is two whole numbers in braces", 4),
        ("{0..10000}", "more than 10,000 numbers", 2),
        ("{0..4999,0..5000}", "more than 10,000 alternatives", None),
        ("{1..1000000000}", "more than 9 digits", 5),
        ("{0..100}.{0..99}", "more than 10,000 alternatives", None),
        ("{" * (MAX_DEPTH + 1), "nest deeper", MAX_DEPTH + 1),
        ("a?", "'?' has no meaning in a glob", 2),
        ("a[0]", "'[' has no meaning in a glob", 2),
        (r"a\.b", "has no meaning in a glob", 2),
        ("a b", "' ' is no character of a module name", 2),
        ("a\n", r"'\n' is no character of a module name", 2),
        ("a" * (MAX_LENGTH + 1), "longer than 1,024", None),
        ("re:", "nothing follows", None),
        ("re:(?=a)b", "no lookarounds", 4),
        ("re:a(?<!b)", "no lookarounds", 5),
        (r"re:(a)\1", "no backreferences", 7),
        ("re:(a", "RE2 refuses it", None),
        ("re:a{2000}", "RE2 refuses it", 5),
        (r"re:(\pL{30}\pN{30}){30}", "too large", None),
    ],
)
def test_what_is_refused_and_where(pattern: str, fragment: str, character: int | None) -> None:
    why = check_pattern(pattern)
    assert why is not None
    assert fragment in why
    assert why.endswith(f"(at character {character})") == (character is not None)


def test_the_widest_braces_that_are_allowed() -> None:
    compiled = Patterns.compile(["{0..99}.{0..99}"])
    assert compiled.matches("99.0") == 0
    assert compiled.matches("100.0") is None


def test_every_invalid_pattern_is_reported() -> None:
    with pytest.raises(InvalidInput) as caught:
        Patterns.compile(["a", "b?", "c", "{d}"])
    assert [problem.kind for problem in caught.value.problems] == ["invalid-pattern"] * 2


@pytest.mark.parametrize(
    ("order", "first"),
    [
        (("a.b", "a.*"), 0),
        (("a.*", "a.b"), 0),
        (("x*", "a.b", "a.*"), 1),
        (("x*", "y", "**", "a.b"), 2),
        (("x", "a.b", "a.b"), 1),
    ],
)
def test_exact_names_and_globs_share_one_order(order: tuple[str, ...], first: int) -> None:
    assert Patterns.compile(order).matches("a.b") == first


def test_no_pattern_matches_nothing() -> None:
    assert Patterns.compile([]).matches("a") is None


@pytest.mark.parametrize(
    "pattern",
    [
        "**.**.**.**.x",
        "**.a*.**.a*.**.a*.**.b",
        "a*a*a*a*a*a*a*a*a*b",
        "{a,{b,{c,{d*,e*}*}*}*}*z",
        "{0..999}*{0..9}*x",
        "re:(a*)*b",
        "re:(a|aa|a?)*.{0,500}c",
    ],
)
def test_hostile_patterns_finish_on_very_long_names(pattern: str) -> None:
    compiled = Patterns.compile([pattern])
    for unit in ("a", "a.", "a1."):
        assert compiled.matches((unit * 100_000)[:100_000] + "y") is None


def test_many_large_patterns_all_answer() -> None:
    # More than one automaton holds; none may run out of memory and answer "no" instead.
    patterns = [rf"re:x{number}-(\pL|\pN){{9}}.*end" for number in range(60)]
    compiled = Patterns.compile(patterns)
    assert [compiled.matches(f"x{n}-ääääääääÄ-end") for n in range(60)] == list(range(60))
    assert len({id(automaton) for automaton, _ in compiled._sets}) > 1


def test_expressions_are_loaded_only_when_needed() -> None:
    code = (
        "import sys; from quantrecipe.schema.patterns import Patterns, check_pattern;"
        "Patterns.compile(['a.b']).matches('a.b'); check_pattern('a?');"
        "assert 're2' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the documentation ----------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "patterns.md"


def table(columns: int) -> list[list[list[str]]]:
    """The rows of the page's table that has so many columns: the code in each cell."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        codes = [re.findall(r"`([^`]+)`", cell.replace(r"\|", "|")) for cell in cells]
        if len(cells) == columns and codes[0]:
            rows.append(codes)
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize("row", table(3), ids=lambda row: row[0][0])
def test_the_documented_examples_hold(row: list[list[str]]) -> None:
    (pattern,), matching, others = row
    assert check_pattern(pattern) is None
    assert [name for name in matching if not matches(pattern, name)] == []
    assert [name for name in others if matches(pattern, name)] == []


@pytest.mark.parametrize("row", table(2), ids=lambda row: row[0][0])
def test_what_is_documented_as_refused_is(row: list[list[str]]) -> None:
    assert check_pattern(row[0][0]) is not None
