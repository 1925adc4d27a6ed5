"""The claim of a record's entry: a figure, its interval, and whether it passes the rule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optim.errors import require
from training import config as configuration

from .. import runs, statistics
from ..export.run import Run, read
from .book import RecordError
from .tracks import Track

# Targets that agree to four digits are the same target.
ROUNDING = 5e-5
# The rule of every study in the book: nobody chooses a threshold for a record.
RULE = {"test_level": statistics.RULE_LEVEL, "sigma_from": "runs"}


@dataclass
class Claim:
    """One entry: the runs of one horizon, one for each seed, and what they show."""

    name: str
    judged: list[Run]
    # In the track's unit. None: the target was not reached.
    figure: float | None
    # Bounds of the figure's interval. None: unknown.
    low: float | None
    high: float | None
    # (target − mean end loss) · √n, and what it must reach to pass.
    statistic: float
    threshold: float | None
    passes: bool | None
    # Trials of its tuning, all of them. None: nobody counted.
    trials: int | None
    note: str

    def entry(self) -> dict[str, Any]:
        """Return the claim as an entry of record.json."""
        summaries = [summary_of(r) for r in self.judged]

        def mean(key: str) -> float:
            return float(np.mean([s[key] for s in summaries]))

        losses = [s["val_loss"] for s in summaries]
        return {
            "name": self.name,
            "config": f"{self.name}.toml",
            "log": f"{self.name}.txt",
            "steps": summaries[0]["steps"],
            "tokens": summaries[0]["tokens"],
            "params": summaries[0]["params"],
            "seeds": [s["seed"] for s in summaries],
            "n": len(losses),
            "losses": losses,
            "mean": float(np.mean(losses)),
            "statistic": self.statistic,
            "threshold": self.threshold,
            "passes": self.passes,
            "figure": self.figure,
            "low": self.low,
            "high": self.high,
            **{key: mean(key) for key in ("train_seconds", "optimizer_seconds", "wall_seconds")},
            "device": summaries[0]["device"],
            "torch": summaries[0]["torch"],
            "trials": self.trials,
            "note": self.note,
        }


def summary_of(run: Run) -> dict[str, Any]:
    """Return the summary.json of a run that came to its end."""
    summary = runs.summary(run.folder) if run.folder else None
    assert summary is not None, "reading a run refuses a folder without one"
    return summary


# ---- a study's claims


def claims_of_study(folder: Path, results: dict[str, Any], track: Track) -> list[Claim]:
    """Return a claim for each entry of a study.

    An entry is judged at its confirmed steps to the target, or at the budget and without a figure
    if it has none. The study's own threshold judges it: where the target is an entry's mean, the
    threshold includes the target's noise. Raises RecordError for another rule or target.
    """
    rule = {key: results["rule"][key] for key in RULE}
    require(
        rule == RULE,
        f"rule of {folder}",
        got=rule,
        allowed=RULE,
        fix="python -m studies.speedrun … with 2 seeds or more, "
        "without --threshold, --level and --sigma",
        error=RecordError,
    )
    require(
        results["target"] is not None and abs(results["target"] - track.target) <= ROUNDING,
        f"target of {folder}",
        got=results["target"],
        allowed=track.target,
        fix=f"python -m studies.speedrun … --target {track.target}",
        error=RecordError,
    )
    threshold = results["rule"]["threshold"]
    return [_claim_of_entry(folder, entry, threshold, track) for entry in results["entries"]]


def _claim_of_entry(
    folder: Path, entry: dict[str, Any], threshold: float | None, track: Track
) -> Claim:
    goal = entry["to_target"]
    reached = goal if goal and goal["confirmed"] else None
    steps = (reached or entry["at_budget"])["steps"]
    judged = [r for r in entry["runs"] if r["steps"] == steps]
    diverged = [r["path"] for r in judged if r["loss"] is None]
    require(
        not diverged,
        entry["name"],
        got=f"runs that diverged: {', '.join(diverged)}",
        allowed="a loss of each",
        fix="other settings",
        error=RecordError,
    )
    horizon = next(h for h in entry["horizons"] if h["steps"] == steps)
    figure, low, high = _figure(reached, judged, track) if reached else (None, None, None)
    return Claim(
        name=entry["name"],
        judged=[read(folder / r["path"]) for r in judged],
        figure=figure,
        low=low,
        high=high,
        statistic=horizon["statistic"],
        threshold=threshold,
        passes=horizon["passes"],
        trials=len(entry["trials"]),
        note=entry["note"],
    )


def _figure(
    reached: dict[str, Any], judged: Sequence[dict[str, Any]], track: Track
) -> tuple[float, float | None, float | None]:
    """Return a study's figure and its interval, (value, low, high), in the track's unit.

    The interval in results.json is of the interpolated horizon. It is widened here to hold the
    horizon that was run.
    """
    if track.figure == "steps":
        steps, low, high = reached["steps"], reached["low"], reached["high"]
        return (
            steps,
            None if low is None else min(steps, low),
            None if high is None else max(steps, high),
        )
    seconds = statistics.mean_interval([r["train_seconds"] for r in judged])
    low, high = (x if math.isfinite(x) else None for x in (seconds.low, seconds.high))
    return seconds.value, low, high


# ---- a claim of single runs


def claim_of_runs(folders: Sequence[Path], track: Track) -> Claim:
    """Return the claim of one configuration's runs, one for each seed.

    The rule's threshold is from their own standard deviation. One run has none and passes nothing.
    """
    judged = [read(f) for f in folders]
    summaries = [summary_of(r) for r in judged]
    losses = [s["val_loss"] for s in summaries]
    noise = statistics.pooled([np.array(losses)])
    threshold = statistics.threshold_at(noise, len(losses)) if noise else None
    rule = statistics.Rule(track.target, math.inf if threshold is None else threshold)
    mean = float(np.mean(losses))
    passes = None if threshold is None else rule.passes(mean, len(losses))
    figure = low = high = None
    if passes and track.figure == "steps":
        figure = float(judged[0].config.train.steps)
    elif passes:
        # Whoever passes has a deviation, hence two runs or more, and an interval.
        seconds = statistics.mean_interval([s["train_seconds"] for s in summaries])
        figure, low, high = seconds.value, seconds.low, seconds.high
    name = re.sub(r"[.-]?(s|seed)?\d+$", "", folders[0].name) or folders[0].name
    return Claim(
        name=name,
        judged=judged,
        figure=figure,
        low=low,
        high=high,
        statistic=rule.statistic(mean, len(losses)),
        threshold=threshold,
        passes=passes,
        trials=None,
        note="",
    )


# ---- what claims must satisfy


def count_trials(claims: Sequence[Claim], trials: Sequence[str]) -> None:
    """Set the entries' numbers of trials, given as NAME=N, or as N if there is one entry."""
    for text in trials:
        name, _, number = text.rpartition("=")
        alone = not name and len(claims) == 1
        claim = next((c for c in claims if c.name == name or alone), None)
        if claim is None or not number.isdecimal() or int(number) < (claim.trials or 0):
            allowed = ", ".join(f"{c.name}=N, N ≥ {c.trials or 0}" for c in claims)
            raise RecordError(
                "--trials",
                got=text,
                allowed=allowed or "none, where nothing was run",
                fix="all that were made, a study's own among them",
            )
        claim.trials = int(number)


def check_clock(claim: Claim, track: Track) -> None:
    """Raise RecordError if the seconds that a track judges are of more than one machine."""
    summaries = [summary_of(run) for run in claim.judged]
    require(
        track.figure != "seconds" or len({s.get("hardware") for s in summaries}) == 1,
        f"training seconds of {claim.name}",
        got=runs.machines(summaries),
        allowed="one machine",
        fix="train all runs of the entry on one",
        error=RecordError,
    )


def check_alike(claim: Claim) -> None:
    """Raise RecordError if runs of one entry differ in more than seed and name."""
    first, *others = claim.judged
    wanted = configuration.flat(first.config)
    for run in others:
        for key, value in configuration.flat(run.config).items():
            require(
                value == wanted[key] or key in ("run.seed", "run.name", "run.dir"),
                f"{key} of {run.name}",
                got=repr(value),
                allowed=f"{wanted[key]!r}, as {first.name} has it",
                fix="runs of one configuration",
                error=RecordError,
            )
    seeds = [r.config.run.seed for r in claim.judged]
    require(
        len(set(seeds)) == len(seeds),
        f"seeds of {claim.name}",
        got=seeds,
        allowed="each once",
        fix="one run a seed",
        error=RecordError,
    )
