"""The trials of each entry: their runs, the best one, and the configurations it makes."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Manifest
from training import config as configuration

from .. import runs, tuning
from .entries import Entry, spelled

FIRST_SEED = 1000  # of trials; the seeds of judged runs end before it
HOLDOUT = 0.1  # of the training split, at most


@dataclass(frozen=True)
class Trial:
    """Values of some settings of an entry, and the runs that try them, one for each seed."""

    values: dict[str, Any]
    jobs: list[runs.Job]

    def result(self, folder: Path) -> dict[str, Any]:
        """Return the trial as results.json holds it; its runs have ended."""
        losses = [runs.final_loss(folder / j.name) for j in self.jobs]
        return {
            "values": self.values,
            "steps": self.jobs[0].config.train.steps,
            "seeds": [j.config.run.seed for j in self.jobs],
            "losses": losses,
            "loss": float(np.mean(losses)),
            "path": [j.name for j in self.jobs],
        }


def default_holdout(manifest: Manifest) -> float:
    """Return the fraction of the training split that is as long as the validation split.

    It is HOLDOUT at most.
    """
    return min(HOLDOUT, manifest.splits["val"].tokens / manifest.splits["train"].tokens)


def plan_trials(
    entries: Sequence[Entry],
    values_by_entry: Mapping[str, Sequence[dict[str, Any]]],
    folder: Path,
    *,
    steps: int | None,
    seeds: int,
    holdout: float,
) -> dict[str, list[Trial]]:
    """Return the trials of each entry, their runs named by their values.

    steps: of every trial; the entry's budget if None. holdout: the fraction of the training split
    that trials are judged on, and do not train on. Raises StudyError if two runs have one name.
    """
    trials: dict[str, list[Trial]] = {}
    for entry in entries:
        changes = {
            "data.holdout": holdout,
            "train.steps": steps or entry.steps,
            "train.eval_every": 0,
        }
        trials[entry.name] = [
            _trial(entry, changes, values, folder, seeds) for values in values_by_entry[entry.name]
        ]
    counts = Counter(j.name for j in jobs_of(trials))
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise runs.StudyError(
            "--tune",
            got=f"two trials named {repeated[0]}",
            allowed="values that differ in their first six digits, letters or digits",
            fix="others",
        )
    return trials


def _trial(
    entry: Entry,
    changes: Mapping[str, Any],
    values: dict[str, Any],
    folder: Path,
    seeds: int,
) -> Trial:
    """Return the trial of these values. changes: those that all trials have."""
    spelling = ".".join(re.sub(r"[^\w.-]", "", f"{k}{spelled(v)}") for k, v in values.items())
    name = f"tune.{entry.name}.{spelling}.s{changes['train.steps']}"
    jobs = [
        entry.job(f"{name}.seed{s}", folder, **{**changes, **values, "run.seed": s})
        for s in range(FIRST_SEED, FIRST_SEED + seeds)
    ]
    return Trial(values, jobs)


def jobs_of(trials: Mapping[str, Sequence[Trial]]) -> list[runs.Job]:
    """Return the runs of all trials of all entries."""
    return [j for trial in itertools.chain(*trials.values()) for j in trial.jobs]


def tune(
    entries: Sequence[Entry],
    ranges: Sequence[tuning.Range],
    trials: Mapping[str, Sequence[Trial]],
    folder: Path,
) -> None:
    """Set each entry's trials, and its tuned values: those of the trial with the lowest mean loss.

    The loss is on the part of the training split that was held out. The runs of the trials have
    ended. Raises StudyError if all of them diverged.
    """
    for entry in entries:
        if not trials[entry.name]:
            entry.notes.append("not tuned")
            continue
        entry.trials = [trial.result(folder) for trial in trials[entry.name]]
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
                    f"best {r.key} = {spelled(best['values'][r.key])} is at the edge of what was"
                    " tried: a better one may lie outside"
                )


def write_tuned(entries: Sequence[Entry], folder: Path) -> None:
    """Write the configuration of each entry with its tuned values to folder/NAME.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        tuned = runs.job(entry.config, entry.name, folder, **(entry.tuned or {})).config
        unnamed = replace(tuned, run=replace(tuned.run, name=None, dir=entry.config.run.dir))
        (folder / f"{entry.name}.toml").write_text(configuration.to_toml(unnamed), encoding="utf-8")
