"""Which modules are fragile under a recipe's schemes, and which to protect."""

from quantrecipe.converter.ranking.choosing import Curve, choose, knee, top, trade_off
from quantrecipe.converter.ranking.climbing import (
    Evaluate,
    Ladder,
    Order,
    Rung,
    default_rungs,
    ladder,
)
from quantrecipe.converter.ranking.protecting import protect
from quantrecipe.converter.ranking.results import (
    Basis,
    Fragility,
    Group,
    Ranking,
    Spikiness,
    WorstBin,
    decibels,
)
from quantrecipe.converter.ranking.scoring import quantized_modules, rank, rank_plan

__all__ = [
    "Basis",
    "Curve",
    "Evaluate",
    "Fragility",
    "Group",
    "Ladder",
    "Order",
    "Ranking",
    "Rung",
    "Spikiness",
    "WorstBin",
    "choose",
    "decibels",
    "default_rungs",
    "knee",
    "ladder",
    "protect",
    "quantized_modules",
    "rank",
    "rank_plan",
    "top",
    "trade_off",
]
