"""The content of results.json: every figure of a study, read from its run folders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import build_model_and_norm
from optim import Dualized
from optim.baselines import BASELINES, takes_polar
from training import config as configuration
from training.baseline import build_baseline
from training.run import texts_of_run

from .. import runs, statistics
from ..evidence import is_restored
from ..intervals import LEVEL, Interval
from ..statistics import Horizon, Noise, Rule
from .clocks import clock_of, note_of_machines
from .entries import Entry, tokens_per_step
from .study import Study

Json = dict[str, Any]
# 1: lines of training without their seconds; an interval of the steps that set the target.
SCHEMA = 2


@dataclass(frozen=True)
class Reached:
    """Where an entry reached the target."""

    steps: int | None = None
    """The shortest horizon that passed; None if none did."""
    interpolated: Horizon | None = None
    """The horizon that just passes; None if the shortest that was run passes."""


@dataclass(frozen=True)
class Judgement:
    """A study whose runs have ended, judged by its rule."""

    study: Study
    rule: Rule | None
    noise: Noise | None
    reached: dict[str, Reached]
    """By entry."""

    @property
    def n(self) -> int:
        """Return the number of seeds."""
        return len(self.study.seeds)

    def sets_target(self, entry: Entry) -> bool:
        """Return whether the target is this entry's mean, so that nothing of it is measured."""
        return entry.name == self.study.target_entry

    def is_test(self, entry: Entry) -> bool:
        """Return whether the steps of this entry to the target are more than a mean below it."""
        threshold_known = self.noise is not None or self.study.threshold is not None
        return threshold_known or self.sets_target(entry)


def results(study: Study, rule: Rule | None, *, about: Json) -> Json:
    """Return results.json. about: what is known before the first run."""
    judgement = _judgement(study, rule)
    noise = judgement.noise
    entries = {e.name: _entry(judgement, e) for e in study.entries}
    paths = [study.folder / r["path"] for e in entries.values() for r in e["runs"]]
    summaries = [s for path in paths if (s := runs.summary(path))]
    estimated = study.sigma is None and noise is not None
    # Every pair; b is the one named first.
    pairs = [_pair(judgement, b, a) for b, a in itertools.combinations(entries.values(), 2)]
    versions = runs.versions(summaries)
    notes = filter(None, (versions["note"], note_of_machines(list(entries.values()))))
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
        "hardware": runs.machines(summaries),
        "versions": versions | {"note": "; ".join(notes) or None},
        "entries": list(entries.values()),
        "pairs": pairs,
    }


def _judgement(study: Study, rule: Rule | None) -> Judgement:
    """Judge each entry by the rule."""
    noise = study.noise()
    reached = {e.name: _reached(study, e, rule, noise, seed=i) for i, e in enumerate(study.entries)}
    return Judgement(study, rule, noise, reached)


def _reached(
    study: Study, entry: Entry, rule: Rule | None, noise: Noise | None, *, seed: int
) -> Reached:
    """Return where an entry reached the target: the budget for the entry that sets it.

    seed: of the draws of the interpolated horizon.
    """
    if rule is None:
        return Reached()
    if entry.name == study.target_entry:
        draws = np.full(statistics.DRAWS, float(entry.steps)) if noise else None
        return Reached(entry.steps, Horizon(entry.steps, draws))
    n, steps = len(study.seeds), study.horizons(entry.name)
    means = [study.mean(entry.name, h) for h in steps]
    _, shortest = statistics.bracket(steps, means, rule.needed(n))
    if not shortest:
        return Reached()
    return Reached(shortest, statistics.horizon(steps, means, n, rule, noise, seed=seed))


# ---- an entry


def _entry(judgement: Judgement, entry: Entry) -> Json:
    """Return what results.json holds of an entry."""
    study = judgement.study
    records = [
        _run(h, s, study.folder / entry.run_name(h, s))
        for h in study.horizons(entry.name)
        for s in study.seeds
    ]
    summaries = (runs.summary(study.folder / r["path"]) for r in records)
    known = next((s for s in summaries if s), {})
    first = study.folder / entry.run_name(entry.steps, study.seeds[0])
    resolved = configuration.flat(configuration.of_file(first / "config.toml"))
    by_study = ("run.name", "run.dir", "run.seed")
    return {
        "name": entry.name,
        "config_path": entry.path,
        "config": {k: v for k, v in resolved.items() if k not in by_study},
        "receipt": _receipt(first),
        "params": known.get("params"),
        "optimizer_state_bytes": known.get("optimizer_state_bytes"),
        "tokens_per_step": tokens_per_step(entry.config),
        "trials": entry.trials,
        "tuned": entry.tuned,
        "runs": records,
        "horizons": [_horizon(judgement, entry, h, records) for h in study.horizons(entry.name)],
        "at_budget": _at_budget(judgement, entry, records),
        "to_target": _to_target(judgement, entry, records),
        "note": "; ".join(_notes(judgement, entry, records, resolved)),
    }


def _receipt(path: Path) -> str:
    """Return a run's receipt: the present code's for a restored run, whose line has none."""
    file = path / "receipt.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = configuration.of_file(path / "config.toml")
    with torch.device("meta"):
        model, norm = build_model_and_norm(config)
        is_baseline = config.optim.name in BASELINES
        optimizer = (
            build_baseline(config, model, norm) if is_baseline else Dualized(model, norm=norm)
        )
    return texts_of_run(config, norm, optimizer)["receipt.txt"]


def _run(steps: int, seed: int, path: Path) -> Json:
    """Return what results.json holds of a run; null for what it did not measure, as it diverged."""
    summary = runs.summary(path) or {}
    records = runs.metrics(path) if (path / "metrics.jsonl").is_file() else []
    keys = ("train_seconds", "optimizer_seconds", "wall_seconds", "peak_memory_bytes", "hardware")
    return {
        "steps": steps,
        "seed": seed,
        "loss": summary.get("val_loss"),
        **{key: summary.get(key) for key in keys},
        "path": path.name,
        "curve": _points(records, "val_loss"),
        "training": _points(records, "loss"),
    }


def _points(records: Sequence[Json], loss: str) -> list[list[Any]]:
    """Return [step, tokens, training seconds, loss] of the records that have this loss."""
    return [[r["step"], r["tokens"], r["train_seconds"], r[loss]] for r in records if loss in r]


def _horizon(judgement: Judgement, entry: Entry, steps: int, records: Sequence[Json]) -> Json:
    """Return the losses of an entry at one horizon, and if they pass.

    The entry that sets the target neither passes nor fails, by definition.
    """
    rule, n = judgement.rule, judgement.n
    mean = judgement.study.mean(entry.name, steps)
    seconds = [r["train_seconds"] for r in records if r["steps"] == steps]
    judged = rule is not None and not judgement.sets_target(entry)
    return {
        "steps": steps,
        "n": n,
        **statistics.mean_interval(judgement.study.losses[entry.name, steps]).json("mean"),
        "statistic": rule.statistic(mean, n) if rule else None,
        "passes": rule.passes(mean, n) if rule and judged else None,
        "train_seconds": None if None in seconds else float(np.mean(seconds)),
    }


def _at_budget(judgement: Judgement, entry: Entry, records: Sequence[Json]) -> Json:
    """Return the figures of an entry at the budget: means, and the most memory of any run."""
    at_budget = [r for r in records if r["steps"] == entry.steps]
    losses = judgement.study.losses[entry.name, entry.steps]
    peaks = (r["peak_memory_bytes"] for r in at_budget)
    seconds = {
        key: [math.inf if r[key] is None else r[key] for r in at_budget]
        for key in ("train_seconds", "optimizer_seconds", "wall_seconds")
    }
    return {
        "n": judgement.n,
        "loss": statistics.mean_interval(losses).json("mean"),
        **{k: statistics.mean_interval(v).json("mean") for k, v in seconds.items()},
        "peak_memory_bytes": max(filter(None, peaks), default=None),
        "steps": entry.steps,
        "tokens": entry.steps * tokens_per_step(entry.config),
    }


def _to_target(judgement: Judgement, entry: Entry, records: Sequence[Json]) -> Json | None:
    """Return the steps, tokens and seconds of an entry to the target; None if it reached none.

    low, high and interpolated are of the interpolated horizon. The entry that sets the target has
    none, because its steps are no measurement.
    """
    reached = judgement.reached[entry.name]
    if not reached.steps:
        return None
    interval = (
        reached.interpolated.interval()
        if reached.interpolated and not judgement.sets_target(entry)
        else Interval(-math.inf, math.nan, math.inf)
    )
    seconds = [r["train_seconds"] for r in records if r["steps"] == reached.steps]
    return {
        "steps": reached.steps,
        "low": interval.low,
        "high": interval.high,
        "tokens": reached.steps * tokens_per_step(entry.config),
        "train_seconds": float(np.mean(seconds)),
        "confirmed": judgement.is_test(entry),
        "interpolated": interval.value,
    }


def _notes(
    judgement: Judgement, entry: Entry, records: Sequence[Json], resolved: Json
) -> list[str]:
    """Return what a reader has to know of an entry. resolved: its configuration as it was run."""
    notes = list(entry.notes)
    if diverged := sum(r["loss"] is None for r in records):
        notes.append(f"{diverged} of {len(records)} runs diverged: infinite losses")
    if restored := sum(is_restored(judgement.study.folder / r["path"]) for r in records):
        notes.append(f"{restored} of {len(records)} runs are restored: evaluations alone")
    if takes_polar(resolved["optim.name"]) and resolved["optim.polar.dtype"] == "float32":
        notes.append("Muon's iteration in float32, torch's is in bfloat16")
    reached = judgement.reached[entry.name]
    if reached.steps:
        if judgement.sets_target(entry):
            notes.append("sets the target: its steps are the budget by definition")
        elif reached.interpolated is None:
            notes.append("the shortest horizon that was run passes: fewer steps may do")
        if not judgement.is_test(entry):
            notes.append("σ unknown: a mean at or under the target, which is no test")
    return notes


# ---- pairs


def _pair(judgement: Judgement, b: Json, a: Json) -> Json:
    """Compare two entries as results.json holds them.

    The comparison is b − a of losses at the budget, and b/a of steps and seconds to the target.
    """
    losses_a, losses_b = (
        judgement.study.losses[e["name"], e["at_budget"]["steps"]] for e in (a, b)
    )
    difference, p = statistics.paired(losses_a, losses_b)
    return {
        "a": a["name"],
        "b": b["name"],
        "n": judgement.n,
        "loss_difference": {**difference.json("mean"), "p": p},
        **_ratios(judgement, b, a),
    }


def _ratios(judgement: Judgement, b: Json, a: Json) -> Json:
    """Return b/a of steps and of seconds to the target; None unless both reached it.

    There is no ratio of seconds either where no one machine's clock compares them.
    """
    reached_a, reached_b = (judgement.reached[e["name"]] for e in (a, b))
    if not reached_a.steps or not reached_b.steps:
        return {"steps_ratio": None, "seconds_ratio": None}
    ratios = {"steps": reached_b.steps / reached_a.steps}
    clock = clock_of(b, a)
    if clock:
        ratios["seconds"] = float(np.mean(clock.b)) / float(np.mean(clock.a))
    draws: dict[str, Any] = {"steps": None, "seconds": None}
    at_a, at_b = reached_a.interpolated, reached_b.interpolated
    if at_a and at_b and at_a.draws is not None and at_b.draws is not None:
        draws["steps"] = statistics.quotient(at_b.draws, at_a.draws)
        per_step_a = clock and _draws_of_step_seconds(clock.a, reached_a.steps, seed=0)
        per_step_b = clock and _draws_of_step_seconds(clock.b, reached_b.steps, seed=1)
        if per_step_a is not None and per_step_b is not None:
            log_ratio = per_step_b - per_step_a
            draws["seconds"] = statistics.quotient(at_b.draws, at_a.draws, log_ratio)
    intervals = {
        key: Interval(-math.inf, ratio, math.inf)
        if draws[key] is None
        else statistics.bounds(ratio, draws[key])
        for key, ratio in ratios.items()
    }
    bounded = {f"{key}_ratio": i.json("value") for key, i in intervals.items()}
    return {"steps_ratio": None, "seconds_ratio": None} | bounded


def _draws_of_step_seconds(
    seconds: Sequence[float], steps: int, *, seed: int
) -> statistics.Array | None:
    """Draw the logarithm of the training seconds a step of an entry's runs at one horizon."""
    return statistics.draws_of_mean([math.log(s / steps) for s in seconds], seed=seed)
