"""Loss against horizon as a power law, and what an entry saves by it. Pure functions of numbers.

A power law in steps is exact for losses that fall as floor + scale · steps^−b, as language models'
do. Horizons a factor of 4 apart need it: through three of them a parabola may rise again, and
monotone cubics are off by up to a tenth where a steep law is halfway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from .intervals import Interval
from .statistics import Array, bounds, draws_of_means

HORIZONS = 3  # which a power law goes through
# Exponents of a power law of loss are within ± STEEPEST: J. Hoffmann et al. measured 0.28 in
# tokens (arXiv 2203.15556, Appendix D.3).
STEEPEST, HALVINGS = 20.0, 60


def crossing(x: Array, y: Array, level: Array | float) -> Array:
    """Return the ln horizon (…) at which the power law through three losses has the level (…).

    x: (3,) ln horizons. y: (…, 3) losses. The law is floor + scale · horizon^−b. It is monotone,
    and goes through all three. It is continued on both sides of them. ∓∞ of a level that it does
    not have. NaN of losses that do not fall, or are infinite.
    """
    first, last = x[1] - x[0], x[2] - x[0]
    falls = y[..., :2] - y[..., 1:]
    with np.errstate(all="ignore"):
        b = _exponent(first, last, falls[..., 1] / falls[..., 0])
        # (1 − e^{−bu}) / b of the distance u to the first horizon, by which the loss falls.
        fall = (y[..., 0] - level) / falls[..., 0] * first * special.exprel(-b * first)
        distance = np.where(b * fall < 1, -np.log1p(-b * fall) / b, np.copysign(np.inf, fall))
    return np.where(((falls > 0) & (falls < np.inf)).all(-1), x[0] + distance, np.nan)


def _exponent(first: float, last: float, ratio: Array) -> Array:
    """Return the b at which (e^{−b·first} − e^{−b·last}) / (1 − e^{−b·first}) is this ratio.

    It falls as b grows. The bounds of the bisection are not symmetric, so that no b is exactly 0.
    """
    low, high = np.full_like(ratio, -STEEPEST), np.full_like(ratio, 1.01 * STEEPEST)
    for _ in range(HALVINGS):
        b = (low + high) / 2
        at_b = np.exp(-b * first) * np.expm1(-b * (last - first)) / np.expm1(-b * first)
        low, high = np.where(at_b > ratio, b, low), np.where(at_b > ratio, high, b)
    return (low + high) / 2


@dataclass(frozen=True)
class Ratios:
    """Steps and training seconds of an entry to the reference's loss, over the reference's."""

    steps: Interval
    seconds: Interval
    """That of steps times the ratio of seconds a step."""
    extrapolated: bool
    """That loss lies outside of the entry's own losses."""


def ratios(
    horizons: Sequence[int], losses: Array, reference: Array, log_seconds: Array, steps: int
) -> Ratios | None:
    """Return the ratios at the horizon `steps`, with intervals by draws of all means at once.

    None if a run diverged, or if the power law reaches the loss at no number of steps. horizons: K
    of them, ascending. losses: (n, K) of the entry. reference: losses (n,) at this horizon.
    log_seconds: (n,) logarithms of the ratio of seconds a step.
    """
    level, means = reference.mean(), losses.mean(0)
    if not math.isfinite(level):
        return None
    middle = int(np.clip(np.abs(means - level).argmin(), 1, len(means) - 2))
    fitted = slice(middle - 1, middle + 2)
    x = np.log(horizons[fitted])
    measured = np.column_stack([losses[:, fitted], reference, log_seconds])

    def quotients(mean: Array) -> Array:
        """Return the ratios (…, 2) by means (…, 5) of what was measured."""
        log_steps = crossing(x, mean[..., :3], mean[..., 3]) - math.log(steps)
        with np.errstate(over="ignore"):
            return np.exp(np.stack([log_steps, log_steps + mean[..., 4]], -1))

    in_steps, in_seconds = quotients(measured.mean(0)).tolist()
    if not 0 < in_steps < math.inf:
        return None
    drawn = draws_of_means(measured, seed=steps)
    draws = np.full((1, 2), np.nan) if drawn is None else quotients(drawn)
    return Ratios(
        steps=bounds(in_steps, draws[:, 0]),
        seconds=bounds(in_seconds, draws[:, 1]),
        extrapolated=not means.min() <= level <= means.max(),
    )
