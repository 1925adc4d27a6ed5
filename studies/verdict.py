"""Has the best learning rate moved? Statistics of losses over (sizes S, learning rates K, seeds N), log₂ lr in octaves.

The model: loss[s, k, n] = mean[s, k] + order[n] + seed effect[s, n] + residual[s, k, n]. A seed's data order is shared by all runs, its initial weights by those of one size, so
that the place of a minimum and a difference of losses within one size carry the residual alone; differences between sizes, of the seeds that both have, carry the seed effect too.
The deviations are pooled over the three lowest learning rates of each size; intervals are parametric bootstraps that draw the deviations too (scaled inverse χ²).
What the learning rates do not show has no bound: a lowest loss beside a run that diverged is placed between its neighbours only, and one at an end has
nothing beyond it; so in the means as in each draw. PASS and FAIL follow from the intervals alone: PASS where those of all sizes are inside (each has to be, which needs no
correction), FAIL where that of one is outside, widened for their number (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from optim.errors import Refusal

Array = NDArray[np.float64]
Word = Literal["PASS", "FAIL", "TOO NOISY TO SAY"]
DRAWS = 4000
LEVEL = 0.95
FAR = 1.0  # nats above the lowest loss of its size and seed: as good as diverged, no parabola of octaves goes there
# A parabola is fitted to the five nearest learning rates, none further than so many octaves: with rates an octave apart to three, half an octave apart to five.
POINTS, WINDOW = 5, 1.5
NEAR = 3  # learning rates of a size that tell its noise, the lowest ones: where it grows with the rate, it is that near the minimum


class VerdictError(Refusal):
    """Losses that no verdict can be of: what was got, what is allowed, how to fix it."""


@dataclass(frozen=True)
class Thresholds:
    """drift: octaves. cost: of the loss, relative. worse: likewise, of a larger model than the one before at the shared lr; with 0 equal sizes could not pass."""

    drift: float = 0.5
    cost: float = 0.005
    worse: float = 0.005


@dataclass(frozen=True)
class Interval:
    """An estimate between its bounds."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Noise:
    """Deviations of one run's loss: residual (within a size) and seed (of all its learning rates together, beside what all sizes share), and their degrees of freedom."""

    residual: float
    seed: float
    df: int
    seed_df: int


@dataclass
class Verdict:
    """Of one axis. best: the best lr of each size. drift: octaves from the smallest size's best lr, at each other size. cost: loss lost by the smallest size's
    best lr at each size, relative. worse: loss of each size but the first above that of the one before, both at the smallest's best lr, relative.
    """

    sizes: list[int]
    lrs: list[float]
    seeds: int
    noise: Noise | None
    best: list[Interval]
    loss: list[float]
    bracketed: list[bool]
    drift: list[Interval]
    cost: list[Interval]
    worse: list[Interval]
    words: dict[str, Word] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def word(self) -> Word:
        """FAIL if anything failed, PASS if all passed."""
        found = set(self.words.values())
        return "FAIL" if "FAIL" in found else "PASS" if found == {"PASS"} else "TOO NOISY TO SAY"

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "word": self.word}


def judge(
    losses: Array,
    sizes: list[int],
    lrs: list[float],
    thresholds: Thresholds = Thresholds(),
    *,
    seed: int = 0,
) -> Verdict:
    """losses: (S, K, N), inf where a run diverged, NaN where there is none: a size has the seeds of which it has all runs. sizes, lrs: ascending.

    Raises VerdictError for fewer than 2 sizes or 3 learning rates, and for a size without a whole seed or a finite loss.
    """
    S, K, N = losses.shape
    if S < 2 or K < 3 or list(lrs) != sorted(set(lrs)) or list(sizes) != sorted(set(sizes)):
        raise VerdictError(
            "a transfer verdict",
            got=f"{S} sizes {sizes}, {K} learning rates {lrs}",
            allowed="2 or more sizes and 3 or more learning rates, ascending",
            fix="--widths or --depths, and --lrs",
        )
    x = np.log2(np.asarray(lrs, dtype=np.float64))
    y, far = zip(*(_whole(losses[s], sizes[s]) for s in range(S)), strict=True)  # (K, N) each
    mean, diverged = (
        np.stack([cells.mean(1) for cells in y]),
        np.stack([cells.any(1) for cells in far]),
    )
    noise = pooled_noise(y, diverged)
    rng = np.random.default_rng(seed)
    draws = _draws(mean, np.array([cells.shape[1] for cells in y]), noise, rng)
    best, bottom, least, most = minimum(x, mean, diverged)
    drawn_best, drawn_bottom, drawn_least, drawn_most = minimum(x, draws, diverged)  # (draws, S)
    bracketed, known = least == most, drawn_least == drawn_most
    at_shared = interpolate(x, mean, np.full(S, best[0]))
    drawn_at_shared = interpolate(x, draws, np.broadcast_to(drawn_best[:, :1], drawn_best.shape))
    steps = [
        _step(x, y[s - 1], y[s], best[0], drawn_best[:, 0], noise, rng) for s in range(1, S)
    ]  # worse, by seeds that both have

    def interval(value: float, low: Array, high: Array, comparisons: int = 1) -> Interval:
        if noise is None:
            return Interval(-np.inf, value, np.inf)
        tail = (1 - LEVEL) / 2 / comparisons
        bounds = (
            np.quantile(low, tail, method="lower"),
            np.quantile(high, 1 - tail, method="higher"),
        )
        return Interval(min(float(bounds[0]), value), value, max(float(bounds[1]), value))

    def drift(s: int, comparisons: int) -> Interval:
        return interval(
            best[s] - best[0],
            drawn_least[:, s] - drawn_most[:, 0],
            drawn_most[:, s] - drawn_least[:, 0],
            comparisons,
        )

    def worse(s: int, comparisons: int) -> Interval:
        value, drawn = steps[s - 1]
        return interval(value, drawn, drawn, comparisons)

    def cost(s: int) -> Interval:
        """Of an absolute value: of the cost with the sign of the best lr's side, so that an interval of lrs on both sides of the shared one has 0 in it."""
        value = max(0.0, at_shared[s] / bottom[s] - 1) * np.sign(best[s] - best[0])
        drawn = np.maximum(0, drawn_at_shared[:, s] / drawn_bottom[:, s] - 1) * np.sign(
            drawn_best[:, s] - drawn_best[:, 0]
        )
        both = known[:, s] & known[:, 0]
        low = np.where(
            both | (known[:, 0] & (drawn > 0)), drawn, -np.inf
        )  # a lowest loss at an end bounds the cost from below
        high = np.where(both | (known[:, 0] & (drawn < 0)), drawn, np.inf)
        i = interval(float(value), low, high)
        return Interval(max(0.0, i.low, -i.high), abs(i.value), max(-i.low, i.high))

    verdict = Verdict(
        sizes=list(sizes),
        lrs=list(lrs),
        seeds=N,
        noise=noise,
        best=[_power(interval(best[s], drawn_least[:, s], drawn_most[:, s])) for s in range(S)],
        loss=[float(v) for v in bottom],
        bracketed=[bool(b) for b in bracketed],
        drift=[drift(s, 1) for s in range(1, S)],
        cost=[cost(s) for s in range(1, S)],
        worse=[worse(s, 1) for s in range(1, S)],
    )
    t = thresholds
    verdict.words = {
        "drift": _word(verdict.drift, [drift(s, S - 1) for s in range(1, S)], -t.drift, t.drift),
        "cost": _word(verdict.cost[-1:], verdict.cost[-1:], -np.inf, t.cost),
        "worse": _word(verdict.worse, [worse(s, S - 1) for s in range(1, S)], -np.inf, t.worse),
    }
    if not bracketed[0] and verdict.words["worse"] == "PASS":
        verdict.words["worse"] = "TOO NOISY TO SAY"  # at a rate that is nobody's best
    for s in range(S):
        if not bracketed[s]:
            low = int(mean[s].argmin())
            where = (
                "at the end of the learning rates"
                if low in (0, K - 1)
                else f"beside a run that diverged or was {FAR:g} nat worse"
            )
            verdict.notes.append(f"size {sizes[s]}: the lowest loss is {where}, {lrs[low]:g}")
    if noise is None:
        verdict.notes.append(
            f"noise is unknown: it takes 2 seeds, and {NEAR} learning rates without a divergence"
        )
    if np.any(np.isinf(losses)):
        verdict.notes.append(
            f"{int(np.isinf(losses).sum())} of {int((~np.isnan(losses)).sum())} runs diverged"
        )
    return verdict


def minimum(x: Array, y: Array, diverged: NDArray[np.bool_]) -> tuple[Array, Array, Array, Array]:
    """(place, value, least, most): the vertex of the parabola at the lowest point, which is then also the least and the most that its place may be. At an end (but where
    five points have their vertex before it), and where one of the parabola's points diverged: the point itself, and its neighbours' places, ∓∞ beyond an end. x: (K,), y: (…, S, K), diverged: (S, K) → (…, S).
    """
    K = len(x)
    low = y.argmin(-1)
    c = np.clip(low, 1, K - 2)
    beside = np.broadcast_to(diverged, y.shape[-2:]) @ _windows(x).T
    a, b, y0 = _parabola(x, y, c)
    with np.errstate(divide="ignore", invalid="ignore"):
        free = np.where(a > 0, -b / (2 * a), 0.0)
    vertex = np.clip(free, x[c - 1] - x[c], x[c + 1] - x[c])
    # Of points enough to fit, not only to pass through, one that is low at an end by chance does not outweigh the others.
    fitted = (a > 0) & (vertex == free) & (_windows(x).sum(1)[c] >= POINTS)
    known = ((low == c) | fitted) & ~np.take_along_axis(
        np.broadcast_to(beside, y.shape), low[..., None], -1
    )[..., 0]
    place = np.where(known, x[c] + vertex, x[low])
    value = np.where(known, y0 + b * vertex + a * vertex**2, y.min(-1))
    edges = np.concatenate([[-np.inf], x, [np.inf]])
    return place, value, np.where(known, place, edges[low]), np.where(known, place, edges[low + 2])


def interpolate(x: Array, y: Array, at: Array) -> Array:
    """y at `at` (…), by the parabola at the point nearest to it."""
    nearest = np.abs(at[..., None] - x).argmin(-1)
    c = np.clip(nearest, 1, len(x) - 2)
    a, b, y0 = _parabola(x, y, c)
    d = at - x[c]
    return y0 + b * d + a * d**2


def _windows(x: Array) -> NDArray[np.bool_]:
    """(K, K): whether point k belongs to the parabola at point c; its two neighbours always do."""
    c, k = np.indices((len(x), len(x)))
    far = np.abs(x[c] - x[k]).round(1)  # rates are written with few digits
    near = far <= np.minimum(WINDOW, np.sort(far)[:, :POINTS][:, -1:])
    return near | (abs(c - k) <= 1)


def _parabola(x: Array, y: Array, c: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """(a, b, y0) of the least-squares parabola y0 + b (x − x[c]) + a (x − x[c])² at point c: an octave apart, the one through it and its two neighbours."""
    fits = np.zeros((len(x), 3, len(x)))
    for at, window in enumerate(_windows(x)):
        if window.sum() >= 3:
            fits[at][:, window] = np.linalg.pinv(np.vander(x[window] - x[at], 3))
    found = (fits[c] @ y[..., None])[..., 0]  # (…, 3)
    return found[..., 0], found[..., 1], found[..., 2]


def pooled_noise(y: Sequence[Array], diverged: NDArray[np.bool_]) -> Noise | None:
    """From the three lowest learning rates of each size, (K, N) each, at which no run diverged; None without such a size of 2 seeds."""
    squares, df, between, seed_df = 0.0, 0, 0.0, 0
    last: Array | None = None
    for cells, bad in zip(y, diverged, strict=True):
        cells = cells[~bad]
        if len(cells) < NEAR or cells.shape[1] < 2:
            continue
        cells = cells[np.argsort(cells.mean(1))[:NEAR]]
        by_seed = cells.mean(0) - cells.mean()
        residual = cells - cells.mean(1, keepdims=True) - by_seed
        squares, df = squares + float((residual**2).sum()), df + (NEAR - 1) * (len(by_seed) - 1)
        if last is not None:
            both = min(len(last), len(by_seed))
            apart = by_seed[:both] - last[:both]
            between, seed_df = (
                between + float(((apart - apart.mean()) ** 2).sum()) / 2,
                seed_df + both - 1,
            )
        last = by_seed
    if not df or not seed_df:
        return None
    # Half the variance of a difference of two sizes' means over the cells is seed² + residual² / NEAR.
    return Noise(
        (squares / df) ** 0.5, max(0.0, between / seed_df - squares / df / NEAR) ** 0.5, df, seed_df
    )


def _drawn_variances(noise: Noise, rng: np.random.Generator) -> tuple[Array, Array]:
    """(residual², seed²), (draws,) each."""
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
    """(draws, S, K) of what differs within a size. counts: seeds of each size."""
    if noise is None:
        return mean[None]
    residual, _ = _drawn_variances(noise, rng)
    drawn = np.sqrt(residual)[:, None, None] * rng.standard_normal((DRAWS, *mean.shape))
    return mean + drawn / np.sqrt(counts)[:, None]


def _step(
    x: Array,
    before: Array,
    after: Array,
    shared: float,
    drawn_shared: Array,
    noise: Noise | None,
    rng: np.random.Generator,
) -> tuple[float, Array]:
    """How much worse `after` (K, N) is than `before` at the shared rate, relative, by the seeds that both have: (value, draws)."""
    both = min(before.shape[1], after.shape[1])
    means = np.stack([before[:, :both].mean(1), after[:, :both].mean(1)])

    def ratio(y: Array, at: Array) -> Array:
        losses = interpolate(x, y, np.broadcast_to(at[..., None], y.shape[:-1]))
        return losses[..., 1] / losses[..., 0] - 1

    value = float(ratio(means, np.asarray(shared)))
    if noise is None:
        return value, np.array([value])
    residual, seed = _drawn_variances(noise, rng)
    drawn = np.sqrt(residual)[:, None, None] * rng.standard_normal((DRAWS, *means.shape))
    drawn += np.sqrt(seed)[:, None, None] * rng.standard_normal((DRAWS, 2, 1))
    return value, ratio(means + drawn / both**0.5, drawn_shared)


def _whole(losses: Array, size: int) -> tuple[Array, NDArray[np.bool_]]:
    """(K, N) → (K, whole seeds), at most FAR above the seed's lowest, which is what a run that diverged counts as, and whether they are that far."""
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


def _word(found: list[Interval], wide: list[Interval], low: float, high: float) -> Word:
    """PASS: all intervals inside. FAIL: a wide one outside altogether."""
    if any(i.low > high or i.high < low for i in wide):
        return "FAIL"
    return "PASS" if all(low <= i.low and i.high <= high for i in found) else "TOO NOISY TO SAY"


def _power(i: Interval) -> Interval:
    return Interval(2**i.low, 2**i.value, 2**i.high)


def student(values: Sequence[float]) -> Interval:
    """The mean of independent values with its interval by Student's t; unbounded for one value."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    half = (
        float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)
        if len(x) > 1
        else np.inf
    )
    return Interval(mean - half, mean, mean + half)
