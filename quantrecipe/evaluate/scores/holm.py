"""Many tests, one risk of a false finding among them."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted by Holm's method (Holm 1979, Scand. J. Statist. 6, 65).

    The smallest is multiplied by the number of tests, the next by one less, and so on; none ends up
    below a smaller one, and none above 1. Showing what is then below ``alpha`` shows anything
    false with a probability of ``alpha`` at most, however the tests depend on each other.

    Args:
        p_values: one a test.

    Returns:
        The adjusted ones, in the same order.
    """
    adjusted = [0.0] * len(p_values)
    most = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        most = max(most, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, most)
    return adjusted
