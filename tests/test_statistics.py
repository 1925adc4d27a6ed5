"""studies/statistics.py against what it claims, on simulated studies whose truth is known.

Tolerances are of the number of studies: four deviations of a binomial.
"""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from studies import statistics
from studies.statistics import (
    Horizon,
    Noise,
    Rule,
    bounds,
    bracket,
    crossing,
    horizon,
    mean_interval,
    paired,
    pooled,
    share_of_seeds,
    threshold_at,
)

from tests.helpers import SOAK

pytestmark = pytest.mark.soak
STUDIES = 10_000 if SOAK else 2_000
SIGMA, TARGET = 0.003, 1.5


def of(rate: float, studies: int = STUDIES) -> float:
    """Four deviations of the rate found in so many studies: one test in 16,000 fails by chance."""
    return 4 * math.sqrt(rate * (1 - rate) / studies)


def losses(*shape: int, mean: float = TARGET, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, SIGMA, shape)


# ---- the rule


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("effect", [0.0, 0.002, 0.005])
def test_the_rule_of_a_known_sigma_passes_at_its_level_and_with_the_computed_power(n: int, effect: float):
    noise = Noise(SIGMA)
    rule = Rule(TARGET, threshold_at(noise, n))
    found = np.mean([rule.passes(m, n) for m in losses(STUDIES, n, mean=TARGET - effect).mean(1)])
    expected = statistics.power_of_rule(effect, n, noise)
    assert abs(found - expected) < of(expected)
    assert effect or expected == pytest.approx(0.01), "the nominal level where there is no effect"


@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize("effect", [0.0, 0.004])
def test_the_rule_of_an_estimated_sigma_does_too(entries: int, effect: float):
    """σ pooled over entries of 4 seeds, one of which is judged by it."""
    n, passed = 4, 0
    for study in losses(STUDIES, entries, n) - effect:
        noise = pooled(study)
        assert noise and noise.df == entries * (n - 1)
        passed += Rule(TARGET, threshold_at(noise, n)).passes(study[0].mean(), n)
    expected = statistics.power_of_rule(effect, n, Noise(SIGMA, entries * (n - 1)))
    assert abs(passed / STUDIES - expected) < of(expected)
    assert effect or expected == pytest.approx(0.01)


def test_a_target_that_is_an_entrys_mean_does_not_raise_false_positives():
    """Of an entry exactly as good as the one that sets the target; without √(1 + n/m) it would be called better in a
    tenth of all studies or so.
    """
    n, m, passed, naive = 4, 8, 0, 0
    theirs, ours = losses(STUDIES, m), losses(STUDIES, n, seed=1)
    for a, b in zip(theirs, ours, strict=True):
        noise = pooled([a, b])
        assert noise
        passed += Rule(a.mean(), threshold_at(noise, n, target_n=m), m).passes(b.mean(), n)
        naive += Rule(a.mean(), threshold_at(noise, n)).passes(b.mean(), n)
    assert abs(passed / STUDIES - 0.01) < of(0.01)
    assert naive / STUDIES > 0.01 + of(0.01)


def test_the_rule_is_the_tracks():
    """0.004 of 8 runs: the mean that just passes is the target less 0.004/√8 (modded-nanogpt's optimization track)."""
    rule = Rule(3.28, 0.004)
    assert rule.needed(8) == pytest.approx(3.28 - 0.0014142, abs=1e-7)
    assert rule.passes(3.2785, 8) and not rule.passes(3.2787, 8) and not rule.passes(math.inf, 8)
    assert threshold_at(Noise(0.0017), 8) == pytest.approx(0.0017 * 2.3263, rel=1e-4), "z of one in a hundred"


def test_sigma_is_pooled_within_groups_and_leaves_divergence_out():
    groups = [np.array([1.0, 1.2]), np.array([5.0, 5.0, 5.3]), np.array([1.0, math.inf]), np.array([7.0])]
    noise = pooled(groups)
    assert noise and noise.df == 3 and noise.sigma == pytest.approx(math.sqrt((0.02 + 0.06) / 3))
    assert pooled(groups[2:]) is None


def test_the_share_of_seeds_is_found():
    """Seeds of deviation 1 at all horizons beside residuals of deviation ½: 0.8 of the variance.

    Few seeds: the mean over studies of pooled estimates.
    """
    rng = np.random.default_rng(0)
    many = [rng.standard_normal((1, 4)) + 0.5 * rng.standard_normal((5, 4)) for _ in range(4000)]
    assert share_of_seeds(many) == pytest.approx(0.8, abs=0.02)
    assert share_of_seeds([rng.standard_normal((5, 4)) for _ in range(4000)]) == pytest.approx(0, abs=0.02)
    assert share_of_seeds([np.ones((1, 4)), np.array([[1.0, math.inf], [1.0, 2.0]])]) == 1.0, "nothing tells them apart"
    assert share_of_seeds([np.ones((2, 2))]) == 1.0


# ---- intervals and the paired test


def test_intervals_cover_the_mean_in_95_of_100_studies():
    found = np.mean([(i := mean_interval(x)).low <= TARGET <= i.high for x in losses(STUDIES, 4).tolist()])
    assert abs(found - 0.95) < of(0.95)
    assert mean_interval([1.0, math.inf]).value == math.inf
    assert (mean_interval([2.0]).low, mean_interval([2.0]).value, mean_interval([2.0]).high) == (
        -math.inf,
        2.0,
        math.inf,
    )


@pytest.mark.parametrize("effect", [0.0, 0.005])
def test_the_paired_test_finds_a_difference_as_often_as_computed(effect: float):
    """What a seed does to both entries cancels, however large it is."""
    n = 4
    seeds = 10 * losses(STUDIES, n, mean=0, seed=2)
    a, b = losses(STUDIES, n) + seeds, losses(STUDIES, n, seed=1) + effect + seeds
    found = [paired(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    rate = np.mean([p < 0.05 for _, p in found])
    expected = statistics.power_of_pairs(effect, n, SIGMA * math.sqrt(2))
    assert abs(rate - expected) < of(expected)
    assert effect or expected == pytest.approx(0.05)
    covered = np.mean([i.low <= effect <= i.high for i, _ in found])
    assert abs(covered - 0.95) < of(0.95)


def test_the_paired_test_is_scipys_and_says_nothing_of_one_seed_or_a_divergence():
    a, b = [1.0, 1.1, 1.3], [0.9, 1.05, 1.0]
    difference, p = paired(a, b)
    theirs = stats.ttest_rel(b, a)
    assert p == pytest.approx(theirs.pvalue) and difference.value == pytest.approx(-0.15)
    assert (difference.low, difference.high) == pytest.approx(tuple(theirs.confidence_interval()))
    assert math.isnan(paired([1.0], [2.0])[1]) and paired([1.0], [2.0])[0].value == 1.0
    assert math.isnan(paired([1.0, math.inf], [2.0, 3.0])[1])
    assert paired([1.0, 2.0], [1.0, 2.0])[1] == 1.0 and paired([1.0, 2.0], [2.0, 3.0])[1] == 0.0


def test_seeds_for_an_effect_are_the_fewest_with_the_power():
    known = Noise(SIGMA)
    rule, pairs = statistics.seeds_for(0.004, known)
    assert rule and pairs
    assert statistics.power_of_rule(0.004, rule, known) >= 0.8 > statistics.power_of_rule(0.004, rule - 1, known)
    deviation = SIGMA * math.sqrt(2)
    assert (
        statistics.power_of_pairs(0.004, pairs, deviation)
        >= 0.8
        > statistics.power_of_pairs(0.004, pairs - 1, deviation)
    )
    estimated, _ = statistics.seeds_for(0.004, Noise(SIGMA, 3))
    assert estimated and estimated > rule, "an estimated σ takes more"
    assert statistics.seeds_for(1e-6, known, most=10) == (None, None)
    assert (statistics.seeds_for(0.004, known, level=0.001)[0] or 0) > rule, "a stricter level takes more"
    assert (
        statistics.seeds_for(0.004, known, from_entry=True)[0] == statistics.seeds_for(0.004 / math.sqrt(2), known)[0]
    )


def test_the_power_against_an_entrys_mean_is_that_of_an_effect_smaller_by_the_root_of_two():
    """As seeds_for has it; σ given, the target the mean of as many runs."""
    n, effect, noise = 4, 0.006, Noise(SIGMA)
    theirs, ours = losses(STUDIES, n).mean(1), losses(STUDIES, n, mean=TARGET - effect, seed=1).mean(1)
    limit = threshold_at(noise, n, target_n=n)
    rate = np.mean([Rule(a, limit, n).passes(b, n) for a, b in zip(theirs, ours, strict=True)])
    expected = statistics.power_of_rule(effect / math.sqrt(2), n, noise)
    assert abs(rate - expected) < of(expected)


# ---- loss against horizon

STEPS = (160, 240, 320, 400)
FLOOR, SCALE, POWER = 1.0, 12.0, 0.5  # of a power law, as losses fall: 1.949 at 160 steps, 1.6 at 400


def law(steps: Any) -> Any:
    """Of a number or of an array."""
    return FLOOR + SCALE * steps**-POWER


def reaches(level: float) -> float:
    return (SCALE / (level - FLOOR)) ** (1 / POWER)


@pytest.mark.parametrize("at", [165.0, 200.0, 281.5, 395.0])
def test_a_power_law_is_interpolated_to_half_a_percent(at: float):
    """The parabola's error in ln horizon, which is largest between the two shortest of them; no noise."""
    level = law(at)
    x, y = np.log(STEPS), law(np.array(STEPS))
    above, reached = bracket(STEPS, y.tolist(), level)
    assert above and reached and above < at < reached
    found = np.exp(crossing(x, y, level, math.log(reached)))
    assert found == pytest.approx(at, rel=5e-3)


def test_two_horizons_are_a_line_and_nowhere_is_infinite():
    x = np.log([100.0, 400.0])
    assert np.exp(crossing(x, np.array([2.0, 1.0]), 1.5, x[1])) == pytest.approx(200)
    ys, levels = np.array([[2.0, 1.0], [2.0, 1.0], [1.0, 1.0]]), np.array([0.5, 0.2, 0.9])
    assert np.exp(crossing(x, ys, levels, x[1])) == pytest.approx([800, math.inf, math.inf])
    assert crossing(x, np.array([1.0, 1.0]), 1.1, x[1]) == -math.inf


def test_the_rising_side_of_a_parabola_is_no_crossing():
    x = np.log([100.0, 200.0, 400.0])
    y = (x - x[1]) ** 2
    assert np.exp(crossing(x, y, float(y[0]), x[0])) == pytest.approx(100)
    assert crossing(x, y, -0.1, x[1]) == math.inf


def test_a_bracket_is_around_the_shortest_horizon_that_reached_it():
    assert bracket([400, 100, 200, 300], [1.0, 2.0, 1.4, 1.45], 1.42) == (100, 200), "that 300 was above again is noise"
    assert bracket([400, 100], [1.5, math.inf], 1.5) == (100, 400)
    assert bracket([400], [1.6], 1.5) == (400, None) and bracket([400], [1.4], 1.5) == (None, 400)


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("target_n", [None, 4])
def test_intervals_of_the_interpolated_horizon_cover_the_true_one(
    share: float, target_n: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Of 4 seeds, σ estimated from 3 entries' worth, seeds that share `share` of their variance between horizons, and a
    target that has noise of its own.

    2,000 studies (without SOAK 400) of 1,000 draws. The tolerance adds 1 % for what is approximate: percentiles of a
    curve's inverse, and draws.
    """
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    studies, n, df = 2000 if SOAK else 400, 4, 9
    rng = np.random.default_rng(5)
    truth = 283.0
    limit = 0.004
    covered = 0
    for k in range(studies):
        seeds, own = rng.standard_normal((1, n)), rng.standard_normal((len(STEPS), n))
        y = law(np.array(STEPS))[:, None] + SIGMA * (math.sqrt(share) * seeds + math.sqrt(1 - share) * own)
        target = (
            law(truth) + limit / math.sqrt(n) + (SIGMA * rng.standard_normal() / math.sqrt(target_n) if target_n else 0)
        )
        noise = Noise(SIGMA * math.sqrt(rng.chisquare(df) / df), df, share)
        found = horizon(STEPS, y.mean(1).tolist(), n, Rule(target, limit, target_n), noise, seed=k)
        assert found
        interval = found.interval()
        assert interval.low < interval.value < interval.high
        covered += interval.low <= truth <= interval.high
    assert abs(covered / studies - 0.95) < of(0.95, studies) + 0.01


def test_a_horizon_without_noise_or_bracket_has_no_bounds():
    means = law(np.array(STEPS)).tolist()
    rule = Rule(law(283.0), 0.0)
    alone = horizon(STEPS, means, 1, rule, None)
    assert alone and alone.steps == pytest.approx(283, rel=5e-3) and alone.interval().low == -math.inf
    assert horizon(STEPS, means, 1, Rule(law(100.0) + 1, 0.0), None) is None, "all reach it"
    assert horizon(STEPS, means, 1, Rule(1.0, 0.0), None) is None, "none does"
    diverged = horizon(STEPS, [math.inf, *means[1:]], 1, Rule(law(200.0), 0.0), None)
    assert diverged and 160 < diverged.steps <= 240
    assert horizon(STEPS[:2], [math.inf, 1.0], 1, rule, None) is None
    wide = horizon(STEPS, means, 1, Rule(law(390.0), 0.0), Noise(0.2))
    assert wide and wide.interval().high == math.inf, "draws that never reach it"


def test_a_quotient_of_draws_overflows_without_a_warning_and_leaves_a_side_open():
    draws = statistics.quotient(np.full(5, 2.0), np.array([1, 2, 4, 0, np.inf]), np.array([0, 0, 0, 0, 1e4]))
    assert draws[:4].tolist() == [2, 1, 0.5, np.inf] and np.isnan(draws[4])
    assert np.isposinf(bounds(1.0, statistics.quotient(np.ones(99), np.ones(99), np.linspace(-1e4, 1e4, 99))).high)


def test_bounds_hold_the_estimate_and_take_what_tells_nothing_as_open():
    draws = np.linspace(1, 2, 1000)
    assert (bounds(1.5, draws).low, bounds(1.5, draws).high) == pytest.approx((1.025, 1.975), abs=2e-3)
    assert bounds(3.0, draws).high == 3.0
    some = np.where(np.arange(1000) < 100, np.nan, draws)
    assert (bounds(1.5, some).low, bounds(1.5, some).high) == (-math.inf, math.inf)
    assert Horizon(2.0, None).interval().high == math.inf
