"""studies/verdict.py: words and intervals on synthetic sweeps whose best learning rates, curvature and noise are known.

loss[s, k, n] = base[s] + curvature (x[k] − best[s])² + seed effect[s, n] + residual[s, k, n], x in octaves. Coverage
and error rates are counted over many sweeps; their bounds are binomial: of n sweeps with a true rate p, a share
further than 3 √(p (1 − p) / n) from it has probability below 0.003. 300 of them in `make soak`.
"""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from studies import verdict
from studies.intervals import Interval
from studies.parabola import interpolate, minimum
from studies.verdict import Thresholds, Verdict, VerdictError, judge, pooled_noise

from tests.helpers import SOAK

pytestmark = pytest.mark.soak
SWEEPS = 300 if SOAK else 100
CURVATURE = 0.05  # nats per octave²
FAR = 3 * math.sqrt(0.025 * 0.975 / SWEEPS)  # of a rate of 2.5% (one side of an interval of 95%)
FEW, MOST = (
    0.95 - 3 * math.sqrt(0.05 * 0.95 / SWEEPS),
    0.95 + 3 * math.sqrt(0.05 * 0.95 / SWEEPS),
)  # covered by intervals of 95%
DEFAULT = Thresholds()
NONE = np.zeros((1, 1), dtype=bool)


def sweep(
    best: list[float],
    rng: np.random.Generator,
    *,
    K: int = 5,
    N: int = 2,
    residual: float = 0.003,
    seed: float = 0.01,
    base: list[float] | None = None,
    step: float = 1.0,
) -> np.ndarray:
    """(S, K, N); learning rates are 2^(step · k)."""
    S = len(best)
    means = (
        np.array(base or [2 - 0.1 * s for s in range(S)])[:, None]
        + CURVATURE * (step * np.arange(K) - np.array(best)[:, None]) ** 2
    )
    return means[:, :, None] + seed * rng.standard_normal((S, 1, N)) + residual * rng.standard_normal((S, K, N))


def judged(losses: np.ndarray, thresholds: Thresholds = DEFAULT, *, step: float = 1.0, seed: int = 0) -> Verdict:
    S, K, _ = losses.shape
    return judge(losses, [64 * 2**s for s in range(S)], [2.0 ** (step * k) for k in range(K)], thresholds, seed=seed)


def many(
    best: list[float], monkeypatch: pytest.MonkeyPatch, thresholds: Thresholds = DEFAULT, **options
) -> list[Verdict]:
    monkeypatch.setattr(verdict, "DRAWS", 800)
    rng = np.random.default_rng(7)
    return [
        judged(sweep(best, rng, **options), thresholds, step=options.get("step", 1.0), seed=i) for i in range(SWEEPS)
    ]


def share(verdicts: list[Verdict], key: str, word: str) -> float:
    return Counter(v.words[key] for v in verdicts)[word] / len(verdicts)


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


# ---- parts


@pytest.mark.parametrize("x", [[0.0, 1.0, 2.0, 3.0], [0.0, 0.3, 2.0, 2.5], [-3.0, -1.0, 2.0, 7.0]])
def test_a_parabola_is_found_exactly_at_any_spacing(x: list[float]):
    for vertex in (x[1], x[2], 0.7 * x[1] + 0.3 * x[2]):
        y = 1.5 + 0.25 * (np.array(x) - vertex) ** 2
        if y.argmin() not in (1, 2):
            continue
        found = minimum(np.array(x), y[None], NONE)
        assert [float(f[0]) for f in found] == pytest.approx([vertex, 1.5, vertex, vertex], abs=1e-12)
        at = np.linspace(x[0] - 1, x[-1] + 1, 11)
        assert interpolate(np.array(x), np.tile(y, (11, 1)), at) == pytest.approx(
            1.5 + 0.25 * (at - vertex) ** 2, abs=1e-11
        )


def test_interpolation_goes_through_the_points_and_takes_the_nearest_three():
    x, y = np.array([0.0, 1, 2, 3, 4]), np.array([5.0, 1, 4, 2, 8])
    assert interpolate(x, np.tile(y, (5, 1)), x) == pytest.approx(y)
    expected = [
        np.polyval(np.polyfit(x[a : a + 3], y[a : a + 3], 2), at) for a, at in ((0, 1.4), (1, 1.6), (2, 3.7), (0, -0.5))
    ]
    assert interpolate(x, np.tile(y, (4, 1)), np.array([1.4, 1.6, 3.7, -0.5])) == pytest.approx(expected)


def test_all_points_within_an_octave_make_the_parabola():
    """Half an octave apart that is five points, by least squares: numpy's."""
    x, y = np.arange(2, 7) / 2, np.array([5.0, 4.0, 3.9, 4.1, 6.0])
    a, b, _ = np.polyfit(x, y, 2)
    assert minimum(x, y[None], NONE)[0][0] == pytest.approx(-b / (2 * a), abs=1e-12)
    wider = np.r_[0.0, x, 4.0]  # one and a half octaves away: no part of it
    assert minimum(wider, np.r_[50.0, y, 60.0][None], NONE)[0][0] == pytest.approx(-b / (2 * a), abs=1e-12)


def test_points_half_an_octave_apart_see_a_steep_side_for_what_it_is():
    """Flat below 2³ and steep above it: a parabola through points an octave apart goes far below all losses."""
    below = []
    for step in (1.0, 0.5):
        x = np.arange(0, 4.01, step)
        y = 2 + 0.01 * (x - 2.6) ** 2 + 0.15 * np.maximum(0, x - 3) ** 2
        place, value, *_ = minimum(x, y[None], NONE)
        assert place[0] == pytest.approx(2.6, abs=0.35)
        below.append(2 - value[0])
    assert below[0] > 0.018 and abs(below[1]) < 0.006


def test_a_lowest_loss_at_an_end_or_beside_a_divergence_is_placed_between_its_neighbours():
    x = np.array([0.0, 1, 2, 3])
    y = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1], [3, 1, 2, 9], [3, 2, 1, 9], [1, 1, 1, 1]])
    diverged = np.zeros((5, 4), dtype=bool)
    diverged[2:4, 3] = True
    place, value, least, most = minimum(x, y, diverged)
    assert place[[0, 1, 3]].tolist() == [0, 3, 2]
    assert value[[0, 1, 3]].tolist() == [1, 1, 1]
    assert least[[0, 1, 3]].tolist() == [-math.inf, 2, 1]
    assert most[[0, 1, 3]].tolist() == [1, math.inf, 3]
    assert place[2] == least[2] == most[2] == pytest.approx(1 + 1 / 6), "two away from a divergence it is a parabola's"
    assert (place[4], most[4]) == (0, 1), "no slope at all: the first"


def test_pooled_noise_has_the_deviations_that_made_it():
    """Unbiased variances: the mean over 400 sweeps of 3 sizes and 3 seeds, within 3 of its standard errors."""
    rng = np.random.default_rng(0)
    none = np.zeros((3, 5), dtype=bool)
    noises = [pooled_noise(list(sweep([2, 2.2, 1.8], rng, N=3, residual=0.004, seed=0.02)), none) for _ in range(400)]
    found = [n for n in noises if n is not None]
    assert len(found) == 400 and {(n.df, n.seed_df) for n in found} == {(12, 4)}
    for name, true in (("residual", 0.004), ("seed", 0.02)):
        squares = np.array([getattr(n, name) ** 2 for n in found])
        assert abs(squares.mean() - true**2) < 3 * squares.std() / 20, name
    alone = [pooled_noise(list(sweep([2, 2.2, 1.8], rng, N=3, residual=0.004, seed=0.0)), none) for _ in range(50)]
    assert np.median([n.seed for n in alone if n]) < 0.002, "nothing of the residual is taken for the seed's"


def test_what_a_seed_does_to_all_sizes_alike_is_no_noise():
    """A data order moves the losses of all runs of its seed: verdicts compare the seeds that two sizes share, also
    where one has more.
    """
    losses = sweep([2, 2], np.random.default_rng(3), N=6, residual=0.001, seed=0.001)
    losses[1, :, 3:] = np.nan
    order = np.array([0.0, 0.2, -0.1, 0.3, 0.3, 0.3])
    without, with_ = judged(losses), judged(losses + order)
    assert without.noise is not None and with_.noise is not None
    assert vars(with_.noise) == pytest.approx(vars(without.noise))
    assert with_.words == without.words and with_.worse[0].value == pytest.approx(without.worse[0].value, rel=0.1)
    plain = np.nanmean((losses + order)[1]) - np.nanmean((losses + order)[0])
    assert abs(plain) > 0.1, "means over the seeds that each has would say otherwise"


def test_noise_is_told_by_the_learning_rates_near_the_minimum_and_by_no_divergence():
    rng = np.random.default_rng(1)
    losses = sweep([3, 3], rng, K=7, N=4)
    wild = losses.copy()
    wild[:, 0] += 0.3 * np.abs(rng.standard_normal((2, 4)))
    wild[:, 6] = math.inf
    ordinary = judged(losses).noise
    assert ordinary == judged(wild).noise
    assert ordinary is not None and ordinary.df == 2 * 2 * 3
    two = sweep([1, 1], rng, K=3)
    two[:, 2] = math.inf
    assert pooled_noise(list(two), np.any(np.isinf(two), axis=2)) is None, "two learning rates are too few"


# ---- intervals


@pytest.mark.parametrize(
    ("best", "options"),
    [
        ([2.0, 2.0], {}),
        ([2.3, 2.8], {"residual": 0.01}),
        ([2.0, 2.0], {"seed": 0.0, "N": 3}),
        ([2.5, 2.5], {"N": 4, "seed": 0.03, "base": [2.0, 2.0]}),
        ([1.4, 2.0, 2.6], {"residual": 0.006}),
    ],
)
def test_an_interval_of_95_percent_has_the_truth_in_it_95_times_in_100(
    best: list[float], options: dict, monkeypatch: pytest.MonkeyPatch
):
    """Those of several sizes together are wider for each of them."""
    found = many(best, monkeypatch, **options)
    S, base = len(best), options.get("base", [2 - 0.1 * s for s in range(len(best))])
    at_shared = [b + CURVATURE * (x - best[0]) ** 2 for b, x in zip(base, best, strict=True)]
    for s in range(S):
        assert FEW <= covered([v.best[s] for v in found], 2 ** best[s]) <= MOST
    for s in range(1, S):
        assert FEW <= covered([v.drift[s - 1] for v in found], best[s] - best[0]) <= 1.0
        assert FEW <= covered([v.cost[s - 1] for v in found], at_shared[s] / base[s] - 1) <= 1.0
        assert FEW <= covered([v.worse[s - 1] for v in found], at_shared[s] / at_shared[s - 1] - 1) <= 1.0


def test_a_seed_moves_all_learning_rates_together_and_so_not_the_best_one():
    """The same residuals with effects of seeds 100 times as large: best lr, drift and cost stay, the comparison of
    sizes widens.
    """
    rng = np.random.default_rng(3)
    losses = sweep([2, 2.2], rng, N=3, seed=0.0)
    effects = 0.3 * rng.standard_normal((2, 1, 3))
    calm, moved = judged(losses), judged(losses + effects - effects.mean(2, keepdims=True))
    assert moved.noise and calm.noise and moved.noise.seed > 20 * calm.noise.seed
    assert moved.noise.residual == pytest.approx(calm.noise.residual)
    for a, b in zip(calm.best + calm.drift, moved.best + moved.drift, strict=True):
        # The draws differ: bounds agree as percentiles of 4000 draws do.
        assert (b.low, b.value, b.high) == pytest.approx((a.low, a.value, a.high), rel=0.05, abs=0.02)
    widths = [v.worse[0].high - v.worse[0].low for v in (calm, moved)]
    assert widths[1] > 5 * widths[0]


def test_more_seeds_say_more():
    rng = np.random.default_rng(4)
    widths = [(d := judged(sweep([2, 2], rng, N=N)).drift[0]).high - d.low for N in (2, 4, 16)]
    assert widths[0] > widths[1] > widths[2]


def test_bounds_are_where_they_are_claimed_to_be(monkeypatch: pytest.MonkeyPatch):
    """With much data and no drift: the standard error of the difference of two vertices, by the propagation of errors.

    The vertex of points at −1, 0, 1 moves by (y₋ − y₊) / 4a, with a deviation of σ √2 / (4 a √N).
    """
    monkeypatch.setattr(verdict, "DRAWS", 20_000)
    sigma, N = 0.005, 64
    drift = judged(sweep([2, 2], np.random.default_rng(5), N=N, residual=sigma)).drift[0]
    error = math.sqrt(2) * sigma * math.sqrt(2) / (4 * CURVATURE * math.sqrt(N))
    assert drift.high - drift.low == pytest.approx(2 * 1.96 * error, rel=0.1)


# ---- words


def test_no_drift_and_little_noise_passes(monkeypatch: pytest.MonkeyPatch):
    found = many([2.3, 2.3, 2.3], monkeypatch, base=[2.0, 1.8, 1.7])
    assert Counter(v.word for v in found)["PASS"] >= 0.98 * SWEEPS
    assert not any("FAIL" in v.words.values() for v in found)


def test_an_octave_of_drift_fails(monkeypatch: pytest.MonkeyPatch):
    found = many([2, 3], monkeypatch)
    assert {v.words["drift"] for v in found} == {"FAIL"} and {v.word for v in found} == {"FAIL"}
    assert all(v.words["cost"] == "FAIL" for v in found), "0.05 of 1.9 nats is 2.6%"


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_much_noise_is_said_to_be_too_much(drift: float, monkeypatch: pytest.MonkeyPatch):
    """Noise as large as what an octave costs. The rest is at most the intervals' own error."""
    found = many([2, 2 + drift], monkeypatch, residual=0.06)
    assert share(found, "drift", "TOO NOISY TO SAY") >= 0.9
    assert share(found, "drift", "PASS") <= 0.025 + FAR
    assert Counter(v.word for v in found)["PASS"] == 0


@pytest.mark.parametrize("residual", [0.002, 0.01])
def test_a_drift_beyond_its_threshold_seldom_passes_and_one_within_seldom_fails(
    residual: float, monkeypatch: pytest.MonkeyPatch
):
    """At the threshold itself each is one side of an interval of 95%."""
    for drift, wrong in ((0.501, "PASS"), (0.499, "FAIL")):
        assert share(many([2, 2 + drift], monkeypatch, residual=residual), "drift", wrong) <= 0.025 + FAR


def test_equal_sizes_are_seldom_called_better_or_worse(monkeypatch: pytest.MonkeyPatch):
    found = many([2, 2], monkeypatch, Thresholds(worse=0), base=[2.0, 2.0])
    assert share(found, "worse", "PASS") <= 0.025 + FAR and share(found, "worse", "FAIL") <= 0.025 + FAR
    calm = judged(sweep([2, 2], np.random.default_rng(0), base=[2.0, 2.0]), Thresholds(worse=0.05))
    assert calm.words["worse"] == "PASS", "a margin can be shown"


def test_a_larger_model_that_is_worse_fails():
    verdict = judged(sweep([2, 2], np.random.default_rng(0), base=[2.0, 2.2], N=4))
    assert verdict.words == {"drift": "PASS", "cost": "PASS", "worse": "FAIL"}
    assert verdict.word == "FAIL"


def test_sizes_that_need_not_be_as_good_have_no_word_for_it():
    verdict = judged(sweep([2, 2], np.random.default_rng(0), base=[2.0, 2.2], N=4), Thresholds(worse=None))
    assert verdict.words == {"drift": "PASS", "cost": "PASS"} and verdict.word == "PASS"
    assert verdict.worse[0].value == pytest.approx(0.1, abs=0.02), "but the numbers are there"


def test_one_seed_says_nothing():
    verdict = judged(sweep([2, 2, 4], np.random.default_rng(0), N=1))
    assert set(verdict.words.values()) == {"TOO NOISY TO SAY"}
    assert verdict.notes[-1] == "noise is unknown: it takes 2 seeds, and 3 learning rates without a divergence"
    assert (verdict.best[0].low, verdict.best[0].high, verdict.drift[0].high) == (0, math.inf, math.inf), (
        "and no bound is claimed"
    )
    assert verdict.best[0].value == pytest.approx(4, rel=0.05)


def test_without_noise_the_numbers_are_exact():
    losses = sweep([1.8, 2.4], np.random.default_rng(0), residual=0.0, seed=0.0)
    verdict = judged(losses)
    assert [b.value for b in verdict.best] == pytest.approx([2**1.8, 2**2.4])
    assert verdict.loss == pytest.approx([2.0, 1.9])
    for found, true in (
        (verdict.drift, 0.6),
        (verdict.cost, 0.05 * 0.36 / 1.9),
        (verdict.worse, (1.9 + 0.05 * 0.36) / 2 - 1),
    ):
        assert [found[0].low, found[0].value, found[0].high] == pytest.approx([true] * 3)
    assert verdict.words == {"drift": "FAIL", "cost": "FAIL", "worse": "PASS"}


# ---- sweeps that do not show the minimum


def test_a_minimum_at_the_end_never_passes(monkeypatch: pytest.MonkeyPatch):
    """0.25 octaves of drift that look like 0.55, as the second minimum is nearest to the last learning rate: no FAIL
    either.
    """
    found = many([3.45, 3.7], monkeypatch)
    assert not any(v.words["drift"] != "TOO NOISY TO SAY" or v.words["cost"] == "PASS" for v in found)
    assert found[0].notes[0] == "size 128: the lowest loss is at the end of the learning rates, 16"
    assert all(v.best[1].low == 8 and v.best[1].high == math.inf for v in found)
    same = many([6, 6], monkeypatch)
    assert not any(
        "PASS" in (v.words["drift"], v.words["cost"]) or "FAIL" in (v.words["drift"], v.words["cost"]) for v in same
    )


def test_a_minimum_far_beyond_an_end_fails(monkeypatch: pytest.MonkeyPatch):
    found = many([3, -2], monkeypatch)
    assert {v.words["drift"] for v in found} == {"FAIL"}, "at least two octaves are seen"
    assert {v.words["cost"] for v in found} == {"FAIL"}, "and their cost"
    assert all(v.drift[0].low == -math.inf and v.cost[0].high == math.inf for v in found)


def test_learning_rates_so_close_that_no_drift_fits_between_them_do_not_pass(monkeypatch: pytest.MonkeyPatch):
    """Five within 0.4 octaves, and noise that hides their minimum: no drift of 0.5 could be seen."""
    found = many([0.2, 0.2], monkeypatch, step=0.1, residual=0.05)
    assert share(found, "drift", "PASS") <= 0.025 + FAR
    assert share(found, "drift", "FAIL") <= 0.025 + FAR


def test_runs_that_diverged_count_as_bad_ones():
    losses = sweep([2, 2], np.random.default_rng(0), K=6)
    whole = judged(losses)
    losses[:, 5, 1] = math.inf
    verdict = judged(losses)
    assert verdict.notes == ["2 of 24 runs diverged"]
    assert (verdict.best, verdict.drift, verdict.words) == (whole.best, whole.drift, whole.words), (
        "far from the minimum they matter not"
    )


def test_a_divergence_beside_the_minimum_hides_its_place():
    """A wall right of the lowest point would pull the parabola half a learning rate to the left, at one size and not at
    the other.
    """
    losses = sweep([2, 2], np.random.default_rng(0))
    losses[1, 3:] = math.inf
    verdict = judged(losses)
    assert verdict.words["drift"] == verdict.words["cost"] == "TOO NOISY TO SAY"
    assert verdict.notes[0] == "size 128: the lowest loss is beside a run that diverged or was 1 nat worse, 4"
    assert (verdict.best[1].low, verdict.best[1].value, verdict.best[1].high) == (2, 4, 8)
    assert verdict.bracketed == [True, False]
    exploded = losses.copy()
    exploded[1, 3:] = 2.5e31
    assert replace(judged(exploded), notes=verdict.notes) == verdict, "a loss without bounds is as good as diverged"


def test_a_shared_learning_rate_that_diverges_fails():
    losses = sweep([3, 1], np.random.default_rng(0))
    losses[1, 3:] = math.inf
    verdict = judged(losses)
    assert verdict.words == {"drift": "FAIL", "cost": "FAIL", "worse": "FAIL"}


def test_seeds_that_are_not_whole_are_left_out():
    losses = sweep([2, 2], np.random.default_rng(0), N=3)
    torn = losses.copy()
    torn[0, 4, 2] = math.nan
    verdict, expected = judged(torn), losses.copy()
    expected[0, :, 2] = math.nan
    assert verdict == judged(expected)
    assert verdict.noise and verdict.noise.df == 2 * (1 + 2)
    assert verdict.word == "PASS"
    torn[0, 0] = math.nan
    with pytest.raises(
        VerdictError,
        match="losses of size 64\n  got: no seed with a run at every learning rate\n  allowed: one or more\n  fix: run the rest",
    ):
        judged(torn)
    torn[0] = math.inf
    with pytest.raises(
        VerdictError,
        match="losses of size 64\n  got: no run that did not diverge\n  allowed: one or more\n  fix: smaller --lrs",
    ):
        judged(torn)


@pytest.mark.parametrize(
    ("sizes", "lrs"),
    [
        ([128, 64], [1.0, 2.0, 4.0]),
        ([64, 128], [2.0, 1.0, 4.0]),
        ([64, 128], [1.0, 1.0, 2.0]),
        ([64, 128], [1.0, 2.0]),
        ([64], [1.0, 2.0, 4.0]),
    ],
)
def test_what_is_not_a_sweep_is_refused(sizes: list[int], lrs: list[float]):
    with pytest.raises(
        VerdictError, match="allowed: 2 or more sizes and 3 or more learning rates, ascending\n  fix: --widths"
    ):
        judge(np.ones((len(sizes), len(lrs), 2)), sizes, lrs)


def test_a_verdict_is_the_same_again_and_can_be_written():
    losses = sweep([2, 2.4], np.random.default_rng(0), residual=0.02)
    verdict = judged(losses)
    assert verdict == judged(losses)
    assert json.loads(json.dumps(verdict.json()))["word"] == verdict.word
    assert str(replace(verdict.drift[0], low=-0.12345, value=0.5, high=1.0)) == "0.5 [-0.123, 1]"


def test_losses_are_not_written():
    losses = sweep([2, 2], np.random.default_rng(0))
    losses[0, 4, 0] = math.inf
    before = losses.copy()
    judged(losses)
    assert np.array_equal(losses, before)
