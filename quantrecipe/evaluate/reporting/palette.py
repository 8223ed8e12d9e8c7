"""Colours, by what they are for: in light and in dark, safe for the colour-blind.

What is shown by heat goes from quiet to noisy in one direction of lightness, so that it can be read
without any hue: noise stands out, dark on light paper and bright on dark. Series differ in marks
and dashes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

HEATS: Final = 8
"""Steps of heat, from 0, quiet, to the noisiest."""

SERIES: Final = 4
"""Series that can be told apart in one picture."""

_HEAT_LIGHT: Final = (
    *("#fff8e0", "#ffecb8", "#fedb85", "#fdbf4f"),
    *("#f59a33", "#bf520a", "#983404", "#5c1f04"),
)
_HEAT_DARK: Final = (
    *("#2b2925", "#3b3020", "#533d1b", "#704a14"),
    *("#8f570d", "#c98022", "#f0b04f", "#ffe3a3"),
)
_DARK_INK: Final = "#15171a"
_LIGHT_INK: Final = "#ffffff"

LIGHT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "page": "#f4f5f7",
        "paper": "#ffffff",
        "ink": "#1b1e23",
        "muted": "#59606b",
        "grid": "#e2e5ea",
        "edge": "#8b929c",
        "plain": "#e8ebf0",
        "on-plain": "#2b3038",
        "band": "#d5ebe0",
        "accent": "#0b5cad",
        "better": "#0b5cad",
        "worse": "#b3400a",
        "equivalent": "#0a7355",
        "unknown": "#59606b",
        "series0": "#0b5cad",
        "series1": "#c2500a",
        "series2": "#0a7d5c",
        "series3": "#9a4388",
        **{f"heat{step}": colour for step, colour in enumerate(_HEAT_LIGHT)},
        **{f"on-heat{step}": _DARK_INK if step < 5 else _LIGHT_INK for step in range(HEATS)},
    }
)
"""On paper, and wherever nobody asked for dark."""

DARK: Final[Mapping[str, str]] = MappingProxyType(
    {
        "page": "#101216",
        "paper": "#191c21",
        "ink": "#e9ebee",
        "muted": "#a3abb6",
        "grid": "#2c3138",
        "edge": "#747c88",
        "plain": "#333942",
        "on-plain": "#e3e6ea",
        "band": "#173c30",
        "accent": "#74b6f2",
        "better": "#74b6f2",
        "worse": "#ff9a5c",
        "equivalent": "#4fc79f",
        "unknown": "#a3abb6",
        "series0": "#6db3f2",
        "series1": "#ff9552",
        "series2": "#44c498",
        "series3": "#dd93cd",
        **{f"heat{step}": colour for step, colour in enumerate(_HEAT_DARK)},
        **{f"on-heat{step}": _LIGHT_INK if step < 5 else _DARK_INK for step in range(HEATS)},
    }
)
"""Where the reader's system is dark."""


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, ``#rrggbb``, from 1 to 21 (WCAG 2.2, section 1.4.3)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
