"""Does the best learning rate move with size? Statistics of losses over sizes, rates and seeds.

Losses are (sizes S, learning rates K, seeds N); learning rates are taken as log₂, in octaves.

The model: loss[s, k, n] = mean[s, k] + order[n] + seed effect[s, n] + residual[s, k, n]. All runs
of a seed share its data order, and those of one size its initial weights. So the place of a
minimum, and a difference of losses within one size, carry the residual alone. A difference between
two sizes is taken over the seeds that both have, and carries the seed effect too.

The deviations are pooled over the three lowest learning rates of each size. Intervals are
parametric bootstraps, which draw the deviations too (scaled inverse χ²).

What the learning rates do not show has no bound. A lowest loss beside a run that diverged lies
between its neighbours, and one at an end has nothing beyond it; so in the means as in each draw.

The words follow from the intervals alone. PASS: the intervals of all sizes are inside the
threshold; each has to be, which needs no correction. FAIL: the interval of one size is outside,
widened for the number of sizes (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optim.errors import Refusal

from .intervals import LEVEL, Interval
from .parabola import Array, Minimum, interpolate, minimum

Word = Literal["PASS", "FAIL", "TOO NOISY TO SAY"]
DRAWS = 4000
# Nats above the lowest loss of the same size and seed. A run this far above it counts as diverged:
# no parabola over a few octaves goes there.
FAR = 1.0
# The lowest learning rates of a size, from which its noise is estimated. Where noise grows with
# the rate, that is the noise near the minimum.
NEAR = 3


class VerdictError(Refusal):
    """Losses that allow no verdict: what was got, what is allowed, how to fix it."""


@dataclass(frozen=True)
class Thresholds:
    """How far from a perfect transfer still passes."""

    drift: float = 0.5
    """Octaves between the best learning rates of two sizes."""
    cost: float = 0.005
    """Loss lost at the shared learning rate, relative."""
    worse: float | None = 0.005
    """Loss above that of the size before, at the shared learning rate, relative. With 0, equal
    sizes could not pass. None: larger sizes need not be as good, and no word says so."""


@dataclass(frozen=True)
class Noise:
    """The deviations of one run's loss, and their degrees of freedom."""

    residual: float
    """Deviation within a size."""
    seed: float
    """Deviation of all learning rates of a size together, beside what all sizes share."""
    df: int
    seed_df: int


@dataclass
class Verdict:
    """The verdict over one axis of sizes. "Shared" is the smallest size's best learning rate."""

    sizes: list[int]
    lrs: list[float]
    seeds: int
    noise: Noise | None
    best: list[Interval]
    """The best learning rate of each size."""
    loss: list[float]
    """The lowest loss of each size, interpolated."""
    bracketed: list[bool]
    """True for each size whose minimum lies inside its learning rates."""
    drift: list[Interval]
    """Octaves from the shared learning rate to the best one, at each size but the first."""
    cost: list[Interval]
    """Loss lost at the shared learning rate, relative, at each size but the first."""
    worse: list[Interval]
    """Loss of each size but the first above that of the size before, both at the shared learning
    rate, relative."""
    words: dict[str, Word] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def word(self) -> Word:
        """Return FAIL if anything failed, PASS if all passed."""
        words = set(self.words.values())
        return "FAIL" if "FAIL" in words else "PASS" if words == {"PASS"} else "TOO NOISY TO SAY"

    def json(self) -> dict[str, Any]:
        """Return the verdict as results.json holds it."""
        return {**asdict(self), "word": self.word}


def judge(
    losses: Array,
    sizes: list[int],
    lrs: list[float],
    thresholds: Thresholds = Thresholds(),
    *,
    seed: int = 0,
) -> Verdict:
    """Return the verdict over losses (S, K, N); sizes and learning rates ascend.

    A loss is inf where a run diverged, and NaN where there is none: a size has the seeds of which
    it has all runs. Raises VerdictError for fewer than 2 sizes or 3 learning rates, and for a size
    without a whole seed or a finite loss.
    """
    _require_a_sweep(losses, sizes, lrs)
    whole = [_whole_seeds(cells, size) for cells, size in zip(losses, sizes, strict=True)]
    estimates = _estimate(whole, np.log2(np.asarray(lrs, dtype=np.float64)), seed)
    best, larger = estimates.best, range(1, len(sizes))
    verdict = Verdict(
        sizes=list(sizes),
        lrs=list(lrs),
        seeds=losses.shape[2],
        noise=estimates.noise,
        best=[estimates.best_rate(s) for s in range(len(sizes))],
        loss=[float(v) for v in best.value],
        bracketed=[bool(b) for b in best.least == best.most],
        drift=[estimates.drift(s) for s in larger],
        cost=[estimates.cost(s) for s in larger],
        worse=[estimates.worse(s) for s in larger],
    )
    verdict.words = _words(verdict, estimates, thresholds)
    verdict.notes = _notes(verdict, losses, [cells.mean(1) for cells, _ in whole])
    return verdict


def _require_a_sweep(losses: Array, sizes: list[int], lrs: list[float]) -> None:
    """Raise VerdictError unless there are sizes and learning rates enough, both ascending."""
    S, K, _ = losses.shape
    if S < 2 or K < 3 or list(lrs) != sorted(set(lrs)) or list(sizes) != sorted(set(sizes)):
        raise VerdictError(
            "a transfer verdict",
            got=f"{S} sizes {sizes}, {K} learning rates {lrs}",
            allowed="2 or more sizes and 3 or more learning rates, ascending",
            fix="--widths or --depths, and --lrs",
        )


def _whole_seeds(losses: Array, size: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return the losses (K, N) of the seeds that have all runs, and which of them diverged.

    A loss is cut at FAR above the lowest of its seed. Those that are cut count as diverged.
    """
    y = losses[:, ~np.isnan(losses).any(0)]
    finite = y[np.isfinite(y)]
    if not finite.size:
        got = (
            "no seed with a run at every learning rate"
            if not y.size
            else "no run that did not diverge"
        )
        raise VerdictError(
            f"losses of size {size}",
            got=got,
            allowed="one or more",
            fix="run the rest" if not y.size else "smaller --lrs",
        )
    limit = np.minimum(y.min(0), finite.max()) + FAR
    return np.minimum(y, limit), y >= limit


# ---- estimates


@dataclass(frozen=True)
class _Estimates:
    """The best learning rates and the losses at the shared one, with draws by the losses' noise."""

    noise: Noise | None
    best: Minimum
    """The minimum of each size, (S,)."""
    drawn: Minimum
    """Draws of it: (draws, S)."""
    at_shared: Array
    drawn_at_shared: Array
    """Loss of each size at the shared learning rate: (S,) and (draws, S)."""
    increases: list[tuple[float, Array]]
    """For each size but the first: how much worse it is than the one before, and draws of that."""

    def interval(self, value: float, low: Array, high: Array, comparisons: int = 1) -> Interval:
        """Return a value with bounds from draws of its lower and its upper bound.

        comparisons: how many intervals have to hold together. Without noise there are no bounds.
        """
        if self.noise is None:
            return Interval(-np.inf, value, np.inf)
        tail = (1 - LEVEL) / 2 / comparisons
        bounds = (
            np.quantile(low, tail, method="lower"),
            np.quantile(high, 1 - tail, method="higher"),
        )
        return Interval(min(float(bounds[0]), value), value, max(float(bounds[1]), value))

    def best_rate(self, s: int) -> Interval:
        """Return the best learning rate of size s."""
        octaves = self.interval(self.best.place[s], self.drawn.least[:, s], self.drawn.most[:, s])
        return Interval(2**octaves.low, 2**octaves.value, 2**octaves.high)

    def drift(self, s: int, comparisons: int = 1) -> Interval:
        """Return the octaves from the shared learning rate to the best one of size s."""
        return self.interval(
            self.best.place[s] - self.best.place[0],
            self.drawn.least[:, s] - self.drawn.most[:, 0],
            self.drawn.most[:, s] - self.drawn.least[:, 0],
            comparisons,
        )

    def worse(self, s: int, comparisons: int = 1) -> Interval:
        """Return how much worse size s is than the one before, at the shared learning rate."""
        value, draws = self.increases[s - 1]
        return self.interval(value, draws, draws, comparisons)

    def cost(self, s: int) -> Interval:
        """Return the loss that size s loses at the shared learning rate.

        Bounds are taken of the cost with a sign: that of the side on which the best learning rate
        lies. An interval of rates on both sides of the shared one then holds a cost of 0.
        """
        best, drawn = self.best, self.drawn
        value = max(0.0, self.at_shared[s] / best.value[s] - 1) * np.sign(
            best.place[s] - best.place[0]
        )
        draws = np.maximum(0, self.drawn_at_shared[:, s] / drawn.value[:, s] - 1) * np.sign(
            drawn.place[:, s] - drawn.place[:, 0]
        )
        known = drawn.least == drawn.most
        both = known[:, s] & known[:, 0]
        # A lowest loss at an end bounds the cost from below.
        low = np.where(both | (known[:, 0] & (draws > 0)), draws, -np.inf)
        high = np.where(both | (known[:, 0] & (draws < 0)), draws, np.inf)
        signed = self.interval(float(value), low, high)
        return Interval(
            max(0.0, signed.low, -signed.high),
            abs(signed.value),
            max(-signed.low, signed.high),
        )


def _estimate(whole: Sequence[tuple[Array, NDArray[np.bool_]]], x: Array, seed: int) -> _Estimates:
    """Estimate all that a verdict is made of, from the whole seeds of each size.

    whole: losses (K, N) of each size, and which of them diverged. x: (K,) log₂ learning rates.
    """
    y = [cells for cells, _ in whole]
    mean = np.stack([cells.mean(1) for cells in y])
    diverged = np.stack([far.any(1) for _, far in whole])
    noise = pooled_noise(y, diverged)
    rng = np.random.default_rng(seed)
    draws = _draws(mean, np.array([cells.shape[1] for cells in y]), noise, rng)
    best, drawn = minimum(x, mean, diverged), minimum(x, draws, diverged)
    shared, drawn_shared = best.place[0], drawn.place[:, 0]
    return _Estimates(
        noise,
        best,
        drawn,
        interpolate(x, mean, np.full(len(y), shared)),
        interpolate(x, draws, np.broadcast_to(drawn_shared[:, None], drawn.place.shape)),
        [
            _increase(x, before, after, shared, drawn_shared, noise, rng)
            for before, after in pairwise(y)
        ],
    )


def pooled_noise(y: Sequence[Array], diverged: NDArray[np.bool_]) -> Noise | None:
    """Estimate the noise from the three lowest learning rates of each size without a divergence.

    y: losses (K, N) of each size. diverged: (S, K). None without such a size of 2 seeds.
    """
    squares, df, between, seed_df = 0.0, 0, 0.0, 0
    last: Array | None = None  # effect of each seed at the size before
    for cells, bad in zip(y, diverged, strict=True):
        cells = cells[~bad]
        if len(cells) < NEAR or cells.shape[1] < 2:
            continue
        cells = cells[np.argsort(cells.mean(1))[:NEAR]]
        by_seed = cells.mean(0) - cells.mean()
        residual = cells - cells.mean(1, keepdims=True) - by_seed
        squares += float((residual**2).sum())
        df += (NEAR - 1) * (len(by_seed) - 1)
        if last is not None:
            common = min(len(last), len(by_seed))
            apart = by_seed[:common] - last[:common]
            between += float(((apart - apart.mean()) ** 2).sum()) / 2
            seed_df += common - 1
        last = by_seed
    if not df or not seed_df:
        return None
    # Half the variance of a difference of two sizes' means is seed² + residual² / NEAR.
    seed_variance = max(0.0, between / seed_df - squares / df / NEAR)
    return Noise((squares / df) ** 0.5, seed_variance**0.5, df, seed_df)


def _drawn_variances(noise: Noise, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw (residual², seed²), (draws,) each."""
    residual = noise.residual**2 * noise.df / rng.chisquare(noise.df, DRAWS)
    between = (
        (noise.seed**2 + noise.residual**2 / NEAR)
        * noise.seed_df
        / rng.chisquare(noise.seed_df, DRAWS)
    )
    return residual, np.maximum(0, between - residual / NEAR)


def _draws(
    mean: Array, counts: NDArray[np.int64], noise: Noise | None, rng: np.random.Generator
) -> Array:
    """Draw the mean losses with what differs within a size: (draws, S, K).

    counts: seeds of each size.
    """
    if noise is None:
        return mean[None]
    residual, _ = _drawn_variances(noise, rng)
    drawn = np.sqrt(residual)[:, None, None] * rng.standard_normal((DRAWS, *mean.shape))
    return mean + drawn / np.sqrt(counts)[:, None]


def _increase(
    x: Array,
    before: Array,
    after: Array,
    shared: float,
    drawn_shared: Array,
    noise: Noise | None,
    rng: np.random.Generator,
) -> tuple[float, Array]:
    """Return how much worse `after` (K, N) is than `before`, relative: (value, draws).

    Both are taken at the shared learning rate, over the seeds that both have.
    """
    common = min(before.shape[1], after.shape[1])
    means = np.stack([before[:, :common].mean(1), after[:, :common].mean(1)])

    def ratio(y: Array, at: Array) -> Array:
        losses = interpolate(x, y, np.broadcast_to(at[..., None], y.shape[:-1]))
        return losses[..., 1] / losses[..., 0] - 1

    value = float(ratio(means, np.asarray(shared)))
    if noise is None:
        return value, np.array([value])
    residual, seed = _drawn_variances(noise, rng)
    drawn = np.sqrt(residual)[:, None, None] * rng.standard_normal((DRAWS, *means.shape))
    drawn += np.sqrt(seed)[:, None, None] * rng.standard_normal((DRAWS, 2, 1))
    return value, ratio(means + drawn / common**0.5, drawn_shared)


# ---- words


def _words(verdict: Verdict, estimates: _Estimates, thresholds: Thresholds) -> dict[str, Word]:
    """Return the word of each part of a verdict."""
    larger = range(1, len(verdict.sizes))
    comparisons = len(larger)
    wide_drift = [estimates.drift(s, comparisons) for s in larger]
    wide_worse = [estimates.worse(s, comparisons) for s in larger]
    t = thresholds
    words: dict[str, Word] = {
        "drift": _word(verdict.drift, wide_drift, -t.drift, t.drift),
        "cost": _word(verdict.cost[-1:], verdict.cost[-1:], -np.inf, t.cost),
    }
    if t.worse is not None:
        word = _word(verdict.worse, wide_worse, -np.inf, t.worse)
        unknown = word == "PASS" and not verdict.bracketed[0]  # the shared rate is nobody's best
        words["worse"] = "TOO NOISY TO SAY" if unknown else word
    return words


def _word(intervals: list[Interval], wide: list[Interval], low: float, high: float) -> Word:
    """Return PASS if all intervals are inside low and high, FAIL if a wide one is outside."""
    if any(i.low > high or i.high < low for i in wide):
        return "FAIL"
    return "PASS" if all(low <= i.low and i.high <= high for i in intervals) else "TOO NOISY TO SAY"


def _notes(verdict: Verdict, losses: Array, means: Sequence[Array]) -> list[str]:
    """Return what a reader of the verdict has to know beside its numbers.

    means: (K,) losses of each size, over its whole seeds.
    """
    notes, lrs = [], verdict.lrs
    for size, mean, shows_minimum in zip(verdict.sizes, means, verdict.bracketed, strict=True):
        if not shows_minimum:
            low = int(mean.argmin())
            where = (
                "at the end of the learning rates"
                if low in (0, len(lrs) - 1)
                else f"beside a run that diverged or was {FAR:g} nat worse"
            )
            notes.append(f"size {size}: the lowest loss is {where}, {lrs[low]:g}")
    if verdict.noise is None:
        notes.append(
            f"noise is unknown: it takes 2 seeds, and {NEAR} learning rates without a divergence"
        )
    if np.any(np.isinf(losses)):
        runs = int((~np.isnan(losses)).sum())
        notes.append(f"{int(np.isinf(losses).sum())} of {runs} runs diverged")
    return notes
