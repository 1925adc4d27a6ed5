"""Which of these configurations gets there sooner? Optimizers side by side, with the statistics of the answer.

    python -m studies.speedrun dualized.toml adamw.toml --seeds 4 --target 1.52 --budget steps=400
    python -m studies.speedrun dualized.toml adamw.toml --target-entry adamw --tune "adamw:optim.lr=log(1e-3,1e-2,8)" "dualized:optim.lr=log(1,10,8)"
    python -m studies.speedrun dualized.toml adamw.toml --sigma 0.002 --power 0.005       (how many seeds does that take?)

An entry is a configuration, named by its file. Other options, --section.key value, change every entry, as train_gpt.py takes them. Seeds and with them the order of
data are the same for all entries. What is measured: the loss at the end of the budget; and the steps to a target, which are the shortest horizon (a run with its whole
schedule) whose mean end loss over the seeds passes the rule (target − mean) · √n ≥ threshold, never the first crossing on a longer schedule (`search` says how it is found).

The folder runs/NAME has a run folder for each training, results.json, report.html and report.png. The same call again goes on where it was stopped. docs/speedrun.md defines each figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loader import DataConfig, Dataset
from optim.receipt import aligned
from training import config as configuration
from training.config import Config

from .. import runs, statistics, tuning
from ..intervals import LEVEL, Interval
from ..record_book.command import TRACKS
from ..statistics import Horizon, Noise, Rule

SCHEMA = (
    2  # 1: lines of training without their seconds, an interval of the steps that set the target
)
HORIZONS = (
    0.4,
    0.6,
    0.8,
)  # of the budget: few enough to pay for, close enough for a parabola (tests/test_statistics.py)
GRID = 80  # points of the budget that a horizon is rounded up to: 5 steps of 400
SHORTER = 0.6  # while the shortest horizon reaches the target, the next is this much of it
TRIES = 3  # horizons that are run to confirm the interpolated one
PROBE = (
    50  # steps whose second half tells the training seconds of one, where the budget is in seconds
)
TUNE_SEEDS = 1000  # seeds of tuning runs begin here, those of judged runs end before
HOLDOUT = 0.1  # at most, of the training split; the validation split's length if that is less


# ---- entries


@dataclass
class Entry:
    """A configuration that takes part. steps: its budget. tuned: the values of its best trial, None without trials."""

    name: str
    path: str
    config: Config
    steps: int = 0
    tuned: dict[str, Any] | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def job(self, name: str, folder: Path, **changes: Any) -> runs.Job:
        """A run of the study: nothing is resumed, and so nothing kept."""
        return runs.job(
            self.config,
            name,
            folder,
            **{
                "train.keep_checkpoints": 0,
                "train.sample_tokens": 0,
                "train.pictures": False,
                **changes,
            },
        )

    def run_name(self, steps: int, seed: int) -> str:
        return f"{self.name}.s{steps}.seed{seed}"

    def judged(self, steps: int, seed: int, folder: Path) -> runs.Job:
        """With about five evaluations on its way, which the training clock does not count."""
        changes = {"run.seed": seed, "train.steps": steps, "train.eval_every": max(1, steps // 5)}
        return self.job(self.run_name(steps, seed), folder, **changes, **(self.tuned or {}))


def load(paths: Sequence[str], options: Sequence[str], *, allow_different: bool) -> list[Entry]:
    """Entries that can be compared: the same data, tokens in a step, context and measure. Other differences but the optimizer's are noted."""
    entries = [Entry(Path(p).stem, p, configuration.load([p, *options])) for p in paths]
    names = [e.name for e in entries]
    if len(set(names)) < len(names):
        raise runs.StudyError(
            "entries", got=", ".join(names), allowed="one of each name", fix="rename a file"
        )
    first = entries[0]
    for entry in entries:
        if entry.config.data.holdout:
            raise runs.StudyError(
                entry.path,
                got=f"data.holdout = {entry.config.data.holdout}",
                allowed="0; tuning holds out for itself",
                fix="leave it out, and --holdout",
            )
        for what, of in MUST_AGREE.items():
            if of(entry.config) != of(first.config) and not allow_different:
                raise runs.StudyError(
                    f"{what} of the entries",
                    got=f"{of(entry.config)} of {entry.name}",
                    allowed=f"{of(first.config)}, as {first.name} has it",
                    fix="the same for all, or --allow-different",
                )
        there = configuration.flat(first.config)
        apart = [
            f"{key} {_said(value)} ({_said(there[key])})"
            for key, value in configuration.flat(entry.config).items()
            if value != there[key]
            and not key.startswith(
                (*OPTIMIZER, "run.seed", "train.steps", "train.eval_every", *runs.NEUTRAL)
            )
        ]
        if apart:
            entry.notes.append(
                f"beside its optimizer, differs from {first.name}: {', '.join(apart)}"
            )
    return entries


OPTIMIZER = ("optim.", "schedule.", "baseline.")  # whose settings are an entry's own
MUST_AGREE: dict[str, Callable[[Config], Any]] = {
    "data.dataset": lambda c: c.data.dataset,
    "model.block_size": lambda c: c.model.block_size,
    "tokens of a step": lambda c: tokens_per_step(c),
    "train.eval_tokens": lambda c: c.train.eval_tokens,
}


def tokens_per_step(config: Config) -> int:
    return config.train.batch_size * config.model.block_size


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- the budget


def budget_of(text: str | None, entries: Sequence[Entry]) -> tuple[str, float]:
    """ "steps=400", "tokens=1.6e6" or "seconds=60" → (kind, value); the configurations' train.steps if left out. Sets the entries' steps but for seconds."""
    if text is None:
        steps = {e.config.train.steps for e in entries}
        if len(steps) > 1:
            raise runs.StudyError(
                "--budget",
                got=f"none, and train.steps {', '.join(f'{e.config.train.steps} of {e.name}' for e in entries)}",
                allowed="one budget for all",
                fix="--budget steps=400",
            )
        text = f"steps={steps.pop()}"
    found = re.fullmatch(r"(steps|tokens|seconds)=([\d.e+]+)", text)
    try:
        kind, value = (found[1], float(found[2])) if found else ("", 0.0)
    except ValueError:
        kind, value = "", 0.0
    fine = 0 < value < math.inf and (kind == "seconds" or value == int(value))
    for entry in entries if fine else ():
        entry.steps = {
            "steps": int(value),
            "tokens": int(value / tokens_per_step(entry.config)),
        }.get(kind, 1)
    if not fine or min(e.steps for e in entries) < 1:
        raise runs.StudyError(
            "--budget",
            got=text,
            allowed="steps=N, tokens=N or seconds=N, of one step or more; steps and tokens are whole numbers",
            fix="--budget steps=400",
        )
    return kind, value


def probes(entries: Sequence[Entry], folder: Path) -> list[runs.Job]:
    """Short runs that tell how long a step of each entry takes."""
    return [
        e.job(
            f"probe.{e.name}",
            folder,
            **{
                "train.steps": PROBE,
                "train.log_every": 1,
                "train.eval_every": 0,
                "train.eval_tokens": 1,
            },
        )
        for e in entries
    ]


def probed(job: runs.Job, folder: Path, seconds: float) -> int:
    """Steps of so many training seconds, by the second half of a probe. The probe is run once: a study that goes on has the same steps."""
    if runs.summary(folder / job.name) is None:
        raise runs.StudyError(
            folder / job.name,
            got="a probe that diverged",
            allowed="one that ends",
            fix="a smaller optim.lr to begin with, or --budget steps=N",
        )
    at = {r["step"]: r["train_seconds"] for r in runs.metrics(folder / job.name) if "loss" in r}
    return max(1, int(seconds * (PROBE - PROBE // 2) / (at[PROBE] - at[PROBE // 2])))


# ---- horizons


def search(
    budget: int,
    mean: float,
    n: int,
    rule: Rule,
    *,
    fractions: Sequence[float] = HORIZONS,
    grid: int | None = None,
    longest: float = 1.0,
    tries: int = TRIES,
) -> Generator[list[int], dict[int, float], None]:
    """The horizons that are run for one entry, given its mean loss at the budget: yields those to run next, is sent {horizon: mean end loss of n seeds}.

    1. Where the budget passes the rule: `fractions` of it. Where it does not: √longest and longest times it, and there the search ends if those do not pass either.
    2. While the shortest horizon passes: one of 0.6 of it. Then a horizon that does not pass lies below one that does.
    3. Loss against ln horizon is interpolated (statistics.crossing) to where the mean just passes the rule, and the next point of the grid above it is run: the horizon is
       confirmed if it passes. If not, the interpolation knows one more point, and the next is one point further up or more, then two; after `tries`, or where the next would be
       the shortest horizon that has passed, that one is the answer.

    What is next depends on the losses alone: a study that was killed repeats the search over the runs that are there, and goes on. Each horizon is a test of its own at the rule's
    level. The threshold is fixed before the first of them.
    """
    grid = grid or max(1, budget // GRID)
    means = {budget: mean}

    def run(wanted: Sequence[float]) -> Generator[list[int], dict[int, float], None]:
        new = sorted({max(1, round(w / grid) * grid) for w in wanted} - means.keys())
        if new:
            means.update((yield new))

    def around() -> tuple[int | None, int | None]:
        return statistics.bracket(list(means), list(means.values()), rule.needed(n))

    yield from run(
        [f * budget for f in fractions]
        if rule.passes(mean, n)
        else [budget * longest**0.5, budget * longest]
        if longest > 1
        else []
    )
    above, reached = around()
    while reached and not above and reached > grid:
        yield from run([min(SHORTER * reached, reached - grid)])
        above, reached = around()
    for failed in range(tries):
        if not above or not reached:
            return
        there = {h: y for h, y in sorted(means.items()) if math.isfinite(y)}
        found = statistics.horizon(list(there), list(there.values()), n, rule, None)
        lowest = (above // grid + max(1, failed)) * grid
        wanted = (
            max(lowest, math.ceil(found.steps / grid) * grid) if found else (above + reached) / 2
        )
        if wanted >= reached:
            return
        before = reached
        yield from run([wanted])
        above, reached = around()
        if reached != before:
            return


# ---- the study


@dataclass
class Study:
    """What is fixed before the first run."""

    folder: Path
    entries: list[Entry]
    seeds: list[int]
    places: list[runs.Place]
    target: float | None
    target_entry: str | None
    search: dict[str, Any]
    sigma: float | None
    threshold: float | None
    level: float
    losses: dict[tuple[str, int], list[float]] = field(
        default_factory=dict
    )  # of (entry, horizon), a seed each

    def run(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Judged runs at these horizons of these entries, by all seeds."""
        cells = [(e, h) for e in self.entries for h in wanted.get(e.name, ())]
        jobs = {(e.name, h): [e.judged(h, s, self.folder) for s in self.seeds] for e, h in cells}
        if jobs:
            runs.sweep(
                list(itertools.chain(*jobs.values())),
                self.folder,
                workers=self.places,
                dry_run=False,
            )
        for cell, made in jobs.items():
            self.losses[cell] = [loss_of(self.folder / j.name) for j in made]

    def mean(self, name: str, steps: int) -> float:
        return float(np.mean(self.losses[name, steps]))

    def horizons(self, name: str) -> list[int]:
        return sorted(h for e, h in self.losses if e == name)

    def aim(self) -> float | None:
        """The target: given, or the mean loss at the budget of the entry that sets it."""
        if self.target_entry is None:
            return self.target
        steps = next(e.steps for e in self.entries if e.name == self.target_entry)
        if math.isinf(mean := self.mean(self.target_entry, steps)):
            raise runs.StudyError(
                "--target-entry",
                got=f"{self.target_entry}, of which a run diverged at the budget",
                allowed="one that ends",
                fix="tune it, or --target",
            )
        return mean

    def noise(self) -> Noise | None:
        """σ of a loss: given, or of those at the budget, pooled over the entries that the rule can pass, which have a mean at or under the target (over all, if there is none).

        One that is far from the target may be far noisier. A deviation is independent of its mean, so that choosing by the mean keeps the rule's level.
        """
        aim = self.aim()
        means = {e.name: self.mean(e.name, e.steps) for e in self.entries}
        near = [e for e in self.entries if aim is not None and means[e.name] <= aim] or self.entries
        given = (
            Noise(self.sigma)
            if self.sigma
            else statistics.pooled([np.array(self.losses[e.name, e.steps]) for e in near])
        )
        if given is None:
            return None
        finite = [
            [y for h in self.horizons(e.name) if np.isfinite(y := self.losses[e.name, h]).all()]
            for e in near
        ]
        return replace(given, share=statistics.share_of_seeds([np.array(y) for y in finite if y]))

    def rule(self) -> Rule | None:
        """The rule, by the runs at the budget. Where nothing tells σ its threshold is 0: a mean at or under the target passes."""
        target, n = self.aim(), len(self.seeds)
        if target is None:
            return None
        by = n if self.target_entry else None
        noise = self.noise()
        threshold = self.threshold
        if threshold is None:
            threshold = (
                statistics.threshold_at(noise, n, level=self.level, target_n=by) if noise else 0.0
            )
        return Rule(target, threshold, by)

    def judge(self) -> Rule | None:
        """Every run of the comparison: the budget, then round by round what each entry's search wants next."""
        self.run({e.name: [e.steps] for e in self.entries})
        rule = self.rule()
        if rule is None:
            return None
        n = len(self.seeds)
        searches = {
            e.name: search(e.steps, self.mean(e.name, e.steps), n, rule, **self.search)
            for e in self.entries
            if e.name != self.target_entry
        }
        answers: dict[str, dict[int, float] | None] = dict.fromkeys(searches)
        while True:
            wanted = {}
            for name, answer in answers.items():
                try:
                    wanted[name] = searches[name].send(answer)  # type: ignore[arg-type]  # None begins it
                except StopIteration:
                    continue
            if not wanted:
                return rule
            self.run(wanted)
            answers = {
                name: {h: self.mean(name, h) for h in horizons} for name, horizons in wanted.items()
            }


def loss_of(path: Path) -> float:
    """Of validation at the end; inf of a run that diverged."""
    found = runs.summary(path)
    return math.inf if found is None else found["val_loss"]


def tune(
    entries: Sequence[Entry],
    ranges: Sequence[tuning.Range],
    planned: Mapping[str, list[dict[str, Any]]],
    made: Mapping[str, list[list[runs.Job]]],
    folder: Path,
) -> None:
    """Sets each entry's trials and its best one: the lowest mean loss on the part of the training split that was held out."""
    for entry in entries:
        if not planned[entry.name]:
            entry.notes.append("not tuned")
            continue
        for values, jobs in zip(planned[entry.name], made[entry.name], strict=True):
            losses = [loss_of(folder / j.name) for j in jobs]
            entry.trials.append(
                {
                    "values": values,
                    "steps": jobs[0].config.train.steps,
                    "seeds": [j.config.run.seed for j in jobs],
                    "losses": losses,
                    "loss": float(np.mean(losses)),
                    "path": [j.name for j in jobs],
                }
            )
        best = min(entry.trials, key=lambda t: t["loss"])
        if math.isinf(best["loss"]):
            raise runs.StudyError(
                f"the trials of {entry.name}",
                got=f"{len(entry.trials)} that diverged",
                allowed="one that ends",
                fix="another --tune, and another --name",
            )
        entry.tuned = best["values"]
        for r in tuning.ranges_of(entry.name, ranges):
            if r.at_edge(best["values"][r.key], (t["values"][r.key] for t in entry.trials)):
                entry.notes.append(
                    f"best {r.key} = {_said(best['values'][r.key])} is at the edge of what was tried: a better one may lie outside"
                )


def trial_jobs(
    entries: Sequence[Entry],
    planned: Mapping[str, list[dict[str, Any]]],
    folder: Path,
    *,
    steps: int | None,
    seeds: int,
    holdout: float,
) -> dict[str, list[list[runs.Job]]]:
    """A job for each seed of each trial of each entry, named by its values."""
    found: dict[str, list[list[runs.Job]]] = {}
    for entry in entries:
        found[entry.name] = []
        for values in planned[entry.name]:
            name = ".".join(re.sub(r"[^\w.-]", "", f"{k}{_said(v)}") for k, v in values.items())
            changes = {
                "data.holdout": holdout,
                "train.steps": steps or entry.steps,
                "train.eval_every": 0,
                **values,
            }
            names = [
                (f"tune.{entry.name}.{name}.s{changes['train.steps']}.seed{s}", s)
                for s in range(TUNE_SEEDS, TUNE_SEEDS + seeds)
            ]
            found[entry.name].append(
                [entry.job(n, folder, **changes, **{"run.seed": s}) for n, s in names]
            )
    made = Counter(j.name for trials in found.values() for jobs in trials for j in jobs)
    if twice := [name for name, times in made.items() if times > 1]:
        raise runs.StudyError(
            "--tune",
            got=f"two trials named {twice[0]}",
            allowed="values that differ in their first six digits, letters or digits",
            fix="others",
        )
    return found


# ---- results


def results(study: Study, rule: Rule | None, *, about: dict[str, Any]) -> dict[str, Any]:
    """results.json. about: what is known before the first run."""
    noise, n = study.noise(), len(study.seeds)
    reached = {e.name: _reached(study, e, i, rule, noise) for i, e in enumerate(study.entries)}
    entries = [_entry(study, e, rule, noise, reached[e.name]) for e in study.entries]
    told = [s for e in entries for r in e["runs"] if (s := runs.summary(study.folder / r["path"]))]
    estimated = study.sigma is None and noise is not None
    return {
        "schema": SCHEMA,
        **about,
        "target": rule.target if rule else None,
        "target_from": study.target_entry,
        "rule": {
            "threshold": rule.threshold if rule else None,
            "sigma": noise.sigma if noise else None,
            "sigma_from": "runs" if estimated else "given" if noise else None,
            "df": noise.df if noise else None,
            "test_level": study.level if study.threshold is None and noise else None,
            "level": LEVEL,
        },
        "seeds": study.seeds,
        "hardware": runs.machines(told),
        "versions": runs.versions(told),
        "entries": entries,
        # Every pair; b is the one named first.
        "pairs": [
            _pair(
                study,
                b,
                a,
                reached,
                entries[study.entries.index(b)],
                entries[study.entries.index(a)],
                n,
            )
            for b, a in itertools.combinations(study.entries, 2)
        ],
    }


def _entry(
    study: Study,
    entry: Entry,
    rule: Rule | None,
    noise: Noise | None,
    reached: tuple[int | None, Horizon | None],
) -> dict[str, Any]:
    paths = {
        (h, s): study.folder / entry.run_name(h, s)
        for h in study.horizons(entry.name)
        for s in study.seeds
    }
    told = [_run(h, s, path) for (h, s), path in paths.items()]
    known = [r for (h, s), path in paths.items() if (r := runs.summary(path))]
    at_budget = [r for r in told if r["steps"] == entry.steps]
    first = paths[entry.steps, study.seeds[0]]
    resolved = configuration.flat(configuration.of_file(first / "config.toml"))
    tokens = tokens_per_step(entry.config)
    n = len(study.seeds)
    diverged = sum(r["loss"] is None for r in told)
    notes = [
        *entry.notes,
        *([f"{diverged} of {len(told)} runs diverged: infinite losses"] if diverged else []),
    ]
    if resolved["optim.name"] == "muon_adamw" and resolved["optim.polar.dtype"] == "float32":
        notes.append("Muon's iteration in float32, torch's is in bfloat16")
    steps, found = reached
    to_target = None
    if rule and steps:
        sets = entry.name == study.target_entry  # nothing is measured: no interval
        confirmed = noise is not None or study.threshold is not None or sets
        interval = (
            found.interval() if found and not sets else Interval(-math.inf, math.nan, math.inf)
        )
        of_horizon = [r["train_seconds"] for r in told if r["steps"] == steps]
        to_target = {
            "steps": steps,
            "low": interval.low,
            "high": interval.high,
            "tokens": steps * tokens,
            "train_seconds": float(np.mean(of_horizon)),
            "confirmed": confirmed,
            "interpolated": interval.value,
        }
        if sets:
            notes.append("sets the target: its steps are the budget by definition")
        elif found is None:
            notes.append("the shortest horizon that was run passes: fewer steps may do")
        if not confirmed:
            notes.append("σ unknown: a mean at or under the target, which is no test")
    return {
        "name": entry.name,
        "config_path": entry.path,
        "config": {
            k: v for k, v in resolved.items() if k not in ("run.name", "run.dir", "run.seed")
        },
        "receipt": (first / "receipt.txt").read_text(encoding="utf-8"),
        "params": known[0]["params"] if known else None,
        "optimizer_state_bytes": known[0]["optimizer_state_bytes"] if known else None,
        "tokens_per_step": tokens,
        "trials": entry.trials,
        "tuned": entry.tuned,
        "runs": told,
        "horizons": [
            {
                "steps": h,
                "n": n,
                **_told(statistics.mean_interval(losses := study.losses[entry.name, h]), "mean"),
                "statistic": rule.statistic(float(np.mean(losses)), n) if rule else None,
                # By definition of the one that sets the target, which is neither above nor below itself.
                "passes": rule.passes(float(np.mean(losses)), n)
                if rule and entry.name != study.target_entry
                else None,
                "train_seconds": _mean([r["train_seconds"] for r in told if r["steps"] == h]),
            }
            for h in study.horizons(entry.name)
        ],
        "at_budget": {
            "n": n,
            "loss": _told(statistics.mean_interval(study.losses[entry.name, entry.steps]), "mean"),
            **{
                key: _told(
                    statistics.mean_interval(
                        [math.inf if r[key] is None else r[key] for r in at_budget]
                    ),
                    "mean",
                )
                for key in ("train_seconds", "optimizer_seconds", "wall_seconds")
            },
            "peak_memory_bytes": max(
                (r["peak_memory_bytes"] for r in at_budget if r["peak_memory_bytes"]), default=None
            ),
            "steps": entry.steps,
            "tokens": entry.steps * tokens,
        },
        "to_target": to_target,
        "note": "; ".join(notes),
    }


def _run(steps: int, seed: int, path: Path) -> dict[str, Any]:
    """One run; what a run that diverged did not come to measure is null."""
    found = runs.summary(path) or {}
    records = runs.metrics(path) if (path / "metrics.jsonl").is_file() else []
    keys = ("train_seconds", "optimizer_seconds", "wall_seconds", "peak_memory_bytes")
    return {
        "steps": steps,
        "seed": seed,
        "loss": found.get("val_loss"),
        **{key: found.get(key) for key in keys},
        "path": path.name,
        "curve": [
            [r["step"], r["tokens"], r["train_seconds"], r["val_loss"]]
            for r in records
            if "val_loss" in r
        ],
        "training": [
            [r["step"], r["tokens"], r["train_seconds"], r["loss"]] for r in records if "loss" in r
        ],
    }


def _reached(
    study: Study, entry: Entry, place: int, rule: Rule | None, noise: Noise | None
) -> tuple[int | None, Horizon | None]:
    """(steps to the target, the interpolated ones): the shortest horizon that passed. The entry that sets the target has the budget."""
    if rule is None:
        return None, None
    if entry.name == study.target_entry:
        return entry.steps, Horizon(
            entry.steps, np.full(statistics.DRAWS, float(entry.steps)) if noise else None
        )
    n, steps = len(study.seeds), study.horizons(entry.name)
    means = [study.mean(entry.name, h) for h in steps]
    reached = statistics.bracket(steps, means, rule.needed(n))[1]
    return reached, statistics.horizon(
        steps, means, n, rule, noise, seed=place
    ) if reached else None


def _pair(
    study: Study,
    b: Entry,
    a: Entry,
    reached: Mapping[str, tuple[int | None, Horizon | None]],
    told_b: dict[str, Any],
    told_a: dict[str, Any],
    n: int,
) -> dict[str, Any]:
    """b − a at the budget, and b/a of steps and seconds to the target."""
    difference, p = statistics.paired(study.losses[a.name, a.steps], study.losses[b.name, b.steps])
    found: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "n": n,
        "loss_difference": {**_told(difference, "mean"), "p": p},
        "steps_ratio": None,
        "seconds_ratio": None,
    }
    (steps_a, at_a), (steps_b, at_b) = reached[a.name], reached[b.name]
    if not steps_a or not steps_b:
        return found
    draws: dict[str, Any] = {"steps": None, "seconds": None}
    if at_a and at_b and at_a.draws is not None and at_b.draws is not None:
        per_step = [
            statistics.draws_of_mean(
                [math.log(r["train_seconds"] / k) for r in told["runs"] if r["steps"] == k], seed=i
            )
            for i, (told, k) in enumerate(((told_a, steps_a), (told_b, steps_b)))
        ]
        draws["steps"] = statistics.quotient(at_b.draws, at_a.draws)
        if per_step[0] is not None and per_step[1] is not None:
            draws["seconds"] = statistics.quotient(
                at_b.draws, at_a.draws, per_step[1] - per_step[0]
            )
    values = {
        "steps": steps_b / steps_a,
        "seconds": told_b["to_target"]["train_seconds"] / told_a["to_target"]["train_seconds"],
    }
    for key, value in values.items():
        interval = (
            Interval(-math.inf, value, math.inf)
            if draws[key] is None
            else statistics.bounds(value, draws[key])
        )
        found[f"{key}_ratio"] = _told(interval, "value")
    return found


def _told(i: Interval, name: str) -> dict[str, float]:
    return {name: i.value, "low": i.low, "high": i.high}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


# ---- what a reader is told


def text(found: Mapping[str, Any]) -> str:
    """The tables of results.json for a terminal."""
    n, rule, target = len(found["seeds"]), found["rule"], found["target"]
    out = [
        f"{found['name']}: {found['dataset']}, {found['budget']['kind']} {found['budget']['value']:g}, n = {n}; [95 % intervals]"
    ]
    if n == 1:
        out.append("one seed: no intervals and no test; these are single runs")
    if target is not None:
        of = (
            f"the mean of {found['target_from']} at the budget" if found["target_from"] else "given"
        )
        out.append(
            f"target {target:.4f} ({of}); the rule: (target − mean)·√n ≥ {rule['threshold']:.3g}, {_sigma(rule)}"
        )
    rows = [
        [
            "entry",
            "tuned",
            "steps",
            "loss there",
            "steps to the target",
            "tokens",
            "train s",
            "optimizer s",
            "wall s",
            "memory",
        ]
    ]
    for e in found["entries"]:
        at, to = e["at_budget"], e["to_target"]
        memory = at["peak_memory_bytes"]
        rows.append(
            [
                e["name"],
                ", ".join(f"{k.removeprefix('optim.')} {_said(v)}" for k, v in e["tuned"].items())
                if e["tuned"]
                else "no",
                str(at["steps"]),
                _interval(at["loss"], "mean", ".4f"),
                "" if to is None else _steps(to, sets=e["name"] == found["target_from"]),
                "" if to is None else f"{to['tokens']:,}",
                "" if to is None else f"{to['train_seconds']:.1f}",
                *(
                    _interval(at[key], "mean", ".1f")
                    for key in ("optimizer_seconds", "wall_seconds")
                ),
                "" if memory is None else f"{memory / 2**20:.0f} MiB",
            ]
        )
    out += [
        "",
        *aligned(rows),
        "(train s: to the target; optimizer s, wall s, memory: of the budget)",
    ]
    rows = [["pair", "loss difference", "p", "steps ratio", "train seconds ratio"]]
    for pair in found["pairs"]:
        p = pair["loss_difference"]["p"]
        ratios = [
            _interval(pair[f"{key}_ratio"], "value", ".3f") if pair[f"{key}_ratio"] else ""
            for key in ("steps", "seconds")
        ]
        rows.append(
            [
                f"{pair['b']} against {pair['a']}",
                _interval(pair["loss_difference"], "mean", "+.4f"),
                _p(p),
                *ratios,
            ],
        )
    if found["pairs"]:
        out += ["", *aligned(rows)]
    if note := found["versions"]["note"]:
        out += ["", f"note: {note}"]
    out += [
        "",
        *(
            f"note: {e['name']}: {note}"
            for e in found["entries"]
            for note in e["note"].split("; ")
            if note
        ),
    ]
    return "\n".join(out).rstrip()


def _steps(to: Mapping[str, Any], *, sets: bool) -> str:
    """The horizon that was run, and the interpolated one with its interval, which has not got to hold the point of the grid above it. sets: the target; its steps are the budget."""
    if sets:
        return f"{to['steps']} sets the target"
    between = (
        f" (interpolated {_interval(to, 'interpolated', '.1f')})"
        if to["interpolated"] is not None
        else ""
    )
    return f"{to['steps']}{between}{'' if to['confirmed'] else ' unconfirmed'}"


def _sigma(rule: Mapping[str, Any]) -> str:
    if rule["sigma"] is None:
        return "σ unknown" if not rule["threshold"] else "given"
    of = (
        "given"
        if rule["sigma_from"] == "given"
        else f"from the runs at the budget, {rule['df']} degrees of freedom"
    )
    level = (
        f"; one-sided level {rule['test_level']:g}" if rule["test_level"] else "; threshold given"
    )
    return f"σ = {rule['sigma']:.2g} {of}{level}"


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _interval(i: Mapping[str, Any], key: str, form: str) -> str:
    """A value with its bounds, which are left out where there are none."""
    value, low, high = i[key], i["low"], i["high"]
    if value is None:
        return "diverged"  # what it measured has no mean
    if low is None and high is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{'−∞' if low is None else f'{low:{form}}'}, {'∞' if high is None else f'{high:{form}}'}]"


def power_text(
    effects: Sequence[float], noise: Noise, entries: int, *, level: float, from_entry: bool
) -> str:
    """How many seeds effects of so many nats take. from_entry: the target is an entry's mean, of as many seeds."""
    of = "an entry's mean" if from_entry else "a number"
    out = [
        f"σ = {noise.sigma:.2g}, level {level:g}, the target {of}; seeds that find an effect with 80 % chance:"
    ]
    for effect in effects:
        found = statistics.seeds_for(
            effect, noise, entries=entries, level=level, from_entry=from_entry
        )
        rule, pair = (str(k) if k else "over 1000" for k in found)
        out.append(
            f"  {effect:g} nats: {rule} by the rule, {pair} by the paired test of two entries (its σ√2 at most: seeds share their data)"
        )
    return "\n".join(out)


# ---- the command


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m studies.speedrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("configs", nargs="+", help="one for each entry; every pair is compared")
    add("--seeds", type=int, default=4, help="of every entry and horizon")
    add("--first-seed", type=int, default=0)
    add("--target", type=float, metavar="L", help="loss, nats per token")
    add(
        "--target-entry",
        metavar="NAME",
        help="the target is this entry's mean loss at the budget; its own noise is accounted for",
    )
    add(
        "--budget",
        metavar="KIND=N",
        help="steps=400, tokens=1.6e6 or seconds=60 (of training); the configurations' train.steps if left out",
    )
    add(
        "--horizons",
        type=float,
        nargs="*",
        default=HORIZONS,
        metavar="F",
        help="fractions of the budget that are run where that passes",
    )
    add(
        "--longest",
        type=float,
        default=1.0,
        metavar="F",
        help="where it does not pass: horizons of up to this many budgets",
    )
    add(
        "--grid",
        type=int,
        metavar="K",
        help="a horizon is a multiple of K steps; budget/80 if left out",
    )
    add(
        "--tries",
        type=int,
        default=TRIES,
        help="horizons that are run to confirm the interpolated one",
    )
    add(
        "--sigma",
        type=float,
        help="of a run's loss; estimated from the runs at the budget if left out",
    )
    add("--threshold", type=float, help="of the rule; if left out, that of a test at --level")
    add("--level", type=float, default=statistics.RULE_LEVEL, help="one-sided, of the rule")
    add(
        "--tune",
        nargs="+",
        action="extend",
        default=[],
        metavar="RANGE",
        help='"[ENTRY:]optim.lr=log(0.01,1,8)", lin(a,b,n), {a,b,c}',
    )
    add(
        "--trials", type=int, metavar="N", help="of every tuned entry, where several keys are tuned"
    )
    add("--tune-seeds", type=int, default=1, help=f"of every trial, from {TUNE_SEEDS} on")
    add("--tune-steps", type=int, help="of every trial; the budget if left out")
    add(
        "--holdout",
        type=float,
        help="fraction of the training split that trials are judged on and do not train on; as long as the validation split if left out",
    )
    add("--tuned-into", type=Path, metavar="DIR", help="write the tuned configurations there")
    add(
        "--allow-different",
        action="store_true",
        help="data, context, tokens of a step and evaluation may differ between entries",
    )
    add("--name", help="of the folder, runs/NAME; speedrun-<entries> if left out")
    add("--track", help="of the record book, noted in results.json")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="runs at a time; run.threads of each is the configuration's",
    )
    add("--gpus", action="store_true", help="one run a GPU at a time, instead of --workers")
    add(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="ranks of every run, as torchrun starts them; with --gpus one GPU each",
    )
    add("--dry-run", action="store_true", help="the cost alone")
    add(
        "--power",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help="how many seeds an effect of X nats takes, and nothing else",
    )
    return parser.parse_known_args(argv)


def check(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise StudyError for what cannot be."""
    for flag, value, fine, allowed in (
        ("--seeds", options.seeds, options.seeds >= 1, "1 or more"),
        ("--first-seed", options.first_seed, options.first_seed >= 0, "0 or more"),
        ("--nproc", options.nproc, options.nproc >= 1, "1 or more"),
        ("--tries", options.tries, options.tries >= 1, "1 or more"),
        ("--trials", options.trials, options.trials is None or options.trials >= 1, "1 or more"),
        ("--tune-seeds", options.tune_seeds, options.tune_seeds >= 1, "1 or more"),
        (
            "--tune-steps",
            options.tune_steps,
            options.tune_steps is None or options.tune_steps >= 1,
            "1 or more",
        ),
        ("--grid", options.grid, options.grid is None or options.grid >= 1, "1 step or more"),
        (
            "--horizons",
            options.horizons,
            all(0 < f < 1 for f in options.horizons),
            "fractions of the budget, above 0 and below 1",
        ),
        ("--longest", options.longest, 1 <= options.longest < math.inf, "1 or more"),
        (
            "--target-entry",
            options.target_entry,
            options.target_entry in (None, *names),
            f"{', '.join(names)}, the entries",
        ),
        (
            "--target-entry",
            options.target_entry,
            options.target_entry is None or options.target is None,
            "one of --target and --target-entry",
        ),
        (
            "--target",
            options.target,
            options.target is None or math.isfinite(options.target),
            "a loss",
        ),
        ("--track", options.track, options.track in (None, *TRACKS), ", ".join(TRACKS)),
        (
            "--sigma",
            options.sigma,
            options.sigma is None or 0 < options.sigma < math.inf,
            "above 0",
        ),
        (
            "--threshold",
            options.threshold,
            options.threshold is None or 0 <= options.threshold < math.inf,
            "0 or more, and finite",
        ),
        ("--level", options.level, 0 < options.level < 0.5, "above 0 and below 0.5"),
        (
            "--holdout",
            options.holdout,
            options.holdout is None or 0 < options.holdout < 1,
            "a fraction above 0 and below 1",
        ),
        ("--power", options.power, all(0 < x < math.inf for x in options.power), "above 0"),
        (
            "--power, --threshold",
            (options.power, options.threshold),
            not options.power or options.threshold is None,
            "--level, which a threshold is made of",
        ),
        (
            "--first-seed, --seeds",
            (options.first_seed, options.seeds),
            options.first_seed + options.seeds <= TUNE_SEEDS
            or options.first_seed >= TUNE_SEEDS + options.tune_seeds,
            f"seeds below {TUNE_SEEDS}, where those of tuning begin",
        ),
    ):
        if not fine:
            raise runs.StudyError(
                flag, got=repr(value), allowed=allowed, fix="another, or leave it out"
            )


def main(argv: list[str]) -> int:
    options, rest = arguments(argv)
    entries = load(options.configs, rest, allow_different=options.allow_different)
    names = [e.name for e in entries]
    check(options, names)
    kind, value = budget_of(options.budget, entries)
    ranges = [tuning.parse(t, names) for t in options.tune]
    planned = tuning.trials_by_entry(ranges, names, options.trials)
    base = entries[0].config
    folder = Path(base.run.dir) / (options.name or f"speedrun-{'-'.join(names)}")
    gpus = _gpus() if options.gpus else ()
    study = Study(
        folder,
        entries,
        list(range(options.first_seed, options.first_seed + options.seeds)),
        runs.places(options.workers, options.nproc, gpus),
        options.target,
        options.target_entry,
        {
            "fractions": options.horizons,
            "grid": options.grid,
            "longest": options.longest,
            "tries": options.tries,
        },
        options.sigma,
        options.threshold,
        options.level,
    )
    dataset = Dataset(DataConfig(base.data.dataset, verify=False))
    tokens = {name: split.tokens for name, split in dataset.manifest.splits.items()}
    holdout = options.holdout or min(HOLDOUT, tokens["val"] / tokens["train"])
    if options.power:
        print(
            power_text(
                options.power,
                _known(study),
                len(entries),
                level=options.level,
                from_entry=options.target_entry is not None,
            )
        )
        return 0
    made = probes(entries, folder) if kind == "seconds" else []
    if made and not options.dry_run:
        runs.sweep(made, folder, workers=study.places, dry_run=False)
    rate = runs.speed(base.run)
    for entry, job in zip(entries, made, strict=False):
        entry.steps = (
            max(1, int(value / (runs.cost(job.config, dataset, rate)[1] - runs.STARTUP) * PROBE))
            if options.dry_run
            else probed(job, folder, value)
        )
    shortest = min(e.steps for e in entries)
    if options.grid and options.grid > shortest:
        raise runs.StudyError(
            "--grid",
            got=options.grid,
            allowed=f"1 to {shortest}, the steps of the budget",
            fix="another, or leave it out",
        )
    trials = trial_jobs(
        entries,
        planned,
        folder,
        steps=options.tune_steps,
        seeds=options.tune_seeds,
        holdout=holdout,
    )
    tuning_jobs = [j for jobs in trials.values() for trial in jobs for j in trial]
    _tell_cost(study, tuning_jobs, dataset, rate)
    if options.dry_run:
        return 0
    if tuning_jobs:
        runs.sweep(tuning_jobs, folder, workers=study.places, dry_run=False)
        tune(entries, ranges, planned, trials, folder)
    for entry in entries if options.tuned_into else ():
        options.tuned_into.mkdir(parents=True, exist_ok=True)
        tuned = runs.job(entry.config, entry.name, folder, **(entry.tuned or {})).config
        whole = replace(tuned, run=replace(tuned.run, name=None, dir=entry.config.run.dir))
        (options.tuned_into / f"{entry.name}.toml").write_text(
            configuration.to_toml(whole), encoding="utf-8"
        )
    rule = study.judge()
    about = {
        "command": f"python -m studies.speedrun {shlex.join(argv)}",
        "name": folder.name,
        "dataset": base.data.dataset,
        "corpus_sha256": dataset.manifest.sha256,
        "track": options.track,
        "budget": {"kind": kind, "value": int(value) if value == int(value) else value},
        "workers": len(study.places),
        "threads": base.run.threads,
        "ranks": options.nproc,
    }
    runs.write_json(folder / "results.json", results(study, rule, about=about))
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    print(text(found))
    from ..report import page as report  # matplotlib, after the runs

    for path in report.write(found, folder):
        print(f"written: {path}")
    return 0


def _gpus() -> list[str]:
    """Those that this process sees, by the numbers that CUDA_VISIBLE_DEVICES takes."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = (
        [g for g in seen.split(",") if g]
        if seen is not None
        else [str(i) for i in range(torch.cuda.device_count())]
    )
    if not found or not torch.cuda.is_available():
        raise runs.StudyError("--gpus", got="no GPU", allowed="one or more", fix="--workers")
    return found


def _known(study: Study) -> Noise:
    """σ: given, or of the runs at the budget that are there."""
    if study.sigma:
        return Noise(study.sigma)
    there = [
        [
            loss_of(p)
            for s in study.seeds
            if runs.finished(p := study.folder / e.run_name(e.steps, s))
        ]
        for e in study.entries
    ]
    found = statistics.pooled([np.array(losses) for losses in there])
    if found is None:
        raise runs.StudyError(
            "--power",
            got="no σ",
            allowed="--sigma, or 2 runs of an entry at the budget that are there",
            fix="--sigma 0.002",
        )
    return found


def _tell_cost(study: Study, trials: Sequence[runs.Job], dataset: Dataset, rate: float) -> None:
    """Of the whole study, before its first run. An estimate: which horizons are run depends on the losses."""
    jobs, more = list(trials), ""
    for entry in study.entries:
        searched = study.target is not None or study.target_entry not in (None, entry.name)
        fractions = (
            [1.0, *study.search["fractions"], *[0.5] * study.search["tries"]] if searched else [1.0]
        )
        if searched:
            more = "; more if the shortest of --horizons reaches the target" + (
                ", or the budget does not" if study.search["longest"] > 1 else ""
            )
        untuned = replace(entry, tuned=None)
        jobs += [
            untuned.judged(max(1, round(f * entry.steps)), s, study.folder)
            for f in fractions
            for s in study.seeds
        ]
    costs = [runs.cost(j.config, dataset, rate) for j in jobs]
    print(
        f"{study.folder}: about {len(jobs)} runs ({len(trials)} to tune), {sum(c[0] for c in costs):.2g} FLOPs,"
        f" {runs.duration([c[1] for c in costs], len(study.places))} on this machine, {len(study.places)} at a time{more}; what is done already is not run again"
    )
