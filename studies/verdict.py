"""Has the best learning rate moved? Statistics of losses over (sizes S, learning rates K, seeds N), log₂ lr in octaves.

The model: loss[s, k, n] = mean[s, k] + seed effect[s, n] + residual[s, k, n]. Seeds are shared by the learning rates of one size (same data order, same initial weights), so that
the place of a minimum and a difference of losses within one size carry the residual alone; differences between sizes carry both. Their deviations
are pooled over the cells at and beside each size's minimum; intervals are parametric bootstraps that draw the deviations too (scaled inverse χ²).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Word = Literal["PASS", "FAIL", "TOO NOISY TO SAY"]
DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Thresholds:
    """drift: octaves. cost: of the loss, relative. worse: likewise, of a larger model at the shared lr."""

    drift: float = 0.5
    cost: float = 0.005
    worse: float = 0.0


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
    """Deviations of one run's loss: residual (within a size) and seed (of all its learning rates together); df of the residual."""

    residual: float
    seed: float
    df: int


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


def judge(losses: Array, sizes: list[int], lrs: list[float], thresholds: Thresholds = Thresholds(), *, seed: int = 0) -> Verdict:
    """losses: (S, K, N), inf where a run diverged, NaN where there is none. sizes, lrs: ascending. Raises ValueError for fewer than 2 sizes or 3 learning rates."""
    S, K, N = losses.shape
    if S < 2 or K < 3 or list(lrs) != sorted(set(lrs)) or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"a transfer verdict\n  got: {S} sizes {sizes}, {K} learning rates {lrs}\n  allowed: 2 or more sizes and 3 or more learning rates, ascending\n"
            "  fix: --widths or --depths, and --lrs"
        )
    x = np.log2(np.asarray(lrs, dtype=np.float64))
    y = _without_infinities(losses)
    mean = np.nanmean(y, axis=2)
    counts = np.maximum(1, (~np.isnan(y)).sum(axis=2))
    best, bottom, bracketed = minimum(x, mean)
    noise = pooled_noise(y, mean, bracketed)
    draws = _draws(mean, counts, noise, np.random.default_rng(seed))
    drawn_best, drawn_bottom, _ = minimum(x, draws)  # (draws, S)
    shared, drawn_shared = best[0], drawn_best[:, :1]
    at_shared = interpolate(x, mean, np.full(S, shared))
    drawn_at_shared = interpolate(x, draws, np.broadcast_to(drawn_shared, drawn_best.shape))

    def interval(value: float, drawn: Array, comparisons: int) -> Interval:
        tail = 100 * (1 - LEVEL) / 2 / comparisons
        low, high = np.percentile(drawn, [tail, 100 - tail])
        return Interval(min(float(low), value), value, max(float(high), value))

    verdict = Verdict(
        sizes=list(sizes),
        lrs=list(lrs),
        seeds=N,
        noise=noise,
        best=[_power(interval(best[s], drawn_best[:, s], 1)) for s in range(S)],
        loss=[float(v) for v in bottom],
        bracketed=[bool(b) for b in bracketed],
        drift=[interval(best[s] - shared, drawn_best[:, s] - drawn_shared[:, 0], S - 1) for s in range(1, S)],
        cost=[interval(at_shared[s] / bottom[s] - 1, drawn_at_shared[:, s] / drawn_bottom[:, s] - 1, 1) for s in range(1, S)],
        worse=[
            interval(at_shared[s] / at_shared[s - 1] - 1, drawn_at_shared[:, s] / drawn_at_shared[:, s - 1] - 1, S - 1) for s in range(1, S)
        ],
    )
    t = thresholds
    verdict.words = {
        "drift": _word(verdict.drift, -t.drift, t.drift),
        "cost": _word(verdict.cost[-1:], -np.inf, t.cost),
        "worse": _word(verdict.worse, -np.inf, t.worse),
    }
    for s in range(S):
        if not bracketed[s]:
            verdict.notes.append(f"size {sizes[s]}: the lowest loss is at the end of the learning rates, {lrs[int(mean[s].argmin())]:g}")
    if not all(bracketed):
        # Where a minimum is outside, the drift is at least what is seen.
        for key in ("drift", "cost"):
            if verdict.words[key] == "PASS":
                verdict.words[key] = "TOO NOISY TO SAY"
    if noise is None:
        verdict.notes.append("one seed: its noise is unknown")
        verdict.words = dict.fromkeys(verdict.words, "TOO NOISY TO SAY")
    if np.isinf(losses).any():
        verdict.notes.append(f"{int(np.isinf(losses).sum())} of {int((~np.isnan(losses)).sum())} runs diverged")
    return verdict


def minimum(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """(place, value, bracketed) of the parabola through the lowest point and its two neighbours; the point itself where it is at an end. x: (K,), y: (…, K) → (…)."""
    K = len(x)
    low = y.argmin(-1)
    inside = (low > 0) & (low < K - 1)
    c = np.clip(low, 1, K - 2)
    a, b = _parabola(x, y, c)
    place, y0 = x[c], np.take_along_axis(y, c[..., None], -1)[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(a > 0, -b / (2 * a), 0.0)
    best = np.where(inside, place + vertex, x[low])
    value = np.where(inside, y0 + b * vertex + a * vertex**2, y.min(-1))
    return best, value, inside


def interpolate(x: Array, y: Array, at: Array) -> Array:
    """y at `at` (…), by the parabola through the three points nearest to it."""
    nearest = np.abs(at[..., None] - x).argmin(-1)
    c = np.clip(nearest, 1, len(x) - 2)
    a, b = _parabola(x, y, c)
    d = at - x[c]
    return np.take_along_axis(y, c[..., None], -1)[..., 0] + b * d + a * d**2


def _parabola(x: Array, y: Array, c: NDArray[np.int64]) -> tuple[Array, Array]:
    """(a, b) of y[c] + b (x − x[c]) + a (x − x[c])² through points c − 1, c, c + 1."""
    left, mid, right = (np.take_along_axis(y, (c + k)[..., None], -1)[..., 0] for k in (-1, 0, 1))
    hl, hr = x[c] - x[c - 1], x[c + 1] - x[c]
    sl, sr = (mid - left) / hl, (right - mid) / hr
    a = (sr - sl) / (hl + hr)
    return a, sl + a * hl


def pooled_noise(y: Array, mean: Array, bracketed: Array) -> Noise | None:
    """From the cells at and beside each minimum; None with fewer than 2 seeds."""
    squares, df, between, seeds_df = 0.0, 0, 0.0, 0
    for s in range(len(y)):
        low = int(mean[s].argmin())
        cells = y[s, max(0, low - 1) : low + 2]
        cells = cells[:, ~np.isnan(cells).any(0)]  # seeds that have them all
        k, n = cells.shape
        if n < 2:
            continue
        by_seed = cells.mean(0)
        residual = cells - cells.mean(1, keepdims=True) - by_seed + cells.mean()
        squares, df = squares + float((residual**2).sum()), df + (k - 1) * (n - 1)
        between, seeds_df = between + k * float(((by_seed - by_seed.mean()) ** 2).sum()), seeds_df + n - 1
    if not df:
        return None
    residual = squares / df
    seed = max(0.0, between / seeds_df - residual) / 3  # mean square between seeds = residual + k · seed, k = 3 cells
    return Noise(residual**0.5, seed**0.5, df)


def _draws(mean: Array, counts: NDArray[np.int64], noise: Noise | None, rng: np.random.Generator) -> Array:
    """(draws, S, K)."""
    if noise is None:
        return np.repeat(mean[None], 2, 0)
    scale = np.sqrt(noise.df / rng.chisquare(noise.df, (DRAWS, 1, 1)))
    residual = noise.residual * rng.standard_normal((DRAWS, *mean.shape))
    seed = noise.seed * rng.standard_normal((DRAWS, mean.shape[0], 1))
    return mean + scale * (residual + seed) / np.sqrt(counts)


def _without_infinities(losses: Array) -> Array:
    """A run that diverged counts as 1 nat worse than the worst of its size."""
    y = losses.copy()
    for s in range(len(y)):
        finite = y[s][np.isfinite(y[s])]
        if not finite.size:
            raise ValueError(f"all runs of size {s + 1} of {len(y)} diverged\n  got: no loss\n  allowed: some\n  fix: smaller --lrs")
        y[s][np.isinf(y[s])] = finite.max() + 1
    return y


def _word(found: list[Interval], low: float, high: float) -> Word:
    """PASS: all intervals inside. FAIL: one of them outside altogether."""
    if any(i.low > high or i.high < low for i in found):
        return "FAIL"
    return "PASS" if all(low <= i.low and i.high <= high for i in found) else "TOO NOISY TO SAY"


def _power(i: Interval) -> Interval:
    return Interval(2**i.low, 2**i.value, 2**i.high)
