"""studies/speedrun/: the search for a horizon on losses whose truth is known, and the command from end to end on a
small dataset.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.loader import Dataset
from studies import runs, statistics
from studies.runs import StudyError
from studies.speedrun import budget, search
from studies.speedrun.budget import set_budget
from studies.speedrun.clocks import clock_of, note_of_machines
from studies.speedrun.command import main
from studies.speedrun.entries import Entry, load
from studies.speedrun.search import SearchSettings, search_horizons
from studies.speedrun.tables import steps_to_target, text
from studies.statistics import Noise, Rule, mean_interval, paired, threshold_at
from training import config as configuration
from training.config import Config

from tests.helpers import SOAK, run, small_dataset, start

KILLS = 20 if SOAK else 1
QUICK = ("--train.eval-tokens", "256", "--train.telemetry-every", "0", "--workers", "2")


# ---- the search

BUDGET, SEEDS, SIGMA = 400, 4, 0.003


def law(steps: float) -> float:
    """1.949 at 160 steps, 1.6 at 400."""
    return 1 + 12 / math.sqrt(steps)


def found(rule: Rule, loss: Any, **options: Any) -> dict[int, float]:
    """Every horizon that a search runs, with its mean, in order."""
    means = {BUDGET: loss(BUDGET)}
    steps = search_horizons(BUDGET, means[BUDGET], SEEDS, rule, SearchSettings(**options))
    answer = None
    while True:
        try:
            wanted = steps.send(answer)  # type: ignore[arg-type]
        except StopIteration:
            return means
        assert not set(wanted) & means.keys(), "no horizon twice"
        answer = {h: loss(h) for h in wanted}
        means |= answer


@pytest.mark.parametrize("truth", [170, 222, 283, 339, 397])
def test_a_horizon_is_found_to_a_point_of_the_grid_without_noise(truth: int):
    """The first multiple of 5 that passes, or the next: the interpolation is right to half a percent
    (tests/test_statistics.py).
    """
    rule = Rule(law(truth) + 0.002, 0.004)
    means = found(rule, law)
    passed = min(h for h, y in means.items() if rule.passes(y, SEEDS))
    assert list(means)[:4] == [400, 160, 240, 320] and len(means) <= 4 + search.TRIES
    assert passed % 5 == 0 and truth <= passed < truth + 10


def test_a_target_below_the_fractions_is_bracketed_first():
    means = found(rule := Rule(law(61), 0.0), law, fractions=(0.5,))
    assert list(means)[:5] == [400, 200, 120, 70, 40], "each 0.6 of the one before, on the grid of 5"
    assert min(h for h, y in means.items() if rule.passes(y, SEEDS)) == 65
    assert list(found(Rule(99.0, 0.0), law, fractions=()))[-1] == 5, (
        "a target that everything reaches ends at the grid's first point"
    )


def test_an_entry_that_does_not_reach_the_target_has_no_horizon_but_with_longer_ones():
    rule = Rule(law(600), 0.0)
    assert list(found(rule, law)) == [400]
    means = found(rule, law, longest=2)
    assert (
        list(means)[:3] == [400, 565, 800] and 600 <= min(h for h, y in means.items() if rule.passes(y, SEEDS)) <= 610
    )
    assert list(found(Rule(1.0, 0.0), law, longest=2)) == [400, 565, 800]


def test_a_horizon_that_fails_by_chance_is_tried_higher_up():
    """What lies just above the crossing is unlucky: one point further, then two, and after so many tries the shortest
    that passed is the answer.
    """
    rule = Rule(law(281), 0.0)
    means = found(rule, lambda h: law(281) + 5e-4 if 281 < h < 320 else law(h))
    tried = list(means)[4:]
    assert len(tried) == search.TRIES and tried[0] == 285
    assert tried[1] >= tried[0] + 5 and tried[2] >= tried[1] + 10
    assert min(h for h, y in means.items() if rule.passes(y, SEEDS)) == 320


def test_runs_that_diverge_are_above_the_target():
    rule = Rule(law(283), 0.0)
    means = found(rule, lambda h: math.inf if h < 200 else law(h))
    assert min(h for h, y in means.items() if rule.passes(y, SEEDS)) in (285, 290)
    assert list(found(rule, lambda h: math.inf)) == [400]
    assert len(found(rule, lambda h: math.inf if h < 400 else law(h))) <= 4 + search.TRIES


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize(("pooled", "from_entry"), [(False, False), (True, False), (True, True)])
def test_of_simulated_studies_few_claim_a_horizon_that_does_not_reach_the_target(
    share: float, pooled: bool, from_entry: bool
):
    """1,000 studies of two entries with noise, the rule at its level of 1 %, σ given or pooled over both at the budget,
    the target a number or the other entry's mean. A claim is false where the true loss at that horizon is above the
    true target. Each horizon tried is a test; near the target there are at most as many of them as tries, and so the
    bound is that many percent. On average what is claimed is the horizon that the rule asks for.
    """
    studies, truth = 1000, 283
    rng = np.random.default_rng(3)
    claims, needed = [], []
    for _ in range(studies):
        seeds = math.sqrt(share) * rng.standard_normal(SEEDS)
        loss = lambda h, seeds=seeds: law(h) + SIGMA * (seeds + math.sqrt(1 - share) * rng.standard_normal(SEEDS))  # noqa: E731
        ours, theirs = loss(BUDGET), law(truth) + SIGMA * rng.standard_normal(SEEDS)
        noise = statistics.pooled([ours, theirs]) if pooled else Noise(SIGMA)
        assert noise
        by = SEEDS if from_entry else None
        rule = Rule(theirs.mean() if from_entry else law(truth), threshold_at(noise, SEEDS, target_n=by), by)
        means = found(rule, lambda h, ours=ours, loss=loss: (ours if h == BUDGET else loss(h)).mean())
        claims.append(min(h for h, y in means.items() if rule.passes(y, SEEDS)))
        needed.append((12 / (rule.needed(SEEDS) - 1)) ** 2)
    level = search.TRIES * statistics.RULE_LEVEL
    false = np.mean(np.array(claims) < truth)
    assert false <= level + 4 * math.sqrt(level * (1 - level) / studies)
    assert -3 <= np.mean(claims) - np.mean(needed) <= 8, "a point of the grid is 5 steps"


# ---- entries, budgets, refusals


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speedrun with spaces")
    text = small_dataset(root).read_text()
    (root / "ours.toml").write_text(text)
    (root / "adamw.toml").write_text(text.replace("lr = 3.0", 'lr = 0.01\nname = "adamw"'))
    (root / "sgd.toml").write_text(text.replace("lr = 3.0", 'lr = 1.0\nname = "sgd"'))
    return root


def argv(root: Path, names: Sequence[str], *more: str) -> list[str]:
    where = ("--data.dataset", str(root / "corpora/small"), "--run.dir", str(root / "runs"))
    return [*(str(root / f"{n}.toml") for n in names), *more, *where, *QUICK]


def call(root: Path, names: Sequence[str], *more: str, folder: str = "runs") -> int:
    return main([str(root / folder) if x == str(root / "runs") else x for x in argv(root, names, *more)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seeds", "0"), "--seeds\n  got: 0\n  allowed: 1 or more"),
        (
            ("--budget", "steps=0"),
            "--budget\n  got: steps=0\n  allowed: steps=N, tokens=N or seconds=N, of one step or more",
        ),
        (("--budget", "tokens=100"), "--budget\n  got: tokens=100"),
        (("--budget", "epochs=1"), "--budget\n  got: epochs=1"),
        (("--budget", "steps=1e"), "--budget\n  got: steps=1e"),
        (("--budget", "steps=400.7"), "--budget\n  got: steps=400.7"),
        (("--budget", "steps=1e999"), "--budget\n  got: steps=1e999"),
        (("--threshold", "nan"), "--threshold\n  got: nan\n  allowed: 0 or more, and finite"),
        (("--threshold", "-0.1"), "--threshold\n  got: -0.1"),
        (("--power", "0.1", "--threshold", "0.004"), "--power, --threshold\n  got: ([0.1], 0.004)\n  allowed: --level"),
        (("--target-entry", "soap"), "--target-entry\n  got: 'soap'\n  allowed: ours, adamw, the entries"),
        (
            ("--target-entry", "adamw", "--target", "1"),
            "--target-entry\n  got: 'adamw'\n  allowed: one of --target and --target-entry",
        ),
        (
            ("--horizons", "0.5", "1.5"),
            "--horizons\n  got: [0.5, 1.5]\n  allowed: fractions of the budget, above 0 and below 1",
        ),
        (
            ("--first-seed", "998"),
            "--first-seed, --seeds\n  got: (998, 4)\n  allowed: seeds below 1000, where those of tuning begin",
        ),
        (("--track", "pysource"), "--track\n  got: 'pysource'\n  allowed: pysource-cpu, "),
        (
            ("--grid", "500", "--budget", "steps=400"),
            "--grid\n  got: 500\n  allowed: 1 to 400, the steps of the budget",
        ),
        (
            ("--tune", "ours:optim.lr={0.12345671,0.12345672}"),
            "--tune\n  got: two trials named tune.ours.optim.lr0.123457.s12.seed1000\n  allowed: values that differ",
        ),
        (("--data.holdout", "0.1"), "got: data.holdout = 0.1\n  allowed: 0; tuning holds out for itself"),
        (
            ("--power", "0.1", "--name", "nothing"),
            "--power\n  got: no σ\n  allowed: --sigma, or 2 runs of an entry at the budget",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(root: Path, more: tuple[str, ...], message: str):
    with pytest.raises(StudyError) as error:
        call(root, ("ours", "adamw"), *more)
    assert message in str(error.value)
    assert all(word in str(error.value) for word in ("got:", "allowed:", "fix:"))


def test_options_of_runs_are_checked_as_strictly(root: Path):
    with pytest.raises(configuration.ConfigError, match="unknown option --optim.lrr"):
        call(root, ("ours", "adamw"), "--optim.lrr", "3")


def test_entries_that_differ_in_more_than_the_optimizer_are_refused_or_noted(root: Path):
    text = (root / "ours.toml").read_text()
    for name, old, new, what in (
        (
            "long",
            "block_size = 16",
            "block_size = 32",
            "model.block_size of the entries\n  got: 32 of long\n  allowed: 16, as ours has it",
        ),
        (
            "large",
            "batch_size = 8",
            "batch_size = 16",
            "tokens of a step of the entries\n  got: 256 of large\n  allowed: 128",
        ),
        (
            "less",
            "eval_tokens = 512",
            "eval_tokens = 256",
            "train.eval_tokens of the entries\n  got: 256 of less\n  allowed: 512",
        ),
    ):
        (root / f"{name}.toml").write_text(text.replace(old, new))
        with pytest.raises(StudyError) as error:
            load([str(root / "ours.toml"), str(root / f"{name}.toml")], [], allow_different=False)
        assert what in str(error.value) and "--allow-different" in str(error.value)
        assert len(load([str(root / "ours.toml"), str(root / f"{name}.toml")], [], allow_different=True)) == 2
    (root / "deep.toml").write_text(
        text.replace("n_layer = 2", "n_layer = 3").replace("lr = 3.0", "lr = 2.0").replace("[run]", "[run]\nseed = 5")
    )
    ours, deep = load([str(root / "ours.toml"), str(root / "deep.toml")], ["--train.steps", "9"], allow_different=False)
    assert (ours.notes, deep.notes) == ([], ["beside its optimizer, differs from ours: model.n_layer 3 (2)"])
    with pytest.raises(StudyError, match="entries\n  got: ours, ours\n  allowed: one of each name"):
        load([str(root / "ours.toml")] * 2, [], allow_different=False)


def test_a_budget_is_steps_of_each_entry():
    entry = lambda **t: Entry("x", "x.toml", configuration.from_dict(Config, {"train": t, "model": {"block_size": 16}}))  # noqa: E731
    short, long = entry(batch_size=8, steps=5), entry(batch_size=16, steps=5)
    assert set_budget("tokens=1.28e3", [short, long]) == ("tokens", 1280) and (short.steps, long.steps) == (
        10,
        5,
    )
    assert set_budget(None, [short, long]) == ("steps", 5) and (short.steps, long.steps) == (5, 5)
    with pytest.raises(StudyError, match="--budget\n  got: none, and train.steps 5 of x, 7 of x"):
        set_budget(None, [short, entry(steps=7)])


def test_the_command_ends_with_code_2_where_it_refuses(root: Path):
    code, _, err = run(root, "nowhere.toml", script=str(command(root)))
    assert code == 2 and err.startswith("error: configuration file\n  got: nowhere.toml")


# ---- the command


def command(root: Path) -> Path:
    """python -m studies.speedrun, without the report, which has tests of its own."""
    path = root / "command.py"
    path.write_text(
        "import runpy, studies.report.page\nstudies.report.page.write = lambda results, folder: []\n"
        "runpy.run_module('studies.speedrun', run_name='__main__', alter_sys=True)\n"
    )
    return path


STEPS = 24
STUDY = (
    *(
        "--name",
        "study",
        "--seeds",
        "2",
        "--budget",
        f"steps={STEPS}",
        "--target-entry",
        "adamw",
        "--sigma",
        "0.01",
        "--horizons",
        "0.5",
        "0.7",
    ),
    *("--tune", "ours:optim.lr=log(1,9,3)", "adamw:optim.lr={0.001,0.003,0.01}", "--tuned-into"),
)
NAMES = ("ours", "adamw", "sgd")


@pytest.fixture(scope="module")
def study(root: Path) -> dict[str, Any]:
    assert call(root, NAMES, *STUDY, str(root / "tuned"), "--schedule.cooldown", "0.5") == 0
    return json.loads((root / "runs/study/results.json").read_text())


def written(folder: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")}


def test_results_are_those_of_the_runs(root: Path, study: dict[str, Any]):
    folder = root / "runs/study"
    assert [e["name"] for e in study["entries"]] == list(NAMES) and study["seeds"] == [0, 1]
    for e in study["entries"]:
        for r in e["runs"]:
            summary = json.loads((folder / r["path"] / "summary.json").read_text())
            made = configuration.load([str(folder / r["path"] / "config.toml")])
            assert (r["loss"], r["train_seconds"], r["peak_memory_bytes"]) == tuple(
                summary[k] for k in ("val_loss", "train_seconds", "peak_memory_bytes")
            )
            assert (made.train.steps, made.run.seed, made.data.holdout) == (r["steps"], r["seed"], 0), (
                "judged on the validation split"
            )
            assert made.optim.lr == (e["tuned"] or {"optim.lr": made.optim.lr})["optim.lr"]
            assert [p[0] for p in r["curve"]] == sorted(
                {*range(0, r["steps"] + 1, max(1, r["steps"] // 5)), r["steps"]}
            )
            assert r["curve"][-1][3] == r["loss"] and [p[1] for p in r["curve"]] == [128 * p[0] for p in r["curve"]]
            metrics = [json.loads(line) for line in (folder / r["path"] / "metrics.jsonl").read_text().splitlines()]
            assert r["training"] == [
                [m[k] for k in ("step", "tokens", "train_seconds", "loss")] for m in metrics if "loss" in m
            ]
            assert len(r["training"]) == r["steps"]
        at, horizon = e["at_budget"], e["horizons"][-1]
        losses = [r["loss"] for r in e["runs"] if r["steps"] == STEPS]
        told = mean_interval(losses)
        assert (at["loss"]["mean"], at["loss"]["low"], at["loss"]["high"]) == pytest.approx(
            (told.value, told.low, told.high)
        )
        assert (horizon["steps"], horizon["mean"], at["tokens"]) == (STEPS, pytest.approx(told.value), STEPS * 128)
        assert e["receipt"] == (folder / f"{e['name']}.s{STEPS}.seed0/receipt.txt").read_text()
        assert (
            e["config"]["optim.name"] == {"ours": "dualized"}.get(e["name"], e["name"])
            and "run.name" not in e["config"]
        )
        assert e["params"] == json.loads((folder / f"{e['name']}.s{STEPS}.seed0/summary.json").read_text())["params"]


def test_a_race_says_that_muon_iterates_in_float32(root: Path, capsys: pytest.CaptureFixture[str]):
    text = (root / "ours.toml").read_text().replace("lr = 3.0", 'lr = 0.02\nname = "muon_adamw"')
    for dtype in ("float32", "bfloat16"):
        (root / f"{dtype}.toml").write_text(f'{text}\n[optim.polar]\ndtype = "{dtype}"\n')
    assert call(root, ("float32", "bfloat16"), "--name", "muons", "--seeds", "1", "--budget", "steps=1") == 0
    notes = [e["note"] for e in json.loads((root / "runs/muons/results.json").read_text())["entries"]]
    assert ["Muon's iteration in float32" in note for note in notes] == [True, False]
    assert "note: float32: Muon's iteration in float32, torch's is in bfloat16" in capsys.readouterr().out.replace(
        "note: float32: not tuned\n", ""
    )


def test_the_target_is_the_entrys_mean_and_the_rule_knows_that_it_has_noise(study: dict[str, Any]):
    ours, adamw, sgd = study["entries"]
    assert study["target"] == adamw["at_budget"]["loss"]["mean"] and study["target_from"] == "adamw"
    rule = study["rule"]
    assert (rule["sigma"], rule["sigma_from"]) == (0.01, "given")
    assert rule["threshold"] == pytest.approx(2.3263 * 0.01 * math.sqrt(2), rel=1e-4), "z of 1 %, and √(1 + 2/2)"
    assert adamw["to_target"]["steps"] == STEPS and "sets the target" in adamw["note"]
    assert [adamw["to_target"][k] for k in ("low", "interpolated", "high")] == [None] * 3, (
        "by definition, not by a measurement"
    )
    assert adamw["horizons"][0]["passes"] is None and [h["steps"] for h in adamw["horizons"]] == [STEPS]
    for h in ours["horizons"]:
        assert h["statistic"] == pytest.approx((study["target"] - h["mean"]) * math.sqrt(2))
        assert h["passes"] == (h["statistic"] >= rule["threshold"])
    assert ours["to_target"], "tuned, it is well ahead of AdamW on this text"
    passed = min(h["steps"] for h in ours["horizons"] if h["passes"])
    assert (
        ours["to_target"]["steps"] == passed
        and ours["to_target"]["tokens"] == 128 * passed
        and ours["to_target"]["confirmed"]
    )
    seconds = [r["train_seconds"] for r in ours["runs"] if r["steps"] == passed]
    assert ours["to_target"]["train_seconds"] == pytest.approx(np.mean(seconds))
    assert ours["to_target"]["low"] <= ours["to_target"]["interpolated"] <= ours["to_target"]["high"]
    assert sgd["to_target"] is None and "not tuned" in sgd["note"] and sgd["tuned"] is None and sgd["trials"] == []


def test_every_pair_is_compared_and_b_is_the_one_named_first(study: dict[str, Any]):
    assert [(p["b"], p["a"]) for p in study["pairs"]] == [("ours", "adamw"), ("ours", "sgd"), ("adamw", "sgd")]
    losses = {e["name"]: [r["loss"] for r in e["runs"] if r["steps"] == STEPS] for e in study["entries"]}
    for pair in study["pairs"]:
        difference, p = paired(losses[pair["a"]], losses[pair["b"]])
        assert pair["loss_difference"] == pytest.approx(
            {"mean": difference.value, "low": difference.low, "high": difference.high, "p": p}
        )
    ratio = study["pairs"][0]["steps_ratio"]
    assert (
        ratio["value"] == study["entries"][0]["to_target"]["steps"] / STEPS
        and ratio["low"] <= ratio["value"] <= ratio["high"]
    )
    assert study["pairs"][0]["seconds_ratio"]["value"] > 0 and study["pairs"][1]["steps_ratio"] is None


def test_trials_are_judged_on_what_was_held_out_by_seeds_of_their_own(root: Path, study: dict[str, Any]):
    folder = root / "runs/study"
    tokens = {
        k: s.tokens
        for k, s in Dataset(configuration.load([str(root / "tuned/ours.toml")]).data).manifest.splits.items()
    }
    for e in study["entries"][:2]:
        assert len(e["trials"]) == 3, "equal budgets"
        for trial in e["trials"]:
            (path,) = trial["path"]
            made = configuration.load([str(folder / path / "config.toml")])
            assert (made.run.seed, made.train.steps, made.data.dataset) == (1000, STEPS, str(root / "corpora/small"))
            assert (
                made.data.holdout == min(0.1, tokens["val"] / tokens["train"])
                and made.optim.lr == trial["values"]["optim.lr"]
            )
            assert (
                trial["losses"]
                == [trial["loss"]]
                == [json.loads((folder / path / "summary.json").read_text())["val_loss"]]
            )
        assert e["tuned"] == min(e["trials"], key=lambda t: t["loss"])["values"]
        tuned = configuration.load([str(root / f"tuned/{e['name']}.toml")])
        assert (
            tuned.optim.lr == e["tuned"]["optim.lr"] and tuned.data.holdout == 0 and tuned.run.dir == str(root / "runs")
        )


def test_the_same_call_again_runs_nothing_and_other_values_under_its_name_are_refused(
    root: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    there = written(root / "runs/study")
    assert {p.name for p in (root / "runs/study").iterdir() if p.is_file()} >= {
        "results.json",
        "report.html",
        "report.png",
    }
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [folder / "report.html"])
    capsys.readouterr()
    assert call(root, NAMES, *STUDY, str(root / "tuned"), "--schedule.cooldown", "0.5") == 0
    out = capsys.readouterr().out
    assert written(root / "runs/study") == there
    assert json.loads((root / "runs/study/results.json").read_text()) == study, "to the last digit, the seconds too"
    for said in (
        ": about ",
        "written: ",
        "ours against adamw",
        "note: sgd: not tuned",
        "one-sided level 0.01",
        "n = 2",
    ):
        assert said in out
    with pytest.raises(StudyError, match="got: optim.beta = 0.5\n  allowed: 0.95, as the run that is there had it"):
        call(root, NAMES, *STUDY, str(root / "tuned"), "--optim.beta", "0.5")


def test_the_cost_alone_is_printed_and_nothing_runs(root: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        call(
            root,
            NAMES,
            "--dry-run",
            "--name",
            "dry",
            "--target",
            "1",
            "--tune",
            "optim.lr=log(0.1,1,2)",
            "--seeds",
            "2",
        )
        == 0
    )
    assert call(root, NAMES, "--dry-run", "--name", "dry", "--budget", "seconds=5") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{root / 'runs/dry'}: about 48 runs (6 to tune), "), (
        "6 + 3 entries · 2 seeds · (1 + 3 + 3 horizons)"
    )
    assert ": about 12 runs (0 to tune), " in second and second.endswith(
        "2 at a time; what is done already is not run again"
    )
    assert "; more if the shortest of --horizons reaches the target; " in first, (
        "how far below them the search goes depends on the losses"
    )
    assert not (root / "runs/dry").exists()


def test_power_is_told_of_a_given_sigma_or_of_the_runs_that_are_there(
    root: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert call(root, NAMES, "--power", "0.005", "--sigma", "0.003") == 0
    rule, pairs = statistics.seeds_for(0.005, Noise(0.003), entries=3)
    assert (
        "σ = 0.003, level 0.01, the target a number; seeds that find an effect with 80 % chance:\n"
        f"  0.005 nats: {rule} by the rule, {pairs} by " in capsys.readouterr().out
    )
    assert call(root, NAMES, "--power", "0.005", "--sigma", "0.003", "--level", "0.001", "--target-entry", "adamw") == 0
    rule, _ = statistics.seeds_for(0.005, Noise(0.003), entries=3, level=0.001, from_entry=True)
    out = capsys.readouterr().out
    assert "level 0.001, the target an entry's mean" in out and f"0.005 nats: {rule} by the rule" in out
    assert call(root, NAMES, "--power", "0.1", "--name", "study", "--budget", f"steps={STEPS}", "--seeds", "2") == 0
    losses = [[r["loss"] for r in e["runs"] if r["steps"] == STEPS] for e in study["entries"]]
    noise = statistics.pooled([np.array(y) for y in losses])
    assert noise and f"σ = {noise.sigma:.2g}, " in capsys.readouterr().out


def test_one_seed_has_no_intervals_and_says_so(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The shortest race. Its σ is unknown: a mean at or under the target passes, unconfirmed."""
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [folder / "report.html"])
    race = (
        "--name",
        "race",
        "--seeds",
        "1",
        "--budget",
        "tokens=2560",
        "--target",
        "2.6",
        "--horizons",
        "0.5",
        "--tries",
        "1",
    )
    assert call(root, ("ours", "adamw"), *race) == 0
    out = capsys.readouterr().out
    assert "one seed: no intervals and no test; these are single runs" in out and " unconfirmed" in out
    found = json.loads((root / "runs/race/results.json").read_text())
    ours = found["entries"][0]
    assert found["rule"]["sigma"] is None and found["rule"]["threshold"] == 0 and found["rule"]["sigma_from"] is None
    assert ours["at_budget"]["steps"] == 20 and ours["at_budget"]["loss"]["low"] is None
    assert (
        ours["to_target"]["confirmed"] is False
        and ours["to_target"]["low"] is None
        and "σ unknown: a mean at or under the target, which is no test" in ours["note"]
    )
    assert (
        found["pairs"][0]["loss_difference"]["p"] is None and found["pairs"][0]["loss_difference"]["mean"] is not None
    )


def test_a_run_that_diverges_has_no_loss_and_never_passes(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [])
    (root / "wild.toml").write_text(
        (root / "sgd.toml").read_text().replace("lr = 1.0", "lr = 1e30").replace("steps = 12", "steps = 6")
    )
    call(
        root,
        ("wild", "adamw"),
        "--name",
        "wild",
        "--seeds",
        "2",
        "--budget",
        "steps=6",
        "--target",
        "9",
        "--horizons",
        "--tries",
        "1",
    )
    found = json.loads((root / "runs/wild/results.json").read_text())
    wild, adamw = found["entries"]
    assert (
        [r["loss"] for r in wild["runs"]] == [None, None]
        and wild["horizons"][0]["passes"] is False
        and wild["to_target"] is None
    )
    assert wild["at_budget"]["loss"]["mean"] is None and "2 of 2 runs diverged: infinite losses" in wild["note"]
    assert adamw["to_target"], "σ is that of the entry that can pass"
    assert found["pairs"][0]["loss_difference"] == {"mean": None, "low": None, "high": None, "p": None}
    assert "diverged" in capsys.readouterr().out


def test_a_budget_of_seconds_is_steps_by_a_probe_that_runs_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [])
    monkeypatch.setattr(budget, "PROBE", 6)
    clock = ("ours", "adamw"), "--name", "clock", "--seeds", "1", "--budget", "seconds=0.05"
    assert call(root, *clock) == 0
    first = json.loads((root / "runs/clock/results.json").read_text())
    for e in first["entries"]:
        probe = [
            json.loads(line) for line in (root / f"runs/clock/probe.{e['name']}/metrics.jsonl").read_text().splitlines()
        ]
        seconds = {r["step"]: r["train_seconds"] for r in probe if "loss" in r}
        assert e["at_budget"]["steps"] == max(1, int(0.05 * 3 / (seconds[6] - seconds[3])))
    there = written(root / "runs/clock")
    assert call(root, *clock) == 0 and written(root / "runs/clock") == there
    assert json.loads((root / "runs/clock/results.json").read_text()) == first
    runs_with_lines = [json.loads(line)["run"] for line in (root / "runs/clock/runs.jsonl").read_text().splitlines()]
    assert len(runs_with_lines) == 2 and not any("probe" in name for name in runs_with_lines), (
        "a probe tells the clock of one machine"
    )


# ---- machines


def on_another_machine(line: dict[str, Any]) -> dict[str, Any]:
    if "summary" not in line:
        return line
    return line | {"summary": line["summary"] | {"hardware": "another", "train_seconds": 100.0}}


def test_a_study_goes_on_from_its_lines_with_the_same_results(
    root: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Without any run folder. Only losses of training batches are lost; receipts are the code's own."""
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [])
    moved = root / "moved/runs/study"
    moved.mkdir(parents=True)
    shutil.copy(root / "runs/study/runs.jsonl", moved)
    more = (*STUDY, str(root / "tuned"), "--schedule.cooldown", "0.5")
    assert call(root, NAMES, *more, "--dry-run", folder="moved/runs") == 0
    names = {p.parent.name for p in (root / "runs/study").glob("*/summary.json")}
    assert f"{moved / 'runs.jsonl'}: the lines of {len(names)} runs, which are done\n" in capsys.readouterr().out
    assert [p.name for p in moved.iterdir()] == ["runs.jsonl"]
    assert call(root, NAMES, *more, folder="moved/runs") == 0
    assert {p.parent.name for p in moved.glob("*/restored.txt")} == names
    assert not any((moved / "configs").iterdir()), "nothing was trained"
    restored = json.loads((moved / "results.json").read_text())
    for e in restored["entries"]:
        total = len(e["runs"])
        e["note"] = "; ".join(
            n for n in e["note"].split("; ") if n != f"{total} of {total} runs are restored: evaluations alone"
        )
    expected = json.loads(json.dumps(study))
    for e in expected["entries"]:
        for r in e["runs"]:
            assert r["training"]
            r["training"] = []
    assert restored | {"command": ""} == expected | {"command": ""}, "to the last digit, the seconds too"


def timed(name: str, steps: int, *clocks: tuple[str, float]) -> dict[str, Any]:
    """An entry of results.json as far as clocks read it: a run for each (machine, training seconds)."""
    entry_runs = [{"steps": steps, "hardware": m, "train_seconds": s, "loss": 1.0} for m, s in clocks]
    return {"name": name, "to_target": {"steps": steps}, "runs": entry_runs}


def test_seconds_are_compared_on_one_machine_alone():
    one, two, three = ("A", 1.0), ("A", 2.0), ("B", 50.0)
    both = timed("b", 3, one, two), timed("a", 4, two, one)
    clock = clock_of(*both)
    assert clock and (clock.machine, clock.b, clock.a) == ("A", [1.0, 2.0], [2.0, 1.0])
    assert note_of_machines(both) is None
    mixed = timed("b", 3, one, three, two, three, three), timed("a", 4, one, two, three)
    clock = clock_of(*mixed)
    assert clock and (clock.machine, clock.b, clock.a) == ("A", [1.0, 2.0], [1.0, 2.0]), "B has one run of a"
    assert note_of_machines(mixed) == (
        "the judged runs are of 2 machines (A | B), over which mean seconds are taken;"
        " the ratio of seconds of b against a: A alone"
    )
    apart = timed("b", 3, one, two, three), timed("a", 4, three, three, one)
    assert clock_of(*apart) is None
    assert (note_of_machines(apart) or "").endswith("b against a: none has 2 runs of each")
    assert clock_of(timed("b", 3, one), timed("a", 4, two)), "one run of each, of one machine"
    assert clock_of(timed("b", 3, one, two), timed("a", 4, three, three)) is None


def test_a_study_of_two_machines_has_no_ratio_of_seconds_and_says_so(
    root: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """One of the two seeds of each horizon was trained elsewhere: losses are compared as they are."""
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [])
    moved = root / "two machines/study"
    moved.mkdir(parents=True)
    by_run = [json.loads(line) for line in (root / "runs/study/runs.jsonl").read_text().splitlines()]
    changed = [on_another_machine(line) if line["run"].endswith("seed1") else line for line in by_run]
    (moved / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    more = (*STUDY, str(root / "tuned"), "--schedule.cooldown", "0.5")
    assert call(root, NAMES, *more, folder="two machines") == 0
    mixed = json.loads((moved / "results.json").read_text())
    for was, now in zip(study["pairs"], mixed["pairs"], strict=True):
        assert now == was | {"seconds_ratio": None}
    assert any(pair["seconds_ratio"] for pair in study["pairs"])
    said = capsys.readouterr().out
    for words in ("the judged runs are of 2 machines (", "ours against adamw: none has 2 runs of each"):
        assert words in mixed["versions"]["note"] and words in said
    assert "another" in mixed["hardware"]


def test_runs_of_two_ranks_are_judged_as_others(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Real processes, gloo.

    The global batch does not depend on ranks: losses are those of one process but for the order of sums.
    """
    monkeypatch.setattr("studies.report.page.write", lambda results, folder: [])
    for name, ranks in (("two", "2"), ("one", "1")):
        more = (
            "--seeds",
            "1",
            "--budget",
            "steps=4",
            "--nproc",
            ranks,
            "--model.dropout",
            "0",
            "--train.gradient-accumulation-steps",
            "1",
        )
        assert call(root, ("ours",), "--name", name, *more) == 0
    two, one = (json.loads((root / f"runs/{name}/results.json").read_text()) for name in ("two", "one"))
    assert json.loads((root / "runs/two/ours.s4.seed0/summary.json").read_text())["world_size"] == 2
    assert two["entries"][0]["runs"][0]["loss"] == pytest.approx(one["entries"][0]["runs"][0]["loss"], abs=1e-3)
    assert (two["ranks"], one["ranks"]) == (2, 1)


# ---- kills


def timeless(x: Any, key: str = "") -> Any:
    """Results without what a clock said: fields whose key has "seconds" or "peak_memory" in it, and the third column of
    curves and lines of training.
    """
    if isinstance(x, dict):
        return {k: timeless(v, k) for k, v in x.items() if "seconds" not in k and "peak_memory" not in k}
    if key in ("curve", "training"):
        return [[*point[:2], *point[3:]] for point in x]
    return [timeless(v) for v in x] if isinstance(x, list) else x


@pytest.mark.soak
def test_a_study_killed_at_random_moments_ends_with_the_same_results(root: Path):
    """kill −9 of the study, whose runs end with it; a study that came to its end before it was killed is begun anew."""
    script = str(command(root))
    short = "--name killed --seeds 1 --budget steps=12 --target 2.75 --sigma 0.02 --horizons 0.5 --tries 1 --tune ours:optim.lr={2,4}"
    args, folder = argv(root, ("ours", "adamw"), *short.split()), root / "runs/killed"

    def to_its_end() -> Any:
        process = start(root, *args, script=script)
        process.join(1800)  # of less than a dozen short runs, which take ten seconds where nothing else runs
        assert process.exitcode == 0, (root / "stderr").read_text()
        found = timeless(json.loads((folder / "results.json").read_text()))
        return {
            k: v for k, v in found.items() if k != "versions"
        }  # of the tree, which may have been committed meanwhile

    whole = to_its_end()
    assert whole["entries"][0]["to_target"] and len(whole["entries"][0]["horizons"]) > 2, "the search is part of it"
    shutil.rmtree(folder)
    rng, progress = np.random.default_rng(0), []
    for kill in range(KILLS):
        process = start(root, *args, script=script)
        wanted = len(written(folder)) + rng.integers(0, 3)  # on its progress, whatever else the machine does
        while process.exitcode is None and len(written(folder)) < wanted:
            process.join(0.05)
        process.join(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        progress.append(len(written(folder)))
        if (folder / "results.json").is_file() or kill == KILLS - 1:
            assert to_its_end() == whole, f"after kill {kill}"
            shutil.rmtree(folder)
    assert any(progress), f"runs that were done before a kill: {progress}"


# ---- what a reader is told


def test_a_point_of_the_grid_outside_the_interval_of_the_interpolated_horizon_is_told_as_that():
    to = {"steps": 292, "interpolated": 287.4, "low": 285.0, "high": 290.1, "confirmed": True}
    assert steps_to_target(to, sets_target=False) == "292 (interpolated 287.4 [285.0, 290.1])"
    assert steps_to_target(to | {"interpolated": None, "confirmed": False}, sets_target=False) == "292 unconfirmed"
    assert steps_to_target(to | {"interpolated": None}, sets_target=True) == "292 sets the target", (
        "by definition, nothing is interpolated"
    )


def test_every_version_that_made_a_run_is_told():
    one, two = {"commit": "abc", "dirty": False, "torch": "2.1"}, {"commit": "def", "dirty": True, "torch": "2.1"}
    alone = runs.versions([one, one])
    assert (alone["torch"], alone["nanodual"], alone["note"]) == ("2.1", "commit abc", None)
    both = runs.versions([two, one, two])
    assert (both["torch"], both["nanodual"]) == ("2.1", "commit abc, commit def (dirty)")
    assert (
        both["note"]
        == "the judged runs are of 2 versions: commit abc with torch 2.1; commit def (dirty) with torch 2.1"
    )
    assert runs.versions([{"commit": None, "dirty": None, "torch": "2.1"}])["nanodual"] is None


def test_a_text_tells_every_figure(study: dict[str, Any]):
    said = text(study)
    ours, adamw, _ = study["entries"]
    for figure in (
        f"target {study['target']:.4f} (the mean of adamw at the budget)",
        f"≥ {study['rule']['threshold']:.3g}, σ = 0.01 given; one-sided level 0.01",
        f"{ours['at_budget']['loss']['mean']:.4f} [{ours['at_budget']['loss']['low']:.4f}, {ours['at_budget']['loss']['high']:.4f}]",
        f"{ours['to_target']['tokens']:,}",
        f"{ours['to_target']['steps']} (interpolated {ours['to_target']['interpolated']:.1f} [",
        f"lr {ours['tuned']['optim.lr']:g}",
        f"{study['pairs'][0]['steps_ratio']['value']:.3f} [",
        f"{adamw['at_budget']['peak_memory_bytes'] / 2**20:.0f} MiB",
    ):
        assert figure in said
    assert "unconfirmed" not in said and "diverged" not in said


def test_places_are_workers_or_groups_of_gpus():
    assert runs.places(3) == [runs.Place()] * 3
    assert [p.gpus for p in runs.places(7, 2, ["0", "1", "4", "5", "6"])] == ["0,1", "4,5"], "the odd one is left over"
    with pytest.raises(StudyError, match="--gpus, --nproc\n  got: 1 GPUs, 2 ranks a run\n  allowed: a GPU a rank"):
        runs.places(1, 2, ["0"])
    one, two = runs.Place(2, "0,1").environments()
    assert (one["RANK"], two["RANK"], one["WORLD_SIZE"], one["CUDA_VISIBLE_DEVICES"]) == ("0", "1", "2", "0,1")
    assert one["MASTER_PORT"] == two["MASTER_PORT"] and runs.Place().environments() == [{}]
