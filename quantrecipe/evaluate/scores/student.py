"""Student's t for paired differences: interval, tests, and what they can show. Needs SciPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from scipy import special
from scipy.optimize import brentq

from quantrecipe.evaluate.scores.bootstrap import Values

_LEVELS: Final = 4096


@dataclass(frozen=True, slots=True)
class Differences:
    """What t needs to know of differences: one a prompt, independent of each other.

    Attributes:
        count: of prompts, at least 2.
        mean: of the differences.
        deviation: their standard deviation, with ``count - 1`` below; above 0.
    """

    count: int
    mean: float
    deviation: float

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.count)

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return self.count - 1


def t_interval(found: Differences, confidence: float) -> tuple[float, float]:
    """``mean -+ t s / sqrt(n)``, with the two-sided quantile of ``n - 1`` degrees of freedom."""
    half = float(special.stdtrit(found.freedom, (1 + confidence) / 2)) * found.error
    return found.mean - half, found.mean + half


def p_of_difference(found: Differences) -> float:
    """Two-sided p value of the paired t test that the true difference is 0."""
    return float(2 * special.stdtr(found.freedom, -abs(found.mean) / found.error))


def p_of_equivalence(found: Differences, margin: float) -> tuple[float, float]:
    """Two one-sided t tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657).

    Returns:
        The p values of a true difference at or below ``-margin``, and at or above ``margin``. Both
        have to be small for equivalence, so the larger one is that of the whole test.
    """
    below = special.stdtr(found.freedom, -(found.mean + margin) / found.error)
    above = special.stdtr(found.freedom, (found.mean - margin) / found.error)
    return float(below), float(above)


def power_of_difference(found: Differences, true: float, alpha: float) -> float:
    """How likely a two-sided paired t test shows a true difference, with the spread that was found.

    ``P(|T| > t)`` where ``T`` has a noncentral t distribution with noncentrality ``true / error``
    (Cohen 1988, chapter 2, for paired differences; exact for Gaussian ones). With ``S`` the
    standard deviation that will be found over the true one, it is the expectation of
    ``Phi(true / error - t S) + Phi(-true / error - t S)``.

    Args:
        found: the number of prompts and the spread; the mean is not looked at.
        true: the difference to be shown.
        alpha: the risk of showing one that is not there.
    """
    critical = special.stdtrit(found.freedom, 1 - alpha / 2) * _spreads(found.freedom)
    away = true / found.error
    return float((special.ndtr(away - critical) + special.ndtr(-away - critical)).mean())


def detectable(found: Differences, alpha: float, power: float) -> float:
    """The smallest true difference that is shown with this power, by ``power_of_difference``."""

    def short_by(errors: float) -> float:
        return power_of_difference(found, errors * found.error, alpha) - power

    most = 2.0
    while short_by(most) < 0:
        most *= 2
    return float(brentq(short_by, 0.0, most)) * found.error


def power_of_equivalence(found: Differences, margin: float, alpha: float) -> float:
    """How likely two one-sided tests show equivalence if the true difference is 0.

    With ``S`` as for ``power_of_difference``, the tests succeed where the mean, in standard errors,
    is within ``margin / error - t S`` of 0: the expectation of ``2 Phi(margin / error - t S) - 1``,
    where that is positive. This is Owen's Q (Phillips 1990, J. Pharmacokinet. Biopharm. 18, 137).

    Args:
        found: the number of prompts and the spread, taken as the true one.
        margin: of the equivalence.
        alpha: the risk of showing equivalence that is not there.
    """
    critical = special.stdtrit(found.freedom, 1 - alpha) * _spreads(found.freedom)
    room = margin / found.error - critical
    return float(np.maximum(0.0, 2 * special.ndtr(room) - 1).mean())


@lru_cache(maxsize=16)
def _spreads(freedom: int) -> Values:
    """Found over true standard deviations, ``sqrt(chi^2 / df)``, at equally likely levels."""
    levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
    found: Values = np.sqrt(special.chdtri(freedom, levels) / freedom)
    found.flags.writeable = False
    return found
