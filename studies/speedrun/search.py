"""The search for the shortest horizon at which an entry passes the rule."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import statistics
from ..statistics import Rule

# Fractions of the budget: few enough to pay for, close enough for a parabola
# (tests/test_statistics.py).
FRACTIONS = (0.4, 0.6, 0.8)
GRID = 80  # points of the budget that a horizon is rounded up to: 5 steps of 400
SHORTER = 0.6  # while the shortest horizon passes, the next is this much of it
TRIES = 3  # horizons that are run to confirm the interpolated one

# A generator that yields the horizons to run next, and is sent {horizon: mean end loss of n seeds}.
Horizons = Generator[list[int], Any, None]


@dataclass(frozen=True)
class SearchSettings:
    """The options of a search."""

    fractions: Sequence[float] = FRACTIONS
    """Fractions of the budget, run where the budget passes."""
    grid: int | None = None
    """Steps that a horizon is a multiple of; the budget divided by GRID if None."""
    longest: float = 1.0
    """Times the budget, run where the budget does not pass; 1 for none."""
    tries: int = TRIES
    """Horizons that are run to confirm the interpolated one."""


def search_horizons(
    budget: int, mean: float, n: int, rule: Rule, settings: SearchSettings
) -> Horizons:
    """Yield the horizons that are run for one entry, round by round.

    mean: of n losses at the budget.

    1. Where the budget passes the rule: `fractions` of it. Where it does not: √longest and longest
       times it; the search ends if those do not pass either.
    2. While the shortest horizon passes: one of 0.6 of it. Then a horizon that does not pass lies
       below one that does.
    3. Loss against ln horizon is interpolated (statistics.crossing) to where the mean just passes
       the rule, and the next point of the grid above it is run. If it passes, it is confirmed.
       If not, the interpolation knows one more point, and the next horizon is one point further up
       or more, then two. The search ends after `tries`, or where the next would be the shortest
       horizon that has passed.

    The next round depends on the losses alone: a study that was killed repeats the search over the
    runs that are done, and continues. Each horizon is a test of its own at the rule's level. The
    threshold is fixed before the first of them.
    """
    grid = settings.grid or max(1, budget // GRID)
    means = {budget: mean}
    level = rule.needed(n)
    if rule.passes(mean, n):
        yield from _run([f * budget for f in settings.fractions], means, grid)
    elif settings.longest > 1:
        longer = [budget * settings.longest**0.5, budget * settings.longest]
        yield from _run(longer, means, grid)
    yield from _shorten(means, level, grid)
    yield from _confirm(means, n, rule, grid, settings.tries)


def _run(horizons: Sequence[float], means: dict[int, float], grid: int) -> Horizons:
    """Yield those of the horizons that are new, on the grid, and add their means."""
    new = sorted({max(1, round(h / grid) * grid) for h in horizons} - means.keys())
    if new:
        means.update((yield new))


def _bracket(means: dict[int, float], level: float) -> tuple[int | None, int | None]:
    """Return (the longest horizon below it that does not pass, the shortest that passes)."""
    return statistics.bracket(list(means), list(means.values()), level)


def _shorten(means: dict[int, float], level: float, grid: int) -> Horizons:
    """Run shorter horizons until one does not pass."""
    above, reached = _bracket(means, level)
    while reached and not above and reached > grid:
        yield from _run([min(SHORTER * reached, reached - grid)], means, grid)
        above, reached = _bracket(means, level)


def _confirm(means: dict[int, float], n: int, rule: Rule, grid: int, tries: int) -> Horizons:
    """Run horizons at and above the interpolated one, until one passes."""
    for failed in range(tries):
        above, reached = _bracket(means, rule.needed(n))
        if not above or not reached:
            return
        finite = {h: y for h, y in sorted(means.items()) if math.isfinite(y)}
        crossing = statistics.horizon(list(finite), list(finite.values()), n, rule, None)
        lowest = (above // grid + max(1, failed)) * grid
        horizon = (
            max(lowest, math.ceil(crossing.steps / grid) * grid)
            if crossing
            else (above + reached) / 2
        )
        if horizon >= reached:
            return
        yield from _run([horizon], means, grid)
        if _bracket(means, rule.needed(n))[1] != reached:
            return
