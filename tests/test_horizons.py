"""studies/power_law.py on losses whose truth is known, and studies/horizons.py from end to end on a small dataset."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from studies import horizons, power_law, statistics
from studies.horizons import claim, log_seconds_ratio, main
from studies.power_law import Ratios, crossing, ratios
from studies.runs import StudyError

from tests.helpers import QUICK, SOAK, small_dataset
from tests.pictures import check_nothing_is_cut_off, words

STEPS, SEEDS, SIGMA = (100, 400, 1600), 5, 0.01
FLOOR, SCALE, POWER = 1.0, 8.0, 0.35  # 2.60 at 100 steps, 1.98 at 400, 1.60 at 1600


def law(steps: Any, floor: float = FLOOR, power: float = POWER) -> Any:
    return floor + SCALE * np.asarray(steps, dtype=float) ** -power


def advantage(ratio: float, steps: int, losses: np.ndarray, **more: Any) -> Ratios | None:
    """Losses (K,) of an entry without noise against a reference that it equals at `ratio` of its steps."""
    reference = np.full(SEEDS, more.pop("level", law(ratio * steps)))
    horizons = more.pop("horizons", STEPS)
    seconds = np.full(SEEDS, more.pop("log_seconds", 0.0))
    return ratios(horizons, np.tile(losses, (SEEDS, 1)), reference, seconds, steps)


# ---- the power law


@pytest.mark.parametrize("power", [-0.2, 1e-9, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("steps", [(100, 400, 1600), (10, 15, 900)])
def test_a_power_law_is_found_again_between_and_beyond_its_three_horizons(steps: Sequence[int], power: float):
    """One that is curved upwards in ln steps, and a straight line, too."""
    x = np.log(np.array(steps, dtype=float))

    def loss(at: Any) -> Any:
        return 3 - np.sign(power) * 0.5 * (1 - np.exp(-power * (at - x[0]))) / abs(power)

    at = np.array([x[0] - 0.5, *x, x[0] + 0.3, x[2] - 0.4, x[2] + 0.2])
    assert np.allclose(crossing(x, loss(x), loss(at)), at, atol=1e-5)


def test_a_level_that_a_law_does_not_have_is_infinite_and_a_rising_loss_says_nothing():
    x = np.log([1.0, 2.0, 4.0])
    fall, line, dive = [4.0, 3.0, 2.5], [4.0, 3.0, 2.0], [4.0, 3.5, 2.5]  # floors: 2, none; a ceiling of 4.5
    levels = np.array([1.9, 1.9, 4.6])
    assert crossing(x, np.array([fall, line, dive]), levels) == pytest.approx([math.inf, 2.1 * math.log(2), -math.inf])
    rising = np.array([[4.0, 3.0, 3.1], [4.0, 4.2, 3.0], [3.0, 3.0, 2.0], [math.inf, 3.0, 2.0], [4.0, math.inf, 2.0]])
    assert np.isnan(crossing(x, rising, 2.5)).all()


# ---- ratios


@pytest.mark.parametrize("ratio", [0.75, 0.95, 1.3])
@pytest.mark.parametrize("steps", STEPS)
def test_a_known_ratio_of_steps_is_found_and_what_lies_outside_is_marked(ratio: float, steps: int):
    found = advantage(ratio, steps, law(STEPS))
    assert found and found.steps.value == pytest.approx(ratio, rel=1e-6)
    assert found.steps.low == pytest.approx(ratio, rel=1e-6) == found.steps.high
    assert found.extrapolated == (not 100 <= ratio * steps <= 1600)


def test_of_more_horizons_the_three_around_the_loss_are_fitted():
    """Elsewhere the entry's losses follow another law, or a run diverged."""
    steps = (50, 100, 200, 400, 800, 1600)
    losses = law(steps)
    losses[0], losses[-1] = math.inf, 0.1
    found = advantage(0.8, 200, losses, horizons=steps)
    assert found and found.steps.value == pytest.approx(0.8) and not found.extrapolated


def test_seconds_are_the_ratio_of_steps_times_that_of_seconds_a_step():
    found = advantage(0.8, 400, law(STEPS), log_seconds=math.log(1.1))
    assert found and found.seconds.value == pytest.approx(0.88) == found.seconds.high


def test_divergence_and_a_loss_below_the_floor_have_no_ratio():
    diverged = law(STEPS)
    diverged[1] = math.inf
    assert advantage(0.8, 400, diverged) is None
    assert advantage(0.8, 400, law(STEPS), level=math.inf) is None
    assert advantage(0.8, 1600, law(STEPS), level=FLOOR - 0.1) is None
    assert advantage(0.8, 400, law(STEPS)[::-1]) is None


def test_one_seed_has_a_ratio_without_bounds():
    found = ratios(STEPS, law(STEPS)[None], law([320]), np.zeros(1), 400)
    assert found and found.steps.value == pytest.approx(0.8)
    assert (found.steps.low, found.steps.high) == (-math.inf, math.inf)


# ---- intervals


def test_draws_of_means_are_students_and_keep_pairs():
    """The draws of one column have the quantiles of Student's t; equal columns have equal draws."""
    values = np.array([1.0, 2.0, 4.0, 4.5])
    draws = statistics.draws_of_means(np.stack([values, values, -values], 1), seed=0)
    assert draws is not None and np.array_equal(draws[:, 0], draws[:, 1]) and np.allclose(draws[:, 0], -draws[:, 2])
    t = (draws[:, 0] - values.mean()) / stats.sem(values)
    assert stats.kstest(t, "t", args=(3,)).pvalue > 0.01
    assert statistics.draws_of_means(values[None], seed=0) is None


@pytest.mark.soak
@pytest.mark.parametrize(("share", "steps"), [(0.0, 400), (0.8, 100), (0.8, 1600)])
def test_intervals_of_5_seeds_cover_the_true_ratio(share: float, steps: int, monkeypatch: pytest.MonkeyPatch):
    """Whether seeds share most of their noise between entries and horizons or none; the extrapolated ratio too.

    2,000 studies (without SOAK 300) of 1,000 draws; four deviations of a binomial, and 1 % for the curve and the draws.
    Draws that resample 5 seeds cover 83 to 85 %: those of Student are needed.
    """
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    monkeypatch.setattr(power_law, "HALVINGS", 40)
    studies, rng, ratio = 2000 if SOAK else 300, np.random.default_rng(1), 0.85
    covered = agreed = 0
    for _ in range(studies):
        noise = rng.standard_normal((SEEDS, 4)) * math.sqrt(1 - share)
        noise = SIGMA * (noise + math.sqrt(share) * rng.standard_normal((SEEDS, 1)))
        losses, reference = law(STEPS) + noise[:, :3], law(ratio * steps) + noise[:, 3]
        found = ratios(STEPS, losses, reference, np.zeros(SEEDS), steps)
        assert found
        covered += found.steps.low <= ratio <= found.steps.high
        difference, _ = statistics.paired(reference.tolist(), losses[:, STEPS.index(steps)].tolist())
        agreed += (difference.high < 0) == (found.steps.high < 1)
    assert abs(covered / studies - 0.95) < 4 * math.sqrt(0.95 * 0.05 / studies) + 0.01
    assert agreed / studies > 0.97, "the ratio is below 1 where the paired difference is below 0"


# ---- words and the picture


def row(steps: int, high: float | None) -> dict[str, Any]:
    return {"steps": steps, "steps_ratio": None if high is None else {"high": high}}


@pytest.mark.parametrize(
    ("highs", "expected"),
    [
        ((0.8, 0.9, 0.99), "holds up to 1,600 steps"),
        ((0.8, 0.9, 1.0), "holds up to 400 steps; it is not shown at 1,600 steps"),
        ((0.8, math.inf, None), "holds up to 100 steps; it is not shown at 400 and 1,600 steps"),
        ((1.1, 0.9, 0.9), "holds at 400 and 1,600 steps; it is not shown at 100 steps"),
        ((0.9, 1.1, 0.9), "holds at 100 and 1,600 steps; it is not shown at 400 steps"),
        ((1.1, None, 1.2), "is shown at no horizon"),
    ],
)
def test_the_claim_ends_where_an_interval_first_reaches_1(highs: Sequence[float | None], expected: str):
    rows = [row(steps, high) for steps, high in zip(STEPS, highs, strict=True)]
    assert claim("ours", "muon", rows) == f"ours: the advantage over muon {expected}"


def test_the_table_names_what_diverged_and_has_no_ratio_for_it():
    ended = {"steps": 400, "lr": 0.1, "loss": {"mean": 2.0, "low": 1.9, "high": 2.1}}
    nothing = {"mean": None, "low": None, "high": None}
    compared = {"difference": nothing | {"p": None}, "steps_ratio": None, "seconds_ratio": None}
    ratio = {"value": 0.9, "low": None, "high": 1.1, "extrapolated": True}
    difference = {"mean": -0.1, "low": -0.2, "high": 0.0, "p": 0.01}
    rows = [
        ended | {"loss": nothing} | compared,
        ended | {"difference": difference, "steps_ratio": ratio, "seconds_ratio": None},
    ]
    about = {"name": "study", "dataset": "text", "against": "muon", "seeds": [0], "tuned_at": 400, "lr_power": 0.0}
    entries = [{"name": "ours", "horizons": rows, "claim": "ours: it holds", "note": "a note"}]
    entries += [{"name": "muon", "horizons": [ended], "claim": None, "note": ""}]
    lines = horizons.text(about | {"entries": entries, "versions": {"note": None}}).splitlines()
    assert lines[2].split() == ["ours", "400", "0.1", "diverged", "diverged", "none"]
    assert "-0.1000 [-0.2000, +0.0000]" in lines[3] and "0.900 [−∞, 1.100] extrapolated" in lines[3]
    assert lines[4].split() == ["muon", "400", "0.1", "2.0000", "[1.9000,", "2.1000]"]
    assert lines[5:] == ["ours: it holds", "note: ours: a note"]


def test_seconds_are_compared_only_on_one_known_machine():
    def summaries(*seconds: float, hardware: str | None = "a") -> list[dict[str, Any]]:
        return [{"train_seconds": s} | ({"hardware": hardware} if hardware else {}) for s in seconds]

    logs = log_seconds_ratio(summaries(2, 4), summaries(1, 1))
    assert logs is not None and np.allclose(np.exp(logs), [2, 4])
    assert log_seconds_ratio(summaries(2, 4), summaries(1, 1, hardware="b")) is None
    assert log_seconds_ratio(summaries(2, hardware=None), summaries(1, hardware=None)) is None
    assert log_seconds_ratio(summaries(2), summaries(1, 1)) is None, "one of them diverged"


def test_the_picture_has_each_entry_and_tells_what_is_extrapolated(tmp_path: Path, figures: list[Figure]):
    def entry(name: str, values: Sequence[float | None], last: float | None) -> dict[str, Any]:
        interval = {"low": 0.7, "high": last}
        rows = [
            {
                "steps": steps,
                "difference": {"mean": value, "low": -0.1, "high": 0.1},
                "steps_ratio": None if value is None else {"value": value, "extrapolated": steps == 100, **interval},
            }
            for steps, value in zip(STEPS, values, strict=True)
        ]
        return {"name": name, "claim": "it holds", "horizons": rows}

    entries = [entry("ours", [0.8, 0.9, 0.95], 0.99), entry("rich", [0.7, None, 0.8], None)]
    reference = {"name": "muon", "claim": None, "horizons": []}
    study = {"against": "muon", "horizons": list(STEPS), "seeds": [0, 1], "dataset": "text"}
    horizons.plot(study | {"entries": [*entries, reference]}, tmp_path / "horizons.png")
    check_nothing_is_cut_off(figures[0])
    ratio, difference = figures[0].axes
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["muon", "ours", "rich"]
    assert "steps to muon's loss" in ratio.get_ylabel() and "nats" in difference.get_ylabel()
    assert {"100", "400", "1,600"} <= set(words(figures[0]).splitlines())
    hollow = [x for x in ratio.lines if x.get_fillstyle() == "none"]
    assert len(hollow) == 2 and "hollow: extrapolated" in words(figures[0])


# ---- the command


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("horizons with spaces")
    text = small_dataset(root).read_text()
    (root / "ours.toml").write_text(text)
    (root / "adamw.toml").write_text(text.replace("lr = 3.0", 'lr = 0.01\nname = "adamw"'))
    (root / "auto.toml").write_text(text.replace("lr = 3.0", 'lr = "auto"'))
    return root


def call(root: Path, *more: str, names: Sequence[str] = ("ours", "adamw")) -> int:
    where = ("--data.dataset", str(root / "corpora/small"), "--run.dir", str(root / "runs"), "--name", "study")
    argv = ("--against", "adamw", "--horizons", "8", "2", "4", "--tuned-at", "4", "--seeds", "2", "--first-seed", "7")
    return main([*(str(root / f"{n}.toml") for n in names), *argv, *where, *QUICK, *more])


@pytest.mark.parametrize(
    ("more", "names", "message"),
    [
        (("--against", "muon"), ("ours", "adamw"), "--against\n  got: muon\n  allowed: ours, adamw"),
        (("--against", "ours"), ("ours",), "entries\n"),
        (("--horizons", "2", "4", "4"), ("ours", "adamw"), "--horizons\n"),
        (("--horizons", "0", "2", "4"), ("ours", "adamw"), "--horizons\n"),
        (("--seeds", "0"), ("ours", "adamw"), "--seeds, --first-seed"),
        (("--tuned-at", "0"), ("ours", "adamw"), "--tuned-at"),
        (("--lr-power", "nan"), ("ours", "adamw"), "--lr-power"),
        ((), ("auto", "adamw"), "optim.lr\n"),
    ],
)
def test_what_cannot_be_studied_is_refused(root: Path, more: Sequence[str], names: Sequence[str], message: str):
    with pytest.raises(StudyError) as error:
        call(root, *more, names=names)
    assert message in str(error.value)
    assert not (root / "runs").exists()


def test_a_dry_run_tells_the_cost_and_the_same_call_runs_only_what_is_missing(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    """Every run has the rate that the rule carries to its horizon, and the whole schedule of it."""
    folder = root / "runs/study"
    assert call(root, "--lr-power", "0.5", "--dry-run") == 0
    assert "12 runs, 0 of them done" in capsys.readouterr().out and not folder.exists()
    assert call(root, "--lr-power", "0.5") == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["against"] == "adamw" and results["horizons"] == [2, 4, 8] and results["seeds"] == [7, 8]
    ours, adamw = results["entries"]
    for entry, lr in ((ours, 3.0), (adamw, 0.01)):
        for cell, factor in zip(entry["horizons"], (math.sqrt(2), 1, math.sqrt(0.5)), strict=True):
            paths = [folder / f"{entry['name']}.s{cell['steps']}.seed{seed}" for seed in (7, 8)]
            summaries = [json.loads((path / "summary.json").read_text()) for path in paths]
            assert [s["val_loss"] for s in summaries] == cell["losses"]
            assert [s["steps"] for s in summaries] == [cell["steps"]] * 2
            assert cell["lr"] == pytest.approx(lr * factor)
            assert f"lr = {cell['lr']}" in (paths[0] / "config.toml").read_text()
    assert ours["claim"].startswith("ours: the advantage over adamw") and adamw["claim"] is None
    ratio = ours["horizons"][1]["steps_ratio"]
    assert ratio is None or ratio["value"] > 0
    assert ours["horizons"][0]["difference"]["mean"] == pytest.approx(
        np.subtract(ours["horizons"][0]["losses"], adamw["horizons"][0]["losses"]).mean()
    )
    said = capsys.readouterr().out
    assert ours["claim"] in said and "lr · (4 / steps)^0.5" in said and (folder / "horizons.png").stat().st_size
    first = {p: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")}
    assert call(root, "--lr-power", "0.5") == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")} == first and len(first) == 12
    with pytest.raises(StudyError, match=r"optim\.lr"):
        call(root, "--lr-power", "0")
