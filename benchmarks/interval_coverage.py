"""How often intervals of a paired difference hold the true one: t, percentile and BCa bootstrap.

    python benchmarks/interval_coverage.py
    python benchmarks/interval_coverage.py --repetitions 200 --json

Scores are drawn from known distributions, compared as ``quantrecipe evaluate`` compares them, and
the intervals held against the true mean difference. ``clip-like`` has the differences of CLIP
scores between INT8 and NF4 that were published for 200 prompts (mean 1.9, 95 % interval 1.21 to
2.64). ``ned-like`` has normalized edit distances: some prompts exactly 0 and some exactly 1, skewed
between, with means near the published 0.704 and 0.760, and the two scores of a prompt correlated.
The other two are harder: most prompts score the same with both variants, and what differs is
skewed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from _measure import machine
from numpy.random import Generator
from scipy import special

from quantrecipe.evaluate.scores.bootstrap import (
    Values,
    bca_interval,
    percentile_interval,
    resampled_means,
)
from quantrecipe.evaluate.scores.student import Differences, t_interval

CONFIDENCE: Final = 0.95
METHODS: Final = ("t", "percentile", "bca")
COUNTS: Final = (20, 50, 200)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Where differences come from.

    Attributes:
        true: the mean difference.
        draw: so many differences, ``[n]``.
    """

    true: float
    draw: Callable[[Generator, int], Values]


@dataclass(frozen=True, slots=True)
class Scores:
    """Numbers from 0 to 1 with mass at both ends, Beta between.

    Attributes:
        zero, one: the shares of exactly 0 and exactly 1.
        a, b: of the Beta distribution.
    """

    zero: float
    one: float
    a: float
    b: float

    @property
    def mean(self) -> float:
        """Exact."""
        return self.one + (1 - self.zero - self.one) * self.a / (self.a + self.b)

    def at(self, levels: Values) -> Values:
        """The quantiles at levels between 0 and 1."""
        inner = np.clip((levels - self.zero) / (1 - self.zero - self.one), 0.0, 1.0)
        found: Values = special.betaincinv(self.a, self.b, inner)
        return found


def gaussian(mean: float, deviation: float) -> Scenario:
    """Differences of a Gaussian distribution."""
    return Scenario(mean, lambda random, count: random.normal(mean, deviation, count))


def bounded(one: Scores, other: Scores, correlation: float) -> Scenario:
    """Two scores of each prompt, joined by a Gaussian copula, which leaves their means alone."""

    def draw(random: Generator, count: int) -> Values:
        shared, first, second = random.normal(size=(3, count))
        own = math.sqrt(1 - correlation)
        levels = (special.ndtr(math.sqrt(correlation) * shared + own * n) for n in (first, second))
        found: Values = one.at(next(levels)) - other.at(next(levels))
        return found

    return Scenario(one.mean - other.mean, draw)


def rare(share: float, scores: Scores) -> Scenario:
    """A difference in this share of prompts, always upwards; 0 in all others."""

    def draw(random: Generator, count: int) -> Values:
        found: Values = (random.random(count) < share) * scores.at(random.random(count))
        return found

    return Scenario(share * scores.mean, draw)


# 200 differences whose 95 % interval is 1.43 wide: 1.43 / (2 * 1.972) * sqrt(200).
SCENARIOS: Final[Mapping[str, Scenario]] = {
    "clip-like": gaussian(1.9, 5.13),
    "ned-like": bounded(Scores(0.05, 0.32, 1.4, 0.9), Scores(0.04, 0.42, 1.5, 0.9), 0.6),
    "ned-like, 1 in 5 differs": rare(0.2, Scores(0.0, 0.1, 0.7, 1.4)),
    "ned-like, 1 in 20 differs": rare(0.05, Scores(0.0, 0.1, 0.7, 1.4)),
}


@dataclass(frozen=True, slots=True)
class Coverage:
    """How a method did in a scenario.

    Attributes:
        scenario, prompts, method: what was tried.
        held: the share of intervals that hold the true difference.
        below, above: the shares that lie wholly below it, and wholly above.
        width: of the intervals, the mean.
    """

    scenario: str
    prompts: int
    method: str
    held: float
    below: float
    above: float
    width: float


def coverage(
    scenario: str, prompts: int, repetitions: int, resamples: int, seed: int = 0
) -> list[Coverage]:
    """Draw, compare and hold against the truth, again and again.

    Args:
        scenario: of ``SCENARIOS``.
        prompts: differences in each repetition.
        repetitions: how many intervals of each method.
        resamples: of the bootstraps.
        seed: of everything.
    """
    true, draw = SCENARIOS[scenario].true, SCENARIOS[scenario].draw
    ends = np.array(
        [
            intervals(draw(np.random.default_rng((seed, index)), prompts), resamples, index)
            for index in range(repetitions)
        ]
    )
    found = []
    for place, method in enumerate(METHODS):
        low, high = ends[:, place].T
        below, above = float((high < true).mean()), float((low > true).mean())
        width = float((high - low).mean())
        found.append(Coverage(scenario, prompts, method, 1 - below - above, below, above, width))
    return found


def intervals(values: Values, resamples: int, seed: int) -> list[tuple[float, float]]:
    """By each of ``METHODS``; a point where no two differences differ."""
    mean = float(values.mean())
    means = resampled_means(values, resamples, seed)
    deviation = float(values.std(ddof=1))
    found = Differences(len(values), mean, deviation)
    by_t = t_interval(found, CONFIDENCE) if deviation else (mean, mean)
    bca = bca_interval(values, means, CONFIDENCE)
    return [by_t, percentile_interval(means, CONFIDENCE), bca or (mean, mean)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="a JSON object in place of Markdown")
    options = parser.parse_args()
    rows = [
        row
        for scenario in SCENARIOS
        for prompts in COUNTS
        for row in coverage(scenario, prompts, options.repetitions, options.resamples)
    ]
    if options.json:
        found = {"machine": machine(), **vars(options), "rows": [*map(asdict, rows)]}
        print(json.dumps(found, indent=2))
        return
    print(f"{options.repetitions} repetitions, {options.resamples} resamples\n")
    print("| scores | prompts | method | hold the truth | below it | above it | width |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shares = f"{row.held:.1%} | {row.below:.1%} | {row.above:.1%}"
        print(f"| {row.scenario} | {row.prompts} | {row.method} | {shares} | {row.width:.3f} |")


if __name__ == "__main__":
    main()
