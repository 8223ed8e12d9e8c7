"""Places of modules, axes, colours and drawings of reports."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.evaluate.reporting import Materials, build
from quantrecipe.evaluate.reporting.axes import Axis, axis
from quantrecipe.evaluate.reporting.drawing import Drawing, fitted, text_width
from quantrecipe.evaluate.reporting.markup import clean, element, escaped
from quantrecipe.evaluate.reporting.network import Heats, heats
from quantrecipe.evaluate.reporting.palette import DARK, HEATS, LIGHT, SERIES, contrast
from quantrecipe.evaluate.reporting.places import Place, places
from quantrecipe.evaluate.reporting.style import stylesheet
from quantrecipe.evaluate.reporting.wording import figure, shortened, signed, size
from tests.evaluate.reporting_materials import ideogram4_lock, lock_with, out_of_bounds

SEGMENTS = st.sampled_from(["a", "b", "layers", "0", "1", "2", "07", "12", "*", "", "é", "x*"])
NAMES = st.lists(st.lists(SEGMENTS, min_size=1, max_size=6).map(".".join), max_size=30, unique=True)


def rebuilt(place: Place) -> str:
    """The name that a place is of."""
    numbers = iter(map(str, place.index))
    stars = f"{place.stack}.*" if place.stack else "*"
    stack = re.sub(r"(?<!\\)\*", lambda _: next(numbers), stars)
    name = stack.replace(r"\*", "*")
    return f"{name}.{place.kind}" if place.kind else name


@given(NAMES)
def test_a_place_says_all_of_a_name(names: list[str]) -> None:
    found = places(names)
    assert list(found) == names
    known = [place for place in found.values() if place is not None]
    assert len(set(known)) == len(known)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["layers.0.attention.to_out.0", "layers.1.attention.to_out.0", "proj"],
            [("layers", (0,), "attention.to_out.0"), ("layers", (1,), "attention.to_out.0"), None],
        ),
        (
            ["b.0.mlp.0", "b.0.mlp.2", "b.1.mlp.0", "b.1.mlp.2"],
            [
                ("b", (0,), "mlp.0"),
                ("b", (0,), "mlp.2"),
                ("b", (1,), "mlp.0"),
                ("b", (1,), "mlp.2"),
            ],
        ),
        (
            [
                f"m.{layer}.experts.{expert}.w{n}"
                for layer in (0, 1)
                for expert in (0, 1)
                for n in "12"
            ],
            [
                ("m.*.experts", (layer, expert), f"w{n}")
                for layer in (0, 1)
                for expert in (0, 1)
                for n in "12"
            ],
        ),
        (
            ["block.0.layer.0.q", "block.0.layer.1.wi", "block.1.layer.0.q", "block.1.layer.1.wi"],
            [
                ("block", (0,), "layer.0.q"),
                ("block", (0,), "layer.1.wi"),
                ("block", (1,), "layer.0.q"),
                ("block", (1,), "layer.1.wi"),
            ],
        ),
        (["blocks.0", "blocks.1"], [("blocks", (0,), ""), ("blocks", (1,), "")]),
        (["layers.0.q", "in", "t.mlp_in"], [None, None, None]),
        (["single.3.x", "single.4.x"], [("single", (3,), "x"), ("single", (4,), "x")]),
    ],
)
def test_what_counts_is_an_index(
    names: list[str], expected: list[tuple[str, tuple[int, ...], str] | None]
) -> None:
    found = list(places(names).values())
    assert found == [None if each is None else Place(*each) for each in expected]
    for name, place in zip(names, found, strict=True):
        assert place is None or rebuilt(place) == name


@given(st.lists(st.floats(-50, 400) | st.none(), max_size=40))
def test_the_noisier_the_hotter(values: list[float | None]) -> None:
    scale = heats(values)
    assert isinstance(scale, Heats)
    known = sorted(value for value in values if value is not None)
    found = [scale.of(value) for value in known]
    assert found == sorted(found, reverse=True)
    assert all(0 <= heat < HEATS for heat in found)
    assert scale.of(None) == 0
    assert {heat for heat, _ in scale.legend()} >= set(found)
    assert len(scale.bounds) < HEATS
    if known and known[-1] - known[0] >= 4:
        assert found[0] == HEATS - 1
        assert found[-1] == 0


FINITE = st.floats(-1e12, 1e12)


@given(st.lists(FINITE, max_size=10), st.booleans(), st.lists(FINITE, max_size=2))
def test_axes_hold_their_numbers(values: list[float], log: bool, include: list[float]) -> None:
    found = axis(values, 10, 110, log=log, include=include)
    assert found.low < found.high
    for value in (*values, *include):
        assert 10 <= found.at(value) <= 110
        if not found.log or value > 1e-150:
            assert found.low <= value <= found.high
    ticks = found.ticks(5)
    assert len(ticks) <= 12
    assert all(found.low <= tick <= found.high for tick in ticks)
    assert list(ticks) == sorted(ticks)


def test_ticks_are_round() -> None:
    assert Axis(0, 10, 0, 1).ticks(6) == (0, 2, 4, 6, 8, 10)
    assert Axis(0.9, 1100, 0, 1, log=True).ticks(6) == (1, 10, 100, 1000)
    assert Axis(36, 46, 0, 1).ticks(6) == (36, 38, 40, 42, 44, 46)


def test_words_for_numbers() -> None:
    assert size(9_289_792_888) == "9.29 GB"
    assert size(999_999) == "1.00 MB"
    assert size(512) == "512 B"
    assert figure(-0.25) == "\N{MINUS SIGN}0.25"
    assert figure(48_300) == "48,300"
    assert figure(math.inf) == "∞"
    assert signed(0.5) == "+0.5"
    assert signed(0.0) == "0"
    assert shortened("abcdefgh", 5) == "ab…gh"


@given(st.text(max_size=30), st.floats(20, 200))
def test_fitted_texts_fit(text: str, width: float) -> None:
    short = fitted(text, width, 10)
    assert short == text or len(short) == 1 or text_width(short, 10) <= width


@pytest.mark.parametrize("tones", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_have_contrast(tones: dict[str, str]) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what is needed to read a picture."""
    for step in range(HEATS):
        assert contrast(tones[f"heat{step}"], tones[f"on-heat{step}"]) >= 4.5, step
    assert contrast(tones["plain"], tones["on-plain"]) >= 4.5
    for ground in ("paper", "page"):
        for tone in ("ink", "muted", "accent", "better", "worse", "equivalent", "unknown"):
            assert contrast(tones[tone], tones[ground]) >= 4.5, tone
    for tone in ("better", "worse", "equivalent", "unknown"):
        assert contrast(tones[tone], tones["band"]) >= 4.5, tone
    for index in range(SERIES):
        assert contrast(tones[f"series{index}"], tones["paper"]) >= 3
    assert contrast(tones["edge"], tones["paper"]) >= 3


def _grey(colour: str) -> float:
    return contrast(colour, "#000000")


@pytest.mark.parametrize("tones", [LIGHT, DARK], ids=["light", "dark"])
def test_heat_is_read_without_hue(tones: dict[str, str]) -> None:
    lights = [_grey(tones[f"heat{step}"]) for step in range(HEATS)]
    assert lights == sorted(lights, reverse=tones is LIGHT)
    assert LIGHT.keys() == DARK.keys()


def test_every_tone_has_a_style() -> None:
    style = stylesheet()
    assert not {"<", "&"} & set(style)
    for tone in LIGHT:
        assert f".f-{tone}{{" in style
    assert "prefers-color-scheme:dark" in style
    assert "@media print" in style


@given(st.text())
def test_nothing_escapes_escaping(text: str) -> None:
    written = element("p", text, title=text)
    assert not {"<", ">"} & set(written.removeprefix("<p ").removesuffix("</p>").replace('">', ""))
    assert written.encode("utf-8")
    assert clean(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)


def drawings() -> Iterator[Drawing]:
    odd = ["layers.0." + "é" * 200, "layers.1." + "é" * 200, "界" * 90, "layers.0.q", "layers.1.q"]
    for lock in (ideogram4_lock(), lock_with(odd), lock_with(["only"])):
        for each in build(Materials(lock), "0").figures:
            yield from each.drawings


def test_shapes_lie_inside_of_their_drawings() -> None:
    checked = 0
    for drawing in drawings():
        assert not out_of_bounds(drawing), drawing.title
        checked += 1
    assert checked > 20


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8))
        .map(".".join)
        .filter(bool),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_modules_of_any_name_are_drawn(names: list[str]) -> None:
    report = build(Materials(lock_with(names)), "0")
    for each in report.figures:
        for drawing in each.drawings:
            assert not out_of_bounds(drawing), drawing.title
