"""The budget: steps, tokens or training seconds of each entry."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from data.loader import Dataset

from .. import run_cost, runs
from .entries import Entry, tokens_per_step

PATTERN = re.compile(r"(steps|tokens|seconds)=([\d.e+]+)")
PROBE = 50  # steps of a run whose second half tells the training seconds of one step


def set_budget(text: str | None, entries: Sequence[Entry]) -> tuple[str, float]:
    """Set the steps of each entry, and return the budget's (kind, value).

    text: "steps=400", "tokens=1.6e6" or "seconds=60"; None takes the configurations' train.steps.
    Seconds leave one step, until `measure_steps` or `estimate_steps` sets more.
    """
    if text is None:
        text = f"steps={_common_steps(entries)}"
    kind, value = _read(text)
    valid = 0 < value < math.inf and (kind == "seconds" or value == int(value))
    for entry in entries if valid else ():
        tokens = tokens_per_step(entry.config)
        entry.steps = {"steps": int(value), "tokens": int(value / tokens)}.get(kind, 1)
    if not valid or min(e.steps for e in entries) < 1:
        raise runs.StudyError(
            "--budget",
            got=text,
            allowed="steps=N, tokens=N or seconds=N, of one step or more; steps and tokens are"
            " whole numbers",
            fix="--budget steps=400",
        )
    return kind, value


def _read(text: str) -> tuple[str, float]:
    """Return (kind, value) of a budget, or ("", 0) of a text that is none."""
    match = PATTERN.fullmatch(text)
    try:
        return (match[1], float(match[2])) if match else ("", 0.0)
    except ValueError:
        return "", 0.0


def _common_steps(entries: Sequence[Entry]) -> int:
    """Return the train.steps of all entries. Raises StudyError if they differ."""
    steps = {e.config.train.steps for e in entries}
    if len(steps) > 1:
        each = ", ".join(f"{e.config.train.steps} of {e.name}" for e in entries)
        raise runs.StudyError(
            "--budget",
            got=f"none, and train.steps {each}",
            allowed="one budget for all",
            fix="--budget steps=400",
        )
    return steps.pop()


# ---- seconds


def measure_steps(
    entries: Sequence[Entry], seconds: float, folder: Path, places: Sequence[runs.Place]
) -> None:
    """Set the steps that each entry trains in so many seconds, by a probe.

    A probe is run once in a folder: a study that is resumed has the same steps. It has no line in
    the study's file, as another machine has another clock.
    """
    probes = _probes(entries, folder)
    runs.sweep(probes, folder, workers=places, dry_run=False, portable=False)
    for entry, probe in zip(entries, probes, strict=True):
        entry.steps = _steps_of_probe(folder / probe.name, seconds)


def estimate_steps(
    entries: Sequence[Entry], seconds: float, folder: Path, dataset: Dataset, speed: float
) -> None:
    """Set the steps of each entry by an estimate of a probe's cost. speed: FLOP/s."""
    for entry, probe in zip(entries, _probes(entries, folder), strict=True):
        probe_seconds = run_cost.cost(probe.config, dataset, speed)[1] - run_cost.STARTUP
        entry.steps = max(1, int(seconds / probe_seconds * PROBE))


def _probes(entries: Sequence[Entry], folder: Path) -> list[runs.Job]:
    """Return a short run of each entry that tells how long its steps take."""
    changes = {
        "train.steps": PROBE,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.eval_tokens": 1,
    }
    return [e.job(f"probe.{e.name}", folder, **changes) for e in entries]


def _steps_of_probe(path: Path, seconds: float) -> int:
    """Return the steps of so many training seconds, by the second half of a probe."""
    if runs.summary(path) is None:
        raise runs.StudyError(
            path,
            got="a probe that diverged",
            allowed="one that ends",
            fix="a smaller optim.lr to begin with, or --budget steps=N",
        )
    clock = {r["step"]: r["train_seconds"] for r in runs.metrics(path) if "loss" in r}
    half = PROBE // 2
    return max(1, int(seconds * (PROBE - half) / (clock[PROBE] - clock[half])))
