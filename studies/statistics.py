"""The arithmetic of a comparison of optimizers. Pure functions of numbers.

The rule, intervals, paired tests, power, and loss against horizon. A loss is the end loss of one
run. n: runs (seeds) of an entry at one horizon. K: horizons of an entry. σ: standard deviation of
a loss from one seed to the next.

The rule: an entry has reached a target at a horizon if (target − mean of n losses) · √n ≥
threshold, as the optimization track of the NanoGPT speedrun judges (KellerJordan/modded-nanogpt).
A threshold of z_{1−level} · σ makes it the one-sided z test at that level of "the mean is not
below the target". With an estimated σ, Student's quantile takes the place of z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .intervals import LEVEL, Interval, student

Array = NDArray[np.float64]
# One-sided: of entries that only just do not reach the target, one in 100 is said to reach it.
RULE_LEVEL = 0.01
DRAWS = 4000
# Chance of finding an effect, for which a study is planned (J. Cohen, Statistical Power
# Analysis, 1988).
POWER = 0.8
# A crossing is fitted to the horizons within this factor of it, and to no fewer than so many.
NEAR, LEAST = math.log(2.5), 3
# A crossing has no bound if it is further than this factor outside the fitted horizons.
BEYOND = math.log(2)


# ---- noise and the rule


@dataclass(frozen=True)
class Noise:
    """The noise of a loss from one seed to the next."""

    sigma: float
    """Standard deviation of one loss."""
    df: int | None = None
    """Degrees of freedom of its estimate; None for a given σ."""
    share: float = 0.0
    """Part of its variance that a seed has in common at all horizons of an entry."""


def pooled(groups: Sequence[Array]) -> Noise | None:
    """Estimate σ within groups of losses (n,), each independent of the others.

    Groups with a run that diverged are left out. None if no group has two losses.
    """
    kept = [g for g in groups if np.isfinite(g).all() and len(g) > 1]
    df = sum(len(g) - 1 for g in kept)
    if not df:
        return None
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in kept)
    return Noise(math.sqrt(squares / df), df)


def share_of_seeds(entries: Sequence[Array]) -> float:
    """Estimate the part of a loss's variance that a seed has in common at all horizons.

    This is the intraclass correlation, by two-way analysis of variance of losses (K, n), pooled
    over entries. With K horizons the variance of a seed's mean is seed² + residual²/K. It is 1
    where nothing tells the two apart, which is cautious: all horizons then say the same thing.
    """
    kept = [y for y in entries if np.isfinite(y).all() and min(y.shape) > 1]
    if not kept:
        return 1.0
    squares = [
        float(((y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()) ** 2).sum()) for y in kept
    ]
    residual = sum(squares) / sum((y.shape[0] - 1) * (y.shape[1] - 1) for y in kept)
    seed = float(np.mean([y.mean(0).var(ddof=1) - residual / len(y) for y in kept]))
    return max(0.0, seed) / (max(0.0, seed) + residual) if residual else 1.0


@dataclass(frozen=True)
class Rule:
    """The rule (target − mean) · √n ≥ threshold."""

    target: float
    threshold: float
    target_n: int | None = None
    """Runs whose mean the target is; None for a number that was fixed before the study."""

    def statistic(self, mean: float, n: int) -> float:
        """Return (target − mean) · √n."""
        return (self.target - mean) * math.sqrt(n)

    def passes(self, mean: float, n: int) -> bool:
        """Return whether n runs with this mean have reached the target."""
        return self.statistic(mean, n) >= self.threshold

    def needed(self, n: int) -> float:
        """Return the mean that just passes."""
        return self.target - self.threshold / math.sqrt(n)


def threshold_at(
    noise: Noise, n: int, *, level: float = RULE_LEVEL, target_n: int | None = None
) -> float:
    """Return the threshold at which the rule's false positives are `level`.

    A target that is itself a mean of target_n runs has their noise too: the threshold is then
    √(1 + n/target_n) times as large.
    """
    quantile = stats.norm.isf(level) if noise.df is None else stats.t.isf(level, noise.df)
    return float(quantile) * noise.sigma * math.sqrt(1 + n / target_n if target_n else 1)


# ---- intervals and tests


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean with its 95 % interval by Student's t.

    One value has no bounds. With an infinite value all three are infinite.
    """
    if not np.isfinite(values).all():
        return Interval(math.inf, math.inf, math.inf)
    return student(values)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[Interval, float]:
    """Compare b with a, seed by seed.

    Returns the mean of b − a with its 95 % interval, and the two-sided p of Student's paired t
    test. p is NaN for one seed, and where a run diverged.
    """
    x = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Interval(-math.inf, math.nan, math.inf), math.nan
    difference = student(x.tolist())
    if len(x) < 2:
        return difference, math.nan
    if not np.ptp(x):
        return difference, 0.0 if x[0] else 1.0
    return difference, float(np.asarray(stats.ttest_1samp(x, 0.0))[1])


def draws_of_mean(values: Sequence[float], *, seed: int) -> Array | None:
    """Draw the mean of independent values with Student's noise; None for one value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None
    student_draws = np.random.default_rng([seed, 3]).standard_t(len(x) - 1, DRAWS)
    return x.mean() + x.std(ddof=1) / math.sqrt(len(x)) * student_draws


def draws_of_means(values: Array, *, seed: int) -> Array | None:
    """Draw the means (…) of values (n, …) with Student's noise; None for one row.

    Returns (DRAWS, …). Each draw weighs the rows' deviations at random, the same for all that is in
    a row, so that whatever is paired by row stays so. A draw of one mean is Student's t.
    """
    n = len(values)
    if n < 2:
        return None
    rng = np.random.default_rng([seed, 4])
    normal, chi2 = rng.standard_normal((DRAWS, n)), rng.chisquare(n - 1, (DRAWS, 1))
    weights = normal / np.sqrt(n * chi2)
    return values.mean(0) + np.tensordot(weights, values - values.mean(0), 1)


def quotient(b: Array, a: Array, log: Array | float = 0.0) -> Array:
    """Return b/a · e^log of draws (m,), without a warning where that is 0, ∞ or NaN.

    With two seeds alone, Student's draws may overflow e^log.
    """
    with np.errstate(all="ignore"):
        return b / a * np.exp(log)


# ---- power


def power_of_rule(effect: float, n: int, noise: Noise, *, level: float = RULE_LEVEL) -> float:
    """Return the chance that the rule passes an entry that is `effect` below the target.

    effect: of the entry's true mean, in nats. n: seeds. With an estimated σ of no degrees of
    freedom there is no rule, and no chance.
    """
    if noise.df == 0:
        return 0.0
    shift = effect * math.sqrt(n) / noise.sigma
    if noise.df is None:
        return float(stats.norm.sf(stats.norm.isf(level) - shift))
    return float(stats.nct.sf(stats.t.isf(level, noise.df), noise.df, shift))


def power_of_pairs(effect: float, n: int, deviation: float) -> float:
    """Return the chance that the paired test of n seeds finds a difference, at level 5 %.

    deviation: of one seed's difference. It is σ · √2 for two entries whose losses at a seed are
    independent.
    """
    if n < 2:
        return 0.0
    shift, bound = effect * math.sqrt(n) / deviation, stats.t.isf((1 - LEVEL) / 2, n - 1)
    return float(stats.nct.sf(bound, n - 1, shift) + stats.nct.cdf(-bound, n - 1, shift))


def seeds_for(
    effect: float,
    noise: Noise,
    *,
    entries: int = 2,
    most: int = 1000,
    level: float = RULE_LEVEL,
    from_entry: bool = False,
) -> tuple[int | None, int | None]:
    """Return the fewest seeds that find an effect with a chance of POWER; None if over `most`.

    The first number is for the rule, the second for the paired test.
    entries: whose seeds estimate σ, if it is not given. level: of the rule. from_entry: the target
    is the mean of as many runs, so that threshold and noise are √2 times as large.
    """

    def rule(n: int) -> float:
        df = None if noise.df is None else entries * (n - 1)
        seen = effect / math.sqrt(2) if from_entry else effect
        return power_of_rule(seen, n, Noise(noise.sigma, df), level=level)

    def pairs(n: int) -> float:
        return power_of_pairs(effect, n, noise.sigma * math.sqrt(2))

    return _fewest(rule, most), _fewest(pairs, most)


def _fewest(power: Callable[[int], float], most: int) -> int | None:
    """Return the smallest n up to `most` whose power is POWER or more."""
    return next((n for n in range(1, most + 1) if power(n) >= POWER), None)


# ---- loss against horizon


def bracket(
    steps: Sequence[int], means: Sequence[float], level: float
) -> tuple[int | None, int | None]:
    """Return the horizons around the shortest one that is at or under the level.

    The first is the longest horizon below it whose mean is above the level, the second is that
    shortest horizon itself; None where there is none. means: infinite of runs that diverged.
    """
    curve = list(zip(steps, means, strict=True))
    reached = min((s for s, y in curve if y <= level), default=None)
    shorter = (s for s, y in curve if y > level and (reached is None or s < reached))
    return max(shorter, default=None), reached


def crossing(x: Array, y: Array, level: Array | float, near: float) -> Array:
    """Return the ln horizon (…) at which loss falls to `level` (…).

    It is where the least-squares parabola in ln horizon crosses the level downwards, or the line
    through two points. x: (K,) ln horizons. y: (…, K) losses. near: a rough crossing; horizons
    within a factor of 2.5 of it are fitted (a power law of loss is a parabola there), 3 at least.
    ∓∞ where the crossing is more than a factor of 2 outside of them, or nowhere.
    """
    far = np.abs(x - near)
    fitted = far <= max(NEAR, np.sort(far)[min(LEAST, len(x)) - 1])
    at = x[fitted] - near
    degree = min(2, int(fitted.sum()) - 1)
    fit = np.linalg.pinv(np.vander(at, degree + 1, increasing=True))
    c, b, *rest = np.moveaxis(y[..., fitted] @ fit.T, -1, 0)
    a = rest[0] if rest else np.zeros_like(b)
    c = c - level
    inside = b**2 - 4 * a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        # The root at which the parabola falls.
        d = 2 * c / (np.sqrt(np.maximum(inside, 0)) - b)
    nowhere = np.where(c > 0, np.inf, -np.inf)
    d = np.where((inside < 0) | np.isnan(d), nowhere, d)
    d = np.where(d > at.max() + BEYOND, np.inf, np.where(d < at.min() - BEYOND, -np.inf, d))
    return near + d


@dataclass(frozen=True)
class Horizon:
    """The steps at which the loss falls to what the rule needs."""

    steps: float
    draws: Array | None
    """Draws of the steps by the losses' noise; None where that is unknown."""

    def interval(self) -> Interval:
        """Return the steps with their 95 % interval.

        A side on which 2.5 % of the draws have no crossing has no bound; without draws none has.
        """
        if self.draws is None:
            return Interval(-math.inf, self.steps, math.inf)
        return bounds(self.steps, self.draws)


def bounds(value: float, draws: Array) -> Interval:
    """Return a positive estimate with the interval that holds 95 % of its draws.

    A side without a bound is ∓∞. A draw of NaN says nothing, and may be anywhere.
    """
    low = float(
        np.quantile(np.nan_to_num(draws, nan=0.0, posinf=np.inf), (1 - LEVEL) / 2, method="lower")
    )
    high = float(
        np.quantile(
            np.nan_to_num(draws, nan=np.inf, posinf=np.inf), (1 + LEVEL) / 2, method="higher"
        )
    )
    return Interval(min(value, low) if low > 0 else -math.inf, value, max(value, high))


def horizon(
    steps: Sequence[int],
    means: Sequence[float],
    n: int,
    rule: Rule,
    noise: Noise | None,
    *,
    seed: int = 0,
) -> Horizon | None:
    """Interpolate where an entry's mean loss falls to what the rule needs.

    None without one horizon above that and a longer one at or under it.

    Each draw has noise on the loss at every horizon, a seed's share of it alike at all of them, and
    on a target that is a mean of runs. An estimated σ is drawn too, by its scaled inverse χ². The
    threshold stays as it was used. seed: of the entry's draws; those of σ and of the target are the
    same for all entries.
    """
    level = rule.needed(n)
    above, reached = bracket(steps, means, level)
    if above is None or reached is None:
        return None
    finite = {k: y for k, y in zip(steps, means, strict=True) if math.isfinite(y)}
    if len(finite) < 2:
        return None
    x, y = np.log(np.array(list(finite), dtype=np.float64)), np.array(list(finite.values()))
    near = math.log(reached)
    if above in finite:
        fall = finite[above] - finite[reached]
        near += math.log(above / reached) * (level - finite[reached]) / fall
    estimate = float(np.clip(crossing(x, y, level, near), math.log(above), math.log(reached)))
    if noise is None:
        return Horizon(math.exp(estimate), None)
    rng, common = np.random.default_rng([seed, 1]), np.random.default_rng([0, 2])
    sigma = noise.sigma * np.sqrt(
        np.ones(DRAWS) if noise.df is None else noise.df / common.chisquare(noise.df, DRAWS)
    )
    seeds, own = rng.standard_normal((DRAWS, 1)), rng.standard_normal((DRAWS, len(x)))
    deviations = math.sqrt(noise.share) * seeds + math.sqrt(1 - noise.share) * own
    drawn = y + sigma[:, None] / math.sqrt(n) * deviations
    shift = (
        sigma * common.standard_normal(DRAWS) / math.sqrt(rule.target_n) if rule.target_n else 0.0
    )
    return Horizon(math.exp(estimate), np.exp(crossing(x, drawn, level + shift, near)))
