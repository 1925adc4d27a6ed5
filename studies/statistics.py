"""The arithmetic of a comparison of optimizers: the rule, intervals, paired tests, power, and loss against horizon. Pure functions of numbers.

A loss is the end loss of one run. n: runs (seeds) of an entry at one horizon. K: horizons of an entry. σ: standard deviation of a loss from one seed to the next.
The rule: an entry has reached a target at a horizon if (target − mean of n losses) · √n ≥ threshold, as the optimization track of the NanoGPT speedrun
judges (KellerJordan/modded-nanogpt). A threshold of z_{1−level} · σ makes it the one-sided z test at that level of "the mean is not below the target"; σ that is
estimated takes Student's quantile instead of z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .intervals import LEVEL, Interval, student

Array = NDArray[np.float64]
RULE_LEVEL = 0.01  # one-sided: of an entry that only just does not reach the target, one study in 100 says it does
DRAWS = 4000
POWER = 0.8  # chance of finding an effect that a study is planned for (J. Cohen, Statistical Power Analysis, 1988)
NEAR, LEAST = (
    math.log(2.5),
    3,
)  # horizons that a crossing is fitted to: those within this factor of it, and no fewer than so many
BEYOND = math.log(
    2
)  # a crossing further than this factor outside the horizons it was fitted to has no bound


# ---- noise and the rule


@dataclass(frozen=True)
class Noise:
    """sigma: of one loss. df: degrees of freedom of its estimate, None where it was given. share: of its variance, what a seed does to all horizons of an entry alike."""

    sigma: float
    df: int | None = None
    share: float = 0.0


def pooled(groups: Sequence[Array]) -> Noise | None:
    """σ within groups of losses (n,), each group independent of the others. Groups with a run that diverged are left out; None without two losses in one."""
    kept = [g for g in groups if np.isfinite(g).all() and len(g) > 1]
    df = sum(len(g) - 1 for g in kept)
    return (
        Noise(math.sqrt(sum(float(((g - g.mean()) ** 2).sum()) for g in kept) / df), df)
        if df
        else None
    )


def share_of_seeds(entries: Sequence[Array]) -> float:
    """The intraclass correlation: of the variance of a loss, the part that a seed does alike to all horizons of an entry. Two-way analysis of variance of losses (K, n), pooled over entries.

    With K horizons the variance of a seed's mean is seed² + residual²/K. 1 where nothing tells them apart, which is the cautious end: horizons then say the same thing.
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
    """(target − mean) · √n ≥ threshold. target_n: runs whose mean the target is, None of a number that was there before the study."""

    target: float
    threshold: float
    target_n: int | None = None

    def statistic(self, mean: float, n: int) -> float:
        return (self.target - mean) * math.sqrt(n)

    def passes(self, mean: float, n: int) -> bool:
        return self.statistic(mean, n) >= self.threshold

    def needed(self, n: int) -> float:
        """The mean that just passes."""
        return self.target - self.threshold / math.sqrt(n)


def threshold(
    noise: Noise, n: int, *, level: float = RULE_LEVEL, target_n: int | None = None
) -> float:
    """At which the rule's false positives are `level`. A target that is itself a mean of target_n runs has their noise too: √(1 + n/target_n) times as much."""
    quantile = stats.norm.isf(level) if noise.df is None else stats.t.isf(level, noise.df)
    return float(quantile) * noise.sigma * math.sqrt(1 + n / target_n if target_n else 1)


# ---- intervals and tests


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval by Student's t; unbounded for one value, and infinite with one that is."""
    if not np.isfinite(values).all():
        return Interval(math.inf, math.inf, math.inf)
    return student(values)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[Interval, float]:
    """b − a, seed by seed: (its mean with a 95 % interval, the two-sided p of Student's paired t test). p is NaN for one seed, and where a run diverged."""
    x = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Interval(-math.inf, math.nan, math.inf), math.nan
    found = student(x.tolist())
    if len(x) < 2:
        return found, math.nan
    if not np.ptp(x):
        return found, 0.0 if x[0] else 1.0
    return found, float(np.asarray(stats.ttest_1samp(x, 0.0))[1])


def draws_of_mean(values: Sequence[float], *, seed: int) -> Array | None:
    """What the mean of which these are independent values may be: their mean with Student's noise. None for one value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None
    return x.mean() + x.std(ddof=1) / math.sqrt(len(x)) * np.random.default_rng(
        [seed, 3]
    ).standard_t(len(x) - 1, DRAWS)


def quotient(b: Array, a: Array, log: Array | float = 0.0) -> Array:
    """b/a · e^log of draws (m,): 0, ∞ or NaN where it is that, without a warning. Two seeds alone leave Student's draws that overflow e^log."""
    with np.errstate(all="ignore"):
        return b / a * np.exp(log)


# ---- power


def power_of_rule(effect: float, n: int, noise: Noise, *, level: float = RULE_LEVEL) -> float:
    """Chance that the rule passes an entry whose true mean is `effect` under the target, from n seeds."""
    shift = effect * math.sqrt(n) / noise.sigma
    if noise.df is None:
        return float(stats.norm.sf(stats.norm.isf(level) - shift))
    return float(stats.nct.sf(stats.t.isf(level, noise.df), noise.df, shift))


def power_of_pairs(effect: float, n: int, deviation: float) -> float:
    """Chance that the paired test of n seeds finds a difference, at the level of 5 %. deviation: of one seed's difference; σ · √2 of two entries that share nothing but the seed's number."""
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
    """(of the rule, of the paired test): the fewest seeds with a chance of POWER of finding the effect; None if over `most`.

    entries: whose seeds estimate σ, where it is not given. level: of the rule. from_entry: its target is the mean of as many runs, so that threshold and noise are √2 times as large.
    """
    seen_by_rule = effect / math.sqrt(2) if from_entry else effect

    def at(n: int) -> tuple[float, float]:
        seen = Noise(noise.sigma, entries * (n - 1)) if noise.df is not None else noise
        return (
            0.0 if seen.df == 0 else power_of_rule(seen_by_rule, n, seen, level=level)
        ), power_of_pairs(effect, n, noise.sigma * math.sqrt(2))

    found: list[int | None] = [None, None]
    for n in range(1, most + 1):
        found = [f or (n if p >= POWER else None) for f, p in zip(found, at(n), strict=True)]
        if None not in found:
            break
    return found[0], found[1]


# ---- loss against horizon


def bracket(
    steps: Sequence[int], means: Sequence[float], level: float
) -> tuple[int | None, int | None]:
    """(the longest horizon below it that is above the level, the shortest that is at or under it); None where there is none. means: infinite of runs that diverged."""
    reached = min((s for s, y in zip(steps, means, strict=True) if y <= level), default=None)
    above = max(
        (
            s
            for s, y in zip(steps, means, strict=True)
            if y > level and (reached is None or s < reached)
        ),
        default=None,
    )
    return above, reached


def crossing(x: Array, y: Array, level: Array | float, near: float) -> Array:
    """ln horizon (…) at which loss falls to `level` (…): where the least-squares parabola in ln horizon crosses it downwards, or the line through two points.

    x: (K,) ln horizons. y: (…, K) losses. near: a rough crossing; horizons within a factor of 2.5 of it are fitted (a power law of loss is a parabola there), 3 at least.
    ∓∞ where the crossing is more than a factor of 2 outside of them, or nowhere.
    """
    far = np.abs(x - near)
    used = far <= max(NEAR, np.sort(far)[min(LEAST, len(x)) - 1])
    at = x[used] - near
    degree = min(2, int(used.sum()) - 1)
    fit = np.linalg.pinv(np.vander(at, degree + 1, increasing=True))
    c, b, *rest = np.moveaxis(y[..., used] @ fit.T, -1, 0)
    a = rest[0] if rest else np.zeros_like(b)
    c = c - level
    inside = b**2 - 4 * a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        d = (
            2 * c / (np.sqrt(np.maximum(inside, 0)) - b)
        )  # of the two roots the one at which the parabola falls
    nowhere = np.where(c > 0, np.inf, -np.inf)
    d = np.where((inside < 0) | np.isnan(d), nowhere, d)
    d = np.where(d > at.max() + BEYOND, np.inf, np.where(d < at.min() - BEYOND, -np.inf, d))
    return near + d


@dataclass(frozen=True)
class Horizon:
    """Steps at which the loss falls to what is needed: the estimate, and draws of it by the losses' noise (none where that is unknown)."""

    steps: float
    draws: Array | None

    def interval(self) -> Interval:
        """95 %, by the draws; unbounded on a side on which 2.5 % of them have no crossing, and without draws."""
        if self.draws is None:
            return Interval(-math.inf, self.steps, math.inf)
        return bounds(self.steps, self.draws)


def bounds(value: float, draws: Array) -> Interval:
    """An estimate of something positive, with the interval that holds 95 % of its draws; ∓∞ for a side without bound. NaN: a draw that tells nothing."""
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
    """Where an entry's mean loss falls to what the rule needs, interpolated; None without one horizon above that and a longer one at or under it.

    Draws: the horizons' losses with noise (σ drawn too where it was estimated, by its scaled inverse χ²), a seed's share of it alike at all horizons, and the target with its own where
    it is a mean of runs. The threshold stays as it was used. seed: of the entry's draws; those of σ and the target are alike for all entries.
    """
    level = rule.needed(n)
    above, reached = bracket(steps, means, level)
    if above is None or reached is None:
        return None
    there = {k: y for k, y in zip(steps, means, strict=True) if math.isfinite(y)}
    if len(there) < 2:
        return None
    x, y = np.log(np.array(list(there), dtype=np.float64)), np.array(list(there.values()))
    near = math.log(reached)
    if above in there:
        near += (
            math.log(above / reached) * (level - there[reached]) / (there[above] - there[reached])
        )
    found = float(np.clip(crossing(x, y, level, near), math.log(above), math.log(reached)))
    if noise is None:
        return Horizon(math.exp(found), None)
    rng, common = np.random.default_rng([seed, 1]), np.random.default_rng([0, 2])
    scale = noise.sigma * np.sqrt(
        np.ones(DRAWS) if noise.df is None else noise.df / common.chisquare(noise.df, DRAWS)
    )
    seeds, own = rng.standard_normal((DRAWS, 1)), rng.standard_normal((DRAWS, len(x)))
    drawn = y + scale[:, None] / math.sqrt(n) * (
        math.sqrt(noise.share) * seeds + math.sqrt(1 - noise.share) * own
    )
    target = (
        scale * common.standard_normal(DRAWS) / math.sqrt(rule.target_n) if rule.target_n else 0.0
    )
    return Horizon(math.exp(found), np.exp(crossing(x, drawn, level + target, near)))
